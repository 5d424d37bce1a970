"""Two longer bodies of the latent pipeline: parts replaced by others, and prompts encoded for a later call.

What enters: a pipeline. What leaves: the same with other parts, or embeddings. Folders are not known here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm_pipe.drawing import walk as drawing
from ldm_pipe.drawing.request.texts import check_second, check_text
from ldm_pipe.interop.folders.folder import check_fit
from ldm_pipe.pretrained import LdmPipeError

if TYPE_CHECKING:
    from ldm_pipe.pipelines.latent import LatentDiffusionPipeline


def replace_parts(pipe: LatentDiffusionPipeline, parts: Mapping[str, Any]) -> None:
    """Put other parts into a pipeline, all or none.

    Raises: LdmPipeError if they do not belong together, or while LoRAs are merged into those that go.
    """
    known = ("unet", "autoencoder", "text_encoders")
    unknown = [name for name in parts if name not in known]
    if unknown:
        raise LdmPipeError(f"there is no part {unknown[0]!r:.80}", "put", f"Give some of {', '.join(known)}.")
    if pipe.loras.adapters:
        raise LdmPipeError("LoRAs are merged into the parts", "put", "Call unload_lora_weights() first.")
    check_fit(replace(pipe.parts(), **parts))
    for name, part in parts.items():
        setattr(pipe, name, part)


@torch.no_grad()
def encode_both(
    pipe: LatentDiffusionPipeline,
    prompts: Sequence[str],
    negatives: Sequence[str],
    prompt_2: str | Sequence[str] | None,
    negative_prompt_2: str | Sequence[str] | None,
    *,
    clip_skip: int | None,
    is_zero: bool,
) -> tuple[Tensor, ...]:
    """Encode prompts and negative ones: tokens, (B, L, D) each, then pooled vectors, (B, P) each, where there are any.

    Raises: LdmPipeError naming a prompt that is no text.
    """
    for text in (*prompts, *negatives):
        check_text("prompt", text)
    given: dict[str, Any] = {"prompt_2": prompt_2, "negative_prompt_2": negative_prompt_2}
    given |= {"prompt_embeds": None, "negative_prompt_embeds": None}
    second = check_second(pipe, given, len(prompts), guided=True)
    cond = drawing.encode(pipe, list(prompts), clip_skip, second[0])
    uncond = cond.zeros() if is_zero else drawing.encode(pipe, list(negatives), None, second[1])
    pairs = ((cond.tokens, uncond.tokens), (cond.pooled, uncond.pooled))
    return tuple(value for pair in pairs for value in pair if value is not None)
