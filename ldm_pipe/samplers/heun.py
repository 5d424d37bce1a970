"""Heun's method on the probability flow, and EDM's stochastic sampler around it. Order 2, two evaluations per step."""

from __future__ import annotations

import math

from torch import Tensor

from ldm_pipe.denoiser import Denoise
from ldm_pipe.noise import Draw
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.samplers.common import Callback, flow_step, fresh, half_log_snr, refuse_eta, report
from ldm_pipe.schedule import Steps


def heun(
    denoise: Denoise,
    x: Tensor,
    steps: Steps,
    *,
    noise: Draw | None = None,
    eta: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """Sample with Heun's method in the frame x / alpha (Karras et al. 2022, arXiv:2206.00364, algorithm 1).

        x_s / alpha_s = x_t / alpha_t + (s_edm - t_edm) (eps_t + eps_s) / 2,   t_edm = sigma_t / alpha_t, s_edm alike

    with eps_s found at the end of an Euler step. From alpha = 0, where t_edm is infinite, and to sigma = 0, where
    eps_s has no meaning, the step is Euler's.

    Args:
        denoise, x, steps, callback: as in `samplers.euler`.
        noise: not used; all samplers are called alike.
        eta: this sampler has none: only 0 is taken.

    Returns: x at the last row, shape (B, *).
    """
    refuse_eta(eta, "heun")
    for i, (t, *levels) in enumerate(steps.pairs()):
        x0 = denoise(x, t).x0
        x = _heun_step(denoise, x, x0, steps.t[i + 1], *levels)
        x = report(callback, i, t, x, x0)
    return x


def edm(
    denoise: Denoise,
    x: Tensor,
    steps: Steps,
    *,
    noise: Draw | None = None,
    eta: float = 0.0,
    callback: Callback | None = None,
    s_churn: float = 40.0,
    s_tmin: float = 0.05,
    s_tmax: float = 50.0,
    s_noise: float = 1.0,
) -> Tensor:
    """Sample with noise added before each step of Heun's (Karras et al. 2022, arXiv:2206.00364, algorithm 2).

        hat = (1 + gamma) t_edm,   gamma = min(s_churn / num_steps, sqrt(2) - 1) where s_tmin <= t_edm <= s_tmax, else 0
        x_hat / alpha_hat = x_t / alpha_t + sqrt(hat^2 - t_edm^2) s_noise z,   then from hat to s as in `heun`

    The defaults are the paper's for ImageNet-64 (table 5), but for s_noise, whose 1.003 there makes up for what that
    network loses; s_churn = 0 is `heun`.

    Args:
        denoise, x, steps, callback: as in `samplers.euler`.
        noise: source of fresh noise, needed unless s_churn is 0.
        eta: this sampler has none: only 0 is taken.
        s_churn: how much noise to add over all steps together, at least 0.
        s_tmin: sigma / alpha below which none is added.
        s_tmax: sigma / alpha above which none is added.
        s_noise: standard deviation of what is added, near 1.

    Returns: x at the last row, shape (B, *).

    Raises: LdmPipeError for a negative option or an empty range.
    """
    refuse_eta(eta, "edm")
    if not (s_churn >= 0 and 0 <= s_tmin <= s_tmax and s_noise >= 0):
        raise LdmPipeError(
            f"s_churn, s_tmin, s_tmax, s_noise are {s_churn}, {s_tmin}, {s_tmax}, {s_noise}",
            how_to_fix="none may be negative, and s_tmin may not exceed s_tmax",
        )
    churn = min(s_churn / steps.num_steps, math.sqrt(2) - 1)
    for i, (t, alpha_t, sigma_t, alpha_s, sigma_s) in enumerate(steps.pairs()):
        if churn > 0 and s_tmin * alpha_t <= sigma_t <= s_tmax * alpha_t:
            t, alpha, sigma = steps.at(half_log_snr(alpha_t, sigma_t) - math.log1p(churn))
            added = math.sqrt((sigma / alpha) ** 2 - (sigma_t / alpha_t) ** 2)
            x = alpha * (x / alpha_t + added * s_noise * fresh(noise, x, "edm"))
            alpha_t, sigma_t = alpha, sigma
        x0 = denoise(x, t).x0
        x = _heun_step(denoise, x, x0, steps.t[i + 1], alpha_t, sigma_t, alpha_s, sigma_s)
        x = report(callback, i, steps.t[i], x, x0)
    return x


def _heun_step(
    denoise: Denoise, x: Tensor, x0: Tensor, s: Tensor, alpha_t: float, sigma_t: float, alpha_s: float, sigma_s: float
) -> Tensor:
    """Return x at s; x0 is the estimate at t. After Euler's step eps_s - eps_t = alpha_s / sigma_s (x0_t - x0_s)."""
    x = flow_step(x, x0, alpha_t, sigma_t, alpha_s, sigma_s)
    if alpha_t == 0 or sigma_s == 0:
        return x
    span = alpha_s * (sigma_t / alpha_t - sigma_s / alpha_s)
    return x.add(denoise(x, s).x0 - x0, alpha=0.5 * span * (alpha_s / sigma_s))
