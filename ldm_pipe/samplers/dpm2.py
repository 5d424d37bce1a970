"""DPM-Solver 2: the midpoint method in half_log_snr, and its ancestral form. Order 2, two evaluations per step."""

from __future__ import annotations

from torch import Tensor

from ldm_pipe.denoiser import Denoise
from ldm_pipe.noise import Draw
from ldm_pipe.samplers.common import Callback, flow_step, fresh, half_log_snr, refuse_eta, report, sde_step
from ldm_pipe.schedule import Steps


def dpm2(
    denoise: Denoise,
    x: Tensor,
    steps: Steps,
    *,
    noise: Draw | None = None,
    eta: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """Sample with DPM-Solver-2 (Lu et al. 2022, arXiv:2206.00927, algorithm 1), k-diffusion's "DPM2".

        x_s / alpha_s = x_t / alpha_t + (s_edm - t_edm) eps_u,   t_edm = sigma_t / alpha_t, s_edm alike

    with u half-way from t to s in half_log_snr, reached by Euler's step. As eps_u - eps_t = alpha_u / sigma_u
    (x0_t - x0_u) there, the step is Euler's plus a correction. From alpha = 0 and to sigma = 0 there is no half-way:
    those steps are Euler's.

    Args:
        denoise, x, steps, callback: as in `samplers.euler`.
        noise: not used; all samplers are called alike.
        eta: this sampler has none: only 0 is taken.

    Returns: x at the last row, shape (B, *).
    """
    refuse_eta(eta, "dpm2")
    for i, (t, alpha_t, sigma_t, alpha_s, sigma_s) in enumerate(steps.pairs()):
        x0 = denoise(x, t).x0
        x_t, x = x, flow_step(x, x0, alpha_t, sigma_t, alpha_s, sigma_s)
        if alpha_t > 0 and sigma_s > 0:
            u, alpha_u, sigma_u = steps.at(0.5 * (half_log_snr(alpha_t, sigma_t) + half_log_snr(alpha_s, sigma_s)))
            x_u = flow_step(x_t, x0, alpha_t, sigma_t, alpha_u, sigma_u)
            span = alpha_s * (sigma_t / alpha_t - sigma_s / alpha_s)
            x = x + span * (alpha_u / sigma_u) * (denoise(x_u, u).x0 - x0)
        x = report(callback, i, t, x, x0)
    return x


def dpm2_ancestral(
    denoise: Denoise,
    x: Tensor,
    steps: Steps,
    *,
    noise: Draw | None = None,
    eta: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """Sample with steps of `dpm2` to below the next level and fresh noise up to it (k-diffusion's "DPM2 a").

        down = s_edm^2 / t_edm,   up^2 = s_edm^2 - down^2   (t_edm, s_edm: sigma / alpha of the two levels)
        x_s / alpha_s = x_t / alpha_t + (down - t_edm) eps_u + up z

    Half-way in half_log_snr from t to the level `down` lies s itself, so u = s. From alpha = 0 and to sigma = 0 the
    step is DDPM's.

    Args:
        denoise, x, steps, callback: as in `samplers.euler`.
        noise: source of fresh noise, needed.
        eta: this sampler has none, its noise is full: only 0 is taken.

    Returns: x at the last row, shape (B, *).
    """
    refuse_eta(eta, "dpm2_ancestral")
    for i, (t, alpha_t, sigma_t, alpha_s, sigma_s) in enumerate(steps.pairs()):
        levels = (alpha_t, sigma_t, alpha_s, sigma_s)
        x0 = denoise(x, t).x0
        x_t, x = x, sde_step(x, x0, *levels, fresh(noise, x, "dpm2_ancestral"))
        if alpha_t > 0 and sigma_s > 0:
            x_u = flow_step(x_t, x0, *levels)
            t_edm, s_edm = sigma_t / alpha_t, sigma_s / alpha_s
            span = alpha_s * (t_edm - s_edm**2 / t_edm)
            x = x + (span / s_edm) * (denoise(x_u, steps.t[i + 1]).x0 - x0)
        x = report(callback, i, t, x, x0)
    return x
