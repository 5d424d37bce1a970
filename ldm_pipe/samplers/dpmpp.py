"""DPM-Solver++ (2M): a multistep exponential integrator. Order 2 at one evaluation per step."""

from __future__ import annotations

import math

from torch import Tensor

from ldm_pipe.denoiser import Denoise
from ldm_pipe.noise import Draw
from ldm_pipe.samplers.common import Callback, refuse_eta, report
from ldm_pipe.schedule import Steps


def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    steps: Steps,
    *,
    noise: Draw | None = None,
    eta: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """Sample with DPM-Solver++ 2M (Lu et al. 2022, arXiv:2211.01095, algorithm 2).

        x_s = sigma_s / sigma_t x_t + alpha_s (1 - exp(-h)) D,   D = x0 + h / (2 h_last) (x0 - x0_last)

    with h the step in half_log_snr. D = x0 in the first step, in the step to sigma = 0, where h is infinite, and in
    the last of fewer than 15 steps. After a start at alpha = 0, h_last is infinite and D is x0 again: no number is
    divided by alpha.

    Args:
        denoise: maps (x_t, t) to an estimate of x0, same shape as x_t.
        x: the state at row 0 of the steps, shape (B, *).
        steps: levels from noise to clean.
        noise: not used; all samplers are called alike.
        eta: this sampler has none: only 0 is taken.
        callback: see `samplers.common.Callback`.

    Returns: x at the last row, shape (B, *).
    """
    refuse_eta(eta, "dpmpp_2m")
    x0_last, h_last = None, math.inf
    for i, (t, alpha_t, sigma_t, alpha_s, sigma_s) in enumerate(steps.pairs()):
        x0 = denoise(x, t).x0
        h = half_log_snr(alpha_s, sigma_s) - half_log_snr(alpha_t, sigma_t)
        few_steps_end = i == steps.num_steps - 1 and steps.num_steps < 15
        if x0_last is None or sigma_s == 0 or few_steps_end:
            d = x0
        else:
            d = x0 + h / (2 * h_last) * (x0 - x0_last)
        x = (sigma_s / sigma_t) * x - alpha_s * math.expm1(-h) * d
        x0_last, h_last = x0, h
        x = report(callback, i, t, x, x0)
    return x


def half_log_snr(alpha: float, sigma: float) -> float:
    """Return log(alpha / sigma), infinite at either end."""
    if alpha == 0:
        return -math.inf
    return math.inf if sigma == 0 else math.log(alpha / sigma)
