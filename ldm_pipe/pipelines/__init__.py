"""Pipelines beside LatentDiffusionPipeline, each in one file, and `load_pipeline`, which finds the one that fits."""

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
