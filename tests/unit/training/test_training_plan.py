"""Plans: counted without memory, they agree with what a training really holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ldm_pipe.cli import main
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.training.run.checkpoint import load_checkpoint
from ldm_pipe.training.tasks.plan import plan, read_plan_config
from tests.source import ROOT
from tests.training import UNET

pytest.importorskip("accelerate")
MODEL = ROOT / "tests" / "data" / "tiny_pipeline"


def diffusion_yaml(folder: Path, **changes: Any) -> Path:
    shape = {
        name: UNET[name] for name in ("block_out_channels", "down_block_types", "up_block_types", "norm_num_groups")
    }
    values: dict[str, Any] = {
        "output_dir": str(folder / "run"), "autoencoder": str(MODEL / "vae"), "text_encoder": str(MODEL),
        "unet": {**shape, "attention_head_dim": 2}, "train_batch_size": 4, "data": {"resolution": 32}, **changes,
    }  # fmt: skip
    path = folder / "diffusion.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_counts_are_those_of_a_real_network_and_its_checkpoint(tmp_path: Path) -> None:
    from ldm_pipe.networks import UNet
    from ldm_pipe.training.run.loop import Part, Trainer

    config = read_plan_config(diffusion_yaml(tmp_path, max_train_steps=1, report_to="none", num_threads=1))
    (cost,) = plan(config, torch.device("cpu"), measure=False)
    shape = config.unet.model_dump(mode="json")  # type: ignore[union-attr]
    unet = UNet.from_config({**shape, "sample_size": 8, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 32})
    assert cost.parameters == sum(p.numel() for p in unet.parameters())
    inputs = torch.zeros(4, 4, 8, 8), torch.ones(4), torch.zeros(4, 16, 32)
    kept: dict[int, tuple[int, torch.Tensor]] = {}
    own = {p.untyped_storage().data_ptr() for p in unet.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        unet(inputs[0], inputs[1], tokens=inputs[2]).mean()
    assert cost.activations == pytest.approx(sum(size for size, _ in kept.values()), rel=0.15)
    loss = lambda micro: (part.module(inputs[0], inputs[1], tokens=inputs[2]).square().mean(), {})  # noqa: E731
    part = Part("unet", unet, loss, config.optim, config.ema_decay)
    Trainer(config, [part], num_items=4).fit()
    groups, _ = load_checkpoint(Path(config.output_dir) / "checkpoint-1")
    size = sum(t.numel() * t.element_size() for tensors in groups.values() for t in tensors.values())
    assert cost.disk == pytest.approx(size, rel=0.02)  # Adam's counters


def test_leaner_settings_are_planned_leaner(tmp_path: Path) -> None:
    def cost_of(**changes: Any) -> Any:
        (cost,) = plan(read_plan_config(diffusion_yaml(tmp_path, **changes)), torch.device("cpu"), measure=False)
        return cost

    plain = cost_of()
    twice = cost_of(train_batch_size=8)
    assert twice.activations == pytest.approx(2 * plain.activations, rel=0.02)
    assert twice.operations == 2 * plain.operations
    assert cost_of(gradient_checkpointing=True).activations < 0.8 * plain.activations
    assert cost_of(use_ema=False).average == 0
    assert cost_of(optim={"optimizer": "adafactor"}).optimizer < plain.optimizer
    assert cost_of(gradient_accumulation_steps=3).operations == 3 * plain.operations


def test_the_command_prints_a_plan_with_a_measured_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = diffusion_yaml(tmp_path)
    assert main(["plan", str(path)]) == 0
    text = capsys.readouterr().out
    assert "unet: " in text
    assert "memory of a process: " in text
    assert " MB per checkpoint; " in text or " kB per checkpoint; " in text
    assert "s per step of the networks alone, measured on this " in text
    assert main(["plan", "--json", "--no-measure", str(path)]) == 0
    (cost,) = json.loads(capsys.readouterr().out)
    assert cost["name"] == "unet"
    assert cost["seconds"] is None


def test_the_shipped_autoencoder_config_is_planned_with_both_networks() -> None:
    config = read_plan_config(ROOT / "configs" / "emoji" / "autoencoder.yaml")
    costs = plan(config, torch.device("cpu"), measure=False)
    assert [cost.name for cost in costs] == ["autoencoder", "discriminator"]
    assert all(cost.activations > cost.weights > 0 for cost in costs)


def test_what_is_no_plan_is_refused(tmp_path: Path) -> None:
    for values, words in (({"method": "lora"}, "fine-tuning"), ({"seed": 3, "output_dir": "x"}, "neither")):
        path = tmp_path / "other.yaml"
        path.write_text(yaml.safe_dump(values))
        with pytest.raises(LdmPipeError, match=words):
            read_plan_config(path)
    with pytest.raises(LdmPipeError, match="autoencoder is not there yet"):
        plan(read_plan_config(diffusion_yaml(tmp_path, autoencoder=str(tmp_path / "none"))), torch.device("cpu"))
