"""What users call: one class per way from input to picture, and `load_pipeline`, which finds the one that fits.

It may import everything below: `drawing` and `interop`. It does not know training or the command line.
Each name is imported when it is first used, so that a prompt pays for its own pipeline only.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm_pipe.pipelines.load import load_pipeline
    from ldm_pipe.pipelines.pixel import PixelDiffusionPipeline
    from ldm_pipe.pipelines.super_resolution import SuperResolutionPipeline
    from ldm_pipe.pipelines.unclip import UnCLIPImageVariationPipeline, UnCLIPPipeline
    from ldm_pipe.pipelines.unconditional import UnconditionalPipeline
    from ldm_pipe.pipelines.upscale import UpscalePipeline

__all__ = [
    "PixelDiffusionPipeline",
    "SuperResolutionPipeline",
    "UnCLIPImageVariationPipeline",
    "UnCLIPPipeline",
    "UnconditionalPipeline",
    "UpscalePipeline",
    "load_pipeline",
]

_HOMES = {
    "PixelDiffusionPipeline": "pixel",
    "SuperResolutionPipeline": "super_resolution",
    "UnCLIPImageVariationPipeline": "unclip",
    "UnCLIPPipeline": "unclip",
    "UnconditionalPipeline": "unconditional",
    "UpscalePipeline": "upscale",
    "load_pipeline": "load",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
