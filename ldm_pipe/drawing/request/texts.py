"""Check the texts of a call: prompts, negative prompts and precomputed embeddings.

What enters: what the caller gave. What leaves: as many checked texts or embeddings as there are prompts, or one
LdmPipeError. This file runs no network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm_pipe.drawing.output import warn_ignored
from ldm_pipe.interop.folders.index import num_numbers
from ldm_pipe.pretrained import LdmPipeError

if TYPE_CHECKING:
    from ldm_pipe.pipelines.latent import LatentDiffusionPipeline

MAX_PROMPT = 100_000  # characters; no encoder reads more than a few hundred tokens


def check_text(name: str, value: Any) -> str:
    """Check one prompt: a string that is text (no lone surrogates) and of sane length."""
    if not isinstance(value, str):
        raise LdmPipeError(f"{name} is a {type(value).__name__}", how_to_fix="give a string or a list of strings")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise LdmPipeError(f"{name} is not valid text ({error.reason})", how_to_fix="give valid Unicode") from None
    if len(value) > MAX_PROMPT:
        raise LdmPipeError(f"{name} has {len(value)} characters", how_to_fix=f"at most {MAX_PROMPT} are read")
    return value


def check_prompts(prompt: Any, embeds: Any) -> tuple[tuple[str, ...] | None, int]:
    """Check that there is exactly one of prompt and prompt_embeds.

    Returns: the prompts, None for embeddings, and how many there are.
    """
    if (prompt is None) == (embeds is None):
        state = "neither" if prompt is None else "both"
        raise LdmPipeError(f"{state} of prompt and prompt_embeds given", how_to_fix="give one of them")
    if prompt is None:
        if not isinstance(embeds, Tensor) or embeds.ndim != 3 or 0 in embeds.shape:
            raise LdmPipeError(
                "prompt_embeds must be a tensor (batch, tokens, channels)", how_to_fix="see pipe.encode_prompt"
            )
        return None, embeds.shape[0]
    if isinstance(prompt, str):
        return (check_text("prompt", prompt),), 1
    if not isinstance(prompt, (list, tuple)) or not prompt:
        raise LdmPipeError(f"prompt is {prompt!r:.80}", how_to_fix="give a string or a list of at least one string")
    return tuple(check_text(f"prompt {i}", text) for i, text in enumerate(prompt)), len(prompt)


def check_negatives(given: Mapping[str, Any], num_prompts: int, *, guided: bool) -> tuple[str, ...]:
    """Check the negative prompts; one text stands for all."""
    negative = given["negative_prompt"]
    if negative is not None and given["negative_prompt_embeds"] is not None:
        raise LdmPipeError("both of negative_prompt and negative_prompt_embeds given", how_to_fix="give one of them")
    if negative is None:
        return ("",) * num_prompts
    if isinstance(negative, str):
        negatives: Sequence[Any] = [negative] * num_prompts
    elif isinstance(negative, (list, tuple)):
        negatives = negative
    else:
        raise LdmPipeError(f"negative_prompt is {negative!r:.80}", how_to_fix="give a string or a list of strings")
    if len(negatives) != num_prompts:
        what = f"{len(negatives)} negative prompts for {num_prompts} prompts"
        raise LdmPipeError(what, how_to_fix="give one for all, or one for each")
    checked = tuple(check_text(f"negative_prompt {i}", text) for i, text in enumerate(negatives))
    if any(checked) and not guided:
        warn_ignored("negative_prompt", "it needs a guidance_scale above 1")
    return checked


def check_second(
    pipe: LatentDiffusionPipeline, given: Mapping[str, Any], num_prompts: int, *, guided: bool
) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """Check the texts for the second text encoder and those after it; without any they read what the first reads."""
    found: list[tuple[str, ...] | None] = []
    for name, beside in (("prompt_2", "prompt_embeds"), ("negative_prompt_2", "negative_prompt_embeds")):
        value = given[name]
        if value is None:
            found.append(None)
            continue
        if len(pipe.text_encoders) < 2:
            what = f"{name} is given, but this model has {len(pipe.text_encoders)} text encoder"
            raise LdmPipeError(what, how_to_fix=f"leave {name} out")
        if given[beside] is not None:
            raise LdmPipeError(f"both of {name} and {beside} given", how_to_fix="give one of them")
        texts = [value] * num_prompts if isinstance(value, str) else value
        if not isinstance(texts, (list, tuple)) or len(texts) != num_prompts:
            what = f"{name} is {value!r:.80} for {num_prompts} prompts"
            raise LdmPipeError(what, how_to_fix="give one text for all, or a list of one for each")
        found.append(tuple(check_text(f"{name} {i}", text) for i, text in enumerate(texts)))
    if found[1] is not None and any(found[1]) and not guided:
        warn_ignored("negative_prompt_2", "it needs a guidance_scale above 1")
    return found[0], found[1]


def check_pooled(
    pipe: LatentDiffusionPipeline, given: Mapping[str, Any], num_prompts: int
) -> tuple[Tensor | None, Tensor | None]:
    """Check the pooled vectors that go with precomputed embeddings, where the U-Net reads one."""
    spec = pipe.unet.spec.embedding
    width = spec.vector_dim - num_numbers(pipe.unet, pipe.text_encoders) * spec.number_dim
    pairs = (
        ("pooled_prompt_embeds", "prompt_embeds"),
        ("negative_pooled_prompt_embeds", "negative_prompt_embeds"),
    )
    for name, beside in pairs:
        value = given[name]
        if value is not None and not spec.number_dim:
            raise LdmPipeError(f"{name} is given, but this model reads no pooled vector", how_to_fix="leave it out")
        if spec.number_dim and (value is None) != (given[beside] is None):
            lacking, there = (name, beside) if value is None else (beside, name)
            raise LdmPipeError(f"{there} without {lacking}", how_to_fix="give both, from the same text encoders")
        if value is None:
            continue
        fits = isinstance(value, Tensor) and value.is_floating_point() and tuple(value.shape) == (num_prompts, width)
        if not fits or not bool(torch.isfinite(value).all()):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            advice = f"give finite floats ({num_prompts}, {width})"
            raise LdmPipeError(f"{name} is {shape}", how_to_fix=advice)
    return given["pooled_prompt_embeds"], given["negative_pooled_prompt_embeds"]


def check_embeds(
    pipe: LatentDiffusionPipeline, given: Mapping[str, Any], num_prompts: int, guided: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Check precomputed embeddings: width of the U-Net, one row per prompt, finite numbers."""
    tokens, null = given["prompt_embeds"], given["negative_prompt_embeds"]
    if null is not None and not guided:
        warn_ignored("negative_prompt_embeds", "it needs a guidance_scale above 1")
    for name, value in (("prompt_embeds", tokens), ("negative_prompt_embeds", null)):
        if value is None:
            continue
        width = pipe.unet.config.get("encoder_hid_dim") or pipe.unet.config.get("cross_attention_dim")
        if (
            not isinstance(value, Tensor)
            or not value.is_floating_point()
            or value.ndim != 3
            or value.shape[0] != num_prompts
        ):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise LdmPipeError(f"{name} is {shape}", how_to_fix=f"give a float tensor ({num_prompts}, tokens, {width})")
        if isinstance(width, int) and value.shape[2] != width:
            raise LdmPipeError(f"{name} has {value.shape[2]} channels", how_to_fix=f"the U-Net takes {width}")
        if not bool(torch.isfinite(value).all()):
            raise LdmPipeError(f"{name} holds NaN or infinity", how_to_fix="encode the prompt anew")
    if tokens is not None and null is not None and tokens.shape != null.shape:
        what = f"prompt_embeds {tuple(tokens.shape)} and negative_prompt_embeds {tuple(null.shape)} differ"
        raise LdmPipeError(what, how_to_fix="give equal shapes")
    return tokens, null
