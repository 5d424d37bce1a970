# The commands of this project. `make` alone lists them.
#   make demo PROMPT="red apple"     draws a picture and prints its path
#   make test                        runs the tests
# Both make .venv first: with uv where it is found, else with python3 and pip.

VENV := .venv
BIN := $(VENV)/bin
PROMPT ?= red apple
SEED ?= 0
OUT ?= out/
# Processes of the quick tests; each computes on one thread.
JOBS ?= 2
BASE ?= HEAD~1
# Any accelerate configuration: configs/accelerate/*.yaml, or your own from `accelerate config`.
ACCELERATE_CONFIG ?= configs/accelerate/cpu.yaml
export PROMPT SEED OUT BASE ACCELERATE_CONFIG
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The tests and checks use the installed code only; a GPU or the hub never changes what they say.
export HF_HUB_DISABLE_TELEMETRY := 1

INPUTS := pyproject.toml constraints.txt
UV := $(shell command -v uv 2>/dev/null)
ifeq ($(UV),)
  INSTALL := $(BIN)/python -m pip install -q --no-compile -c constraints.txt -e
else
  INSTALL := uv pip install -q --python $(BIN)/python -c constraints.txt -e
endif

.PHONY: help demo test check format slow bench same train-emoji clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo PROMPT="..."  draw a picture (SEED=0, OUT=out/)'
	@echo 'make test               run the tests that are quick and need no network and no GPU (JOBS=2)'
	@echo 'make check              format, lint and types'
	@echo 'make format             apply the format and the safe fixes of the linter'
	@echo 'make slow               run the slow tests'
	@echo 'make bench              compare speed and memory with diffusers'
	@echo 'make same               ask for the pictures and losses of another commit, to the bit (BASE=HEAD~1)'
	@echo 'make train-emoji        train the shipped model from scratch (ACCELERATE_CONFIG=...)'
	@echo 'make clean              remove .venv and the caches'

$(BIN)/python:
ifeq ($(UV),)
	@for python in $${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
	    "$$python" -m venv $(VENV) && exit 0; \
	    rm -rf $(VENV); echo "error: $$python -m venv failed. Install python3-venv, or uv." >&2; exit 3; \
	  fi; \
	done; echo 'error: no Python >= 3.10 found. Name one: make PYTHON=/path/to/python3' >&2; exit 3
else
	uv venv -q --python '>=3.10' $(VENV)
endif

# Stamps: an install is repeated only when what it reads has changed.
$(VENV)/.runtime: $(INPUTS) | $(BIN)/python
	@echo 'installing what the pipeline needs into $(VENV) (some minutes the first time)'
	@$(INSTALL) .
	@touch $@

$(VENV)/.test: $(INPUTS) | $(BIN)/python
	@echo 'installing what the tests need into $(VENV) (some minutes the first time)'
	@$(INSTALL) '.[test]'
	@touch $@ $(VENV)/.runtime

$(VENV)/.dev: $(INPUTS) | $(BIN)/python
	@echo 'installing what the checks need into $(VENV) (some minutes the first time)'
	@$(INSTALL) '.[dev]'
	@touch $@ $(VENV)/.test $(VENV)/.runtime

demo: $(VENV)/.runtime
	@$(BIN)/ldm-pipe generate --seed "$$SEED" --overwrite --output "$$OUT" -- "$$PROMPT"

# Whole files to each process: what a file builds once for its tests is then built once.
test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.dev
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

format: $(VENV)/.dev
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

bench: $(VENV)/.test
	$(BIN)/python benchmarks/against_diffusers.py

# Hashes are of one machine: both commits run here, and neither is kept.
same: $(VENV)/.test
	@rm -rf out/same && mkdir -p out/same
	@git archive "$$BASE" | tar -x -C out/same
	@cd out/same && ../../$(BIN)/python -m benchmarks.same --record ../same.json
	@rm -rf out/same
	@$(BIN)/python -m benchmarks.same --compare out/same.json

train-emoji: $(VENV)/.test
	$(BIN)/python scripts/train_clip.py --config configs/emoji/clip.yaml
	$(BIN)/accelerate launch --config_file "$$ACCELERATE_CONFIG" scripts/train_autoencoder.py --config configs/emoji/autoencoder.yaml
	$(BIN)/accelerate launch --config_file "$$ACCELERATE_CONFIG" scripts/train_diffusion.py --config configs/emoji/diffusion.yaml
	$(BIN)/python scripts/export_diffusers.py runs/emoji/diffusion runs/emoji/exported

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
