"""The U-Net against diffusers' UNet2DConditionModel (0.42) on tiny random weights, fp32.

Tolerance 1e-5 of the largest output: the same sums in another order. Gradients pass the network twice: 1e-4.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe.networks import UNet
from tests.bfloat16 import assert_as_close_as_the_reference
from tests.pipelines import fill

diffusers = pytest.importorskip("diffusers")

SD1: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 16,
    "block_out_channels": [32, 64, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 2,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
SD2 = {**SD1, "use_linear_projection": True, "attention_head_dim": [2, 4, 8]}
SDXL = {
    **SD2,
    "block_out_channels": [32, 64, 96],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [1, 2, 3],
    "transformer_layers_per_block": [1, 2, 3],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 16,
    "projection_class_embeddings_input_dim": 20 + 6 * 16,
}
UPSCALER = {**SD2, "in_channels": 7, "only_cross_attention": [True, True, False], "num_class_embeds": 50}
ODD = {
    **SD1,
    "layers_per_block": [1, 2, 1],
    "downsample_padding": 0,
    "mid_block_scale_factor": 1.5,
    "act_fn": "gelu",
    "time_embedding_act_fn": "silu",
    "time_embedding_dim": 48,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "center_input_sample": True,
    "encoder_hid_dim": 24,
    "conv_in_kernel": 5,
    "conv_out_kernel": 1,
    "transformer_layers_per_block": [[2], [1, 0], 3],
    "reverse_transformer_layers_per_block": [1, [2, 1, 0], [1, 2]],
    "upcast_attention": True,
}
NO_MID = {**SD1, "mid_block_type": None, "class_embed_type": "timestep", "class_embeddings_concat": True}
RESIDUAL_MID = {**SD1, "mid_block_type": "UNetMidBlock2D", "class_embed_type": "identity"}
PROJECTION = {**SD1, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 20}
SIMPLE_PROJECTION = {**PROJECTION, "class_embed_type": "simple_projection"}


def _numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _pair(config: dict[str, Any]) -> tuple[Any, UNet]:
    """Build theirs and ours with the same weights, every one random."""
    theirs = fill(diffusers.UNet2DConditionModel(**config))
    ours = UNet.from_config(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


T = torch.tensor([3.0, 701.5])
TOKENS = _numbers(2, 2, 5, 24)
SIZES = torch.tensor([[64.0, 64.0, 0.0, 8.0, 64.0, 48.0], [32.0, 64.0, 0.0, 0.0, 128.0, 64.0]])

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "sd1": (SD1, {}, {}),
    "sd2": (SD2, {}, {}),
    "sdxl": (
        SDXL,
        {"pooled": _numbers(3, 2, 20), "labels": SIZES},
        {"added_cond_kwargs": {"text_embeds": _numbers(3, 2, 20), "time_ids": SIZES}},
    ),
    "x4_upscaler": (UPSCALER, {"labels": torch.tensor([7, 20])}, {"class_labels": torch.tensor([7, 20])}),
    "odd_fields": (ODD, {}, {}),
    "timestep_class": (NO_MID, {"labels": torch.tensor([1.0, 9.0])}, {"class_labels": torch.tensor([1.0, 9.0])}),
    "identity_class": (RESIDUAL_MID, {"pooled": _numbers(4, 2, 128)}, {"class_labels": _numbers(4, 2, 128)}),
    "projection_class": (PROJECTION, {"pooled": _numbers(5, 2, 20)}, {"class_labels": _numbers(5, 2, 20)}),
    "simple_class": (SIMPLE_PROJECTION, {"pooled": _numbers(5, 2, 20)}, {"class_labels": _numbers(5, 2, 20)}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [(16, 16), (10, 13)], ids=["even", "odd_sides"])
@torch.no_grad()
def test_output_agrees_with_diffusers(name: str, size: tuple[int, int]) -> None:
    config, slots, kwargs = CASES[name]
    theirs, ours = _pair(config)
    x = _numbers(1, 2, config["in_channels"], *size)
    expected = theirs(x, T, TOKENS, **kwargs).sample
    assert _difference(ours(x, T, tokens=TOKENS, **slots), expected) < 1e-5
    assert _difference(ours.to(memory_format=torch.channels_last)(x, T, tokens=TOKENS, **slots), expected) < 1e-5


def _half(slots: dict[str, Any]) -> dict[str, Any]:
    """Give what is read in bfloat16 to networks in bfloat16; times, labels and sizes stay as they are."""
    return {k: v.bfloat16() if torch.is_tensor(v) and k in ("pooled", "text_embeds") else v for k, v in slots.items()}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_bfloat16_is_as_close_to_fp32_as_diffusers_is(name: str) -> None:
    config, slots, kwargs = CASES[name]
    theirs, ours = _pair(config)
    x = _numbers(1, 2, config["in_channels"], 16, 16)
    exact = theirs(x, T, TOKENS, **kwargs).sample
    kwargs = {k: _half(v) if isinstance(v, dict) else v for k, v in kwargs.items()}
    if "class" in name and "timestep" not in name:
        kwargs = {"class_labels": kwargs["class_labels"].bfloat16()}
    x, tokens = x.bfloat16(), TOKENS.bfloat16()
    found = ours.bfloat16()(x, T, tokens=tokens, **_half(slots))
    assert_as_close_as_the_reference(found, theirs.bfloat16()(x, T, tokens, **kwargs).sample, exact)


@torch.no_grad()
def test_inpainting_channels_come_through_spatial() -> None:
    theirs, ours = _pair({**SD1, "in_channels": 9})
    x, spatial = _numbers(1, 2, 4, 16, 16), _numbers(6, 2, 5, 16, 16)
    expected = theirs(torch.cat([x, spatial], dim=1), T, TOKENS).sample
    assert _difference(ours(x, T, tokens=TOKENS, spatial=spatial), expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("config", [SD1, SD2])
def test_token_mask_agrees_with_encoder_attention_mask(config: dict[str, Any]) -> None:
    theirs, ours = _pair(config)
    x = _numbers(1, 2, 4, 16, 16)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]])
    expected = theirs(x, T, TOKENS, encoder_attention_mask=mask).sample
    assert _difference(ours(x, T, tokens=TOKENS, token_mask=mask), expected) < 1e-5
    assert _difference(ours(x, T, tokens=TOKENS, token_mask=mask.bool()), expected) < 1e-5
    assert _difference(ours(x, T, tokens=TOKENS), expected) > 1e-3


def test_gradients_agree_with_diffusers() -> None:
    theirs, ours = _pair(SD1)
    x = _numbers(1, 2, 4, 16, 16)
    tokens = [TOKENS.clone().requires_grad_() for _ in range(2)]
    theirs(x, T, tokens[0]).sample.square().mean().backward()
    ours(x, T, tokens=tokens[1]).square().mean().backward()
    expected = dict(theirs.named_parameters())
    assert tokens[0].grad is not None
    assert tokens[1].grad is not None
    assert _difference(tokens[1].grad, tokens[0].grad) < 1e-4
    scale = max(float(value.grad.abs().max()) for value in expected.values())
    for name, value in ours.named_parameters():
        assert value.grad is not None, name
        assert float((value.grad - expected[name].grad).abs().max()) < 1e-4 * scale, name


@torch.no_grad()
@pytest.mark.parametrize("config", [SD1, SDXL], ids=["sd1", "sdxl"])
def test_diffusers_loads_what_we_save_and_back(
    config: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs, ours = _pair(config)
    slots = {"pooled": _numbers(3, 2, 20), "labels": SIZES} if config is SDXL else {}
    kwargs = {"added_cond_kwargs": {"text_embeds": slots["pooled"], "time_ids": SIZES}} if slots else {}
    x = _numbers(1, 2, 4, 16, 16)
    expected = theirs(x, T, TOKENS, **kwargs).sample
    ours.save_pretrained(tmp_path / "ours")
    caplog.set_level(logging.WARNING)
    diffusers.utils.logging.enable_propagation()
    loaded = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False)
    assert [record.getMessage() for record in caplog.records if "diffusers" in record.name] == []
    assert _difference(loaded(x, T, TOKENS, **kwargs).sample, expected) < 1e-6
    theirs.save_pretrained(tmp_path / "theirs")
    back = UNet.from_pretrained(tmp_path / "theirs")
    assert _difference(back(x, T, tokens=TOKENS, **slots), expected) < 1e-5
    written = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert {key: written[key] for key in config} == {key: back.config[key] for key in config}


def test_defaults_are_those_of_diffusers() -> None:
    from ldm_pipe.networks.config import DEFAULTS

    theirs = {key: value for key, value in diffusers.UNet2DConditionModel(**SD1).config.items() if key[0] != "_"}
    assert set(DEFAULTS) == set(theirs)
    import inspect

    parameters = inspect.signature(diffusers.UNet2DConditionModel.__init__).parameters
    for key, value in DEFAULTS.items():
        default = parameters[key].default
        assert value == (list(default) if isinstance(default, tuple) else default), key
