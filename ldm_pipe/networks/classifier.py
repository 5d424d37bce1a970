"""ADM's classifier of noisy pictures: the way down of a U-Net, and one of four ways to pool what it found.

What enters: x_t and t. What leaves: logits of classes, whose gradient guides a diffusion model
(`guidance.classifier_score`). This file knows no noise schedules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ldm_pipe.networks.attention import attend_sdpa
from ldm_pipe.networks.config_2d import read_config_2d
from ldm_pipe.networks.fields import positive, refuse
from ldm_pipe.networks.layers import ACTIVATIONS, GroupNorm, VectorEmbedding, sinusoid
from ldm_pipe.networks.spec import UNetSpec
from ldm_pipe.networks.unet import down_stage, mid_stage
from ldm_pipe.pretrained import FrozenConfig, PretrainedModule

Pool = Literal["attention", "adaptive", "spatial", "spatial_v2"]
OWN_FIELDS = ("_class_name", "num_classes", "pool", "hidden_width")
HIDDEN_WIDTH = 2048  # of the spatial pools in openai's code


class AttentionPool(nn.Module):
    """One query, the mean of all positions, looks at itself and at them (CLIP's, Radford et al. 2021, section 2.4).

    Args:
        channels: of the features.
        side: of the features, whose positions have an embedding each.
        num_heads: of the attention.
        num_classes: the width of what leaves.
    """

    def __init__(self, channels: int, side: int, num_heads: int, num_classes: int) -> None:
        """Build the projections."""
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.randn(1 + side * side, channels) / channels**0.5)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, K)."""
        tokens = x.flatten(2).transpose(1, 2)  # (B, hw, C)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1) + self.positional_embedding
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1))
            for part in (self.to_q(tokens[:, :1]), self.to_k(tokens), self.to_v(tokens))
        )
        return self.to_out(attend_sdpa(q, k, v, None).flatten(1))


class AveragePool(nn.Module):
    """Average over positions, then one linear map, which begins at 0 (`pool="adaptive"` of openai's code)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        """Build the map."""
        super().__init__()
        self.to_out = nn.Linear(channels, num_classes)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, K)."""
        return self.to_out(x.mean(dim=(2, 3)))


