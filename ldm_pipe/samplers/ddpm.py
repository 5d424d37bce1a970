"""Ancestral sampling: the reverse of the diffusion, step by step. Order 1/2 along a path, right in distribution."""

from __future__ import annotations

from typing import get_args

from torch import Tensor

from ldm_pipe.denoiser import Denoise
from ldm_pipe.noise import Draw
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.samplers.common import Callback, fresh, refuse_eta, report
from ldm_pipe.schedule import Steps
from ldm_pipe.schedule.process import Variance, posterior


def ddpm(
    denoise: Denoise,
    x: Tensor,
    steps: Steps,
    *,
    noise: Draw | None = None,
    eta: float = 0.0,
    callback: Callback | None = None,
    variance: Variance | None = None,
) -> Tensor:
    """Sample with DDPM (Ho et al. 2020, arXiv:2006.11239, eq. 6-7), from level t to s at any distance.

        x_s ~ N((r sigma_s^2 x_t + alpha_s large x0) / sigma_t^2,  variance)
        r = alpha_t / alpha_s,   large = sigma_t^2 - r^2 sigma_s^2,   small = large sigma_s^2 / sigma_t^2

    with the variance small, large (section 3.2 there), or large^v small^(1 - v) with v learnt by the network (Nichol &
    Dhariwal 2021, arXiv:2102.09672, eq. 15). The step to sigma = 0 draws no noise.

    Args:
        denoise: maps (x_t, t) to an estimate of x0, same shape as x_t.
        x: the state at row 0 of the steps, shape (B, *).
        steps: levels from noise to clean.
        noise: source of fresh noise, needed.
        eta: this sampler has none: only 0 is taken.
        callback: see `samplers.common.Callback`.
        variance: "fixed_small", "fixed_large" or "learned"; None: learned where the network learnt it, else small.

    Returns: x at the last row, shape (B, *).

    Raises: LdmPipeError for an unknown variance, or a learned one that the network did not learn.
    """
    refuse_eta(eta, "ddpm")
    if variance not in (None, *get_args(Variance)):
        raise LdmPipeError(f"variance is {variance!r}", how_to_fix=f"use one of {', '.join(get_args(Variance))}")
    for i, (t, *levels) in enumerate(steps.pairs()):
        estimate = denoise(x, t)
        x0, mix = estimate.x0, estimate.var_mix
        if variance == "learned" and mix is None:
            raise LdmPipeError(
                'variance is "learned", but the network gives none', how_to_fix='use "fixed_small" or "fixed_large"'
            )
        back = posterior(*levels)
        x = back.of_x_t * x + back.of_x0 * x0
        if back.small > 0:
            if variance == "fixed_large":
                std = back.large**0.5
            elif variance == "fixed_small" or mix is None:
                std = back.small**0.5
            else:
                std = back.small**0.5 * (back.large / back.small) ** (0.5 * mix)
            x = x + std * fresh(noise, x, "ddpm")
        x = report(callback, i, t, x, x0)
    return x
