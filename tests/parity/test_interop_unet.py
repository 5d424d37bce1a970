"""U-Nets without tokens and with joint attention against diffusers (0.42) on tiny random weights, fp32.

Tolerance 1e-5 of the largest output: the same sums in another order; bfloat16: `tests/bfloat16.py`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe.networks import UNet
from ldm_pipe.networks.config import DEFAULTS
from ldm_pipe.networks.config_2d import DEFAULTS_2D
from tests.bfloat16 import assert_as_close_as_the_reference
from tests.pipelines import OF_ADM, OF_IF, fill

diffusers = pytest.importorskip("diffusers")

LDM: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [16, 32, 48],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 8,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "mid_block_scale_factor": 1.5,
}
SUPER_RESOLUTION = {
    **LDM,
    "in_channels": 6,
    "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "attention_head_dim": None,
    "downsample_padding": 0,
}
ADM = {
    **LDM,
    **OF_ADM,
    "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"],
}
UNATTENDED = {**LDM, "add_attention": False, "class_embed_type": "timestep", "center_input_sample": True}
NO_MID_NORM = {**LDM, "resnet_time_scale_shift": "scale_shift", "class_embed_type": "identity"}
IF_I: dict[str, Any] = {
    **OF_IF,
    "block_out_channels": [16, 32, 32],
    "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"],
    "up_block_types": ["SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
}
IF_II = {
    **IF_I,
    "in_channels": 6,
    "layers_per_block": [1, 1, 2],
    "class_embed_type": "timestep",
    "time_embedding_dim": 40,
    "time_embedding_act_fn": "gelu",
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1.4142271248762552,
    "mid_block_scale_factor": 1.4142271248762552,
    "only_cross_attention": True,
}
KARLO = {
    **{key: value for key, value in IF_I.items() if key[:8] not in ("encoder_", "addition", "cross_at", "act_fn")},
    "cross_attention_dim": 24,
    "class_embed_type": "identity",
}
LABELS = torch.tensor([1, 4])
WITHOUT_TOKENS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "ldm": (LDM, {}, {}),
    "super_resolution": (SUPER_RESOLUTION, {}, {}),
    "adm": (ADM, {"labels": LABELS}, {"class_labels": LABELS}),
    "unattended": (UNATTENDED, {"labels": LABELS}, {"class_labels": LABELS}),
    "no_mid_norm": (NO_MID_NORM, {"pooled": torch.ones(2, 64) / 3}, {"class_labels": torch.ones(2, 64) / 3}),
}
WITH_TOKENS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "if_i": (IF_I, {}, {}),
    "if_ii": (IF_II, {"labels": LABELS}, {"class_labels": LABELS}),
    "karlo": (KARLO, {"pooled": torch.ones(2, 64) / 3}, {"class_labels": torch.ones(2, 64) / 3}),
}
T = torch.tensor([3, 701])


def _numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TOKENS = _numbers(2, 2, 5, 24)


def _pair(class_name: str, config: dict[str, Any]) -> tuple[Any, UNet]:
    """Build theirs and ours with the same weights, every one random."""
    theirs = fill(getattr(diffusers, class_name)(**config))
    ours = UNet.from_config({"_class_name": class_name, **config}).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def _difference(x: Tensor, y: Tensor) -> float:
    assert x.shape == y.shape
    return float((x.float() - y).abs().max() / y.abs().max())


@pytest.mark.parametrize("name", WITHOUT_TOKENS)
@torch.no_grad()
def test_without_tokens_the_output_agrees(name: str) -> None:
    config, slots, kwargs = WITHOUT_TOKENS[name]
    theirs, ours = _pair("UNet2DModel", config)
    x = _numbers(1, 2, config["in_channels"], 8, 12)
    expected = theirs(x, T, **kwargs).sample
    assert _difference(ours(x, T, **slots), expected) < 1e-5
    assert _difference(ours.to(memory_format=torch.channels_last)(x, T, **slots), expected) < 1e-5


BFLOAT16 = {*WITHOUT_TOKENS, *WITH_TOKENS} - {"unattended"}  # diffusers fails: its sinusoids of classes are fp32


@pytest.mark.parametrize("name", sorted(BFLOAT16))
@torch.no_grad()
def test_bfloat16_is_as_close_to_fp32_as_diffusers_is(name: str) -> None:
    config, slots, kwargs = {**WITHOUT_TOKENS, **WITH_TOKENS}[name]
    theirs, ours = _pair("UNet2DModel" if name in WITHOUT_TOKENS else "UNet2DConditionModel", config)
    x = _numbers(1, 2, config["in_channels"], 8, 12)
    tokens = () if name in WITHOUT_TOKENS else (TOKENS,)
    exact = theirs(x, T, *tokens, **kwargs).sample
    x, tokens = x.bfloat16(), tuple(value.bfloat16() for value in tokens)
    slots, kwargs = (
        {k: v.bfloat16() if v.is_floating_point() else v for k, v in given.items()} for given in (slots, kwargs)
    )
    found = ours.bfloat16()(x, T, tokens=next(iter(tokens), None), **slots)
    assert_as_close_as_the_reference(found, theirs.bfloat16()(x, T, *tokens, **kwargs).sample, exact)


@pytest.mark.parametrize("name", WITH_TOKENS)
@torch.no_grad()
def test_with_joint_attention_the_output_agrees(name: str) -> None:
    config, slots, kwargs = WITH_TOKENS[name]
    theirs, ours = _pair("UNet2DConditionModel", config)
    x = _numbers(1, 2, config["in_channels"], 8, 12)
    expected = theirs(x, T, TOKENS, **kwargs).sample
    assert _difference(ours(x, T, tokens=TOKENS, **slots), expected) < 1e-5
    assert _difference(ours(x, T, tokens=ours.keep_tokens(TOKENS), **slots), expected) < 1e-5
    if config.get("only_cross_attention"):
        return  # diffusers pads the mask for positions that are not there, and fails
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]])
    expected = theirs(x, T, TOKENS, encoder_attention_mask=mask, **kwargs).sample
    assert _difference(ours(x, T, tokens=TOKENS, token_mask=mask, **slots), expected) < 1e-5


@pytest.mark.parametrize("name", ["adm", "if_ii"])
@torch.no_grad()
def test_folders_go_both_ways(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class_name = "UNet2DModel" if name in WITHOUT_TOKENS else "UNet2DConditionModel"
    config = {**WITHOUT_TOKENS, **WITH_TOKENS}[name][0]
    theirs, ours = _pair(class_name, config)
    ours.save_pretrained(tmp_path / "ours")
    caplog.set_level(logging.WARNING)
    diffusers.utils.logging.enable_propagation()
    loaded = getattr(diffusers, class_name).from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False)
    assert [record.getMessage() for record in caplog.records if "diffusers" in record.name] == []
    theirs.save_pretrained(tmp_path / "theirs")
    back = UNet.from_pretrained(tmp_path / "theirs").state_dict()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key]), key
        assert torch.equal(value, back[key]), key


def test_defaults_are_those_of_diffusers() -> None:
    for class_name, defaults, config in (
        ("UNet2DModel", DEFAULTS_2D, LDM),
        ("UNet2DConditionModel", DEFAULTS, IF_I),
    ):
        theirs = getattr(diffusers, class_name)(**config).config
        assert set(defaults) == {key for key in theirs if key[0] != "_"}
        assert {key: defaults[key] for key in defaults if key not in config} == {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in theirs.items()
            if key[0] != "_" and key not in config
        }
