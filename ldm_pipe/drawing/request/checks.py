"""Check what a caller of a small pipeline asks for, once and before any work.

What enters: the arguments of a call. What leaves: a `Request` without open questions, or one LdmPipeError that names
argument, value and range. Every check is the one of LatentDiffusionPipeline where that has it; no network runs here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm_pipe.drawing.output import MAX_PICTURES, Thresholding, real_number, whole_number
from ldm_pipe.drawing.pixel_space import PixelSpace
from ldm_pipe.drawing.pixels import load_images
from ldm_pipe.drawing.request.request import Request
from ldm_pipe.drawing.request.shared import check_shared, check_size, model_default, or_default, repeat_rows, spread
from ldm_pipe.drawing.request.texts import check_embeds, check_negatives, check_prompts
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.samplers.from_diffusers import SchedulerSampler
from ldm_pipe.schedule.keys import KEYS

# Arguments that LatentDiffusionPipeline has and a pipeline of this package may leave out.
NEUTRAL: dict[str, Any] = {
    "timesteps": None,
    "sigmas": None,
    "guidance_scale": 1.0,
    "negative_prompt": None,
    "prompt_embeds": None,
    "negative_prompt_embeds": None,
    "clip_skip": None,
}
_CLIPPING = ("DDIM", "DDPM", "UnCLIP", "LCM", "Heun")  # the classes of diffusers that read clip_sample


@dataclass(frozen=True)
class Texts:
    """The prompts of a call, picture by picture, or their embeddings."""

    prompts: tuple[str, ...] | None
    negatives: tuple[str, ...]
    prompt_embeds: Tensor | None
    negative_embeds: Tensor | None
    num_pictures: int
    guidance_scale: float


def no_texts(count: Any, guidance_scale: float = 1.0) -> Texts:
    """Describe a call for so many pictures without prompts."""
    count = whole_number("the number of pictures", count, 1, MAX_PICTURES)
    return Texts(None, ("",) * count, None, None, count, guidance_scale)


def check_texts(pipe: Any, given: Mapping[str, Any]) -> Texts:
    """Check prompts, negative prompts and embeddings, and repeat them for every picture.

    Raises: LdmPipeError naming argument, value and range.
    """
    given = {**NEUTRAL, **given}
    scale = check_scale(pipe, given)
    prompts, num_prompts = check_prompts(given["prompt"], given["prompt_embeds"])
    if prompts is not None and not pipe.text_encoders:
        raise LdmPipeError("this model has no text encoder", how_to_fix="give prompt_embeds")
    each = whole_number("num_images_per_prompt", or_default(given["num_images_per_prompt"], 1), 1, MAX_PICTURES)
    count = whole_number("the number of pictures", num_prompts * each, 1, MAX_PICTURES)
    negatives = check_negatives(given, num_prompts, guided=scale > 1)
    tokens, null = (repeat_rows(rows, each) for rows in check_embeds(pipe, given, num_prompts, scale > 1))
    return Texts(spread(prompts, each), spread(negatives, each), tokens, null, count, scale)


def check_scale(pipe: Any, given: Mapping[str, Any]) -> float:
    """Settle the guidance scale: as given, else the model's."""
    scale = model_default(given["guidance_scale"], pipe.defaults.guidance_scale)
    return real_number("guidance_scale", scale, 0.0, 1000.0)


