"""Edit with the noise of a picture: find it, walk between two, leave it a little.

What enters: a pipeline, pictures, prompts, seeds. What leaves: noise for `pipe(latents=)`, or pictures. Drawing is the
pipeline's; the walk upwards is samplers/inversion.py.
"""

from __future__ import annotations

import inspect
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from conditioning import Condition
from ldm_pipe.drawing import walk as drawing
from ldm_pipe.drawing.output import IntDefault, LatentDiffusionOutput, real_number, whole_number
from ldm_pipe.drawing.png_info import PngInfo
from ldm_pipe.drawing.request.request import Request, check_request
from ldm_pipe.noise import Draw, Noise
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.samplers import ddim_inversion

if TYPE_CHECKING:
    from ldm_pipe.pipelines.latent import LatentDiffusionPipeline

MAX_FRAMES = 10_000
MAX_REFINEMENTS = 100
IN_BOTH_DIRECTIONS = (
    "image", "prompt", "height", "width", "num_inference_steps", "spacing", "clip_skip", "prompt_2", "spatial",
    "class_labels", "depth_map", "original_size", "crops_coords_top_left", "target_size", "aesthetic_score",
)  # fmt: skip
HAND_OVER = ("denoising_start", "denoising_end")
NOT_IN_INVERT = (
    "latents", "mask_image", "generator", "num_images_per_prompt", "callback_on_step_end", "prompt_syntax", *HAND_OVER,
)  # fmt: skip
NOT_ON_A_WAY = (
    "image", "mask_image", "strength", "generator", "prompt_embeds", "negative_prompt_embeds", "num_images_per_prompt",
    "deterministic_batch", "prompt_syntax", *HAND_OVER,
)  # fmt: skip
NOT_IN_VARY = (
    "image", "mask_image", "strength", "generator", "latents", "prompt_embeds", "deterministic_batch", "prompt_syntax",
    *HAND_OVER,
)  # fmt: skip


@dataclass
class InversionOutput:
    """What `pipe.invert` found.

    Attributes:
        latents: unit noise for `pipe(latents=)`, (B, C, h, w).
        encoded: what the autoencoder made of the pictures, (B, C, h, w): where a perfect way back ends.
    """

    latents: Tensor
    encoded: Tensor


