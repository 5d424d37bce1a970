"""What a run tells: history, trackers, pictures, the page at its end; and the precisions and optimisers it may use."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

pytest.importorskip("accelerate")

from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.training.run import environment
from ldm_pipe.training.run.checkpoint import optimizer_tensors, restore_optimizer
from ldm_pipe.training.run.config import OptimConfig
from ldm_pipe.training.run.environment import start_processes
from ldm_pipe.training.run.loop import Micro, Part, Trainer
from ldm_pipe.training.run.optim import make_optimizer
from ldm_pipe.training.run.records import read_history
from tests.training import assert_same_bits, make_config, make_trainer, run, whole_state

OFTEN: dict[str, Any] = {"max_train_steps": 20, "validation_steps": 10}


def showing(folder: Path, **changes: Any) -> Trainer:
    """Make a trainer whose validation shows a picture and notes a number."""

    def validate(step: int, trainer: Trainer) -> None:
        path = folder / "grids" / f"a sheet {step}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 4), (step, 0, 0)).save(path)
        trainer.show("samples", path)
        trainer.note({"validation/score": float(step)})

    return make_trainer(make_config(folder, **{**OFTEN, **changes}), validate=validate)


def test_the_history_holds_every_tenth_step_once_whatever_was_resumed(tmp_path: Path) -> None:
    showing(tmp_path / "a").fit()
    first = make_trainer(make_config(tmp_path / "b", **OFTEN))
    first._start_records()
    for _ in range(12):
        first.train_step()
    first.save()
    assert first.records is not None
    first.records.note(14, {"unet/loss": 99.0})  # a step that the kill took back
    first.records.close()
    with (tmp_path / "b" / "history.jsonl").open("a") as file:
        file.write('{"step": 16, "unet/lo')
    showing(tmp_path / "b", resume_from_checkpoint="latest").fit()
    steps = [row["step"] for row in read_history(tmp_path / "b") if "unet/loss" in row]
    assert steps == [20]
    rows = {row["step"]: row["unet/loss"] for row in read_history(tmp_path / "a") if "unet/loss" in row}
    assert list(rows) == [1, 10, 20]
    assert read_history(tmp_path / "b")[0]["unet/loss"] == rows[20]
    assert all({"unet/lr", "unet/grad_norm", "images_per_second", "memory_gb"} <= row.keys()
               for row in read_history(tmp_path / "a") if "unet/loss" in row)  # fmt: skip


def test_tensorboard_gets_numbers_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    showing(tmp_path, report_to="tensorboard").fit()
    (file,) = (tmp_path / "tensorboard").iterdir()
    events = EventAccumulator(str(file))
    events.Reload()
    assert [event.step for event in events.Scalars("unet/loss")] == [1, 10, 20]
    assert [(event.step, event.value) for event in events.Scalars("validation/score")] == [(10, 10.0), (20, 20.0)]
    assert [(image.step, image.width, image.height) for image in events.Images("samples")] == [(10, 8, 4), (20, 8, 4)]


class FakeRun:
    id = "abc"

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.open = True

    def define_metric(self, *_: Any, **__: Any) -> None:
        pass

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.open = False


def test_weights_and_biases_gets_numbers_and_pictures_offline_without_a_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no .netrc
    wandb, fake, started = ModuleType("wandb"), FakeRun(), []
    wandb.init = lambda **options: started.append(options) or fake  # type: ignore[attr-defined]
    wandb.Image = lambda path: ("image", Path(path).name)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    showing(tmp_path / "run", report_to="wandb").fit()
    assert started[0]["mode"] == "offline"
    assert started[0]["config"]["seed"] == 0
    assert [row["step"] for row in fake.logged if "unet/loss" in row] == [1, 10, 20]
    assert {"samples": ("image", "a sheet 10.png"), "step": 10} in fake.logged
    assert not fake.open
    showing(tmp_path / "run", report_to="wandb", resume_from_checkpoint="latest").fit()
    assert (started[1]["id"], started[1]["resume"]) == ("abc", "allow")
    monkeypatch.setenv("WANDB_MODE", "online")
    showing(tmp_path / "other", report_to="wandb").fit()
    assert started[2]["mode"] is None  # wandb reads its own variable


def test_the_real_wandb_writes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    showing(tmp_path, report_to="wandb").fit()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_tracker_that_is_not_installed_is_told_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    trainer = make_trainer(make_config(tmp_path, report_to=name))
    with pytest.raises(LdmPipeError, match=f"{name} is not installed.*pip install {name}"):
        trainer.fit()
    assert trainer.step == 0


def test_the_page_at_the_end_shows_figures_curve_sheets_and_config(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    trainer = showing(tmp_path / "a run")
    trainer.fit()
    text = (tmp_path / "a run" / "summary.md").read_text()
    assert "| steps | 20 of 20 |" in text
    assert f"| epochs | {20 * 4 / 11:.2f} |" in text
    for name, value in (("seed", "0"), ("validation/score", "20"), ("device", "cpu")):
        assert f"| {name} | {value} |" in text
    assert "max_train_steps: 20\n" in text
    links = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert links == ["losses.png", "grids/a%20sheet%2020.png"]
    for link in links:
        with Image.open(tmp_path / "a run" / unquote(link)) as image:
            image.load()


def test_a_run_keeps_what_all_its_starts_were_made_with(tmp_path: Path) -> None:
    run(tmp_path, max_train_steps=2, seed=5)
    for _ in range(2):
        run(tmp_path, max_train_steps=2, seed=5, resume_from_checkpoint="latest")
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["seed"] == 5
    assert [start["first_step"] for start in (*facts["before"], facts)] == [0, 2, 2]
    assert all("commit" in start and "before" not in start for start in facts["before"])


def test_the_command_of_a_run_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of three words stood there as three words."""
    words = ["finetune.py", "--validation_prompts", "a red apple", "a blue sky"]
    monkeypatch.setattr(sys, "argv", words)
    run(tmp_path, max_train_steps=1)
    assert shlex.split(json.loads((tmp_path / "run.json").read_text())["command"]) == words


