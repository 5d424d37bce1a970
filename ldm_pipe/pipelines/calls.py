"""What the pipelines of this package share: their state, the checks of a call, and the way from noise to pictures.

What enters: a pipeline and the arguments of a call. What leaves: a `Request` without open questions, and pictures.
Every check and stage is the one of LatentDiffusionPipeline; this file only chooses which of them a call needs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from autoencoder import Autoencoder
from conditioning import AnyTextEncoder, Condition
from ldm_pipe import drawing
from ldm_pipe.noise import Draw
from ldm_pipe.outputs import (
    MAX_PICTURES,
    MAX_SIDE,
    OUTPUT_TYPES,
    Defaults,
    FloatDefault,
    IntDefault,
    LatentDiffusionOutput,
    Thresholding,
    one_of,
    picture_infos,
    real_number,
    whole_number,
)
from ldm_pipe.pipelines.pixel_space import PixelSpace
from ldm_pipe.pixels import give_images, load_images
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.request import (
    MAX_PIXELS,
    Request,
    _check_callback,
    _check_callback_inputs,
    _check_latents,
    _check_randomness,
    nearest_sizes,
)
from ldm_pipe.request_prompts import check_embeds, check_negatives, check_prompts
from ldm_pipe.request_steps import check_sampling
from ldm_pipe.samplers.from_diffusers import SchedulerSampler
from ldm_pipe.schedule import Law
from ldm_pipe.schedule_keys import KEYS
from ldm_pipe.scheduler_config import SchedulerConfig, defaults_of, law_of
from ldm_pipe.steps import Steps
from ldm_pipe.unet import UNet

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


class Call:
    """The state of a pipeline beside its networks: its noise law, its defaults, and what a callback may look at."""

    schedule: Law

    def __init__(
        self,
        unet: UNet,
        autoencoder: Autoencoder | PixelSpace,
        text_encoders: Sequence[AnyTextEncoder],
        schedule: Law,
        defaults: Defaults | None,
        name: str,
    ) -> None:
        """Keep the parts."""
        self.unet, self.schedule = unet, schedule
        self.autoencoder = cast(Autoencoder, autoencoder)
        self.text_encoders = tuple(text_encoders)
        self.defaults, self.name = defaults or Defaults(), name
        self._progress: dict[str, Any] = {}
        self._offload: torch.device | None = None
        self._offload_lock = threading.Lock()
        self.given_scheduler: Any = None
        self.begin_call(1.0, 0)

    @property
    def scheduler(self) -> Any:
        """Return the scheduler that was set, else something whose `.config` is that of the model."""
        return self.given_scheduler or SchedulerConfig.of(self.schedule, self.defaults)

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        """Sample with a scheduler object of diffusers, and take over the noise law of its config."""
        if isinstance(scheduler, SchedulerConfig):
            self.given_scheduler, self.schedule, self.defaults = None, scheduler.law, scheduler.defaults
            return
        self.schedule = law_of(scheduler, self.schedule)
        self.given_scheduler, self.defaults = scheduler, defaults_of(scheduler, self.defaults)

    @property
    def guidance_scale(self) -> float:
        """Return the guidance scale of the call a callback belongs to."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Return the number of steps of the call a callback belongs to."""
        return self._num_timesteps

    @property
    def _interrupt(self) -> bool:
        return self.num_interrupts > 0

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        """Stop the calls under way after their present step."""
        if value:
            self.num_interrupts += 1

    def begin_call(self, guidance_scale: float, num_timesteps: int) -> None:
        """Set what a callback may look at."""
        self._guidance_scale, self._num_timesteps, self.num_interrupts = guidance_scale, num_timesteps, 0


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
    each = 1 if given["num_images_per_prompt"] is None else given["num_images_per_prompt"]
    each = whole_number("num_images_per_prompt", each, 1, MAX_PICTURES)
    count = whole_number("the number of pictures", num_prompts * each, 1, MAX_PICTURES)
    negatives = check_negatives(given, num_prompts, guided=scale > 1)
    embeds = [
        None if rows is None else rows.repeat_interleave(each, dim=0)
        for rows in check_embeds(pipe, given, num_prompts, scale > 1)
    ]

    def spread(texts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(text for text in texts for _ in range(each))

    return Texts(None if prompts is None else spread(prompts), spread(negatives), *embeds, count, scale)


def check_scale(pipe: Any, given: Mapping[str, Any]) -> float:
    """Settle the guidance scale: as given, else the model's."""
    scale = given["guidance_scale"]
    if (scale is None or isinstance(scale, FloatDefault)) and pipe.defaults.guidance_scale is not None:
        scale = pipe.defaults.guidance_scale
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


def check_side(name: str, value: Any, default: int, factor: int) -> int:
    """Settle one side of the pictures."""
    side = whole_number(name, default if value is None else value, 1, MAX_SIDE)
    if side % factor:
        advice = f"use {nearest_sizes(side, factor)}: sides must be multiples of {factor}"
        raise LdmPipeError(f"{name} is {side}", how_to_fix=advice)
    return side


def check_call(pipe: Any, given: Mapping[str, Any], texts: Texts, size: tuple[int, int]) -> Request:
    """Settle everything that is not particular to one pipeline.

    Args:
        given: the arguments of the call.
        texts: how many pictures, from what.
        size: height and width, in pixels.
    Raises: LdmPipeError naming argument, value and range, before any work.
    """
    given, (height, width), count = {**NEUTRAL, **given}, size, texts.num_pictures
    whole_number("pictures x height x width", count * height * width, 1, MAX_PIXELS)
    asked, num_steps = given["num_inference_steps"], pipe.defaults.num_inference_steps
    if num_steps is None or not (asked is None or isinstance(asked, IntDefault)):
        num_steps = asked
    sampling = check_sampling(pipe, given, num_steps, (height // pipe.factor) * (width // pipe.factor))
    seeds, generators = _check_randomness(given["seed"], given["generator"], count)
    output_type = "pil" if given["output_type"] is None else given["output_type"]
    rule = _thresholding(pipe, given["thresholding"], foreign=isinstance(sampling.run, SchedulerSampler))
    if sampling.name == "ddim" and rule.kind != "none" and given["thresholding"] is None:
        sampling = replace(sampling, options={"keep_eps": True, **sampling.options})  # as diffusers does
    return Request(
        prompts=texts.prompts,
        negatives=texts.negatives,
        prompt_embeds=texts.prompt_embeds,
        negative_embeds=texts.negative_embeds,
        num_pictures=count,
        height=height,
        width=width,
        sampling=sampling,
        guidance_scale=texts.guidance_scale,
        guidance_rescale=0.0,
        thresholding=rule,
        seeds=seeds,
        generators=generators,
        latents=_check_latents(pipe, given["latents"], count, height, width),
        image=None,
        mask=None,
        strength=1.0,
        clip_skip=given["clip_skip"],
        output_type=one_of("output_type", output_type, OUTPUT_TYPES),
        return_latents=bool(given["return_latents"]),
        callback=_check_callback(given["callback_on_step_end"]),
        callback_inputs=_check_callback_inputs(given["callback_on_step_end_tensor_inputs"]),
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


def first_noise(pipe: Any, request: Request, draw: Draw) -> Tensor:
    """Return unit Gaussian noise in the shape of z, (B, C, h, w): the caller's, else fresh."""
    shape = (
        request.num_pictures,
        pipe.autoencoder.latent_channels,
        request.height // pipe.factor,
        request.width // pipe.factor,
    )
    eps = draw(shape) if request.latents is None else request.latents
    return eps.to(pipe.device, torch.float32)


def draw_pictures(
    pipe: Any, request: Request, eps: Tensor, draw: Draw, cond: Condition, uncond: Condition | None
) -> LatentDiffusionOutput:
    """Walk from noise to z, and decode it.

    Args:
        eps: unit Gaussian noise, (B, C, h, w).
        draw: where the sampler's own noise comes from.
        cond, uncond: B rows each, on the pipeline's device.
    """
    steps = request.sampling.steps
    try:
        z = drawing.sample(pipe, request, eps * steps.init_scale, steps, draw, cond, uncond, None)
        images: Any = z
        if request.output_type != "latent":
            with pipe.on_device(pipe.autoencoder):
                image = pipe.autoencoder.decode(z.to(pipe.autoencoder.dtype))
            images = give_images(image, request.output_type)
    except torch.OutOfMemoryError as error:
        what = f"out of memory for {request.num_pictures} pictures of {request.width}x{request.height}"
        advice = "Draw fewer at once, smaller, in bfloat16, or with enable_model_cpu_offload()."
        raise LdmPipeError(what, str(pipe.device), advice) from error
    return LatentDiffusionOutput(
        images,
        seeds=None if request.seeds is None else list(request.seeds),
        latents=z if request.return_latents else None,
        infos=picture_infos(request, pipe.name, None),
    )


Wrap = Callable[[Any, Steps], Any]  # (denoise, steps) -> denoise


def with_wrapped(request: Request, wrap: Wrap) -> Request:
    """Return the request with a sampler that hands its denoiser through `wrap` first."""
    run = request.sampling.run

    def wrapped(denoise: Any, x: Tensor, steps: Steps, **options: Any) -> Tensor:
        return run(wrap(denoise, steps), x, steps, **options)

    return replace(request, sampling=replace(request.sampling, run=wrapped))
