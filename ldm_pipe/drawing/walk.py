"""The stages of one call, each a function: encode, choose steps, start, sample.

What enters: a pipeline and a checked request. What leaves: conditions, steps, the first x_t, and z. Settings are
settled before (request.py); the order of the stages is the pipeline's.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from conditioning import Condition
from ldm_pipe import guidance
from ldm_pipe.denoiser import Denoiser
from ldm_pipe.drawing.prompting import Plan
from ldm_pipe.drawing.stepping import Interrupted, Restore, StepHook
from ldm_pipe.guidance.thresholding import threshold
from ldm_pipe.noise import Draw, Noise
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import Steps
from ldm_pipe.schedule.process import q_sample

if TYPE_CHECKING:
    from ldm_pipe.drawing.placement import Placement
    from ldm_pipe.drawing.request.request import Request
    from ldm_pipe.pipelines.latent import LatentDiffusionPipeline


def encode(
    pipe: Placement,
    texts: Sequence[str],
    clip_skip: int | None = None,
    texts_2: Sequence[str] | None = None,
) -> Condition:
    """Encode texts with every text encoder; equal texts are encoded once.

    Args:
        texts_2: what the second encoder and those after it read; None or an empty text: the same as the first.
    Returns: Condition with tokens (B, L, D), several encoders' side by side along D, and what else they give.
    """
    if not pipe.text_encoders:
        raise LdmPipeError(
            "the pipeline has no text encoder", how_to_fix="Give prompt_embeds and negative_prompt_embeds."
        )
    others = [other or text for text, other in zip(texts, texts_2 or texts, strict=True)]
    conditions = []
    for i, encoder in enumerate(pipe.text_encoders):
        read = others if i else texts
        distinct = list(dict.fromkeys(read))
        with pipe.on_device(encoder):
            condition = encoder.encode(distinct, clip_skip=clip_skip)
        conditions.append(condition.select([distinct.index(text) for text in read]))
    return functools.reduce(Condition.join, conditions)


def encode_prompts(pipe: Placement, request: Request, plan: Plan | None = None) -> tuple[Condition, Condition | None]:
    """Return the condition and, under guidance, the unconditional one, with what stands beside the texts.

    Given embeddings are taken as they are.
    """
    if request.conditions is not None:
        return request.conditions
    cond, uncond = _encode_texts(pipe, request) if plan is None else plan.first
    if uncond is not None and uncond.slots()["tokens"].shape != cond.slots()["tokens"].shape:
        shapes = f"{tuple(cond.slots()['tokens'].shape)}, the negative prompt's {tuple(uncond.slots()['tokens'].shape)}"
        advice = "Give negative_prompt_embeds of the same shape."
        raise LdmPipeError(f"the prompt's embeddings are {shapes}", how_to_fix=advice)
    if request.beside is not None:  # sizes stay float32: bfloat16 has no room for 1023
        cond = cond.join(request.beside.to(pipe.device))
    if uncond is not None and request.beside_null is not None:
        uncond = uncond.join(request.beside_null.to(pipe.device))
    return cond, uncond


def _encode_texts(pipe: Placement, request: Request) -> tuple[Condition, Condition | None]:
    if request.prompt_embeds is None:
        cond = encode(pipe, request.prompts or (), request.clip_skip, request.prompts_2)
    else:
        cond = Condition(tokens=request.prompt_embeds, pooled=request.pooled_embeds)
    cond = cond.to(pipe.device, pipe.dtype)
    if not request.guided:
        return cond, None
    if request.zero_null:
        return cond, cond.zeros()
    if request.negative_embeds is None:  # all layers, as in diffusers
        uncond = encode(pipe, request.negatives, None, request.negatives_2)
    else:
        uncond = Condition(tokens=request.negative_embeds, pooled=request.negative_pooled)
    return cond, uncond.to(pipe.device, pipe.dtype)


def choose_steps(request: Request) -> Steps:
    """Return the rows of a call: the last part of them for a picture to start from, or for latents handed over.

    Raises: LdmPipeError if nothing is left to do.
    """
    steps = request.sampling.steps
    if request.begin is not None:
        first = steps.num_steps - _count_below(steps, request.begin)
        if first == steps.num_steps:
            raise LdmPipeError("denoising_start leaves no step", how_to_fix="start earlier, or use more steps")
        steps = steps.from_row(first)
    elif request.image is not None or request.z0 is not None:
        steps = steps.from_strength(request.strength)
    if num_wanted(request, steps) == 0:
        raise LdmPipeError("denoising_end leaves no step", how_to_fix="end later, or use more steps")
    return steps


def num_wanted(request: Request, steps: Steps) -> int:
    """Return how many of the steps are taken before the latents are handed on: those from no later than that time."""
    return steps.num_steps if request.end is None else steps.num_steps - _count_below(steps, request.end)


def _count_below(steps: Steps, time: float) -> int:
    """Count the steps that start later (with less noise) than a time; rows may lie 1e-6 beside whole times."""
    return int((steps.t[:-1] < time - 1e-6).sum())


def noise_source(request: Request) -> Draw:
    """Return the source of all noise of a call: float32, on the generators' device."""
    if request.source is not None:
        return request.source()
    if isinstance(request.generators, torch.Generator):
        return Noise.from_generator(request.generators)
    if request.generators is not None:
        return Noise.from_generators(request.generators)
    return Noise(request.seeds or ())


