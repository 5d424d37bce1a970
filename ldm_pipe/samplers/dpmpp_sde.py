"""The DPM-Solver++ of the reverse diffusion: fresh noise in every step, right in distribution with few of them."""

from __future__ import annotations

from torch import Tensor

from ldm_pipe.denoiser import Denoise
from ldm_pipe.noise import Draw
from ldm_pipe.samplers.common import Callback, fresh, half_log_snr, refuse_eta, report, sde_step
from ldm_pipe.samplers.dpmpp import Past, extrapolate, usable_order
from ldm_pipe.schedule import Steps


def dpmpp_sde(
    denoise: Denoise,
    x: Tensor,
    steps: Steps,
    *,
    noise: Draw | None = None,
    eta: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """Sample with the singlestep SDE solver of two stages (k-diffusion's "DPM++ SDE"; arXiv:2211.01095).

        x_u = reverse diffusion from t half-way to s in half_log_snr, with x0_t held
        x_s = reverse diffusion from t to s, with x0_u held

    on one path of noise: what drives the second is the noise of the first and as much more as is missing, weighed in
    the clock of the diffusion, snr = (alpha / sigma)^2. From alpha = 0 and to sigma = 0 the step is DDPM's.

    Args:
        denoise, x, steps, callback: as in `samplers.euler`.
        noise: source of fresh noise, needed; two draws per step.
        eta: this sampler has none, its noise is full: only 0 is taken.

    Returns: x at the last row, shape (B, *).
    """
    refuse_eta(eta, "dpmpp_sde")
    for i, (t, alpha_t, sigma_t, alpha_s, sigma_s) in enumerate(steps.pairs()):
        x0 = d = denoise(x, t).x0
        z = fresh(noise, x, "dpmpp_sde")
        if alpha_t > 0 and sigma_s > 0:
            u, alpha_u, sigma_u = steps.at(0.5 * (half_log_snr(alpha_t, sigma_t) + half_log_snr(alpha_s, sigma_s)))
            d = denoise(sde_step(x, x0, alpha_t, sigma_t, alpha_u, sigma_u, z), u).x0
            snr_t, snr_u, snr_s = (
                (a / b) ** 2 for a, b in ((alpha_t, sigma_t), (alpha_u, sigma_u), (alpha_s, sigma_s))
            )
            share = (snr_u - snr_t) / (snr_s - snr_t)
            z = share**0.5 * z + (1 - share) ** 0.5 * fresh(noise, x, "dpmpp_sde")
        x = sde_step(x, d, alpha_t, sigma_t, alpha_s, sigma_s, z)
        x = report(callback, i, t, x, x0)
    return x


def dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    steps: Steps,
    *,
    noise: Draw | None = None,
    eta: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """Sample with SDE-DPM-Solver++ 2M (Lu et al. 2022, arXiv:2211.01095): `dpmpp_2m` along the reverse diffusion.

        x_s = sigma_s / sigma_t exp(-h) x_t + alpha_s (1 - exp(-2 h)) D + sigma_s sqrt(1 - exp(-2 h)) z

    with h the step in half_log_snr and D of `dpmpp_2m`, its orders at the ends too.

    Args:
        denoise, x, steps, callback: as in `samplers.euler`.
        noise: source of fresh noise, needed.
        eta: this sampler has none, its noise is full: only 0 is taken.

    Returns: x at the last row, shape (B, *).
    """
    refuse_eta(eta, "dpmpp_2m_sde")
    past: Past = []
    for i, (t, *levels) in enumerate(steps.pairs()):
        x0 = denoise(x, t).x0
        past = [(half_log_snr(*levels[:2]), x0), *past[:1]]
        order = usable_order(past, steps, i, levels[3])
        d = extrapolate(past[:order], half_log_snr(*levels[2:]), rate=2)
        x = sde_step(x, d, *levels, fresh(noise, x, "dpmpp_2m_sde"))
        x = report(callback, i, t, x, x0)
    return x


def dpmpp_3m_sde(
    denoise: Denoise,
    x: Tensor,
    steps: Steps,
    *,
    noise: Draw | None = None,
    eta: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """Sample with SDE-DPM-Solver++ 3M (Lu et al. 2022, arXiv:2211.01095): `dpmpp_3m` along the reverse diffusion.

    As `dpmpp_2m_sde`, with D from the parabola through the last three x0; see `dpmpp.extrapolate`. diffusers 0.42.1
    turns a sign in phi_3 and halves x0'', k-diffusion only halves; neither is repeated here.

    Args:
        denoise, x, steps, callback: as in `samplers.euler`.
        noise: source of fresh noise, needed.
        eta: this sampler has none, its noise is full: only 0 is taken.

    Returns: x at the last row, shape (B, *).
    """
    refuse_eta(eta, "dpmpp_3m_sde")
    past: Past = []
    for i, (t, *levels) in enumerate(steps.pairs()):
        x0 = denoise(x, t).x0
        past = [(half_log_snr(*levels[:2]), x0), *past[:2]]
        order = usable_order(past, steps, i, levels[3])
        d = extrapolate(past[:order], half_log_snr(*levels[2:]), rate=2)
        x = sde_step(x, d, *levels, fresh(noise, x, "dpmpp_3m_sde"))
        x = report(callback, i, t, x, x0)
    return x
