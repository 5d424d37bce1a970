"""A model folder -> the pipeline that fits it.

What enters: a folder or the id of a model. What leaves: one of our pipelines, by the class that `model_index.json`
names. Nothing in a folder can name code to run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

from ldm_pipe.interop.folder import find_folder
from ldm_pipe.pipeline import LatentDiffusionPipeline
from ldm_pipe.pipelines import files, pixel, super_resolution, unclip, unconditional, upscale

AnyPipeline: TypeAlias = (
    LatentDiffusionPipeline
    | unconditional.UnconditionalPipeline
    | pixel.PixelDiffusionPipeline
    | upscale.UpscalePipeline
    | super_resolution.SuperResolutionPipeline
    | unclip.UnCLIPPipeline
    | unclip.UnCLIPImageVariationPipeline
)


def load_pipeline(name: str | Path | None = None, **options: Any) -> AnyPipeline:
    """Load a model with whichever pipeline draws it.

    Args:
        name: a folder, a training run, or a model of the hub; None is the shipped model.
        options: dtype or torch_dtype, variant, use_safetensors, local_files_only, revision, device: as of
            `LatentDiffusionPipeline.from_pretrained`.
    Raises: LdmPipeError for a class that no pipeline here draws, and as `from_pretrained` of each does.
    """
    source = {key: options.pop(key) for key in ("local_files_only", "revision") if key in options}
    pickles = options.get("use_safetensors") is False
    root = find_folder(name, variant=options.get("variant"), pickles=pickles, **source)
    match files.class_of(root):
        case "DDPMPipeline" | "DDIMPipeline" | "LDMPipeline" | files.OWN_UNCONDITIONAL:
            return unconditional.UnconditionalPipeline.from_pretrained(root, **options)
        case name_of_class if name_of_class in pixel.CLASSES:
            return pixel.PixelDiffusionPipeline.from_pretrained(root, **options)
        case upscale.LATENT | upscale.PIXEL:
            return upscale.UpscalePipeline.from_pretrained(root, **options)
        case super_resolution.CLASS | files.OWN_SUPER_RESOLUTION:
            return super_resolution.SuperResolutionPipeline.from_pretrained(root, **options)
        case unclip.TEXT:
            return unclip.UnCLIPPipeline.from_pretrained(root, **options)
        case unclip.IMAGE:
            return unclip.UnCLIPImageVariationPipeline.from_pretrained(root, **options)
        case _:  # what it does not draw either it refuses, by name
            return LatentDiffusionPipeline.from_pretrained(root, **options)