def slerp(a: Tensor, b: Tensor, weight: float | Tensor) -> Tensor:
    """Walk along the great circle from noise a to noise b (Shoemake 1985, "Animating rotation", section 3.3).

        x = r (cos(w phi) u + sin(w phi) p),   r = (1 - w) |a| + w |b|

    with u = a / |a|, phi the angle between a and b, and p the unit vector across u towards b: points between two unit
    Gaussians are as long as Gaussians are, unlike those on the straight line. Both ends are exact. Equal directions
    stay; opposite ones, between which no circle is the shortest, go by way of a's pairs of numbers turned by 90
    degrees.

    Args:
        a, b: shape (B, *).
        weight: in [0, 1], a number or one per sample, (B,).

    Returns: shape (B, *), each sample by itself.
    """
    start, end = (v.detach().flatten(1).double() for v in (a, b))
    w = torch.as_tensor(weight, dtype=torch.float64, device=a.device).expand(len(a))[:, None]
    long_a, long_b = (v.norm(dim=1, keepdim=True) for v in (start, end))
    u = start / long_a.clamp_min(1e-300)
    along = (end * u).sum(1, keepdim=True)
    across = end - along * u
    turned = torch.stack([-u[:, 1::2], u[:, : u.shape[1] // 2 * 2 : 2]], dim=2).flatten(1)
    turned = torch.nn.functional.pad(turned, (0, u.shape[1] % 2))
    far = across.norm(dim=1, keepdim=True)
    none = far <= 1e-9 * long_b  # a and b on one line: rounding is all there is across it
    p = torch.where(none, turned / turned.norm(dim=1, keepdim=True).clamp_min(1e-300), across / far.clamp_min(1e-300))
    phi = w * torch.atan2(torch.where(none, torch.zeros_like(far), far), along)
    x = ((1 - w) * long_a + w * long_b) * (phi.cos() * u + phi.sin() * p)
    x = torch.where(w == 0, start, torch.where(w == 1, end, x))
    return x.to(a.dtype).reshape(a.shape)


def blend(ends: Tensor, places: Sequence[float], *, straight: bool = False) -> Tensor:
    """Return points on the way through all ends.

    Args:
        ends: shape (K, *).
        places: each from 0, the first end, to K - 1, the last.
        straight: along lines, as embeddings are mixed, instead of great circles.

    Returns: shape (len(places), *).
    """
    left, w = _sections(len(ends), places)
    a, b = ends[left], ends[left + 1]
    if not straight:
        return slerp(a, b, w.to(a.device))
    weight = w.to(a).reshape(-1, *(1,) * (a.ndim - 1))
    return (1 - weight) * a + weight * b


def _sections(count: int, places: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return the end before each place, and how far the place is from there to the next."""
    where = torch.tensor(places, dtype=torch.float64)
    left = where.long().clamp(max=count - 2)
    return left, where - left


def blend_condition(ends: Condition, places: Sequence[float]) -> Condition:
    """Return conditions on the way through all ends: embeddings go straight, what either end shows is shown."""
    left, w = _sections(ends.batch_size, places)

    def way(value: Tensor) -> Tensor:
        if value.is_floating_point():
            return blend(value, places, straight=True)
        if value.dtype == torch.bool:
            return value[left] | value[left + 1]
        return value[left + (w > 0.5)]  # classes have nothing between them

    return replace(ends, **{name: way(value) for name, value in ends.slots().items()})


def blended_noise(seeds: Sequence[int], places: Sequence[float]) -> Draw:
    """Return a source whose every draw lies on the way between the draws of the seeds: any sampler's frames join."""
    source = Noise(seeds)
    return lambda shape: blend(source((len(seeds), *shape[1:])), places)


def _checked(pipe: LatentDiffusionPipeline, call: Mapping[str, Any], refused: Sequence[str] = ()) -> Request:
    """Check a call as `pipe(**call)` does; what has no meaning here is refused."""
    known = inspect.signature(pipe.__call__).parameters
    for name, value in call.items():
        if name not in known or (name in refused and value is not None):
            advice = f"use some of {', '.join(other for other in known if other not in refused)}"
            raise LdmPipeError(f"there is no {name} here", how_to_fix=advice)
    return check_request(pipe, {name: call.get(name, parameter.default) for name, parameter in known.items()})


def _count(image: Any) -> int:
    """Return how many pictures a user's picture or list of them is."""
    if isinstance(image, (list, tuple)):
        return max(sum(_count(one) for one in image), 1)
    return image.shape[0] if getattr(image, "ndim", 0) == 4 else 1


@torch.no_grad()
def invert(pipe: LatentDiffusionPipeline, call: Mapping[str, Any], num_refinements: Any) -> InversionOutput:
    """Encode pictures to noise; see `LatentDiffusionPipeline.invert`."""
    refinements = whole_number("num_refinements", num_refinements, 0, MAX_REFINEMENTS)
    if call["image"] is None:
        raise LdmPipeError("image is None", how_to_fix="give the picture to invert")
    prompt = [call["prompt"]] * _count(call["image"]) if isinstance(call["prompt"], str) else call["prompt"]
    checked = {**call, "prompt": prompt, "strength": 1.0, "seed": 0, "sampler": "ddim", "output_type": "latent"}
    request = _checked(pipe, checked, NOT_IN_INVERT)
    steps = request.sampling.steps
    if request.image is None:
        raise LdmPipeError("image holds latents", how_to_fix="give the picture to invert")
    with pipe.one_at_a_time():
        cond, uncond = drawing.encode_prompts(pipe, request)
        with pipe.on_device(pipe.autoencoder):
            image = (request.image * 2 - 1).to(pipe.device, pipe.autoencoder.dtype)
            z0 = pipe.autoencoder.encode(image).float()
        denoise = drawing.build_denoise(pipe, request, cond, uncond, request.guidance_scale)
        with pipe.on_device(pipe.unet), pipe.progress_bar(steps.num_steps) as bar:

            def advance(*_: Any) -> None:
                bar.update()

            x = ddim_inversion(denoise, z0, steps, num_refinements=refinements, callback=advance)
    if not bool(torch.isfinite(x).all()):
        advice = "Invert with guidance_scale=1, fewer num_refinements, or dtype=torch.float32."
        raise LdmPipeError("NaN or infinity in the noise found", "inversion", advice)
    return InversionOutput(x / steps.init_scale, z0)


@torch.no_grad()
def interpolate(
    pipe: LatentDiffusionPipeline, call: Mapping[str, Any], num_frames: Any, batch_size: Any
) -> LatentDiffusionOutput:
    """Draw the frames of a way; see `LatentDiffusionPipeline.interpolate`."""
    total = whole_number("num_frames", num_frames, 2, MAX_FRAMES)
    size = whole_number("batch_size", batch_size, 1, MAX_FRAMES)
    ends = _ends(pipe, call)
    with pipe.one_at_a_time():
        cond, uncond = drawing.encode_prompts(pipe, ends)
    places = [i * (ends.num_pictures - 1) / (total - 1) for i in range(total)]
    parts = [pipe.run(_frames(ends, cond, uncond, places[first : first + size])) for first in range(0, total, size)]
    output = join(parts)
    infos = [_frame_info(info, ends, f"{i + 1}/{total}") for i, info in enumerate(output.infos)]
    return replace(output, infos=infos)


def _ends(pipe: LatentDiffusionPipeline, call: Mapping[str, Any]) -> Request:
    """Check what the way leads through: as many prompts, seeds and latents as there are most of one of them."""
    given = {name: call[name] for name in ("prompt", "seed", "latents")}
    if given["seed"] is None:
        given["seed"] = secrets.randbelow(2**32)
    counts = {n: len(v) if isinstance(v, (list, tuple, Tensor)) and len(v) else 1 for n, v in given.items()}
    count = max(counts.values())
    if count == 1:
        raise LdmPipeError("a single point is no way", how_to_fix="give two or more prompts, seeds or latents")
    for name, number in counts.items():
        if number not in (1, count):
            raise LdmPipeError(f"{number} of {name} for {count} points", how_to_fix="give one, or one for each point")
        value = given[name]
        if number == 1 and isinstance(value, Tensor):
            given[name] = value.expand(count, *value.shape[1:])
        elif number == 1 and value is not None:
            given[name] = (list(value) if isinstance(value, (list, tuple)) else [value]) * count
    return _checked(pipe, {**call, **given}, NOT_ON_A_WAY)


def _frames(ends: Request, cond: Condition, uncond: Condition | None, places: list[float]) -> Request:
    """Return the request for the frames at these places."""
    assert ends.seeds is not None
    seeds = ends.seeds
    return replace(
        ends,
        prompts=None,
        negatives=("",) * len(places),
        conditions=(blend_condition(cond, places), None if uncond is None else blend_condition(uncond, places)),
        beside=None,  # joined to the conditions already
        beside_null=None,
        num_pictures=len(places),
        seeds=None,
        latents=None if ends.latents is None else blend(ends.latents, places),
        source=lambda: blended_noise(seeds, places),
    )


def _frame_info(info: PngInfo, ends: Request, place: str) -> PngInfo:
    """Say of a frame between which prompts and seeds it lies."""
    prompt = " -> ".join(dict.fromkeys(ends.prompts or ()))
    negative = " -> ".join(dict.fromkeys(ends.negatives))
    seeds = " -> ".join(map(str, dict.fromkeys(ends.seeds or ())))
    settings = {"Seeds": seeds} if ends.latents is None else {}
    return PngInfo(prompt, negative, {**info.settings, **settings, "Frame": place})


def join(parts: Sequence[LatentDiffusionOutput]) -> LatentDiffusionOutput:
    """Put the pictures of several calls together."""
    first = parts[0]
    if isinstance(first.images, list):
        images: Any = [image for part in parts for image in part.images]
    elif isinstance(first.images, Tensor):
        images = torch.cat([part.images for part in parts])
    else:
        import numpy as np

        images = np.concatenate([part.images for part in parts])
    latents = None if first.latents is None else torch.cat([part.latents for part in parts if part.latents is not None])
    seeds = None if first.seeds is None else [seed for part in parts for seed in part.seeds or ()]
    infos = [info for part in parts for info in part.infos]
    return LatentDiffusionOutput(images, seeds=seeds, latents=latents, infos=infos)


@torch.no_grad()
def vary(
    pipe: LatentDiffusionPipeline, call: Mapping[str, Any], strength: Any, num_refinements: Any
) -> LatentDiffusionOutput:
    """Draw relatives of pictures; see `LatentDiffusionPipeline.vary`."""
    share = real_number("strength", strength, 0.0, 1.0)
    upwards = {name: value for name, value in call.items() if name in IN_BOTH_DIRECTIONS}
    found = invert(pipe, {**upwards, "guidance_scale": 1.0}, num_refinements)
    count, _, rows, columns = found.latents.shape
    prompts = [call["prompt"]] * count if isinstance(call["prompt"], str) else call["prompt"]
    size = {"height": rows * pipe.factor, "width": columns * pipe.factor}
    request = _checked(pipe, {**call, "image": None, "prompt": prompts, **size}, NOT_IN_VARY)
    noise = Noise(request.seeds or ())
    latents = found.latents.repeat_interleave(request.num_pictures // count, dim=0)
    fresh = noise(latents.shape).to(latents)
    return pipe.run(replace(request, latents=slerp(latents, fresh, share), source=lambda: noise))


class Editing:
    """The methods of the pipeline that edit with noise."""

    def invert(
        self,
        image: Any,
        prompt: str | list[str] = "",
        *,
        num_inference_steps: int = IntDefault(50),
        guidance_scale: float = 1.0,
        num_refinements: int = 1,
        **call: Any,
    ) -> InversionOutput:
        """Find the noise that `pipe(prompt, latents=)` turns into a picture (DDIM upwards, arXiv:2010.02502, 4.3).

        Drawing it with the same prompt, steps and guidance_scale=1 gives the picture back; with another prompt, the
        same noise.

        Args:
            image: one or several; see `__call__`.
            prompt: what the pictures show; one for all, or one for each.
            guidance_scale: above 1 the way back is less exact.
            num_refinements: further evaluations per step that make it more exact; see `samplers.ddim_inversion`.
            call: further arguments of `__call__`: height, width, spacing, timesteps, negative_prompt, ...
        Raises: LdmPipeError naming argument, value and range.
        """
        more = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        return invert(_pipeline(self), {"image": image, "prompt": prompt, **more, **call}, num_refinements)

    def interpolate(
        self,
        prompt: str | list[str] = "",
        *,
        num_frames: int = 9,
        seed: int | list[int] | None = None,
        latents: Tensor | None = None,
        batch_size: int = 8,
        **call: Any,
    ) -> LatentDiffusionOutput:
        """Draw the pictures on the way between prompts, seeds, or inverted pictures.

        Noise turns on a great circle, text embeddings go straight. One prompt is kept along a way of seeds, one seed
        along a way of prompts; several of both change together. The first and the last frame are what `pipe` draws.

        Args:
            prompt, seed, latents: one, or one for each point of the way; latents as of `invert`.
            num_frames: pictures on the whole way, both ends counted.
            batch_size: most pictures drawn at once.
            call: further arguments of `__call__`.
        Raises: LdmPipeError naming argument, value and range.
        """
        more = {"prompt": prompt, "seed": seed, "latents": latents}
        return interpolate(_pipeline(self), {**more, **call}, num_frames, batch_size)

    def vary(
        self,
        image: Any,
        prompt: str | list[str] = "",
        *,
        strength: float = 0.3,
        num_images_per_prompt: int = 4,
        num_refinements: int = 1,
        **call: Any,
    ) -> LatentDiffusionOutput:
        """Draw relatives of a picture: its noise, found by `invert`, with a part of it fresh.

        Args:
            image, prompt, num_refinements: see `invert`.
            strength: how far the noise turns to fresh noise; 0 gives the picture back, 1 forgets it.
            call: further arguments of `__call__`; picture i takes its fresh noise from seed + i.
        Raises: LdmPipeError naming argument, value and range.
        """
        more = {"image": image, "prompt": prompt, "num_images_per_prompt": num_images_per_prompt}
        return vary(_pipeline(self), {**more, **call}, strength, num_refinements)


def _pipeline(editing: Editing) -> LatentDiffusionPipeline:
    return cast("LatentDiffusionPipeline", editing)
