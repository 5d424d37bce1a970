"""A model folder -> the pipeline that fits it.

What enters: a folder or the id of a model. What leaves: one of our pipelines, by the class that `model_index.json`
names. Nothing in a folder can name code to run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import torch

from ldm_pipe.interop.folder import find_folder
from ldm_pipe.pipeline import LatentDiffusionPipeline
from ldm_pipe.pipelines import files, pixel, super_resolution, unconditional, upscale

AnyPipeline: TypeAlias = (
    LatentDiffusionPipeline
    | unconditional.UnconditionalPipeline
    | pixel.PixelDiffusionPipeline
    | upscale.UpscalePipeline
    | super_resolution.SuperResolutionPipeline
)


def load_pipeline(
    name: str | Path | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    variant: str | None = None,
    local_files_only: bool = False,
    revision: str | None = None,
) -> AnyPipeline:
    """Load a model with whichever pipeline draws it.

    Args:
        name: a folder, a training run, or a model of the hub; None is the shipped model.
        dtype: of all weights in memory; None is float32.
        variant: "fp16" reads the files named `*.fp16.safetensors`.
    Raises: LdmPipeError for a class that no pipeline here draws, and as `from_pretrained` of each does.
    """
    source: dict[str, Any] = {"local_files_only": local_files_only, "revision": revision}
    root = find_folder(name, variant=variant, **source)
    options: dict[str, Any] = {"dtype": dtype, "variant": variant}
    match files.class_of(root):
        case "DDPMPipeline" | "DDIMPipeline" | "LDMPipeline" | files.OWN_UNCONDITIONAL:
            return unconditional.UnconditionalPipeline.from_pretrained(root, **options)
        case pixel.CLASS:
            return pixel.PixelDiffusionPipeline.from_pretrained(root, **options)
        case upscale.LATENT | upscale.PIXEL:
            return upscale.UpscalePipeline.from_pretrained(root, **options)
        case super_resolution.CLASS:
            return super_resolution.SuperResolutionPipeline.from_pretrained(root, **options)
        case _:  # what it does not draw either it refuses, by name
            return LatentDiffusionPipeline.from_pretrained(root, **options)
