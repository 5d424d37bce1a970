"""What the pipelines of this package share: their state, and the way from noise to pictures.

What enters: a pipeline and a checked request. What leaves: pictures. The stages are those of LatentDiffusionPipeline.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from autoencoder import Autoencoder
from conditioning import AnyTextEncoder, Condition
from ldm_pipe import drawing
from ldm_pipe.adapters import Adapters
from ldm_pipe.noise import Draw
from ldm_pipe.outputs import Defaults, LatentDiffusionOutput, picture_infos
from ldm_pipe.pipelines.pixel_space import PixelSpace
from ldm_pipe.pixels import give_images
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.request import Request
from ldm_pipe.schedule import Law
from ldm_pipe.scheduler_config import SchedulerConfig, defaults_of, law_of
from ldm_pipe.steps import Steps
from ldm_pipe.unet import UNet


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
        infos=picture_infos(request, pipe.name, None, pipe.adapter_settings() if isinstance(pipe, Adapters) else None),
    )


Wrap = Callable[[Any, Steps], Any]  # (denoise, steps) -> denoise


def with_wrapped(request: Request, wrap: Wrap) -> Request:
    """Return the request with a sampler that hands its denoiser through `wrap` first."""
    run = request.sampling.run

    def wrapped(denoise: Any, x: Tensor, steps: Steps, **options: Any) -> Tensor:
        return run(wrap(denoise, steps), x, steps, **options)

    return replace(request, sampling=replace(request.sampling, run=wrapped))
