"""ADM's classifier of noisy pictures: the way down of a U-Net, and attention that pools what is left.

What enters: x_t and t. What leaves: logits of classes, whose gradient guides a diffusion model
(`guidance.classifier_score`). This file knows no noise schedules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm_pipe.networks.attention import attend_sdpa
from ldm_pipe.networks.config_2d import read_config_2d
from ldm_pipe.networks.fields import positive, refuse
from ldm_pipe.networks.layers import ACTIVATIONS, GroupNorm, VectorEmbedding, sinusoid
from ldm_pipe.networks.spec import UNetSpec
from ldm_pipe.networks.unet import down_stage, mid_stage
from ldm_pipe.pretrained import FrozenConfig, PretrainedModule


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


class ADMClassifier(PretrainedModule):
    """Classify noisy pictures (Dhariwal & Nichol 2021, arXiv:2105.05233, section 4.1 and appendix H).

    Args:
        config: `num_classes`, `sample_size`, and the fields of diffusers' `UNet2DModel` that shape the way down.
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
        self.norm_out = GroupNorm(spec.num_groups, last, eps=spec.norm_eps)
        sizes = {"sample_size": None, "num_classes": None, **config}
        side = positive(sizes, "sample_size") // 2 ** (len(spec.levels) - 1)
        self.pool = AttentionPool(last, side, spec.mid.num_heads, positive(sizes, "num_classes"))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ADMClassifier:
        """Build the network with random weights.

        Raises: LdmPipeError naming the field and the value that cannot be represented.
        """
        return cls(config)

    def forward(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        """Map pictures (B, C, H, W) of the size of the config at network times () or (B,) to logits (B, K)."""
        size = self.config.sample_size
        if tuple(x_t.shape[1:]) != (self.spec.in_channels, size, size):
            raise refuse("x_t", list(x_t.shape), f"(B, {self.spec.in_channels}, {size}, {size})")
        emb = self.spec.embedding
        times = torch.as_tensor(t, device=x_t.device).reshape(-1)
        x = x_t.to(self.dtype)
        frequencies = {"flip_sin_to_cos": emb.flip_sin_to_cos, "freq_shift": emb.freq_shift}
        angles = sinusoid(times, self._sinusoid_dim, **frequencies)
        embedded = ACTIVATIONS[self.spec.activation](self.time_embedding(angles.to(x.dtype)))
        x = self.conv_in(x)
        skips: list[Tensor] = []
        for stage in (*self.down_blocks, self.mid_block):
            x = stage(x, embedded, None, None, skips)
        return self.pool(ACTIVATIONS[self.spec.activation](self.norm_out(x)))


def read_spec(config: Mapping[str, Any]) -> UNetSpec:
    """Read the way down as that of a U-Net, whose way up mirrors it and is not built."""
    down = config.get("down_block_types")
    if not isinstance(down, list) or not all(isinstance(name, str) for name in down):
        raise refuse("down_block_types", down, "a list of names")
    up = [name.replace("Downsample", "Upsample").replace("Down", "Up") for name in reversed(down)]
    shared = {name: value for name, value in config.items() if name not in ("_class_name", "num_classes")}
    return read_config_2d({**shared, "up_block_types": up, "out_channels": shared.get("in_channels", 3)})
