"""Check what a call of any pipeline may ask for: size, steps, seeds, latents, callback, output.

What enters: the arguments of a call. What leaves: fields of a `Request`, or one LdmPipeError that names argument, value
and range. This file knows no prompts and runs no network.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ldm_pipe.drawing.output import MAX_SIDE, OUTPUT_TYPES, FloatDefault, IntDefault, one_of, whole_number
from ldm_pipe.drawing.request.sampling import check_sampling
from ldm_pipe.pretrained import LdmPipeError

MAX_SEED = 2**63 - 1
MAX_PIXELS = 2**32  # of one call
CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")


def check_shared(pipe: Any, given: Mapping[str, Any], count: int, size: tuple[int, int]) -> dict[str, Any]:
    """Settle the fields of a `Request` that say how pictures are drawn, not what of.

    Args:
        count: of the pictures.
        size: height and width, in pixels.
    Raises: LdmPipeError naming argument, value and range.
    """
    height, width = size
    whole_number("pictures x height x width", count * height * width, 1, MAX_PIXELS)
    num_steps = model_default(given["num_inference_steps"], pipe.defaults.num_inference_steps)
    sampling = check_sampling(pipe, given, num_steps, (height // pipe.factor) * (width // pipe.factor))
    seeds, generators = _check_randomness(given["seed"], given["generator"], count)
    skip = given["clip_skip"]
    return {
        "num_pictures": count,
        "height": height,
        "width": width,
        "sampling": sampling,
        "seeds": seeds,
        "generators": generators,
        "latents": check_latents(pipe, given["latents"], count, size),
        "clip_skip": None if skip is None else whole_number("clip_skip", skip, 0, 100),
        "output_type": one_of("output_type", or_default(given["output_type"], "pil"), OUTPUT_TYPES),
        "return_latents": bool(given["return_latents"]),
        "callback": _check_callback(given["callback_on_step_end"]),
        "callback_inputs": _check_callback_inputs(given["callback_on_step_end_tensor_inputs"]),
    }


def or_default(value: Any, default: Any) -> Any:
    """Replace None."""
    return default if value is None else value


def model_default(value: Any, default: Any) -> Any:
    """Replace the signature's default, recognised by its type, with the model's own."""
    untouched = value is None or isinstance(value, (IntDefault, FloatDefault))
    return default if untouched and default is not None else value


def spread(texts: tuple[str, ...] | None, times: int) -> Any:
    """Repeat each text for the pictures of its prompt."""
    return None if texts is None else tuple(text for text in texts for _ in range(times))


def repeat_rows(rows: Tensor | None, times: int) -> Tensor | None:
    """Repeat each row for the pictures of its prompt."""
    return None if rows is None else rows.repeat_interleave(times, dim=0)


def _nearest_sizes(size: int, factor: int) -> str:
    """Name the allowed sizes around one that is not."""
    low = size // factor * factor
    return f"{low} or {low + factor}" if low else str(factor)


def check_size(given: Mapping[str, Any], inherited: tuple[int, int], factor: int) -> tuple[int, int]:
    """Settle height and width: as given, else as inherited; multiples of what one latent spans."""
    sides = []
    for name, value in zip(("height", "width"), inherited, strict=True):
        side = whole_number(name, or_default(given[name], value), 1, MAX_SIDE)
        if side % factor:
            advice = f"use {_nearest_sizes(side, factor)}: sides must be multiples of {factor}"
            raise LdmPipeError(f"{name} is {side}", how_to_fix=advice)
        sides.append(side)
    return sides[0], sides[1]


def check_latents(pipe: Any, latents: Any, count: int, size: tuple[int, int], name: str = "latents") -> Tensor | None:
    """Check latents of all pictures: shape (B, C, h, w), finite floats."""
    wanted = (count, pipe.autoencoder.latent_channels, size[0] // pipe.factor, size[1] // pipe.factor)
    return check_floats(name, latents, wanted)


def check_floats(name: str, value: Any, shape: tuple[int, ...]) -> Tensor | None:
    """Check noise, latents or embeddings that a caller gave: finite floats of one shape; None stays None."""
    if value is None:
        return None
    if not isinstance(value, Tensor) or not value.is_floating_point() or tuple(value.shape) != shape:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise LdmPipeError(f"{name} is {found}", how_to_fix=f"give a float tensor {shape}")
    if not bool(torch.isfinite(value).all()):
        raise LdmPipeError(f"{name} holds NaN or infinity", how_to_fix="give finite numbers")
    return value


def _check_randomness(
    seed: Any, generator: Any, count: int
) -> tuple[tuple[int, ...] | None, tuple[torch.Generator, ...] | torch.Generator | None]:
    """Settle one seed per picture; without any, draw one and tell it, so that the picture can be had again."""
    if generator is not None:
        if seed is not None:
            raise LdmPipeError("both of seed and generator given", how_to_fix="give one of them")
        if isinstance(generator, torch.Generator):
            return None, generator
        generators = tuple(generator) if isinstance(generator, (list, tuple)) else ()
        if len(generators) != count or not all(isinstance(g, torch.Generator) for g in generators):
            raise LdmPipeError(
                f"generator is {generator!r:.80}",
                how_to_fix=f"give a torch.Generator, or a list of {count} for {count} pictures",
            )
        return None, generators
    if seed is None:
        seed = secrets.randbelow(2**32)
    if isinstance(seed, (list, tuple)):
        if len(seed) != count:
            raise LdmPipeError(f"{len(seed)} seeds for {count} pictures", how_to_fix="give one number, or one for each")
        return tuple(whole_number(f"seed {i}", s, 0, MAX_SEED) for i, s in enumerate(seed)), None
    first = whole_number("seed", seed, 0, MAX_SEED - count)
    return tuple(range(first, first + count)), None


def _check_callback(callback: Any) -> Callable[..., Any] | None:
    if callback is not None and not callable(callback):
        raise LdmPipeError(
            "callback_on_step_end cannot be called", how_to_fix="give a function (pipe, i, t, tensors) -> tensors"
        )
    return callback


def _check_callback_inputs(names: Any) -> tuple[str, ...]:
    if not isinstance(names, (list, tuple)):
        raise LdmPipeError(f"callback_on_step_end_tensor_inputs is {names!r:.80}", how_to_fix="give a list of names")
    return tuple(one_of("callback_on_step_end_tensor_inputs", name, CALLBACK_TENSORS) for name in names)
