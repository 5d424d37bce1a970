"""Guidance by comparing two predictions: with the condition and without.

Enters: a rule that combines both predictions, and a scale. Leaves: a `Guidance`, (denoiser, conds, weights, uncond) ->
`Denoise`, in the form that `pipe(..., guidance=)` takes. This file does not know samplers or how conditions are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ldm_pipe.denoiser import ConditionLike, Denoise, Denoised, Denoiser
from ldm_pipe.guidance.classifier_free import rescale_std
from ldm_pipe.guidance.composed import evaluate, weighted_sum
from ldm_pipe.guidance.scale import NoiseLevel, Scale, scale_at
from ldm_pipe.pretrained import LdmPipeError

# (denoiser, K conditions of B rows, their weights (K, B), empty or negative condition) -> Denoise
Guidance = Callable[[Denoiser, Sequence[ConditionLike], Tensor, ConditionLike | None], Denoise]
# (prediction with the condition, without, w) -> guided prediction; all of shape (B, *)
Combine = Callable[[Tensor, Tensor, float], Tensor]
Space = Literal["prediction", "x0"]


def pair(start: Callable[[], Combine], scale: Scale, *, space: Space = "prediction", rescale: float = 0.0) -> Guidance:
    """Return the guidance that combines predictions with and without the condition by a rule.

    Several conditions are joined to one first, uncond + sum_k weight_k (cond_k - uncond) (Liu et al. 2022,
    arXiv:2206.01714, eq. 11). Where w is 1 and there is one condition of weight 1, the network is evaluated with the
    condition only. A learnt variance is that of the first condition.

    Args:
        start: makes the rule; called once for each sampling, so that a rule may remember earlier steps.
        scale: w.
        space: what is combined: the network's own prediction, or x0.
        rescale: phi of arXiv:2305.08891, eq. 16, in [0, 1]; in the space of the network's prediction only.
    """
    if not 0 <= rescale <= 1:
        raise LdmPipeError(f"guidance rescale is {rescale}", how_to_fix="use a number from 0 to 1; 0.7 is the paper's")

    def guidance(
        denoiser: Denoiser, conds: Sequence[ConditionLike], weights: Tensor, uncond: ConditionLike | None
    ) -> Denoise:
        if len(conds) == 0 or weights.shape[0] != len(conds):
            raise LdmPipeError(f"weights {list(weights.shape)} for {len(conds)} conditions", "guidance")
        combine, plain = start(), len(conds) == 1 and bool((weights == 1).all())
        every: Any = None if uncond is None else type(conds[0]).cat([uncond, *conds])

        def denoise(x_t: Tensor, t: Tensor) -> Denoised:
            w = scale_at(scale, noise_level(denoiser, t))
            if w == 1 and plain:
                return denoiser(x_t, t, conds[0])
            if every is None:
                raise LdmPipeError(
                    f"guidance scale {w:g} without an unconditional condition",
                    "guidance",
                    "give one, or use scale 1 (conditional)",
                )
            without, *parts = evaluate(denoiser, x_t, t, every, 1 + len(conds))
            num = x_t.shape[1]  # further channels are of the variance
            base = without[:, :num]
            given = (
                parts[0][:, :num] if plain else base + weighted_sum(base, [part[:, :num] for part in parts], weights)
            )
            if space == "x0":
                ends = (denoiser.to_denoised(value, x_t, t).x0 for value in (given, base))
                return Denoised(combine(*ends, w), denoiser.to_denoised(parts[0], x_t, t).var_mix)
            out = combine(given, base, w)
            if rescale > 0:
                out = rescale_std(out, given, rescale)
            return denoiser.to_denoised(torch.cat([out, parts[0][:, num:]], dim=1), x_t, t)

        return denoise

    return guidance


def noise_level(denoiser: Denoiser, t: Tensor) -> NoiseLevel:
    """Return where a time stands in the denoiser's schedule; of a time per sample, the first."""
    first = t.reshape(-1)[:1].double().cpu()
    alpha, sigma = (float(level) for level in denoiser.schedule.alpha_sigma(first))
    last = float(denoiser.schedule.t_range[1])
    return NoiseLevel(float(first), float(first) / last, sigma / alpha if alpha > 0 else float("inf"))


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of each sample, shape (B, 1, ..., 1)."""
    return (a * b).sum(tuple(range(1, a.ndim)), keepdim=True)


def over(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the quotient, 0 where the denominator is 0."""
    return torch.where(denominator > 0, numerator / denominator.clamp(min=torch.finfo(denominator.dtype).tiny), 0.0)
