"""unCLIP from the CLIP embedding of a picture to its pixels.

    embedding, caption --projection--> Condition;  noise --decoder--> small picture
    small picture, enlarged, beside noise --two U-Nets, the second for the last step--> picture

What enters: embeddings, and a checked call. What leaves: pictures. Where embeddings come from is in unclip.py.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from autoencoder import Autoencoder
from conditioning import Condition
from ldm_pipe.drawing import walk as drawing
from ldm_pipe.drawing.draw import draw_pictures, with_wrapped
from ldm_pipe.drawing.output import Defaults, LatentDiffusionOutput, real_number, whole_number
from ldm_pipe.drawing.pixel_space import PixelSpace
from ldm_pipe.drawing.placement import Placement
from ldm_pipe.drawing.request.checks import Texts, check_call
from ldm_pipe.drawing.request.request import Request
from ldm_pipe.drawing.request.shared import check_floats
from ldm_pipe.interop.folders.unclip import UnCLIPParts
from ldm_pipe.networks import UNet
from ldm_pipe.noise import Draw
from ldm_pipe.pipelines.base import Call
from ldm_pipe.schedule import Law
from ldm_pipe.schedule import read as schedule_config
from ldm_pipe.schedule.steps import Steps

_NOT_ASKED: dict[str, Any] = {
    "eta": 0.0, "sampler": None, "spacing": None, "sampler_options": None, "thresholding": None, "latents": None,
    "return_latents": False, "callback_on_step_end": None, "callback_on_step_end_tensor_inputs": (),
}  # fmt: skip


class Cascade:
    """The state of a pipeline of several diffusions: its parts, its name, and where they run."""

    def __init__(self, parts: UnCLIPParts, name: str) -> None:
        """Keep the parts."""
        self.parts, self.name = parts, name
        self.unet, self.text_encoders = parts.decoder, (parts.text_encoder,)
        self.autoencoder = cast(Autoencoder, PixelSpace())
        self.defaults = Defaults()
        self._progress: dict[str, Any] = {}
        self._offload: torch.device | None = None
        self._offload_lock = threading.Lock()

    @property
    def default_size(self) -> tuple[int, int]:
        """Return the height and width of the pictures."""
        side = self.parts.super_res_first.config.sample_size
        return side, side


class Stage(Placement, Call):
    """One of the diffusions of a pipeline, as `drawing` looks at it: a network on pixels or vectors, and its law."""

    def __init__(self, pipe: Cascade, net: Any, schedule: Law) -> None:
        """Take the network and the law; where it runs is the pipeline's."""
        defaults = Defaults(sampler=schedule_config.sampler_name(schedule.config) or "ddpm")
        super().__init__(net, PixelSpace(), (), schedule, defaults, pipe.name)
        self._progress, self._offload = pipe._progress, pipe._offload

    def settle(self, name: str, given: Mapping[str, Any], texts: Texts, shape: tuple[int, ...]) -> Request:
        """Check the arguments of one stage; its steps and its first noise are named after it.

        Args:
            given: `<name>_num_inference_steps`, `<name>_latents`, seed, generator, output_type.
            texts: with the guidance scale of this stage.
            shape: of what is diffused, without the batch.
        Raises: LdmPipeError naming argument, value and range.
        """
        named, most = f"{name}_num_inference_steps", self.schedule.num_train_timesteps or 1000
        asked = {**_NOT_ASKED, **given, "num_inference_steps": whole_number(named, given[named], 1, most)}
        request = check_call(self, asked, texts, (shape[1], shape[2]) if len(shape) == 3 else (1, 1))
        eps = check_floats(f"{name}_latents", given[f"{name}_latents"], (texts.num_pictures, *shape))
        return replace(request, latents=eps)

    def walk(
        self, request: Request, shape: tuple[int, ...], draw: Draw, cond: Condition, uncond: Condition | None
    ) -> LatentDiffusionOutput:
        """Walk from noise to x0: the start is drawn first, then what the steps need."""
        eps = draw((request.num_pictures, *shape)) if request.latents is None else request.latents
        return draw_pictures(self, request, eps.to(self.device, torch.float32), draw, cond, uncond)


