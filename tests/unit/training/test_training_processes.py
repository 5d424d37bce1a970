"""Several processes train as one: the same rows, losses and weights, accumulated, full and LoRA, sharded or not."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("accelerate")

from tests.ranks import FSDP2, ZERO, assert_near, die, facts_of, rows_of, run_ranks, train, train_with_nan
from tests.training import assert_same_bits, saved_state

# Adam divides a gradient by its size, and so a rounding by itself where a gradient is next to nothing; with this
# epsilon it does not, and weights can be compared as closely as losses.
CHANGES: dict[str, Any] = {"max_train_steps": 20, "checkpointing_steps": 10, "optim": {
    "learning_rate": 2.0e-3, "lr_warmup_steps": 2, "adam_epsilon": 1.0e-4}}  # fmt: skip
ONE, TWO = {**CHANGES, "train_batch_size": 8}, {**CHANGES, "train_batch_size": 4}
TWO_ACCUMULATED = {**CHANGES, "train_batch_size": 2, "gradient_accumulation_steps": 2}
MOST_LOSS = 1e-6  # of weights: that of `assert_near`


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process with a global batch of 8."""
    folder = tmp_path_factory.mktemp("one")
    assert run_ranks(train, 1, folder, ONE) == [0]
    return folder


def test_fault_10_two_processes_with_accumulation_train_as_one(tmp_path: Path, one: Path) -> None:
    assert run_ranks(train, 2, tmp_path, TWO_ACCUMULATED) == [0, 0]
    facts, (whole,) = facts_of(tmp_path, 2), facts_of(one, 1)
    assert rows_of(facts) == rows_of([whole])
    assert facts[0]["losses"] == pytest.approx(whole["losses"], abs=MOST_LOSS)
    assert_near(saved_state(tmp_path / "checkpoint-20"), saved_state(one / "checkpoint-20"))


@pytest.mark.slow
def test_fault_10_a_lora_trains_on_two_processes_as_on_one(tmp_path: Path) -> None:
    assert run_ranks(train, 1, tmp_path / "one", ONE, 2) == [0]
    for name, changes in (("two", TWO), ("accumulated", TWO_ACCUMULATED)):
        assert run_ranks(train, 2, tmp_path / name, changes, 2) == [0, 0]
        facts, (whole,) = facts_of(tmp_path / name, 2), facts_of(tmp_path / "one", 1)
        assert rows_of(facts) == rows_of([whole])
        assert facts[0]["losses"] == pytest.approx(whole["losses"], abs=MOST_LOSS)
        state = saved_state(tmp_path / name / "checkpoint-20")
        assert_near(state, saved_state(tmp_path / "one" / "checkpoint-20"))
        assert not [name for name in state if name.startswith("unet/unet.")], "the frozen network is not saved"


@pytest.mark.slow
def test_two_processes_stop_together_and_see_the_same_data_exactly_once_on_resume(tmp_path: Path, one: Path) -> None:
    """The signal reaches one process in step 6; both save after it. 20 steps of 8 are 14 epochs of 11, and 6 more."""
    assert run_ranks(train, 2, tmp_path, TWO, 0, 6) == [0, 0]
    before = facts_of(tmp_path, 2)
    assert (tmp_path / "checkpoint-7" / "manifest.json").is_file()
    assert run_ranks(train, 2, tmp_path, {**TWO, "resume_from_checkpoint": "latest"}) == [0, 0]
    after = facts_of(tmp_path, 2)
    assert [fact["start"] for fact in after] == [7, 7]
    rows = rows_of(before) + rows_of(after)
    assert rows == rows_of(facts_of(one, 1))
    stream = [row for step in facts_of(one, 1)[0]["rows"] for row in step]
    assert all(sorted(stream[i : i + 11]) == list(range(11)) for i in range(0, 154, 11))
    assert_near(saved_state(tmp_path / "checkpoint-20"), saved_state(one / "checkpoint-20"))


@pytest.mark.slow
def test_fsdp2_saves_whole_weights_and_resumes_on_two_processes_and_on_one(tmp_path: Path, one: Path) -> None:
    whole = saved_state(one / "checkpoint-20")
    assert run_ranks(train, 2, tmp_path / "unbroken", TWO, environ=FSDP2) == [0, 0]
    unbroken = saved_state(tmp_path / "unbroken" / "checkpoint-20")
    assert_near(unbroken, whole)
    for name in ("two", "alone"):
        assert run_ranks(train, 2, tmp_path / name, TWO, 0, 6, environ=FSDP2) == [0, 0]
    resume = {"resume_from_checkpoint": "latest"}
    assert run_ranks(train, 2, tmp_path / "two", {**TWO, **resume}, environ=FSDP2) == [0, 0]
    assert_same_bits(saved_state(tmp_path / "two" / "checkpoint-20"), unbroken)
    changed = {**ONE, **resume, "allow_config_change": True}  # the batch size per process
    assert run_ranks(train, 1, tmp_path / "alone", changed) == [0]
    assert_near(saved_state(tmp_path / "alone" / "checkpoint-20"), whole)
    result = load_file(tmp_path / "unbroken" / "unet" / "diffusion_pytorch_model.safetensors")
    assert result.keys() == {name.removeprefix("unet.ema/") for name in unbroken if name.startswith("unet.ema/")}
    assert all(torch.equal(result[name], unbroken[f"unet.ema/{name}"]) for name in result)


