"""Every way to start a fine-tuning: plain python, torchrun, accelerate with shipped and default files, a notebook."""

from __future__ import annotations

import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
from torch import Tensor

pytest.importorskip("accelerate")

from ldm_pipe import LatentDiffusionPipeline
from ldm_pipe.training.tasks.finetune.nets import LORA_FILE
from tests.e2e.test_training_scripts import TWO_RANKS, script
from tests.finetuning import TINY, make_pictures
from tests.ranks import assert_near
from tests.source import ROOT
from tests.training import assert_same_bits, saved_state

LAUNCH = ("-m", "accelerate.commands.launch", "--config_file")
CONFIGS = ROOT / "configs" / "accelerate"
FLAGS = shlex.split("""
    --resolution 32 --max_train_steps 3 --checkpointing_steps 3 --learning_rate 1e-3 --lr_scheduler constant
    --lr_warmup_steps 0 --adam_epsilon 1e-4 --report_to none --num_threads 1""")


def fine_tune(folder: Path, method: str, per_process: int, shares: int, launcher: tuple[str, ...]) -> dict[str, Tensor]:
    """Run the script as a user types it; the global batch is 4. Return the state it ends in."""
    sizes = ["--train_batch_size", str(per_process), "--gradient_accumulation_steps", str(shares)]
    places = ["--train_data_dir", make_pictures(folder / "pictures"), "--cache_dir", folder / "cache"]
    places += ["--pretrained_model_name_or_path", TINY, "--output_dir", folder / "run"]
    script("scripts/finetune.py", "--method", method, *FLAGS, *sizes, *places, launcher=launcher)
    return end_of(folder / "run", method)


def end_of(run: Path, method: str) -> dict[str, Tensor]:
    """Return the last state of a run whose result is whole."""
    assert (run / "summary.md").is_file()
    assert (run / LORA_FILE).is_file() == (method == "lora")
    LatentDiffusionPipeline.from_pretrained(run)  # replays its golden sample
    return saved_state(run / "checkpoint-3")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """The ends of `python scripts/finetune.py`, by method."""
    return {m: fine_tune(tmp_path_factory.mktemp(m), m, 4, 1, ()) for m in ("full", "lora")}


@pytest.mark.slow
def test_accelerates_default_config_is_plain_python(tmp_path: Path, plain: dict[str, dict[str, Tensor]]) -> None:
    from accelerate.utils import write_basic_config

    file = tmp_path / "default.yaml"  # what `accelerate config default` writes
    write_basic_config(save_location=str(file))
    end = fine_tune(tmp_path, "full", 4, 1, (*LAUNCH, str(file)))
    assert_same_bits(end, plain["full"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"),
    [("torchrun", "full"), ("two_cpu", "full"), ("two_cpu", "lora"), ("fsdp2", "full"), ("fsdp2", "lora"),
     ("deepspeed_zero2", "full"), ("deepspeed_zero2", "lora")],
)  # fmt: skip
def test_two_processes_with_accumulation_fine_tune_as_one(
    tmp_path: Path, plain: dict[str, dict[str, Tensor]], name: str, method: str
) -> None:
    if name == "deepspeed_zero2" and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    ranks = ("--num_processes", "2", "--main_process_port", "29587")
    launcher = TWO_RANKS if name == "torchrun" else (*LAUNCH, str(CONFIGS / f"{name}.yaml"), *ranks)
    assert_near(fine_tune(tmp_path, method, 1, 2, launcher), plain[method])


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_notebook_of_the_docs(tmp_path: Path, plain: dict[str, dict[str, Tensor]], num_processes: int) -> None:
    """The cells of docs/running.md, with another folder and shorter, as one program: a kernel is no more than that."""
    page = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
    (cells,) = re.findall(r"```python\n(.*?notebook_launcher.*?)```", page, re.DOTALL)
    data = {"train_data_dir": str(make_pictures(tmp_path / "pictures")), "resolution": 32, "caption_column": "text"}
    values = {
        "pretrained_model_name_or_path": str(TINY), "output_dir": str(tmp_path / "run"), "report_to": "none",
        "cache_dir": str(tmp_path / "cache"), "max_train_steps": 3, "checkpointing_steps": 3, "method": "lora",
        "train_batch_size": 4 // num_processes, "num_threads": 1,
        "data": data,
        "optim": {"learning_rate": 1e-3, "lr_scheduler": "constant", "lr_warmup_steps": 0, "adam_epsilon": 1e-4},
    }  # fmt: skip
    cells, found = re.subn(r"FinetuneConfig\(.*?\n\)", f"FinetuneConfig(**{values!r})", cells, flags=re.DOTALL)
    assert found == 1
    cells, found = re.subn(r"num_processes=\d+", f"num_processes={num_processes}", cells)
    assert found == 1
    (tmp_path / "cells.py").write_text(cells)
    script(tmp_path / "cells.py")
    end = end_of(tmp_path / "run", "lora")
    (assert_same_bits if num_processes == 1 else assert_near)(end, plain["lora"])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["num_processes"] == num_processes