def settle(pipe: Cascade, given: Mapping[str, Any], texts: Texts) -> tuple[Request, Request]:
    """Settle the decoder and the super resolution; both know the seeds of the call."""
    parts = pipe.parts
    scale = real_number("decoder_guidance_scale", given["decoder_guidance_scale"], 0.0, 1000.0)
    last = Stage(pipe, parts.super_res_first, parts.super_res_schedule)
    second = last.settle("super_res", given, replace(texts, guidance_scale=1.0), _shape(parts.super_res_first))
    first = Stage(pipe, parts.decoder, parts.decoder_schedule)
    told = {**given, **inner(second)}
    return first.settle("decoder", told, replace(texts, guidance_scale=scale), _shape(parts.decoder)), second


def inner(request: Request) -> dict[str, Any]:
    """Return what all stages of a settled call share: where its noise comes from, and that no picture is made yet."""
    seeds = None if request.seeds is None else list(request.seeds)
    return {"seed": seeds, "generator": request.generators, "output_type": "latent"}


def encode(pipe: Any, texts: list[str]) -> Condition:
    """Encode captions: tokens, their mask, and the vector of each, all of one width."""
    return drawing.encode(pipe, texts).to(pipe.device, pipe.dtype)


def paint(
    pipe: Any,
    requests: tuple[Request, Request],
    image: Tensor,
    text: Condition,
    null: Condition | None,
    draw: Draw,
    settings: Mapping[str, Any],
) -> LatentDiffusionOutput:
    """Draw small pictures of embeddings, and enlarge them (Ramesh et al. 2022, arXiv:2204.06125, section 2.1).

    Args:
        requests: of the decoder and of the super resolution.
        image: embeddings of pictures, (B, P).
        text, null: what goes with them, and what stands for nothing, where guidance needs it.
        settings: further ones, for PNG files.
    """
    parts, (first, second) = pipe.parts, requests
    cond = _project(pipe, text, image)
    uncond = _project(pipe, null, None) if null is not None and first.guided else None
    stage = Stage(pipe, parts.decoder, parts.decoder_schedule)
    small = stage.walk(first, _shape(parts.decoder), draw, cond, uncond).images.clamp(-1, 1)
    shape = _shape(parts.super_res_first)
    large = F.interpolate(small, shape[1:], mode="bicubic", align_corners=False, antialias=True)
    beside = Condition(spatial=large.to(pipe.dtype))
    stage = Stage(pipe, parts.super_res_first, parts.super_res_schedule)
    with pipe.on_device(parts.super_res_last):
        output = stage.walk(_with_last(pipe, second, beside), shape, draw, beside, None)
    steps = {"Steps": first.sampling.steps.num_steps, "Enlarging steps": second.sampling.steps.num_steps}
    told = {**steps, "CFG scale": f"{first.guidance_scale:g}", "Pipeline": type(pipe).__name__, **settings}
    words = {name: str(value) for name, value in told.items()}
    return replace(output, infos=[replace(info, settings={**info.settings, **words}) for info in output.infos])


def _project(pipe: Any, text: Condition, image: Tensor | None) -> Condition:
    """Make what the decoder reads; None is no picture."""
    proj = pipe.parts.text_proj
    slots = text.slots()
    with pipe.on_device(proj):
        tokens, vector = proj(None if image is None else image.to(pipe.dtype), slots["pooled"], slots["tokens"])
    mask = F.pad(slots["token_mask"], (proj.config.clip_extra_context_tokens, 0), value=True)
    return Condition(tokens=tokens, token_mask=mask, pooled=vector)


def _with_last(pipe: Any, request: Request, beside: Condition) -> Request:
    """Let the second network of the super resolution take the last step."""
    parts = pipe.parts
    last: Any = Stage(pipe, parts.super_res_last, parts.super_res_schedule)
    final = drawing.build_denoise(last, request, beside, None, 1.0)

    def wrap(denoise: Any, steps: Steps) -> Any:
        return lambda x, t: final(x, t) if float(t) == float(steps.t[-2]) else denoise(x, t)

    return with_wrapped(request, wrap)


def _shape(net: UNet) -> tuple[int, int, int]:
    side = net.config.sample_size
    return 3, side, side