@pytest.mark.slow
def test_fsdp2_trains_a_lora(tmp_path: Path) -> None:
    assert run_ranks(train, 1, tmp_path / "one", ONE, 2) == [0]
    assert run_ranks(train, 2, tmp_path / "two", TWO, 2, environ=FSDP2) == [0, 0]
    assert_near(saved_state(tmp_path / "two" / "checkpoint-20"), saved_state(tmp_path / "one" / "checkpoint-20"))


needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("lora", [0, 2])
def test_zero_trains_as_one_and_resumes_on_two_processes_and_on_one(
    tmp_path: Path, one: Path, stage: int, lora: int
) -> None:
    """DeepSpeed's ZeRO 1 and 2, with accumulation: to rounding one process's run, resumed to the bit."""
    if lora:
        one = tmp_path / "one"
        assert run_ranks(train, 1, one, ONE, lora) == [0]
    environ = {**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    assert run_ranks(train, 2, tmp_path / "two", TWO_ACCUMULATED, lora, environ=environ) == [0, 0]
    facts, (whole,) = facts_of(tmp_path / "two", 2), facts_of(one, 1)
    assert rows_of(facts) == rows_of([whole])
    assert facts[0]["losses"] == pytest.approx(whole["losses"], abs=MOST_LOSS)
    unbroken = saved_state(tmp_path / "two" / "checkpoint-20")
    assert_near(unbroken, saved_state(one / "checkpoint-20"))
    shutil.rmtree(tmp_path / "two" / "checkpoint-20")
    shutil.copytree(tmp_path / "two", tmp_path / "alone")
    resume: dict[str, Any] = {"resume_from_checkpoint": "latest"}
    assert run_ranks(train, 2, tmp_path / "two", {**TWO_ACCUMULATED, **resume}, lora, environ=environ) == [0, 0]
    assert_same_bits(saved_state(tmp_path / "two" / "checkpoint-20"), unbroken)
    assert run_ranks(train, 1, tmp_path / "alone", {**ONE, **resume, "allow_config_change": True}, lora) == [0]
    assert_near(saved_state(tmp_path / "alone" / "checkpoint-20"), unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2", pytest.param("zero", marks=needs_deepspeed)])
def test_fault_11_a_nan_of_one_process_is_skipped_by_all(tmp_path: Path, name: str) -> None:
    """One process without step 3 ends where two end of which one has NaN in it."""
    changes = {**TWO, "max_train_steps": 6, "checkpointing_steps": 6}
    environ = {"ddp": {}, "fsdp2": FSDP2, "zero": ZERO}[name]
    assert run_ranks(train_with_nan, 2, tmp_path / "two", changes, 3, environ=environ) == [0, 0]
    assert run_ranks(train_with_nan, 1, tmp_path / "one", {**changes, "train_batch_size": 8}, 3) == [0]
    state = json.loads((tmp_path / "two" / "checkpoint-6" / "state.json").read_text())
    assert state["skipped"] == 1
    assert_near(saved_state(tmp_path / "two" / "checkpoint-6"), saved_state(tmp_path / "one" / "checkpoint-6"))


@pytest.mark.slow
def test_fault_10_a_run_of_one_process_goes_on_with_two_and_accumulation(tmp_path: Path, one: Path) -> None:
    shutil.copytree(one, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-20")
    changes = {**TWO_ACCUMULATED, "resume_from_checkpoint": "latest", "allow_config_change": True}
    assert run_ranks(train, 2, tmp_path / "run", changes) == [0, 0]
    assert facts_of(tmp_path / "run", 2)[0]["losses"] == pytest.approx(
        facts_of(one, 1)[0]["losses"][10:], abs=MOST_LOSS
    )
    assert_near(saved_state(tmp_path / "run" / "checkpoint-20"), saved_state(one / "checkpoint-20"))


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_with_clear_words_and_nothing_lost(tmp_path: Path, one: Path) -> None:
    assert run_ranks(die, 2, tmp_path, TWO, 14) == [2, -9]
    text = (tmp_path / "error.txt").read_text()
    assert "another process of this run ended" in text
    assert "--resume_from_checkpoint latest" in text
    assert run_ranks(train, 2, tmp_path, {**TWO, "resume_from_checkpoint": "latest"}) == [0, 0]
    assert facts_of(tmp_path, 2)[0]["start"] == 10
    assert_near(saved_state(tmp_path / "checkpoint-20"), saved_state(one / "checkpoint-20"))
