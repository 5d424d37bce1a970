"""Save a pipeline as a model folder, with a golden sample of exactly the weights that were written."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ldm_pipe.drawing.golden import golden_sample
from ldm_pipe.interop.folders.card import model_card
from ldm_pipe.interop.folders.folder import RUN_PIPELINE, ZERO_KEY, Parts, load_parts, write_folder
from ldm_pipe.pretrained import LdmPipeError

if TYPE_CHECKING:
    from ldm_pipe.pipelines.latent import LatentDiffusionPipeline


def model_hash(parts: Parts, dtype: torch.dtype) -> str:
    """Return ten hexadecimal digits that name the U-Net's weights, rounded to `dtype`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(parts.unet.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu", dtype).to(torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:10]


def save_pipeline(
    pipe: LatentDiffusionPipeline,
    target: Path,
    *,
    variant: str | None,
    dtype: torch.dtype,
    card: Mapping[str, str] | None,
    sampler: str | None = None,
) -> None:
    """Write a folder and the golden sample of its weights, as they are after rounding to `dtype`.

    Args:
        sampler: which one diffusers starts with; None is the pipeline's default.
    Raises: LdmPipeError if something cannot be written or has no place in a diffusers folder.
    """
    if target.exists() and not target.is_dir():
        raise LdmPipeError("is a file, not a folder", str(target), "Choose another folder.")
    sampler = sampler or pipe.defaults.sampler or "ddim"
    place = target.resolve()
    parts = replace(pipe.parts(), name=pipe.name or (place.parent.name if place.name == RUN_PIPELINE else place.name))
    own: dict[str, Any] = {
        "name": parts.name,
        "model_hash": model_hash(parts, dtype),
        "defaults": replace(parts.defaults, sampler=sampler).to_json(),
    }
    if parts.spatial is not None:
        own["spatial"] = parts.spatial.stored()
    if parts.labels is not None:
        own["labels"] = parts.labels.stored()
    if parts.zero_empty_prompt:
        own[ZERO_KEY] = True
    text = model_card(parts, name=parts.name, sampler=sampler, dtype=str(dtype).removeprefix("torch."), facts=card)
    write_folder(parts, target, sampler=sampler, dtype=dtype, variant=variant, own=own, card=text, golden=_golden_of)


def _golden_of(folder: Path, variant: str | None) -> dict[str, Any]:
    """Load what was written, in float32, and draw its golden sample."""
    from ldm_pipe.pipelines.latent import LatentDiffusionPipeline

    parts = load_parts(folder, dtype=torch.float32, variant=variant)
    return golden_sample(LatentDiffusionPipeline.from_parts(parts))