# -- precision ---------------------------------------------------------------------------------------------------


def test_bf16_computes_in_half_keeps_fp32_weights_and_resumes_to_the_bit(tmp_path: Path) -> None:
    unbroken = run(tmp_path / "a", mixed_precision="bf16")
    assert all(t.dtype == torch.float32 for t in unbroken.raw["unet"].state_dict().values())
    plain = whole_state(run(tmp_path / "b"))
    assert not all(torch.equal(t, plain[name]) for name, t in whole_state(unbroken).items()), "it was fp32"
    (tmp_path / "a" / "checkpoint-6").rename(tmp_path / "put-away")
    resumed = run(tmp_path / "a", mixed_precision="bf16", resume_from_checkpoint="latest")
    assert_same_bits(whole_state(resumed), whole_state(unbroken))


def test_the_state_of_the_loss_scaler_is_saved(tmp_path: Path) -> None:
    """fp16 itself needs a GPU; its scaler runs here too. It starts so high that the first gradients overflow."""

    def scaled(folder: Path, **changes: Any) -> Trainer:
        trainer = make_trainer(make_config(folder, **changes), wrap=lambda loss: lambda m: (loss(m)[0] * 64, {}))
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=2)
        return trainer

    unbroken = scaled(tmp_path / "a", max_train_steps=12)
    unbroken.fit()
    assert unbroken.skipped > 0
    assert unbroken.accelerator.scaler is not None
    scale = unbroken.accelerator.scaler.state_dict()
    broken = scaled(tmp_path / "b", max_train_steps=12)
    for _ in range(5):
        broken.train_step()
    broken.save()
    resumed = scaled(tmp_path / "b", max_train_steps=12, resume_from_checkpoint="latest")
    resumed.fit()
    assert resumed.accelerator.scaler is not None
    assert resumed.accelerator.scaler.state_dict() == scale
    assert_same_bits(whole_state(resumed), whole_state(unbroken))


