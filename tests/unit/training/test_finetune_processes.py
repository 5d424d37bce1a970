"""Fine-tuning on two gloo processes trains as on one: same rows, losses and weights, accumulated, sharded or not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")

from ldm_pipe import LatentDiffusionPipeline
from ldm_pipe.training.tasks.finetune.nets import LORA_FILE
from tests.finetuning import make_pictures
from tests.ranks import FSDP2, assert_near, facts_of, finetune, rows_of, run_ranks
from tests.training import assert_same_bits, saved_state

MOST_LOSS, MOST_WEIGHT = 1e-6, 1e-5  # weights with a large adam_epsilon: see test_training_processes.py
COMMON: dict[str, Any] = {"max_train_steps": 6, "checkpointing_steps": 3, "use_ema": True, "optim": {
    "learning_rate": 2.0e-3, "adam_epsilon": 1.0e-4}}  # fmt: skip
BATCHES = {"two": {"train_batch_size": 2}, "accumulated": {"train_batch_size": 1, "gradient_accumulation_steps": 2}}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "full-encoder": {"train_text_encoder": True},
    "full-bf16": {"mixed_precision": "bf16"},
    "lora": {"method": "lora"},
    "lora-encoder": {"method": "lora", "train_text_encoder": True, "gradient_checkpointing": True},
    "word": {"method": "textual_inversion", "placeholder_token": "<x>", "initializer_token": "apple"},
    "inpainting": {"inpainting": True},
    "dreambooth": {"instance_prompt": "a sks apple", "with_prior_preservation": True, "class_prompt": "an apple",
                   "num_class_images": 3, "sample_batch_size": 2},
}  # fmt: skip
FAST = ("full", "lora")


@pytest.fixture(scope="module")
def ones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where the runs of one process with a global batch of 4 lie, as they are made."""
    return {"": tmp_path_factory.mktemp("one")}


def of_one(ones: dict[str, Path], method: str) -> Path:
    """Return the run of one process."""
    if method not in ones:
        make_pictures(ones[""] / method / "pictures")
        changes = {**COMMON, **METHODS[method], "train_batch_size": 4}
        assert run_ranks(finetune, 1, ones[""] / method, changes) == [0]
        ones[method] = ones[""] / method / "run"
    return ones[method]


def of_two(folder: Path, method: str, batches: str, **how: Any) -> Path:
    """Fine-tune on two processes, which find no cache and fill it at the same time."""
    make_pictures(folder / "pictures")
    changes = {**COMMON, **METHODS[method], **BATCHES[batches], **how.pop("changes", {})}
    assert run_ranks(finetune, 2, folder, changes, **how) == [0, 0]
    return folder / "run"


def assert_as_one(two: Path, one: Path, method: str) -> None:
    """Compare two runs; in bfloat16 a product depends on the batch it is in: there only the losses, to 1e-3."""
    facts, (whole,), half = facts_of(two, 2), facts_of(one, 1), "bf16" in method
    assert rows_of(facts) == rows_of([whole])
    assert facts[0]["losses"] == pytest.approx(whole["losses"], abs=1e-3 if half else MOST_LOSS)
    if not half:
        assert_near(saved_state(two / "checkpoint-6"), saved_state(one / "checkpoint-6"), MOST_WEIGHT)


@pytest.mark.parametrize("method", [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_two_processes_with_accumulation_fine_tune_as_one(tmp_path: Path, ones: dict[str, Path], method: str) -> None:
    run, one = of_two(tmp_path, method, "accumulated"), of_one(ones, method)
    assert_as_one(run, one, method)
    if method in FAST:
        drawn = [
            LatentDiffusionPipeline.from_pretrained(f)("red apple", seed=0, num_inference_steps=2, output_type="pt")
            for f in (run, one)
        ]
        torch.testing.assert_close(*(output.images for output in drawn), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_processes_fine_tune_as_one(tmp_path: Path, ones: dict[str, Path], method: str) -> None:
    assert_as_one(of_two(tmp_path, method, "two"), of_one(ones, method), method)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora", "full-bf16"])
def test_fsdp2_fine_tunes_as_one_and_resumes_to_the_bit(tmp_path: Path, ones: dict[str, Path], method: str) -> None:
    run, one = of_two(tmp_path, method, "accumulated", environ=FSDP2), of_one(ones, method)
    assert_as_one(run, one, method)
    unbroken = saved_state(run / "checkpoint-6")
    assert (run / LORA_FILE).is_file() == (method == "lora")
    LatentDiffusionPipeline.from_pretrained(run)  # replays the golden sample with the whole weights
    shutil.rmtree(run / "checkpoint-6")
    again = {"changes": {"resume_from_checkpoint": "latest"}, "environ": FSDP2}
    assert_same_bits(saved_state(of_two(tmp_path, method, "accumulated", **again) / "checkpoint-6"), unbroken)
