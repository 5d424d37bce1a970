"""Faults of the training state that the tests of single files do not hold: kills, torn reads, full disks, changes.

Numbers in names are those of a table of faults: 1 kill, 4 full disk, 5 two writers, 6 stop signals, 7 data position,
12 changed config, 15 odd places and clocks.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")

from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.training.run.checkpoint import find_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from ldm_pipe.training.run.config import build_config, config_changes, default_values
from ldm_pipe.training.run.parts import Part
from ldm_pipe.training.run.stop import StopSignal
from ldm_pipe.training.tasks.diffusion import DiffusionConfig
from tests.source import ROOT
from tests.training import (
    BASE,
    Both,
    assert_same_bits,
    make_config,
    make_data,
    make_trainer,
    make_unet,
    run,
    saved_state,
    whole_state,
)


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_fault_1_killed_runs_end_as_the_unbroken_one(kills: int) -> None:
    command = [sys.executable, "scripts/kill_test.py", "--kills", str(kills), "--seed", "1"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills" in done.stdout


# -- 4: disk full ------------------------------------------------------------------------------------------------


def fill_disk_from(step: int, until: int, patch: pytest.MonkeyPatch, trainer: Any) -> None:
    """Let the disk be full while the trainer is between two steps."""
    usage = shutil.disk_usage("/")
    full, free = usage._replace(free=1000), usage._replace(free=1 << 40)
    patch.setattr(shutil, "disk_usage", lambda _: full if step <= trainer.step < until else free)


def test_fault_4_a_full_disk_stops_the_run_and_it_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(make_config(tmp_path / "a", checkpointing_steps=2))
    fill_disk_from(4, 99, monkeypatch, trainer)
    with pytest.raises(LdmPipeError, match=r"no room for a checkpoint: \d+ bytes needed, 1000 free"):
        trainer.fit()
    assert [path.name for path in list_checkpoints(tmp_path / "a")] == ["checkpoint-2"]
    monkeypatch.undo()
    resumed = run(tmp_path / "a", checkpointing_steps=2, resume_from_checkpoint="latest")
    assert_same_bits(whole_state(resumed), whole_state(run(tmp_path / "b", checkpointing_steps=2)))


def test_fault_4_a_full_disk_is_told_and_the_run_goes_on_where_the_flag_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"checkpointing_steps": 2, "on_save_error": "continue"}
    trainer = make_trainer(make_config(tmp_path / "a", **options))
    fill_disk_from(4, 6, monkeypatch, trainer)
    trainer.fit()
    assert "goes on without a checkpoint of step 4" in capsys.readouterr().err
    assert [path.name for path in list_checkpoints(tmp_path / "a")] == ["checkpoint-2", "checkpoint-6"]
    assert_same_bits(whole_state(trainer), whole_state(run(tmp_path / "b")))
    last = make_trainer(make_config(tmp_path / "c", **options))
    fill_disk_from(4, 99, monkeypatch, last)
    with pytest.raises(LdmPipeError, match="no room"):  # what the run was for is never lost in silence
        last.fit()


@pytest.mark.parametrize("on_save_error", ["stop", "continue"])
def test_fault_4_a_disk_too_full_for_the_result_is_told_as_for_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], on_save_error: str
) -> None:
    def write() -> None:
        if trainer.step == 4:
            raise LdmPipeError("cannot be written (No space left on device)", "pipeline")

    options: dict[str, Any] = {"checkpointing_steps": 2, "on_save_error": on_save_error}
    trainer = make_trainer(make_config(tmp_path, **options))
    trainer.save_result = write
    with nullcontext() if on_save_error == "continue" else pytest.raises(LdmPipeError, match="No space left"):
        trainer.fit()
    names = [path.name for path in list_checkpoints(tmp_path)]
    if on_save_error == "continue":
        assert "goes on without a result of step 4: pipeline: cannot be written" in capsys.readouterr().err
        assert names == ["checkpoint-4", "checkpoint-6"]
    else:
        assert names == ["checkpoint-2", "checkpoint-4"]


def test_fault_4_a_history_that_cannot_be_written_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Path.open

    def full(self: Path, mode: str = "r", **options: Any) -> Any:
        if self.name == "history.jsonl" and "a" in mode:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, mode, **options)

    monkeypatch.setattr(Path, "open", full)
    assert run(tmp_path).step == 6
    assert "history.jsonl cannot be written (No space left on device)" in capsys.readouterr().err


# -- 5: two processes in one folder ------------------------------------------------------------------------------


def test_fault_5_readers_never_see_a_torn_checkpoint(tmp_path: Path) -> None:
    """Another process writes and prunes; a read is whole, or says that the folder is gone: 1,000 reads."""

    def groups(step: int) -> dict[str, dict[str, torch.Tensor]]:
        return {"net": {"w": torch.full((64,), float(step))}, "net.ema": {"w": torch.full((64,), float(step))}}

    save_checkpoint(tmp_path, 0, groups(0), {})
    writer = os.fork()
    if writer == 0:
        for step in itertools.count(1):
            save_checkpoint(tmp_path, step, groups(step), {})
    whole, steps = 0, set()
    try:
        for _ in range(1000):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a folder pruned while it was looked at
                    found = find_checkpoint(tmp_path, "latest")
                assert found is not None
                tensors, state = load_checkpoint(found)
            except LdmPipeError:
                continue
            whole += 1
            steps.add(state["step"])
            for name, group in groups(state["step"]).items():
                assert torch.equal(tensors[name]["w"], group["w"])
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
    assert whole > 300
    assert len(steps) > 3, "the writer did not write while there were reads"


# -- 6: stop signals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_fault_6_the_second_signal_ends_the_process_at_once(number: signal.Signals) -> None:
    process = os.fork()
    if process == 0:
        stop = StopSignal()
        os.kill(os.getpid(), number)
        if stop.wanted:
            os.kill(os.getpid(), number)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + number


# -- 7: the position in the data ---------------------------------------------------------------------------------


def test_fault_7_every_picture_once_per_epoch_over_many_stops(tmp_path: Path) -> None:
    """33 steps of 4 are 12 epochs of 11; the run is stopped after 2, 5, 6, 17 and 30 steps."""
    seen: list[int] = []
    options: dict[str, Any] = {"max_train_steps": 33, "checkpointing_steps": 100}
    for stop in (2, 5, 6, 17, 30, 33):
        trainer = make_trainer(make_config(tmp_path, **options, resume_from_checkpoint="auto"))
        trainer.resume("auto")
        while trainer.step < stop:
            seen += trainer._micros()[0].indices
            trainer.train_step()
        trainer.save()
    assert [sorted(seen[i : i + 11]) for i in range(0, 132, 11)] == [list(range(11))] * 12


# -- 12: another run ---------------------------------------------------------------------------------------------

CHANGED: dict[str, Any] = {
    "seed": 1, "max_train_steps": 9, "train_batch_size": 2, "gradient_accumulation_steps": 2,
    "mixed_precision": "bf16", "ema_decay": 0.5, "use_ema": False, "caption_dropout": 0.3, "snr_gamma": None,
    "optim": {"learning_rate": 1e-3, "lr_warmup_steps": 2}, "data": {"resolution": 32},
    "schedule": {"prediction_type": "epsilon"},
}  # fmt: skip


@pytest.mark.parametrize("key", CHANGED)
def test_fault_12_every_changed_key_is_named(key: str, tmp_path: Path) -> None:
    now = make_config(tmp_path, **{key: CHANGED[key]}).model_dump(mode="json")
    (line,) = config_changes(make_config(tmp_path).model_dump(mode="json"), now)
    assert line.startswith(key)
    assert " -> " in line


def test_fault_12_a_key_younger_than_the_checkpoint_counts_as_its_default(tmp_path: Path) -> None:
    now = make_config(tmp_path).model_dump(mode="json")
    saved = {**now, "optim": {name: value for name, value in now["optim"].items() if name != "optimizer"}}
    del saved["on_save_error"], saved["noise_offset"]
    assert config_changes(saved, now, default_values(DiffusionConfig)) == []
    other = build_config(DiffusionConfig, {**BASE, "output_dir": "x", "noise_offset": 0.1}, "test")
    changes = config_changes(saved, other.model_dump(mode="json"), default_values(DiffusionConfig))
    assert changes == ["noise_offset: 0.0 -> 0.1"]


def lora_trainer(folder: Path, base: int, **changes: Any) -> Any:
    from ldm_pipe.interop.lora.layers import TrainableLora
    from ldm_pipe.training.run.loop import Trainer
    from ldm_pipe.training.run.rng import generator
    from ldm_pipe.training.tasks.diffusion import diffusion_loss

    config, unet, data = make_config(folder, **changes), make_unet(base), make_data()
    net = Both(unet, TrainableLora({"unet": unet}, rank=2, generator=generator(0, "lora")))
    part = Part("unet", net, lambda micro: loss(micro), config.optim, 0.9, save_frozen=False)
    trainer = Trainer(config, [part], num_items=len(data.mean), fingerprint="data")
    device = trainer.accelerator.device
    loss = diffusion_loss(part.module, data, config.schedule.build(), config, global_batch=4, device=device)
    return trainer


def test_fault_12_frozen_weights_stay_out_of_checkpoints_and_other_ones_are_refused(tmp_path: Path) -> None:
    unbroken = lora_trainer(tmp_path / "a", 0)
    frozen = {name: t.clone() for name, t in unbroken.raw["unet"].unet.state_dict().items()}
    unbroken.fit()
    assert all(torch.equal(t, frozen[name]) for name, t in unbroken.raw["unet"].unet.state_dict().items())
    assert not any(p.requires_grad for p in unbroken.raw["unet"].unet.parameters())
    state = saved_state(tmp_path / "a" / "checkpoint-6")
    assert {name for name in state if name.startswith(("unet/", "unet.ema/"))} == {
        f"{group}/added.{name}" for group in ("unet", "unet.ema") for name in unbroken.raw["unet"].added.state_dict()
    }
    (tmp_path / "a" / "checkpoint-6").rename(tmp_path / "put-away")
    resumed = lora_trainer(tmp_path / "a", 0, resume_from_checkpoint="latest")
    resumed.fit()
    assert_same_bits(whole_state(resumed), state)
    with pytest.raises(LdmPipeError, match="frozen weights of unet are not those"):
        lora_trainer(tmp_path / "a", 1, resume_from_checkpoint="latest", allow_config_change=True).fit()


def test_a_loss_that_reaches_no_weight_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(
        make_config(tmp_path), wrap=lambda _: lambda micro: (torch.ones((), requires_grad=True) * 1.0, {})
    )
    with pytest.raises(LdmPipeError, match="no gradient reaches the weights of unet"):
        trainer.train_step()


# -- 15: clocks --------------------------------------------------------------------------------------------------


def test_fault_15_a_clock_that_jumps_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 0.0)
    run(tmp_path)
    os.utime(tmp_path / "checkpoint-3", (4e9, 4e9))
    os.utime(tmp_path / "checkpoint-6", (1.0, 1.0))
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-6"


# -- the learning rate -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_learning_rate_that_is_none_is_refused(tmp_path: Path, rate: float) -> None:
    with pytest.raises(LdmPipeError, match=r"optim\.learning_rate"):
        make_config(tmp_path, optim={"learning_rate": rate})


def test_fault_11_a_learning_rate_that_gives_nan_stops_with_words_and_a_whole_checkpoint(tmp_path: Path) -> None:
    wild: dict[str, Any] = {"max_train_steps": 60, "checkpointing_steps": 1, "max_nonfinite_steps": 3}
    with pytest.raises(LdmPipeError, match=r"NaN or infinity.*Lower the learning rate; the last checkpoint is kept"):
        run(tmp_path, **wild, optim={"learning_rate": 1e30, "lr_warmup_steps": 0, "adam_weight_decay": 0.0})
    found = find_checkpoint(tmp_path, "latest")
    assert found is not None
    assert all(torch.isfinite(t).all() for t in saved_state(found).values())
