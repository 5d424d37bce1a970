"""What users call: one class per way from input to picture, and `load_pipeline`, which finds the one that fits.

It may import everything below: `drawing` and `interop`. It does not know training or the command line.
"""

from __future__ import annotations

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