def test_what_this_machine_cannot_do_is_said_before_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LdmPipeError, match="fp16 needs a GPU"):
        start_processes("fp16")


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3", r"ZeRO stage 3.*fsdp2\.yaml"),
        ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds.json", r"the YAML of the run decides.*deepspeed_zero2\.yaml"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu", "offload_optimizer_device: none"),
        ("WORLD_SIZE", "1", "--num_processes 2"),
        ("WORLD_SIZE", "2", r"DeepSpeed is not installed.*pip install deepspeed.*fsdp2\.yaml"),
    ],
)
def test_what_deepspeed_is_not_used_for_is_refused_with_words(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, named: str
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv(name, value)
    with pytest.raises(LdmPipeError, match=named):
        start_processes("no")


@pytest.mark.slow
def test_torch_compile_trains_the_same_and_resumes(tmp_path: Path) -> None:
    """A small network: what compiles, and how long it takes, is torch's affair; names, steps and resuming are ours."""

    def make(folder: Path, **changes: Any) -> Trainer:
        config = make_config(folder, **changes)
        net = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(torch.linspace(-0.5, 0.5, p.numel()).reshape(p.shape))

        def loss(micro: Micro) -> tuple[Tensor, dict[str, float]]:
            x = torch.tensor(micro.indices, dtype=torch.float32)[:, None] * torch.arange(1.0, 5.0) / 40
            return (part.module(x) - x).square().mean(), {}

        part = Part("net", net, loss, config.optim, config.ema_decay)
        return Trainer(config, [part], num_items=11)

    plain, compiled = make(tmp_path / "plain"), make(tmp_path / "compiled", torch_compile=True)
    for trainer in (plain, compiled):
        trainer.fit()
    for name, tensor in whole_state(plain).items():
        torch.testing.assert_close(whole_state(compiled)[name], tensor, rtol=0, atol=1e-5)
    (tmp_path / "compiled" / "checkpoint-6").rename(tmp_path / "put-away")
    resumed = make(tmp_path / "compiled", torch_compile=True, resume_from_checkpoint="latest")
    resumed.fit()
    assert_same_bits(whole_state(resumed), whole_state(compiled))


# -- optimisers --------------------------------------------------------------------------------------------------


def test_adafactor_is_lean_on_matrices_and_resumes_to_the_bit(tmp_path: Path) -> None:
    net = nn.Linear(64, 64)
    optimizer = make_optimizer(net, OptimConfig(optimizer="adafactor"))
    net(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    kept = sum(v.numel() for v in optimizer.state[net.weight].values() if isinstance(v, torch.Tensor))
    assert kept <= 64 + 64 + 1  # AdamW: 2 * 64 * 64 + 1
    optim = {"learning_rate": 1.0e-2, "lr_warmup_steps": 2, "optimizer": "adafactor"}
    unbroken = run(tmp_path / "a", optim=optim)
    (tmp_path / "a" / "checkpoint-6").rename(tmp_path / "put-away")
    resumed = run(tmp_path / "a", optim=optim, resume_from_checkpoint="latest")
    assert_same_bits(whole_state(resumed), whole_state(unbroken))


def test_adafactor_takes_a_convolution_for_a_matrix() -> None:
    conv, line = nn.Conv2d(6, 5, 3), nn.Linear(54, 5)
    with torch.no_grad():
        line.weight.copy_(conv.weight.flatten(1))
        line.bias.copy_(conv.bias if conv.bias is not None else 0.0)
    x = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    for net, given in ((conv, x), (line, x.flatten(1))):
        optimizer = make_optimizer(net, OptimConfig(optimizer="adafactor", learning_rate=0.1))
        for _ in range(3):
            optimizer.zero_grad()
            net(given).flatten().cos().sum().backward()
            optimizer.step()
        kept = sum(v.numel() for v in optimizer.state[net.weight].values())
        assert kept == 5 + 54 + 1
    assert torch.allclose(conv.weight.flatten(1), line.weight, atol=1e-6)
    before = {"0.step": torch.tensor(1.0), "0.row_var": torch.zeros(5, 6, 3, 1), "0.col_var": torch.zeros(5, 6, 1, 3)}
    restore_optimizer(optimizer := make_optimizer(conv, OptimConfig(optimizer="adafactor")), before)
    conv(x).sum().backward()
    with pytest.raises(LdmPipeError, match="of an older version"):
        optimizer.step()


def test_eight_bits_without_bitsandbytes_is_refused_with_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(LdmPipeError, match=r"bitsandbytes is not installed.*adafactor"):
        make_optimizer(nn.Linear(2, 2), OptimConfig(optimizer="adamw_8bit"))


def test_state_within_a_dict_and_whole_numbers_are_kept() -> None:
    """As the optimisers of bitsandbytes give their state in its release 0.50."""

    class Wrapping(torch.optim.SGD):
        def state_dict(self) -> dict[str, Any]:
            entries = {"step": 3, "wrapped": {"state1": torch.arange(4.0)}}
            return {**super().state_dict(), "state": {0: entries}}

    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(second.parameters())
    restore_optimizer(optimizer, optimizer_tensors(Wrapping(first.parameters())))
    entries = optimizer.state[second.weight]
    assert type(entries["step"]) is int
    assert entries["step"] == 3
    assert torch.equal(entries["state1"], torch.arange(4.0))


def test_eight_bit_adam_resumes_to_the_bit(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="keeps Adam's numbers in 8 bits")
    optim = {"learning_rate": 1.0e-2, "lr_warmup_steps": 2, "optimizer": "adamw_8bit"}
    unbroken = run(tmp_path / "a", optim=optim)
    assert any(t.dtype == torch.uint8 for t in whole_state(unbroken).values())
    (tmp_path / "a" / "checkpoint-6").rename(tmp_path / "put-away")
    resumed = run(tmp_path / "a", optim=optim, resume_from_checkpoint="latest")
    assert_same_bits(whole_state(resumed), whole_state(unbroken))


def test_the_commit_is_that_of_this_code_wherever_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = environment.git_commit()
    monkeypatch.chdir(tmp_path)
    assert environment.git_commit() == here
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))  # a copy that git does not know
    assert environment.git_commit() is None


def test_a_finished_run_that_is_resumed_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, max_train_steps=2)
    assert "nothing left to train" not in capsys.readouterr().err
    run(tmp_path, max_train_steps=2, resume_from_checkpoint="latest")
    assert "nothing left to train: step 2 of 2 is reached" in capsys.readouterr().err
