"""Attention over a picture's positions, and from them to the tokens of a condition.

What enters: features (B, C, h, w) and tokens (B, L, D). What leaves: features of the same shape. This file knows
neither t nor levels. Attribute names are those that diffusers stores.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe.networks.kept import Kept
from ldm_pipe.networks.layers import GroupNorm
from ldm_pipe.pretrained import LdmPipeError

Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]  # q, k, v (B, L, H, D), bias (B, 1, 1, L)


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v (Vaswani et al. 2017, arXiv:1706.03762, eq. 1), by torch's own kernels."""
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias
    ).transpose(1, 2)


def attend_xformers(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the same with xformers' memory-efficient attention.

    Raises: LdmPipeError if xformers is missing or has no operator for these tensors.
    """
    try:
        ops: Any = importlib.import_module("xformers.ops")
        if bias is not None:
            bias = bias.expand(-1, q.shape[2], q.shape[1], -1).contiguous()  # its kernels broadcast no bias
        return ops.memory_efficient_attention(q, k, v, attn_bias=bias)
    except (ImportError, OSError, NotImplementedError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        what = f"xformers cannot compute attention for {q.dtype} on {q.device}: {reason}"
        raise LdmPipeError(what, "attention='xformers'", "Use attention='sdpa', which is as fast.") from None


def choose_attention(name: str, *, device: torch.device, dtype: torch.dtype, head_dim: int) -> Attend:
    """Return the function behind a name; "xformers" is tried out first, so that it is never ignored in silence.

    Raises: LdmPipeError with the reason, where xformers has no operator that runs.
    """
    match name:
        case "sdpa":
            return attend_sdpa
        case "xformers":
            probe = torch.zeros(1, 16, 1, head_dim, device=device, dtype=dtype)
            attend_xformers(probe, probe, probe, None)
            return attend_xformers
        case _:
            raise LdmPipeError(f"unknown attention {name!r}", "set_attention", "Known: 'sdpa', 'xformers'.")


def mask_to_bias(token_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a mask (B, L), true = keep, into a bias (B, 1, 1, L) on the attention scores.

    -10000 instead of -inf, as in diffusers: a row without any token then attends evenly instead of giving NaN.
    """
    return ((token_mask.to(dtype) - 1.0) * 10000.0)[:, None, None, :]


class Attention(nn.Module):
    """Multi-head attention; keys and values come from the tokens where `token_dim` is given, else from x itself."""

    def __init__(self, dim: int, num_heads: int, token_dim: int | None, *, upcast: bool, bias: bool = False) -> None:
        """Build four projections; the three inner ones carry a bias in unCLIP's prior only."""
        super().__init__()
        self.num_heads, self.is_cross, self.upcast = num_heads, token_dim is not None, upcast
        self.attend: Attend = attend_sdpa
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(token_dim or dim, dim, bias=bias)
        self.to_v = nn.Linear(token_dim or dim, dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Project tokens (B, L, D) to keys and values, each (B, L, heads, dim / heads)."""
        shape = (source.shape[0], source.shape[1], self.num_heads, -1)
        return self.to_k(source).view(shape), self.to_v(source).view(shape)

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor] | None, bias: Tensor | None) -> Tensor:
        """Attend from x (B, N, C) to the given keys and values, or to x itself."""
        k, v = self.keys_values(x) if keys_values is None else keys_values
        q = self.to_q(x).view(x.shape[0], x.shape[1], self.num_heads, -1)
        if self.upcast and q.dtype != torch.float32:
            out = self.attend(q.float(), k.float(), v.float(), None if bias is None else bias.float()).to(q.dtype)
        else:
            out = self.attend(q, k, v, bias)
        return self.to_out[0](out.reshape(x.shape))


class GEGLU(nn.Module):
    """value * gelu(gate), both from one projection (Shazeer 2020, arXiv:2002.05202, eq. 6)."""

    def __init__(self, dim: int, hidden: int) -> None:
        """Build the double projection."""
        super().__init__()
        self.proj = nn.Linear(dim, hidden * 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim) to (..., hidden)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Two layers with a gated middle; index 1 of `net` is diffusers' dropout slot and holds nothing."""

    def __init__(self, dim: int) -> None:
        """Build dim -> 4 dim -> dim."""
        super().__init__()
        self.net = nn.ModuleList([GEGLU(dim, dim * 4), nn.Identity(), nn.Linear(dim * 4, dim)])

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, C) to (B, N, C)."""
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, attention to the tokens, feed-forward; each after a norm and added to its input.

    With `only_cross` the first attention looks at the tokens too (the x4-upscaler). The token mask then holds there as
    well; diffusers leaves that one unmasked, which lets padding through.
    """

    def __init__(self, dim: int, num_heads: int, token_dim: int, *, only_cross: bool, upcast: bool) -> None:
        """Build the three parts."""
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, num_heads, token_dim if only_cross else None, upcast=upcast)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, num_heads, token_dim, upcast=upcast)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, kept: Kept, bias: Tensor | None) -> Tensor:
        """Map (B, N, C) to (B, N, C)."""
        if self.attn1.is_cross:
            x = x + self.attn1(self.norm1(x), self.attn1.keys_values(kept.tokens), bias)
        else:
            x = x + self.attn1(self.norm1(x), None, None)
        x = x + self.attn2(self.norm2(x), kept.once(self.attn2, lambda: self.attn2.keys_values(kept.tokens)), bias)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map (Rombach et al. 2022, arXiv:2112.10752, section 3.3)."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        depth: int,
        token_dim: int,
        *,
        num_groups: int,
        linear: bool,
        only_cross: bool = False,
        upcast: bool = False,
    ) -> None:
        """Build norm, projection in, blocks, projection out; `linear` says how the projections are stored."""
        super().__init__()
        self.linear = linear
        self.norm = GroupNorm(num_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, num_heads, token_dim, only_cross=only_cross, upcast=upcast) for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, kept: Kept, bias: Tensor | None) -> Tensor:
        """Map features (B, C, h, w) to the same shape."""
        batch, channels, height, width = x.shape
        h = self.norm(x)
        if self.linear:
            h = self.proj_in(h.permute(0, 2, 3, 1).reshape(batch, height * width, channels))  # (B, hw, C)
        else:
            h = self.proj_in(h).permute(0, 2, 3, 1).reshape(batch, height * width, channels)  # (B, hw, C)
        for block in self.transformer_blocks:
            h = block(h, kept, bias)
        if self.linear:
            h = self.proj_out(h)
        h = h.view(batch, height, width, channels).permute(0, 3, 1, 2)  # (B, C, h, w), channels last in memory
        return x + (h if self.linear else self.proj_out(h))
