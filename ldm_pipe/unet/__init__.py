"""The U-Net: `spec.py` says what it is made of, `config.py` reads and writes that, `network.py` runs it."""

from __future__ import annotations

from ldm_pipe.unet.network import UNet
from ldm_pipe.unet.spec import EmbeddingSpec, LevelSpec, MidSpec, UNetSpec

__all__ = ["EmbeddingSpec", "LevelSpec", "MidSpec", "UNet", "UNetSpec"]