def start(
    pipe: LatentDiffusionPipeline, request: Request, steps: Steps, draw: Draw
) -> tuple[Tensor, Tensor | None, Restore | None]:
    """Make the first x_t: noise, latents handed over, or a diffused picture; draws come in diffusers' order.

    Returns: x_t (B, C, h, w), the extra channels of an inpainting U-Net (B, 1 + C, h, w), and what puts the known part
        back after each step of any other U-Net.
    """
    rows, columns = request.height // pipe.factor, request.width // pipe.factor
    shape = (request.num_pictures, pipe.autoencoder.latent_channels, rows, columns)

    def noise() -> Tensor:
        eps = draw(shape) if request.latents is None else request.latents
        return eps.to(pipe.device, torch.float32)

    if request.z0 is not None:
        z0 = request.z0.to(pipe.device, torch.float32)
        return q_sample(z0, noise(), float(steps.alpha[0]), float(steps.sigma[0])), None, None
    if request.image is None:
        return noise() * (1.0 if request.begin is not None else steps.init_scale), None, None
    image = (request.image * 2 - 1).to(pipe.device)
    paints = pipe.paints
    fresh = request.mask is not None and request.strength == 1

    def encoded(picture: Tensor) -> Tensor:
        dtype = pipe.autoencoder.dtype
        return pipe.autoencoder.encode(picture.to(dtype), draw(shape).to(pipe.device, dtype)).float()

    with pipe.on_device(pipe.autoencoder):
        z0 = None if fresh and paints else encoded(image)
        eps = noise()
        if fresh or z0 is None:
            x = eps * steps.init_scale
        else:
            x = q_sample(z0, eps, float(steps.alpha[0]), float(steps.sigma[0]))
        if request.mask is None:
            return x, None, None
        pixel_mask = request.mask.to(pipe.device)
        mask = nn.functional.interpolate(pixel_mask, size=shape[2:])  # (B, 1, h, w)
        if paints:
            known = encoded(image * (pixel_mask < 0.5))
            return x, torch.cat([mask, known], dim=1), None
    assert z0 is not None
    return x, None, _restore(steps, mask, z0, eps)


def _restore(steps: Steps, mask: Tensor, z0: Tensor, eps: Tensor) -> Restore:
    """Return what puts the known part, diffused to the level reached, back after each step.

    RePaint, Lugmayr et al. 2022, arXiv:2201.09865, eq. 8.
    """
    alphas, sigmas = steps.alpha[1:].tolist(), steps.sigma[1:].tolist()
    alphas[-1], sigmas[-1] = 1.0, 0.0

    def restore(i: int, x: Tensor) -> Tensor:
        return (1 - mask) * q_sample(z0, eps, alphas[i], sigmas[i]) + mask * x

    return restore