class LevelsPool(nn.Module):
    """Average the features of all blocks over positions, join them, two linear maps ("spatial" of openai's code).

    Args:
        channels: of all features together.
        hidden: width between the maps.
        num_classes: the width of what leaves.
        normed: "spatial_v2": group norm and SiLU between the maps in place of ReLU.
    """

    def __init__(self, channels: int, hidden: int, num_classes: int, *, normed: bool) -> None:
        """Build the maps."""
        super().__init__()
        self.to_hidden = nn.Linear(channels, hidden)
        self.norm = nn.GroupNorm(32, hidden) if normed else None
        self.to_out = nn.Linear(hidden, num_classes)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Map features, (B, C_i, h_i, w_i) each, to (B, K)."""
        x = self.to_hidden(torch.cat([feature.mean(dim=(2, 3)) for feature in features], dim=1))
        return self.to_out(nn.functional.relu(x) if self.norm is None else nn.functional.silu(self.norm(x)))


class ADMClassifier(PretrainedModule):
    """Classify noisy pictures (Dhariwal & Nichol 2021, arXiv:2105.05233, section 4.1 and appendix H).

    Args:
        config: `num_classes`; `pool`, "attention" (then `sample_size` too), "adaptive", "spatial" or "spatial_v2"
            (then `hidden_width`); and the fields of diffusers' `UNet2DModel` that shape the way down.
    """

    class_name = "LdmPipeClassifier"

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Build the network with random weights."""
        super().__init__()
        self.config = FrozenConfig(config)
        self.spec = read_spec(config)
        spec, emb = self.spec, self.spec.embedding
        first, last = spec.levels[0].channels, spec.levels[-1].channels
        self._sinusoid_dim = emb.sinusoid_dim or first
        self.conv_in = nn.Conv2d(spec.in_channels, first, 3, padding=1)
        self.time_embedding = VectorEmbedding(self._sinusoid_dim, emb.time_dim, spec.activation)
        self.down_blocks = nn.ModuleList(down_stage(spec, i) for i in range(len(spec.levels)))
        self.mid_block = mid_stage(spec)
        self.pool_kind = read_pool(config)
        num_classes = positive({"num_classes": None, **config}, "num_classes")
        self.norm_out: nn.Module | None = None
        self.pool: nn.Module
        if self.pool_kind in ("spatial", "spatial_v2"):
            hidden = config.get("hidden_width", HIDDEN_WIDTH)
            self.pool = LevelsPool(num_features(spec), hidden, num_classes, normed=self.pool_kind == "spatial_v2")
            return
        self.norm_out = GroupNorm(spec.num_groups, last, eps=spec.norm_eps)
        if self.pool_kind == "adaptive":
            self.pool = AveragePool(last, num_classes)
            return
        side = positive({"sample_size": None, **config}, "sample_size") // 2 ** (len(spec.levels) - 1)
        self.pool = AttentionPool(last, side, spec.mid.num_heads, num_classes)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ADMClassifier:
        """Build the network with random weights.

        Raises: LdmPipeError naming the field and the value that cannot be represented.
        """
        return cls(config)

    def forward(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        """Map pictures (B, C, H, W), of the config's size where it has one, at network times () or (B,) to logits."""
        size, fold = self.config.get("sample_size"), 2 ** (len(self.spec.levels) - 1)
        channels = self.spec.in_channels
        if size is None:
            if x_t.ndim != 4 or x_t.shape[1] != channels or x_t.shape[2] % fold or x_t.shape[3] % fold:
                raise refuse("x_t", list(x_t.shape), f"(B, {channels}, H, W), sides multiples of {fold}")
        elif tuple(x_t.shape[1:]) != (channels, size, size):
            raise refuse("x_t", list(x_t.shape), f"(B, {channels}, {size}, {size})")
        emb = self.spec.embedding
        times = torch.as_tensor(t, device=x_t.device).reshape(-1)
        x = x_t.to(self.dtype)
        frequencies = {"flip_sin_to_cos": emb.flip_sin_to_cos, "freq_shift": emb.freq_shift}
        angles = sinusoid(times, self._sinusoid_dim, **frequencies)
        embedded = ACTIVATIONS[self.spec.activation](self.time_embedding(angles.to(x.dtype)))
        x = self.conv_in(x)
        skips = [x]
        for stage in (*self.down_blocks, self.mid_block):
            x = stage(x, embedded, None, None, skips)
        if self.norm_out is None:
            return self.pool([*skips, x])
        return self.pool(ACTIVATIONS[self.spec.activation](self.norm_out(x)))


def read_pool(config: Mapping[str, Any]) -> Pool:
    """Read how the classifier pools; the classifiers that ADM published pool by attention."""
    pool = config.get("pool", "attention")
    if pool not in get_args(Pool):
        raise refuse("pool", pool, f"one of {', '.join(get_args(Pool))}")
    return pool


def num_features(spec: UNetSpec) -> int:
    """Count the channels of all features on the way down and in the middle."""
    down = sum(
        level.channels * (level.num_residual + (i + 1 < len(spec.levels))) for i, level in enumerate(spec.levels)
    )
    return spec.levels[0].channels + down + spec.levels[-1].channels


def read_spec(config: Mapping[str, Any]) -> UNetSpec:
    """Read the way down as that of a U-Net, whose way up mirrors it and is not built."""
    down = config.get("down_block_types")
    if not isinstance(down, list) or not all(isinstance(name, str) for name in down):
        raise refuse("down_block_types", down, "a list of names")
    up = [name.replace("Downsample", "Upsample").replace("Down", "Up") for name in reversed(down)]
    shared = {name: value for name, value in config.items() if name not in OWN_FIELDS}
    return read_config_2d({**shared, "up_block_types": up, "out_channels": shared.get("in_channels", 3)})