def check_small(value: Any, count: int | None, num_groups: int = 1) -> Tensor:
    """Read the pictures to enlarge, and repeat them for every picture to draw.

    Args:
        value: what the caller gave.
        count: how many are drawn; None: one for each.
        num_groups: prompts, each of which may have its picture.
    Returns: (B, 3, h, w) in [-1, 1].
    """
    if value is None:
        raise LdmPipeError("no image", how_to_fix="give the small picture as image")
    small = load_images(value) * 2 - 1
    count = len(small) if count is None else count
    if len(small) not in (1, num_groups, count) or count % len(small):
        what = f"{len(small)} pictures in image, {count} to draw"
        raise LdmPipeError(what, how_to_fix="give one for all, or one for each")
    return small.repeat_interleave(count // len(small), dim=0)


def fit_small(
    pipe: Any, small: Tensor, given: Mapping[str, Any], *, align_corners: bool
) -> tuple[Tensor, tuple[int, int]]:
    """Settle the size of the result, and bring the small pictures to the size of x_t.

    Args:
        given: `height` and `width`, which only a model in pixels takes.
        align_corners: how such a model was shown enlarged pictures.
    Returns: the pictures (B, 3, h, w), and the height and width of the result.
    """
    if isinstance(pipe.autoencoder, PixelSpace):
        size = check_size(given, pipe.default_size, 1)
        return nn.functional.interpolate(small, size, mode="bilinear", align_corners=align_corners), size
    size = (small.shape[2] * pipe.factor, small.shape[3] * pipe.factor)
    if given["height"] not in (None, size[0]) or given["width"] not in (None, size[1]):
        what = f"height and width are {given['height']} and {given['width']}"
        raise LdmPipeError(what, how_to_fix=f"leave them out: the result is {size[0]}x{size[1]}")
    return small, size


def check_labels(labels: Any, count: int, num_classes: int, name: str = "class_labels") -> Tensor:
    """Read one class for all pictures, or one for each.

    Args:
        num_classes: rows of the U-Net's table; 0 where it has none.
    Returns: (B,).
    """
    given = labels.tolist() if isinstance(labels, Tensor) else labels
    rows = list(given) if isinstance(given, (list, tuple)) else [given] * count
    last = num_classes - 1 if num_classes else 2**31 - 1
    for value in rows:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= last:
            raise LdmPipeError(f"{name} holds {value!r:.80}", how_to_fix=f"give whole numbers from 0 to {last}")
    if len(rows) != count:
        raise LdmPipeError(f"{len(rows)} {name} for {count} pictures", how_to_fix="give one for all, or one for each")
    return torch.tensor(rows, dtype=torch.int64)


def check_call(pipe: Any, given: Mapping[str, Any], texts: Texts, size: tuple[int, int]) -> Request:
    """Settle everything that is not particular to one pipeline.

    Args:
        given: the arguments of the call.
        texts: how many pictures, from what.
        size: height and width, in pixels.
    Raises: LdmPipeError naming argument, value and range, before any work.
    """
    given = {**NEUTRAL, **given}
    shared = check_shared(pipe, given, texts.num_pictures, size)
    sampling = shared["sampling"]
    rule = _thresholding(pipe, given["thresholding"], foreign=isinstance(sampling.run, SchedulerSampler))
    if sampling.name == "ddim" and rule.kind != "none" and given["thresholding"] is None:
        shared["sampling"] = replace(sampling, options={"keep_eps": True, **sampling.options})  # as diffusers does
    return Request(
        **shared,
        prompts=texts.prompts,
        negatives=texts.negatives,
        prompt_embeds=texts.prompt_embeds,
        negative_embeds=texts.negative_embeds,
        guidance_scale=texts.guidance_scale,
        guidance_rescale=0.0,
        thresholding=rule,
        image=None,
        mask=None,
        strength=1.0,
    )


def _thresholding(pipe: Any, given: Any, *, foreign: bool) -> Thresholding:
    """Settle it: as given, else left to a scheduler object, else the model's own, else its scheduler file's."""
    if given is None and foreign:
        return Thresholding()
    given = pipe.defaults.thresholding if given is None else given
    return thresholding_of(pipe.schedule.config) if given is None else Thresholding.read(given)


def thresholding_of(config: Mapping[str, Any]) -> Thresholding:
    """Read `thresholding`, else `clip_sample`, of a diffusers scheduler config, as its class would.

    Only diffusers' pipelines of Stable Diffusion turn `clip_sample` off; those of pixels rely on it.
    """
    asked = Thresholding.of_scheduler(config)
    name = str(config.get("_class_name"))
    if asked is not None:
        return asked
    if name.startswith(_CLIPPING) and config.get("clip_sample", "clip_sample" in KEYS.get(name, {})):
        limit = real_number("clip_sample_range", config.get("clip_sample_range", 1.0), 1e-3, 1e4)
        return Thresholding("static", max_value=limit)
    return Thresholding()
