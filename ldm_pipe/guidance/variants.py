"""Variants of classifier-free guidance, each a rule for one pair of predictions.

Enters: a scale and the options of the paper. Leaves: a `Guidance` for `pipe(..., guidance=)`. This file does not know
networks or samplers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm_pipe.denoiser import ConditionLike, Denoise, Denoised, Denoiser
from ldm_pipe.guidance.pair import Combine, Guidance, inner, noise_level, over, pair
from ldm_pipe.guidance.scale import Scale, scale_at
from ldm_pipe.pretrained import LdmPipeError


def classifier_free(scale: Scale = 7.5, *, rescale: float = 0.0) -> Guidance:
    """Guide by uncond + w (cond - uncond); see `guidance.cfg` (Ho & Salimans 2022, arXiv:2207.12598, eq. 6)."""
    return pair(lambda: lambda cond, uncond, w: uncond + w * (cond - uncond), scale, rescale=rescale)


def apg(scale: Scale = 10.0, *, eta: float = 0.0, max_norm: float = math.inf, momentum: float = -0.5) -> Guidance:
    """Guide by adaptive projection (Sadat et al. 2024, arXiv:2410.02416, section 4 and algorithm 1), in x0.

        d_i = (cond - uncond) + momentum d_{i-1},   d = d_i min(1, max_norm / |d_i|)
        x0 = cond + (w - 1) (d_orthogonal + eta d_parallel)

    where the parts are orthogonal and parallel to cond: the parallel one is what saturates colours.

    Args:
        scale: w.
        eta: share of the parallel part; 1, with no bound and no momentum, is classifier-free guidance.
        max_norm: the paper's r, the largest length of d over a whole sample; it depends on the size of the latents.
        momentum: the paper's beta; negative pushes away from the direction of earlier steps.

    Raises: LdmPipeError for options out of range.
    """
    if not max_norm > 0 or not -1 < momentum < 1 or not math.isfinite(eta):
        raise LdmPipeError(
            f"adaptive projected guidance with eta {eta}, max_norm {max_norm}, momentum {momentum}",
            how_to_fix="use a finite eta, max_norm above 0 and momentum between -1 and 1",
        )

    def start() -> Combine:
        kept: list[Tensor] = []  # the last direction of this sampling

        def combine(cond: Tensor, uncond: Tensor, w: float) -> Tensor:
            direction = cond - uncond
            if momentum != 0:
                if kept and kept[0].shape == direction.shape:
                    direction = direction + momentum * kept[0]
                kept[:] = [direction]
            if math.isfinite(max_norm):
                length = inner(direction, direction).sqrt()
                direction = direction * torch.where(length > max_norm, max_norm / length, 1.0)
            parallel = over(inner(direction, cond), inner(cond, cond)) * cond
            return cond + (w - 1) * (direction - parallel + eta * parallel)

        return combine

    return pair(start, scale, space="x0")


def cfg_zero(scale: Scale = 7.5, *, zero_init: int = 1) -> Guidance:
    """Guide a flow by CFG-Zero* (Fan et al. 2025, arXiv:2503.18886, eq. 11 and algorithm 1).

        out = s uncond + w (cond - s uncond),   s = <cond, uncond> / |uncond|^2 over each sample

    and no movement at all in the first evaluations, where the learnt flow is worse than none.

    Args:
        scale: w.
        zero_init: evaluations at the start whose velocity is set to 0.

    Raises: LdmPipeError if zero_init is negative, or the network does not predict the flow.
    """
    if zero_init < 0:
        raise LdmPipeError(f"zero_init is {zero_init}", how_to_fix="use 0 or a small number of evaluations")

    def start() -> Combine:
        done = [0]

        def combine(cond: Tensor, uncond: Tensor, w: float) -> Tensor:
            done[0] += 1
            if done[0] <= zero_init:
                return torch.zeros_like(cond)
            base = over(inner(cond, uncond), inner(uncond, uncond)) * uncond
            return base + w * (cond - base)

        return combine

    rule = pair(start, scale)

    def guidance(denoiser: Denoiser, conds: object, weights: Tensor, uncond: ConditionLike | None) -> Denoise:
        if denoiser.prediction != "flow":
            raise LdmPipeError(
                f"CFG-Zero* for a network that predicts {denoiser.prediction}",
                "guidance.cfg_zero",
                "it is made for flow; use classifier_free or apg",
            )
        return rule(denoiser, conds, weights, uncond)  # type: ignore[arg-type]

    return guidance


def tangential(scale: Scale = 7.5) -> Guidance:
    """Guide after tangential damping (Kwon et al. 2025, arXiv:2503.18137, algorithm 1).

    The unconditional prediction is projected on the first right singular vector of both predictions, the direction
    they share; then classifier-free guidance.
    """

    def combine(cond: Tensor, uncond: Tensor, w: float) -> Tensor:
        # The singular vector is a combination of both rows: the eigenvector of their 2 x 2 Gram matrix.
        rows = torch.stack([cond.flatten(1), uncond.flatten(1)], dim=1).double()  # (B, 2, n)
        values, vectors = torch.linalg.eigh(rows @ rows.transpose(1, 2))
        first = vectors[:, :, 1:].transpose(1, 2) @ rows  # (B, 1, n), of squared length values[:, 1]
        share = over(first @ rows[:, 1:].transpose(1, 2), values[:, 1:, None])  # (B, 1, 1)
        damped = (share * first).reshape(uncond.shape).to(uncond.dtype)
        return damped + w * (cond - damped)

    return pair(lambda: combine, scale)


def magnitude_aware(scale: Scale = 10.0, *, damping: float = 8.0) -> Guidance:
    """Guide less where both predictions differ much (MAMBO-G, Zhu et al. 2025, arXiv:2508.03442).

        out = uncond + (1 + (w - 1) exp(-damping |cond - uncond| / |uncond|)) (cond - uncond)

    Raises: LdmPipeError if damping is negative.
    """
    if not 0 <= damping < math.inf:
        raise LdmPipeError(f"damping is {damping}", how_to_fix="use a number of 0 (no damping) or more; 8 is customary")

    def combine(cond: Tensor, uncond: Tensor, w: float) -> Tensor:
        difference = cond - uncond
        ratio = over(inner(difference, difference), inner(uncond, uncond)).sqrt()
        return uncond + (1 + (w - 1) * torch.exp(-damping * ratio)) * difference

    return pair(lambda: combine, scale)


def autoguidance(weaker: Denoiser, scale: Scale = 2.0) -> Guidance:
    """Guide a model by a weaker one of itself (Karras et al. 2024, arXiv:2406.02507, eq. 3 with both conditioned).

        x0 = x0_weaker + w (x0 - x0_weaker)

    The weaker model sees the same condition: a smaller network, one trained for less long, or an earlier EMA.

    Args:
        weaker: of the same shape of latents and the same noise schedule.
        scale: w; where it is 1 the weaker model is not evaluated.

    Raises: LdmPipeError, when it is called, for several conditions or for a weaker model of another latent shape.
    """

    def guidance(
        denoiser: Denoiser, conds: list[ConditionLike], weights: Tensor, uncond: ConditionLike | None
    ) -> Denoise:
        if len(conds) != 1 or not bool((weights == 1).all()):
            raise LdmPipeError("autoguidance with several or weighted conditions", how_to_fix="use one plain prompt")

        def denoise(x_t: Tensor, t: Tensor) -> Denoised:
            strong = denoiser(x_t, t, conds[0])
            w = scale_at(scale, noise_level(denoiser, t))
            if w == 1:
                return strong
            try:
                weak = weaker(x_t, t, conds[0]).x0
            except RuntimeError as error:
                raise LdmPipeError(
                    f"the weaker model does not take latents {list(x_t.shape)} with this condition: {error}",
                    "guidance.autoguidance",
                    "use a weaker model of the same latents and text encoder",
                ) from error
            return Denoised(weak + w * (strong.x0 - weak), strong.var_mix)

        return denoise

    return guidance  # type: ignore[return-value]
