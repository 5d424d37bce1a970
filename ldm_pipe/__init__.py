"""Latent diffusion in three stages: autoencoder, diffusion, conditioning.

Importing this package costs next to nothing: each public name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ldm_pipe import guidance, samplers
    from ldm_pipe.guidance import thresholding
    from ldm_pipe.networks import UNet
    from ldm_pipe.pipelines import load_pipeline
    from ldm_pipe.pipelines.latent import LatentDiffusionPipeline
    from ldm_pipe.pretrained import LdmPipeError
    from ldm_pipe.schedule import NoiseSchedule

__all__ = [
    "LatentDiffusionPipeline",
    "LdmPipeError",
    "NoiseSchedule",
    "UNet",
    "guidance",
    "load_pipeline",
    "samplers",
    "thresholding",
]

_HOMES = {
    "LatentDiffusionPipeline": "ldm_pipe.pipelines.latent",
    "LdmPipeError": "ldm_pipe.pretrained",
    "NoiseSchedule": "ldm_pipe.schedule",
    "UNet": "ldm_pipe.networks",
    "load_pipeline": "ldm_pipe.pipelines",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name in ("guidance", "samplers"):
        return importlib.import_module(f"ldm_pipe.{name}")
    if name == "thresholding":
        return importlib.import_module("ldm_pipe.guidance.thresholding")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ldm_pipe' has no attribute {name!r}; public names: {', '.join(__all__)}")
