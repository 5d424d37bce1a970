"""Model offload: every network is on the device for its stage only, and the picture is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ldm_pipe import LatentDiffusionPipeline
from ldm_pipe.pretrained import LdmPipeError

TINY = Path(__file__).parents[2] / "data" / "tiny_pipeline"


def _picture(pipe: LatentDiffusionPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe("red apple", num_inference_steps=2, seed=1, output_type="pt").images


def test_offload_brings_each_network_for_its_stage_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU here: `cpu:0` stands for it, and every move to it and back is written down."""
    plain = _picture(LatentDiffusionPipeline.from_pretrained(TINY))
    pipe = LatentDiffusionPipeline.from_pretrained(TINY)
    names = {id(module): name for name, module in pipe.components.items()}
    moves: list[tuple[str, str]] = []
    move = nn.Module.to

    def listen(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if id(module) in names:
            moves.append((names[id(module)], str(args[0])))
        return move(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "to", listen)
    pipe.enable_model_cpu_offload(device="cuda:0")  # moves all to the CPU
    assert [where for _, where in moves] == ["cpu"] * 3
    pipe._offload = torch.device("cpu", 0)
    moves.clear()
    assert torch.equal(_picture(pipe), plain)
    stages = list(dict.fromkeys(name for name, _ in moves))
    assert stages == ["text_encoder", "unet", "autoencoder"]
    for name in stages:
        own = [where for part, where in moves if part == name]
        assert own == ["cpu:0", "cpu"] * (len(own) // 2)
    on: set[str] = set()
    for name, where in moves:  # never two at once
        on = on | {name} if where == "cpu:0" else on - {name}
        assert len(on) <= 1
    assert on == set()
    with pytest.raises(LdmPipeError, match="offload to the CPU"):
        pipe.enable_model_cpu_offload(device="cpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LdmPipeError, match="accelerate is not installed"):
        pipe.enable_model_cpu_offload(device="cuda")


@pytest.mark.gpu
def test_offload_draws_the_same_on_a_gpu_and_leaves_nothing_there() -> None:
    plain = _picture(LatentDiffusionPipeline.from_pretrained(TINY).to("cuda"))
    pipe = LatentDiffusionPipeline.from_pretrained(TINY)
    pipe.enable_model_cpu_offload()
    torch.testing.assert_close(_picture(pipe), plain, rtol=0, atol=1e-4)
    assert {module.device.type for module in pipe.components.values()} == {"cpu"}
