"""The parts of a U-Net without attention: embeddings of t, residual blocks, resampling.

What enters: features (B, C, h, w) and the embedding of t (B, E). What leaves: features. This file knows no config.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe.networks.convolution import Conv3x3, doubling_convolution, doubling_kernel, doubling_transposed
from ldm_pipe.networks.kept import Kept


def silu(x: Tensor) -> Tensor:
    """Apply SiLU; it only ever sees the fresh output of a norm, hence in place where no gradient is kept."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "swish": silu,
    "gelu": F.gelu,
    "mish": F.mish,
    "relu": F.relu,
}


def sinusoid(t: Tensor, dim: int, *, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Embed numbers as sines and cosines (Ho et al. 2020, arXiv:2006.11239, appendix B).

        angle_i = t * 10000^(-i / (dim/2 - freq_shift)),   embedding = (sin, cos), or (cos, sin) if flipped

    Args:
        t: numbers of any shape (...).
    Returns: float32 (fp32 because exp), shape (..., dim).
    """
    half = dim // 2
    exponent = torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(10000.0) / (half - freq_shift))
    angle = t.float()[..., None] * exponent.exp()
    parts = (angle.cos(), angle.sin()) if flip_sin_to_cos else (angle.sin(), angle.cos())
    return F.pad(torch.cat(parts, dim=-1), (0, dim % 2))


class VectorEmbedding(nn.Module):
    """Linear, activation, linear: from a sinusoid or a pooled vector to the embedding that residual blocks read."""

    def __init__(self, in_dim: int, out_dim: int, activation: str = "silu", *, hidden: int | None = None) -> None:
        """Build two layers; `hidden` is the width between them, None that of the result."""
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, hidden or out_dim)
        self.linear_2 = nn.Linear(hidden or out_dim, out_dim)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in) to (B, out)."""
        return self.linear_2(self.activation(self.linear_1(x)))


def pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a 1x1 convolution as the matrix product it is: (B, C, h, w) to (B, C', h, w), in the memory order of x."""
    if conv._forward_hooks:  # an adapter in training adds to what the call returns
        return conv(x)
    if x.is_contiguous() and conv.bias is not None:  # as in training: (C', C) times (C, h w) for each picture
        matrix = conv.weight.flatten(1).expand(len(x), -1, -1)
        return torch.baddbmm(conv.bias[:, None], matrix, x.flatten(2)).view(len(x), -1, *x.shape[2:])
    return F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)


class GroupNorm(nn.GroupNorm):
    """torch's own, fed channel by channel: its kernel for channels-last features takes up to ten times as long."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same shape."""
        return super().forward(x.contiguous())


class ResidualBlock(nn.Module):
    """Two convolutions, the embedding of t added between them (Ho et al. 2020, arXiv:2006.11239, appendix B).

    With `scale_shift` it scales and shifts the second norm instead; with `resample` the resolution changes within the
    block, by averaging or repeating (both: Dhariwal & Nichol 2021, arXiv:2105.05233, section 3).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_dim: int,
        *,
        num_groups: int,
        eps: float,
        activation: str,
        dropout: float,
        scale_factor: float = 1.0,
        scale_shift: bool = False,
        resample: Literal["down", "up"] | None = None,
    ) -> None:
        """Build the block; the sum is divided by `scale_factor`."""
        super().__init__()
        self.norm1 = GroupNorm(num_groups, in_channels, eps=eps)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.time_emb_proj = nn.Linear(emb_dim, out_channels * (2 if scale_shift else 1))
        self.norm2 = GroupNorm(num_groups, out_channels, eps=eps)
        self.conv2 = Conv3x3(out_channels, out_channels)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.activation = ACTIVATIONS[activation]
        self.dropout, self.scale_factor, self.scale_shift = dropout, scale_factor, scale_shift
        self.resample = resample

    def _resample(self, x: Tensor, size: tuple[int, int] | None) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, size=size, mode="nearest") if self.resample == "up" else x

    def forward(self, x: Tensor, emb: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Map features (B, C, h, w), to `size` on the way up; `emb` (B, E) has been through the activation already."""
        h = self.conv1(self._resample(self.activation(self.norm1(x)), size))
        x = self._resample(x, size)
        emb = self.time_emb_proj(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.activation(self.norm2(h) * (1 + scale) + shift)
        else:
            h = self.activation(self.norm2(h + emb))
        if self.dropout and self.training:
            h = F.dropout(h, self.dropout)
        h = self.conv2(h)
        x = (x if self.conv_shortcut is None else pointwise(self.conv_shortcut, x)) + h
        return x if self.scale_factor == 1.0 else x / self.scale_factor


class Downsample(nn.Module):
    """Halve both sides by a strided convolution."""

    def __init__(self, channels: int, *, asymmetric: bool) -> None:
        """Build the convolution; `asymmetric` pads one row and column at the far sides only."""
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C, ceil(h/2), ceil(w/2)); floor if asymmetric."""
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Repeat each position, then smooth by a convolution."""

    def __init__(self, channels: int) -> None:
        """Build the convolution."""
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor, size: tuple[int, int], kept: Kept | None = None) -> Tensor:
        """Map (B, C, h, w) to (B, C, *size), the size that was left on the way down."""
        doubled = size == (2 * x.shape[2], 2 * x.shape[3])
        plain = x.device.type == "cpu" and x.dtype == torch.float32 and not self.conv._forward_hooks
        positions = x.shape[2] * x.shape[3]
        if doubled and plain and torch.is_grad_enabled() and len(x) * positions >= 256:
            return doubling_transposed(x, self.conv.weight, self.conv.bias)
        worth = positions >= 16  # below, reading the larger kernel costs more than the products saved
        if kept is not None and kept.keep and doubled and plain and worth:
            kernel = kept.once(self, lambda: doubling_kernel(self.conv.weight))
            return doubling_convolution(x, kernel, self.conv.bias)
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