def build_denoise(
    pipe: LatentDiffusionPipeline,
    request: Request,
    cond: Condition,
    uncond: Condition | None,
    scale: float,
    plan: Plan | None = None,
    i: int = 0,
) -> Callable[[Tensor, Tensor], Any]:
    """Build (x_t, t) -> x0 of step i: the network under guidance, then thresholding; a plan knows better conditions."""
    net = Denoiser(pipe.unet, pipe.schedule, pipe.schedule.prediction)
    if plan is not None:
        beside = [Condition(spatial=c.spatial, labels=c.labels) for c in (cond, uncond or cond)]
        denoise = plan.denoise(net, i, scale, request.guidance_rescale, *beside, request.guidance)
    else:
        rescale = request.guidance_rescale
        denoise = guidance.guide(net, [cond], None, uncond, scale, rescale=rescale, guidance=request.guidance)
    rule = request.thresholding
    if rule.kind == "none":
        return denoise
    return threshold(
        denoise,
        rule.kind,
        percentile=rule.percentile,
        max_value=rule.max_value,
        cap=rule.cap,
        space=rule.space,
        autoencoder=pipe.autoencoder if rule.space == "pixel" else None,
    )


def sample(
    pipe: LatentDiffusionPipeline,
    request: Request,
    x: Tensor,
    steps: Steps,
    draw: Draw,
    cond: Condition,
    uncond: Condition | None,
    restore: Restore | None,
    plan: Plan | None = None,
) -> Tensor:
    """Walk down the steps, from x_t to z; what changes during a call lives here, not in the pipeline."""
    view = copy.copy(pipe)
    num_steps = num_wanted(request, steps)
    view.begin_call(request.guidance_scale, num_steps)
    denoise, step = [build_denoise(pipe, request, cond, uncond, request.guidance_scale, plan)], [-1]

    def rebuild(embeddings: dict[str, Any], scale: float) -> None:
        new_cond = replace(cond, tokens=embeddings["prompt_embeds"])
        new_uncond = None if uncond is None else replace(uncond, tokens=embeddings["negative_prompt_embeds"])
        given = (embeddings["prompt_embeds"], embeddings["negative_prompt_embeds"])
        if plan is not None and any(a is not b for a, b in zip(given, told, strict=True)):
            advice = 'Use prompt_syntax="plain" where a callback changes prompt_embeds.'
            raise LdmPipeError("a callback changed embeddings of a prompt with a grammar", "sampling", advice)
        denoise[0] = build_denoise(pipe, request, new_cond, new_uncond, scale, plan, step[0] + 1)

    def advance(i: int) -> None:
        bar.update(max(i + 1 - bar.n, 0))  # restart visits rows again
        step[0] = i
        if plan is not None and plan.changes(i + 1):
            denoise[0] = build_denoise(pipe, request, cond, uncond, view.guidance_scale, plan, i + 1)

    def handed_on() -> bool:
        return step[0] + 1 == num_steps < steps.num_steps

    told = (cond.tokens, uncond.tokens if uncond else None)

    before = pipe.num_interrupts
    with pipe.on_device(pipe.unet), pipe.progress_bar(num_steps) as bar:
        hook = StepHook(
            view,
            request,
            advance=advance,
            interrupted=lambda: handed_on() or view.num_interrupts > 0 or pipe.num_interrupts != before,
            embeddings={"prompt_embeds": told[0], "negative_prompt_embeds": told[1]},
            rebuild=rebuild,
            restore=restore,
        )
        try:
            how = request.sampling
            z = how.run(
                lambda x_t, t: denoise[0](x_t, t), x, steps, noise=draw, eta=how.eta, callback=hook, **how.options
            )
        except Interrupted as stop:
            z = stop.x
    hook.finish()
    return z
