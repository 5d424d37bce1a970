"""CLIP's training side: a small convolutional image tower and the symmetric contrastive loss.

What enters: images and vectors of texts. What leaves: vectors of images, feature maps for a perceptual distance, a
loss. This file knows no tokenizer and no data set.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe.pretrained import FrozenConfig, LdmPipeError, PretrainedModule

NUM_GROUPS = 8


class ImageStage(nn.Module):
    """Halve the resolution, then one residual convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        """Make both convolutions with their norms."""
        super().__init__()
        self.down = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(NUM_GROUPS, out_channels)
        self.conv = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.norm_out = nn.GroupNorm(NUM_GROUPS, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, C, H, W) to (B, C', H/2, W/2)."""
        x = F.silu(self.norm(self.down(x)))
        return x + F.silu(self.norm_out(self.conv(x)))


class ImageTower(PretrainedModule):
    """Convolutional image encoder of CLIP (Radford et al. 2021, arXiv:2103.00020, sec. 2.4), small enough for a CPU.

    Its feature maps serve as the perceptual distance of autoencoder training (LPIPS form, arXiv:1801.03924, eq. 1).

    Args:
        config: `channels` (one entry per stage, multiples of 8) and `projection_dim`.
    """

    weights_name = "model"
    class_name = "ImageTower"

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Build the stages and the projection."""
        super().__init__()
        channels, width = list(config.get("channels", [])), config.get("projection_dim")
        if not channels or any(not isinstance(c, int) or c <= 0 or c % NUM_GROUPS or c > 4096 for c in channels):
            raise LdmPipeError(f"channels is {channels}, expected multiples of {NUM_GROUPS}", "image tower config")
        if not isinstance(width, int) or not 1 <= width <= 4096:
            raise LdmPipeError(f"projection_dim is {width!r}, expected 1 to 4096", "image tower config")
        self.config = FrozenConfig({**config, "channels": channels})
        self.stages = nn.ModuleList(ImageStage(a, b) for a, b in pairwise([3, *channels]))
        self.norm = nn.LayerNorm(channels[-1])
        self.projection = nn.Linear(channels[-1], width, bias=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ImageTower:
        """Build the tower with random weights."""
        return cls(config)

    def features(self, image: Tensor) -> list[Tensor]:
        """Return the feature map of each stage.

        Args:
            image: in [-1, 1], shape (B, 3, H, W).
        Returns: maps of shape (B, channels[i], H / 2^(i+1), W / 2^(i+1)).
        """
        maps = []
        for stage in self.stages:
            image = stage(image)
            maps.append(image)
        return maps

    def forward(self, image: Tensor) -> Tensor:
        """Embed images in the space shared with texts, shape (B, projection_dim), not normalised."""
        return self.projection(self.norm(self.features(image)[-1].mean(dim=(2, 3))))


def contrastive_loss(images: Tensor, texts: Tensor, log_scale: Tensor, concepts: Tensor | None = None) -> Tensor:
    """Compute the symmetric InfoNCE loss (Radford et al. 2021, arXiv:2103.00020, fig. 3).

        s_ij = exp(log_scale) cos(image_i, text_j)
        loss = -1/2 mean_i (log softmax_j s_ij [j = i] + log softmax_j s_ji [j = i])

    Another row of the same concept says the same thing, so it is no negative: its term is left out of the sum.

    Args:
        images: vectors, shape (B, P); need not be normalised.
        texts: vectors, shape (B, P).
        log_scale: log of the inverse temperature, shape ().
        concepts: whole numbers, shape (B,); equal means the same concept. None: all differ.
    """
    scores = log_scale.exp() * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T  # (B, B)
    if concepts is not None:
        twins = (concepts[:, None] == concepts[None]) & ~torch.eye(
            len(concepts), dtype=torch.bool, device=concepts.device
        )
        scores = scores.masked_fill(twins, float("-inf"))
    target = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
