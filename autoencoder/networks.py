"""The convolutional encoder and decoder that all first stages share.

An image enters the encoder and a map of features leaves it; latents enter the decoder and an image leaves it. What the
features mean (a Gaussian, a code book) and how latents are normalised is not known here. Attribute names are those of
diffusers, so that its weight files fit without a map. Architecture: LDM (arXiv:2112.10752, appendix G), after VQGAN
(arXiv:2012.09841, table 7).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUP_NORM_EPS = 1e-6


def silu(x: Tensor) -> Tensor:
    """Apply SiLU; it only ever sees the fresh output of a norm, hence in place where no gradient is kept."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "swish": silu,
    "mish": F.mish,
    "gelu": F.gelu,
    "relu": F.relu,
}


class ResnetBlock(nn.Module):
    """Add two normalised 3x3 convolutions to their input."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int, act_fn: str) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, in_channels, eps=GROUP_NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(num_groups, out_channels, eps=GROUP_NORM_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.act = ACTIVATIONS[act_fn]

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in, h, w) to (B, out, h, w)."""
        h = self.conv1(self.act(self.norm1(x)))
        h = self.conv2(self.act(self.norm2(h)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return x + h


class Attention(nn.Module):
    """Add single-head self-attention over all positions to the input."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(num_groups, channels, eps=GROUP_NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same shape."""
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, L, C)
        q, k, v = (to(h).unsqueeze(1) for to in (self.to_q, self.to_k, self.to_v))  # (B, 1, L, C)
        h = self.to_out[0](F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    """Halve height and width with a strided convolution, padded on the right and at the bottom."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C, h / 2, w / 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width by repetition, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C, 2 h, 2 w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Hold the residual blocks of one resolution; what changes the resolution follows them."""

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, num_groups: int, act_fn: str, resample: str | None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, num_groups, act_fn)
            for i in range(num_blocks)
        )
        self.downsamplers = nn.ModuleList([Downsample(out_channels)] if resample == "down" else [])
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if resample == "up" else [])

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in, h, w) to (B, out, h', w')."""
        for module in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = module(x)
        return x


class MidBlock(nn.Module):
    """Hold two residual blocks with an optional attention between them."""

    def __init__(self, channels: int, num_groups: int, act_fn: str, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, num_groups, act_fn) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, num_groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same shape."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    """Map an image to features at 1 / 2**(levels - 1) of its size.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the features (twice the latent's for a Gaussian).
        block_out_channels: width of each level, from the image inwards.
        num_blocks: residual blocks per level.
        num_groups: groups of every group norm.
        act_fn: a name in `ACTIVATIONS`.
        mid_attention: whether the middle holds an attention.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        block_out_channels: Sequence[int],
        num_blocks: int,
        num_groups: int,
        act_fn: str = "silu",
        mid_attention: bool = True,
    ) -> None:
        super().__init__()
        widths = list(block_out_channels)
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], width, num_blocks, num_groups, act_fn, "down" if i < last else None)
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], num_groups, act_fn, mid_attention)
        self.conv_norm_out = nn.GroupNorm(num_groups, widths[-1], eps=GROUP_NORM_EPS)
        self.act = silu  # whatever act_fn says, as in diffusers
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, in, H, W) to (B, out, H / f, W / f)."""
        x = self.conv_in(image)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(self.act(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Map latents to an image 2**(levels - 1) times their size; the encoder's mirror with one more block per level.

    Args:
        in_channels: channels of the latents.
        out_channels: channels of the image.
        block_out_channels: width of each level, from the image inwards (as for the encoder).
        num_blocks: residual blocks per level of the *encoder*; the decoder has one more.
        num_groups: groups of every group norm.
        act_fn: a name in `ACTIVATIONS`.
        mid_attention: whether the middle holds an attention.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        block_out_channels: Sequence[int],
        num_blocks: int,
        num_groups: int,
        act_fn: str = "silu",
        mid_attention: bool = True,
    ) -> None:
        super().__init__()
        widths = list(reversed(block_out_channels))
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], num_groups, act_fn, mid_attention)
        self.up_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], width, num_blocks + 1, num_groups, act_fn, "up" if i < last else None)
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(num_groups, widths[-1], eps=GROUP_NORM_EPS)
        self.act = silu  # whatever act_fn says, as in diffusers
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Map (B, in, h, w) to (B, out, f h, f w)."""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.act(self.conv_norm_out(x)))
