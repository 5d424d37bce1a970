"""What predicts from x_t: the U-Net (`spec.py`, `config.py`, `unet.py`), unCLIP's prior, the classifier of ADM.

It may import `pretrained`. It does not know schedules, samplers or prompts: a network sees tensors and a time.
"""

from __future__ import annotations

from ldm_pipe.networks.spec import EmbeddingSpec, LevelSpec, MidSpec, UNetSpec
from ldm_pipe.networks.unet import UNet

__all__ = ["EmbeddingSpec", "LevelSpec", "MidSpec", "UNet", "UNetSpec"]
