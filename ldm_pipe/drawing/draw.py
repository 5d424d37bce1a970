"""What the pipelines of this package share: the way from noise to pictures.

What enters: a pipeline and a checked request. What leaves: pictures. The stages are those of LatentDiffusionPipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from conditioning import Condition
from ldm_pipe.drawing import walk as drawing
from ldm_pipe.drawing.output import LatentDiffusionOutput, picture_infos
from ldm_pipe.drawing.pixels import give_images
from ldm_pipe.drawing.request.request import Request
from ldm_pipe.drawing.stepping import Restore
from ldm_pipe.noise import Draw
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule.steps import Steps


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


Begin = Callable[[Tensor, Steps], tuple[Tensor, Restore | None]]  # (eps, steps) -> the first x_t, what is put back


def draw_pictures(
    pipe: Any,
    request: Request,
    eps: Tensor,
    draw: Draw,
    cond: Condition,
    uncond: Condition | None,
    begin: Begin | None = None,
) -> LatentDiffusionOutput:
    """Walk from noise to z, and decode it.

    Args:
        eps: unit Gaussian noise, (B, C, h, w).
        draw: where the sampler's own noise comes from.
        cond, uncond: B rows each, on the pipeline's device.
        begin: makes the first x_t of eps; None: a walk from noise alone.
    """
    steps = drawing.choose_steps(request)
    try:
        x, restore = (eps * steps.init_scale, None) if begin is None else begin(eps, steps)
        z = drawing.sample(pipe, request, x, steps, draw, cond, uncond, restore)
        images: Any = z
        if request.output_type != "latent":
            with pipe.on_device(pipe.autoencoder):
                image = pipe.autoencoder.decode(z.to(pipe.autoencoder.dtype))
            images = give_images(image, request.output_type)
    except torch.OutOfMemoryError as error:
        what = f"out of memory for {request.num_pictures} pictures of {request.width}x{request.height}"
        advice = "Draw fewer at once, smaller, in bfloat16, or with enable_model_cpu_offload()."
        raise LdmPipeError(what, str(pipe.device), advice) from error
    adapters = getattr(pipe, "adapter_settings", dict)()
    return LatentDiffusionOutput(
        images,
        seeds=None if request.seeds is None else list(request.seeds),
        latents=z if request.return_latents else None,
        infos=picture_infos(request, pipe.name, None, {**adapters, "Pipeline": type(pipe).__name__}),
    )


Wrap = Callable[[Any, Steps], Any]  # (denoise, steps) -> denoise


def with_wrapped(request: Request, wrap: Wrap) -> Request:
    """Return the request with a sampler that hands its denoiser through `wrap` first."""
    run = request.sampling.run

    def wrapped(denoise: Any, x: Tensor, steps: Steps, **options: Any) -> Tensor:
        return run(wrap(denoise, steps), x, steps, **options)

    return replace(request, sampling=replace(request.sampling, run=wrapped))
