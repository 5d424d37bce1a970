"""DPM-Solver++ (2S): a singlestep exponential integrator, and its ancestral form. Order 2, two evaluations per step."""

from __future__ import annotations

from torch import Tensor

from ldm_pipe.denoiser import Denoise
from ldm_pipe.noise import Draw
from ldm_pipe.samplers.common import Callback, flow_step, fresh, half_log_snr, refuse_eta, report, sde_step
from ldm_pipe.schedule import Steps


def dpmpp_2s(
    denoise: Denoise,
    x: Tensor,
    steps: Steps,
    *,
    noise: Draw | None = None,
    eta: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """Sample with DPM-Solver++ 2S (Lu et al. 2022, arXiv:2211.01095, algorithm 1 with r = 1/2).

        x_u = sigma_u / sigma_t x_t + alpha_u (1 - exp(-h / 2)) x0_t
        x_s = sigma_s / sigma_t x_t + alpha_s (1 - exp(-h)) x0_u

    with h the step in half_log_snr and u half-way. From alpha = 0 and to sigma = 0 there is no half-way: x0_t stands
    for x0_u.

    Args:
        denoise, x, steps, callback: as in `samplers.euler`.
        noise: not used; all samplers are called alike.
        eta: this sampler has none: only 0 is taken.

    Returns: x at the last row, shape (B, *).
    """
    refuse_eta(eta, "dpmpp_2s")
    for i, (t, alpha_t, sigma_t, alpha_s, sigma_s) in enumerate(steps.pairs()):
        x0 = d = denoise(x, t).x0
        if alpha_t > 0 and sigma_s > 0:
            u, alpha_u, sigma_u = steps.at(0.5 * (half_log_snr(alpha_t, sigma_t) + half_log_snr(alpha_s, sigma_s)))
            d = denoise(flow_step(x, x0, alpha_t, sigma_t, alpha_u, sigma_u), u).x0
        x = flow_step(x, d, alpha_t, sigma_t, alpha_s, sigma_s)
        x = report(callback, i, t, x, x0)
    return x


def dpmpp_2s_ancestral(
    denoise: Denoise,
    x: Tensor,
    steps: Steps,
    *,
    noise: Draw | None = None,
    eta: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """Sample with steps of `dpmpp_2s` to below the next level and fresh noise up to it (k-diffusion's "DPM++ 2S a").

    The step goes to down = s_edm^2 / t_edm (t_edm, s_edm: sigma / alpha of the two levels); half-way in half_log_snr
    lies s itself, so the estimate of x0 is the one at s, at the end of a DDIM step. The rest is DDPM's step with it.

    Args:
        denoise, x, steps, callback: as in `samplers.euler`.
        noise: source of fresh noise, needed.
        eta: this sampler has none, its noise is full: only 0 is taken.

    Returns: x at the last row, shape (B, *).
    """
    refuse_eta(eta, "dpmpp_2s_ancestral")
    for i, (t, alpha_t, sigma_t, alpha_s, sigma_s) in enumerate(steps.pairs()):
        levels = (alpha_t, sigma_t, alpha_s, sigma_s)
        x0 = d = denoise(x, t).x0
        if alpha_t > 0 and sigma_s > 0:
            d = denoise(flow_step(x, x0, *levels), steps.t[i + 1]).x0
        x = sde_step(x, d, *levels, fresh(noise, x, "dpmpp_2s_ancestral"))
        x = report(callback, i, t, x, x0)
    return x
