"""Classifier-free guidance.

Enters: a `Denoiser` and two conditions. Leaves: a `Denoise`. This file does not know samplers or how conditions are
    made.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from ldm_pipe.denoiser import ConditionLike, Denoise, Denoised, Denoiser
from ldm_pipe.pretrained import LdmPipeError


def cfg(
    denoiser: Denoiser,
    cond: ConditionLike | None,
    uncond: ConditionLike | None,
    scale: float,
    *,
    rescale: float = 0.0,
) -> Denoise:
    """Guide without a classifier (Ho & Salimans 2022, arXiv:2207.12598, eq. 6, with w counted from 1).

        out = uncond + w (cond - uncond)

    and, against over-exposure at large w (Lin et al. 2023, arXiv:2305.08891, eq. 15-16; rescale is their phi),

        out = phi out std(cond) / std(out) + (1 - phi) out

    both in the space of the network's own prediction, the standard deviations over each sample. A learnt variance is
    not guided: the conditional one is taken.

    Args:
        denoiser: the model.
        cond: condition, B rows; may be None only where scale = 0.
        uncond: empty or negative condition, B rows; may be None only where scale = 1.
        scale: w; 1 is the conditional model, 0 the unconditional one, each at one evaluation of B per step; otherwise
            one evaluation of 2B.
        rescale: phi in [0, 1].

    Returns: (x_t, t) -> Denoised.

    Raises: LdmPipeError if scale is not finite, rescale is outside [0, 1], or a needed condition is missing.
    """
    if not math.isfinite(scale):
        raise LdmPipeError(
            f"guidance scale is {scale}", how_to_fix="use a finite number; 1 is no guidance, 7.5 customary"
        )
    if not 0 <= rescale <= 1:
        raise LdmPipeError(f"guidance rescale is {rescale}", how_to_fix="use a number from 0 to 1; 0.7 is the paper's")
    if scale in (0, 1):
        if rescale > 0:
            warnings.warn(
                f"guidance rescale {rescale} has no effect at guidance scale {scale}", UserWarning, stacklevel=2
            )
        only = cond if scale == 1 else uncond
        return lambda x_t, t: denoiser(x_t, t, only)
    if cond is None or uncond is None:
        missing = "a condition" if cond is None else "an unconditional condition"
        raise LdmPipeError(
            f"guidance scale {scale} without {missing}",
            where="guidance.cfg",
            how_to_fix="give both, or use scale 1 (conditional) or 0 (unconditional)",
        )
    both = type(cond).cat([uncond, cond])  # 2B rows, joined once for all steps

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        times = torch.cat([t, t]) if t.ndim else t
        without, given = denoiser.predict(torch.cat([x_t, x_t]), times, both).chunk(2)
        num = x_t.shape[1]  # further channels are of the variance
        out = without[:, :num] + scale * (given[:, :num] - without[:, :num])
        if rescale > 0:
            out = rescale_std(out, given[:, :num], rescale)
        if given.shape[1] > num:
            out = torch.cat([out, given[:, num:]], dim=1)
        return denoiser.to_denoised(out, x_t, t)

    return denoise


def rescale_std(out: Tensor, reference: Tensor, rescale: float) -> Tensor:
    """Draw each sample's standard deviation towards that of a reference (arXiv:2305.08891, eq. 15-16)."""
    dims = tuple(range(1, out.ndim))
    spread = out.std(dims, keepdim=True)
    # a constant prediction has nothing to rescale: leave it instead of dividing 0 by 0
    ratio = torch.where(spread > 0, reference.std(dims, keepdim=True) / spread, 1.0)
    return out * (rescale * ratio + (1 - rescale))
