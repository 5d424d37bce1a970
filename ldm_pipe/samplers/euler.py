"""Euler's method on the probability flow. Order 1."""

from __future__ import annotations

from torch import Tensor

from ldm_pipe.denoiser import Denoise
from ldm_pipe.noise import Draw
from ldm_pipe.samplers.common import Callback, refuse_eta, report
from ldm_pipe.schedule import Steps


def euler(
    denoise: Denoise,
    x: Tensor,
    steps: Steps,
    *,
    noise: Draw | None = None,
    eta: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """Sample with Euler steps in the frame x / alpha (Karras et al. 2022, arXiv:2206.00364, algorithm 1 without churn).

        d(x / alpha) / d(sigma / alpha) = eps   =>   x_s = r x_t + (alpha_s - r alpha_t) x0,   r = sigma_s / sigma_t

    Multiplied out it divides by no alpha, so it starts from alpha = 0. On the same rows it equals DDIM with eta = 0;
    what diffusers calls Euler differs in its rows (grid "fractional") and its init_scale.

    Args:
        denoise: maps (x_t, t) to an estimate of x0, same shape as x_t.
        x: the state at row 0 of the steps, shape (B, *).
        steps: levels from noise to clean.
        noise: not used; all samplers are called alike.
        eta: this sampler has none: only 0 is taken.
        callback: see `samplers.common.Callback`.

    Returns: x at the last row, shape (B, *).
    """
    refuse_eta(eta, "euler")
    for i, (t, alpha_t, sigma_t, alpha_s, sigma_s) in enumerate(steps.pairs()):
        x0 = denoise(x, t).x0
        r = sigma_s / sigma_t
        x = r * x + (alpha_s - r * alpha_t) * x0
        x = report(callback, i, t, x, x0)
    return x
