"""Guidance towards several conditions at once, each with a weight.

Enters: a `Denoiser`, conditions and their weights. Leaves: a `Denoise`. This file does not know how prompts are written
or encoded.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm_pipe.denoiser import ConditionLike, Denoise, Denoised, Denoiser
from ldm_pipe.guidance.classifier_free import rescale_std
from ldm_pipe.pretrained import LdmPipeError


def composed(
    denoiser: Denoiser,
    conds: Sequence[ConditionLike],
    weights: Tensor,
    uncond: ConditionLike,
    scale: float,
    *,
    rescale: float = 0.0,
) -> Denoise:
    """Guide towards the conjunction of conditions (Liu et al. 2022, arXiv:2206.01714, eq. 11).

        out = uncond + w sum_k weight_k (cond_k - uncond)

    in the space of the network's own prediction; one condition of weight 1 is classifier-free guidance. The learnt
    variance, where there is one, is that of the first condition.

    Args:
        denoiser: the model.
        conds: K conditions of B rows each.
        weights: shape (K, B); below 0 pushes away.
        uncond: empty or negative condition, B rows.
        scale: w.
        rescale: as in `cfg`, with the first condition as reference.

    Returns: (x_t, t) -> Denoised, at one evaluation of (K + 1) B rows per step.

    Raises: LdmPipeError if weights are not (K, B).
    """
    num, batch = len(conds), weights.shape[-1]
    if weights.shape != (num, batch) or num == 0:
        raise LdmPipeError(f"weights {list(weights.shape)} for {num} conditions", "guidance.composed")
    if scale == 1 and rescale > 0:
        warnings.warn(f"guidance rescale {rescale} has no effect at guidance scale 1", UserWarning, stacklevel=2)
        rescale = 0.0
    every = type(conds[0]).cat([uncond, *conds])

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        without, *given = evaluate(denoiser, x_t, t, every, num + 1)
        channels = x_t.shape[1]  # further ones are of the variance
        base = without[:, :channels]
        out = base + scale * weighted_sum(base, [value[:, :channels] for value in given], weights)
        if rescale > 0:
            out = rescale_std(out, given[0][:, :channels], rescale)
        if without.shape[1] > channels:
            out = torch.cat([out, given[0][:, channels:]], dim=1)
        return denoiser.to_denoised(out, x_t, t)

    return denoise


def evaluate(denoiser: Denoiser, x_t: Tensor, t: Tensor, every: ConditionLike, num: int) -> Sequence[Tensor]:
    """Run the network once for `num` conditions joined along the batch; return the output of each."""
    times = t.repeat(num) if t.ndim else t
    return denoiser.predict(x_t.repeat(num, *[1] * (x_t.ndim - 1)), times, every).chunk(num)


def weighted_sum(base: Tensor, parts: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Return sum_k weight_k (part_k - base), shape (B, *), for weights (K, B)."""
    differences = torch.stack([part - base for part in parts])  # (K, B, *)
    factors = weights.to(differences).reshape(len(parts), -1, *[1] * (base.ndim - 1))
    return (factors * differences).sum(dim=0)
