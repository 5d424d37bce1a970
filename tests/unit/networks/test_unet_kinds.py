"""Laws of the U-Nets beside Stable Diffusion's: without tokens (LDM, ADM), and with joint attention (IF, Karlo)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe.networks import UNet
from ldm_pipe.networks.config_2d import read_config_2d, write_config_2d
from ldm_pipe.pretrained import LdmPipeError

TINY_2D: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "block_out_channels": [16, 32],
    "down_block_types": ["AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 4,
}
TINY_JOINT: dict[str, Any] = {
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
    "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 8,
}
T = torch.tensor([3.0, 701.5])


def _numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("down_block_types", ["DownBlock2D", "AttnSkipDownBlock2D"]),
        ("up_block_types", ["UpBlock2D"]),
        ("mid_block_type", "UNetMidBlock2DCrossAttn"),
        ("attention_head_dim", 5),
        ("attention_head_dim", 0),
        ("norm_num_groups", 5),
        ("attn_norm_num_groups", 7),
        ("act_fn", "gelu"),
        ("time_embedding_type", "fourier"),
        ("class_embed_type", "projection"),
        ("downsample_type", "fir"),
        ("layers_per_block", [1, 1]),
    ],
)
def test_config_without_tokens_that_cannot_be_represented_names_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(LdmPipeError, match=rf"{field} = .* cannot be represented\. Allowed: "):
        UNet.from_config({**TINY_2D, field: value})


def test_heads_of_two_widths_have_no_config_without_tokens() -> None:
    """Four heads at every level (ADM's 128 model): every shape would load in diffusers, every picture be wrong."""
    spec = read_config_2d(TINY_2D)
    uneven = replace(spec, levels=tuple(replace(level, num_heads=4) for level in spec.levels))
    with pytest.raises(LdmPipeError, match=r"attention heads of different widths: \[4, 8\]"):
        write_config_2d(uneven)


def test_unknown_kinds_of_networks_are_refused() -> None:
    with pytest.raises(LdmPipeError, match="_class_name = 'UNet3DConditionModel' cannot be represented"):
        UNet.from_config({**TINY_JOINT, "_class_name": "UNet3DConditionModel"})


def test_a_network_without_tokens_refuses_them_and_is_saved_as_what_it_is(tmp_path: Path) -> None:
    net = UNet.from_config(TINY_2D).eval()
    x = _numbers(1, 2, 3, 8, 8)
    with pytest.raises(LdmPipeError, match="this U-Net reads none"):
        net(x, T, tokens=_numbers(2, 2, 5, 12))
    net.save_pretrained(tmp_path)
    again = UNet.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "UNet2DModel"
    with torch.no_grad():
        assert torch.equal(again(x, T), net(x, T))


@torch.no_grad()
def test_joint_attention_hides_masked_tokens_and_keeps_what_steps_share() -> None:
    net = UNet.from_config(TINY_JOINT).eval()
    x, tokens, mask = _numbers(1, 2, 4, 8, 8), _numbers(2, 2, 5, 12), torch.tensor([[1, 1, 1, 0, 0]] * 2)
    first = net(x, T, tokens=tokens, token_mask=mask)
    torch.testing.assert_close(net(x, T, tokens=tokens[:, :3]), first, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(net(x, T, tokens=tokens), first, atol=1e-4)
    kept = net.keep_tokens(tokens)
    for t in (T, T / 2):
        torch.testing.assert_close(net(x, t, tokens=kept), net(x, t, tokens=tokens), rtol=1e-5, atol=1e-5)
