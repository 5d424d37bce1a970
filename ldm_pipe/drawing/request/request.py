"""Check what a caller of the pipeline asks for, once and before any work, and settle every default.

What enters: the arguments of `LatentDiffusionPipeline.__call__`. What leaves: a frozen `Request` without open
questions, or one LdmPipeError that names argument, value and range. This file runs no network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from conditioning import Condition
from ldm_pipe.drawing.output import MAX_PICTURES, FloatDefault, Thresholding, real_number, warn_ignored, whole_number
from ldm_pipe.drawing.prompting import PromptSyntax
from ldm_pipe.drawing.request.beside import check_beside
from ldm_pipe.drawing.request.pictures import check_latent_image, check_pictures
from ldm_pipe.drawing.request.sampling import Sampling, check_hand_over
from ldm_pipe.drawing.request.shared import (
    check_latents,
    check_shared,
    check_size,
    model_default,
    or_default,
    repeat_rows,
    spread,
)
from ldm_pipe.drawing.request.texts import check_embeds, check_negatives, check_pooled, check_prompts, check_second
from ldm_pipe.guidance.pair import Guidance
from ldm_pipe.noise import Draw
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.samplers.from_diffusers import SchedulerSampler

if TYPE_CHECKING:
    from ldm_pipe.pipelines.latent import LatentDiffusionPipeline


@dataclass(frozen=True)
class Request:
    """One checked call; `num_pictures` pictures, prompt by prompt."""

    prompts: tuple[str, ...] | None
    negatives: tuple[str, ...]
    prompt_embeds: Tensor | None
    negative_embeds: Tensor | None
    num_pictures: int
    height: int
    width: int
    sampling: Sampling
    guidance_scale: float
    guidance_rescale: float
    thresholding: Thresholding
    seeds: tuple[int, ...] | None
    generators: tuple[torch.Generator, ...] | torch.Generator | None
    latents: Tensor | None
    image: Tensor | None
    mask: Tensor | None
    strength: float
    clip_skip: int | None
    output_type: str
    return_latents: bool
    callback: Callable[..., Any] | None
    callback_inputs: tuple[str, ...]
    source: Callable[[], Draw] | None = None  # starts the noise of the call anew, where seeds do not say it all
    conditions: tuple[Condition, Condition | None] | None = None  # in place of texts and embeddings
    syntax: PromptSyntax | None = None  # None: prompts are plain
    prompts_2: tuple[str, ...] | None = None  # for the second text encoder and those after it; None: the same
    negatives_2: tuple[str, ...] | None = None
    pooled_embeds: Tensor | None = None
    negative_pooled: Tensor | None = None
    zero_null: bool = False  # embeddings of zeros stand for the negative prompt
    beside: Condition | None = None  # sizes and maps, a row per picture, joined to the prompts' conditions
    beside_null: Condition | None = None  # and to those of the negative prompts
    z0: Tensor | None = None  # latents in place of `image`
    begin: float | None = None  # time at which `latents` were handed over
    end: float | None = None  # time at which they are handed on
    guidance: Guidance | None = None  # None: classifier-free guidance

    @property
    def guided(self) -> bool:
        """Return whether the unconditional network runs at all; as in diffusers it does above a scale of 1."""
        return self.guidance_scale > 1 or self.guidance is not None

    def rows(self) -> list[Request]:
        """Split into requests of one picture each."""

        def row(value: Any, i: int) -> Any:
            return value if value is None or isinstance(value, torch.Generator) else value[i : i + 1]

        names = (
            "prompts",
            "negatives",
            "prompt_embeds",
            "negative_embeds",
            "seeds",
            "generators",
            "latents",
            "image",
            "mask",
            "prompts_2",
            "negatives_2",
            "pooled_embeds",
            "negative_pooled",
            "z0",
        )

        def beside(condition: Condition | None, i: int) -> Condition | None:
            return None if condition is None else condition.select([i])

        return [
            replace(
                self,
                num_pictures=1,
                beside=beside(self.beside, i),
                beside_null=beside(self.beside_null, i),
                **{name: row(getattr(self, name), i) for name in names},
            )
            for i in range(self.num_pictures)
        ]


def check_request(pipe: LatentDiffusionPipeline, given: Mapping[str, Any]) -> Request:
    """Check the arguments of a call against each other and the model.

    Raises: LdmPipeError naming argument, value and range.
    """
    prompts, num_prompts = check_prompts(given["prompt"], given["prompt_embeds"])
    per_prompt = whole_number("num_images_per_prompt", or_default(given["num_images_per_prompt"], 1), 1, MAX_PICTURES)
    count = num_prompts * per_prompt
    whole_number("the number of pictures", count, 1, MAX_PICTURES)
    scale, rescale = _check_guidance(pipe, given)
    texts = _check_texts(
        pipe, given, prompts, num_prompts, per_prompt, guided=scale > 1 or given["guidance"] is not None
    )
    begin, end = check_hand_over(pipe.schedule, given)
    given, z0 = check_latent_image(pipe, given, count, num_prompts, handed_over=begin is not None)
    image, mask, strength = check_pictures(pipe, given, count, num_prompts, z0)
    height, width = _check_size(pipe, given, image if z0 is None else None, given["latents"] if z0 is None else z0)
    shared = check_shared(pipe, given, count, (height, width))
    beside, beside_null = check_beside(pipe, given, count, num_prompts, (height, width))
    return Request(
        **texts,
        **shared,
        beside=beside,
        beside_null=beside_null,
        z0=check_latents(pipe, z0, count, (height, width), "image"),
        begin=begin,
        end=end,
        guidance_scale=scale,
        guidance_rescale=rescale,
        thresholding=_check_thresholding(pipe, given["thresholding"], shared["sampling"]),
        image=image,
        mask=mask,
        strength=strength,
        guidance=_check_own_guidance(given["guidance"], rescale),
    )


def _check_texts(
    pipe: LatentDiffusionPipeline,
    given: Mapping[str, Any],
    prompts: tuple[str, ...] | None,
    num_prompts: int,
    per_prompt: int,
    *,
    guided: bool,
) -> dict[str, Any]:
    """Settle every field of a Request that holds a text or embeddings, a row per picture."""
    negatives = check_negatives(given, num_prompts, guided=guided)
    embeds = check_embeds(pipe, given, num_prompts, guided)
    second = check_second(pipe, given, num_prompts, guided=guided)
    pooled = check_pooled(pipe, given, num_prompts)
    syntax = PromptSyntax.read(given["prompt_syntax"])
    if syntax is not None:
        syntax.check(prompts or (), negatives)
        if second != (None, None):
            advice = 'write one prompt for all text encoders, or prompt_syntax="plain"'
            raise LdmPipeError("prompt_2 or negative_prompt_2 with a prompt_syntax", how_to_fix=advice)
    unsaid = all(given[name] is None for name in ("negative_prompt", "negative_prompt_2", "negative_prompt_embeds"))
    return {
        "syntax": syntax,
        "prompts": spread(prompts, per_prompt),
        "negatives": spread(negatives, per_prompt),
        "prompts_2": spread(second[0], per_prompt),
        "negatives_2": spread(second[1], per_prompt),
        "prompt_embeds": repeat_rows(embeds[0], per_prompt),
        "negative_embeds": repeat_rows(embeds[1], per_prompt),
        "pooled_embeds": repeat_rows(pooled[0], per_prompt),
        "negative_pooled": repeat_rows(pooled[1], per_prompt),
        "zero_null": pipe.zero_empty_prompt and unsaid,
    }


def _check_guidance(pipe: LatentDiffusionPipeline, given: Mapping[str, Any]) -> tuple[float, float]:
    scale = model_default(given["guidance_scale"], pipe.defaults.guidance_scale)
    scale = real_number("guidance_scale", scale, 0.0, 1000.0)
    rescale = model_default(given["guidance_rescale"], pipe.defaults.guidance_rescale)
    rescale = real_number("guidance_rescale", rescale, 0.0, 1.0)
    if 0 < scale < 1:
        warn_ignored(f"guidance_scale {scale:g}", "up to 1 there is no guidance, as in diffusers")
    if rescale > 0 and scale <= 1 and not isinstance(given["guidance_rescale"], FloatDefault):
        warn_ignored("guidance_rescale", "it needs a guidance_scale above 1")
    return scale, rescale


def _check_own_guidance(chosen: Any, rescale: float) -> Guidance | None:
    """Check that a guidance can be called."""
    if chosen is None:
        return None
    if not callable(chosen):
        advice = "give a function (denoiser, conds, weights, uncond) -> denoise, or leave it out"
        raise LdmPipeError(f"guidance is {chosen!r:.80}", how_to_fix=advice)
    if rescale > 0:
        warn_ignored("guidance_rescale", "the guidance of the call is its own")
    return chosen


def _check_size(
    pipe: LatentDiffusionPipeline, given: Mapping[str, Any], image: Tensor | None, latents: Any
) -> tuple[int, int]:
    """Settle height and width: as given, else those of the picture or the latents, else the model's."""
    factor = pipe.factor
    if image is not None:
        inherited = (image.shape[2], image.shape[3])
    elif isinstance(latents, Tensor) and latents.ndim == 4:
        inherited = (latents.shape[2] * factor, latents.shape[3] * factor)
    else:
        inherited = pipe.default_size
    return check_size(given, inherited, factor)


def _check_thresholding(pipe: LatentDiffusionPipeline, given: Any, sampling: Sampling) -> Thresholding:
    """Settle the thresholding: as given, else the model's, else what its scheduler file asks for."""
    if given is None:
        given = pipe.defaults.thresholding
    if given is None and isinstance(sampling.run, SchedulerSampler):
        return Thresholding()  # a scheduler of diffusers does by itself what its config says
    return Thresholding.read(Thresholding.of_scheduler(pipe.schedule.config) if given is None else given)
