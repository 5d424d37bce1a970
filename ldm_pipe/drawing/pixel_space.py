"""Stand for an autoencoder where the diffusion runs on pixels.

What enters: pictures. What leaves: the same. So every stage can be written once, for latents and pixels alike.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from ldm_pipe.pretrained import FrozenConfig


class PixelSpace(nn.Module):
    """The identity between pictures (B, C, H, W) in [-1, 1] and the z that is diffused.

    Args:
        channels: of a picture.
    """

    factor = 1
    dtype = torch.float32

    def __init__(self, channels: int = 3) -> None:
        """Keep the number of channels."""
        super().__init__()
        self.latent_channels = channels
        self.config = FrozenConfig({"latent_channels": channels})

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the picture."""
        return image

    def decode(self, z: Tensor) -> Tensor:
        """Return the picture."""
        return z

    def enable_slicing(self) -> None:
        """Say that there is nothing to save."""
        warnings.warn("slicing and tiling have no effect: this model has no autoencoder", stacklevel=3)

    disable_slicing = enable_tiling = disable_tiling = enable_slicing
