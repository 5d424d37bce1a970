"""A model folder -> the pipeline that fits it.

What enters: a folder or the id of a model. What leaves: one of our pipelines, by the class that `model_index.json`
names. Nothing in a folder can name code to run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

from ldm_pipe.interop.folders import other
from ldm_pipe.interop.folders.folder import find_folder
from ldm_pipe.pipelines import pixel, super_resolution, unclip, unconditional, upscale
from ldm_pipe.pipelines.latent import LatentDiffusionPipeline
from ldm_pipe.pretrained import LdmPipeError

AnyPipeline: TypeAlias = (
    LatentDiffusionPipeline
    | unconditional.UnconditionalPipeline
    | pixel.PixelDiffusionPipeline
    | upscale.UpscalePipeline
    | super_resolution.SuperResolutionPipeline
    | unclip.UnCLIPPipeline
    | unclip.UnCLIPImageVariationPipeline
)
KINDS: tuple[tuple[tuple[str, ...], Any], ...] = (
    (unconditional.CLASSES, unconditional.UnconditionalPipeline),
    (pixel.CLASSES, pixel.PixelDiffusionPipeline),
    (upscale.CLASSES, upscale.UpscalePipeline),
    (super_resolution.CLASSES, super_resolution.SuperResolutionPipeline),
    ((unclip.TEXT,), unclip.UnCLIPPipeline),
    ((unclip.IMAGE,), unclip.UnCLIPImageVariationPipeline),
)
OPTIONS = ("dtype", "torch_dtype", "variant", "use_safetensors", "local_files_only", "revision", "device")


def load_pipeline(name: str | Path | None = None, **options: Any) -> AnyPipeline:
    """Load a model with whichever pipeline draws it.

    Args:
        name: a folder, a training run, or a model of the hub; None is the shipped model.
        options: dtype or torch_dtype, variant, use_safetensors, local_files_only, revision, device: as of
            `LatentDiffusionPipeline.from_pretrained`.
    Raises: LdmPipeError for an unknown option or a class that no pipeline here draws, and as each `from_pretrained`.
    """
    unknown = [key for key in options if key not in OPTIONS]
    if unknown:
        raise LdmPipeError(f"unknown {', '.join(unknown)}", "load_pipeline", f"Known are name, {', '.join(OPTIONS)}.")
    source = {key: options.pop(key) for key in ("local_files_only", "revision") if key in options}
    pickles = options.get("use_safetensors") is False
    root = find_folder(name, variant=options.get("variant"), pickles=pickles, **source)
    found = other.class_of(root)
    for names, kind in KINDS:
        if found in names:
            return kind.from_pretrained(root, **options)
    return LatentDiffusionPipeline.from_pretrained(root, **options)  # what it does not draw either it refuses, by name
