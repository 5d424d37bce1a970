"""Euler's method on the probability flow, and its ancestral form. Order 1."""

from __future__ import annotations

from torch import Tensor

from ldm_pipe.denoiser import Denoise
from ldm_pipe.noise import Draw
from ldm_pipe.samplers.common import Callback, flow_step, fresh, refuse_eta, report, sde_step
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
    for i, (t, *levels) in enumerate(steps.pairs()):
        x0 = denoise(x, t).x0
        x = flow_step(x, x0, *levels)
        x = report(callback, i, t, x, x0)
    return x


def euler_ancestral(
    denoise: Denoise,
    x: Tensor,
    steps: Steps,
    *,
    noise: Draw | None = None,
    eta: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """Sample with Euler steps to below the next level and fresh noise up to it (k-diffusion's "Euler a").

        down = s_edm^2 / t_edm,   up^2 = s_edm^2 - down^2   (t_edm, s_edm: sigma / alpha of the two levels)
        x_s / alpha_s = x_t / alpha_t + (down - t_edm) eps + up z

    Multiplied out this is the step of DDPM: on the same rows the two are equal. They differ in their rows (grid
    "fractional" here) and init_scale.

    Args:
        denoise, x, steps, callback: as in `euler`.
        noise: source of fresh noise, needed.
        eta: this sampler has none, its noise is full: only 0 is taken.

    Returns: x at the last row, shape (B, *).
    """
    refuse_eta(eta, "euler_ancestral")
    for i, (t, *levels) in enumerate(steps.pairs()):
        x0 = denoise(x, t).x0
        x = sde_step(x, x0, *levels, fresh(noise, x, "euler_ancestral"))
        x = report(callback, i, t, x, x0)
    return x
