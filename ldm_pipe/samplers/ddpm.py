"""Ancestral sampling: the reverse of the diffusion, step by step. Order 1/2 along a path, right in distribution."""

from __future__ import annotations

from torch import Tensor

from ldm_pipe.denoiser import Denoise
from ldm_pipe.noise import Draw
from ldm_pipe.samplers.common import Callback, fresh, refuse_eta, report
from ldm_pipe.schedule import Steps


def ddpm(
    denoise: Denoise,
    x: Tensor,
    steps: Steps,
    *,
    noise: Draw | None = None,
    eta: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """Sample with DDPM (Ho et al. 2020, arXiv:2006.11239, eq. 6-7), from level t to s at any distance.

        x_s ~ N((r sigma_s^2 x_t + alpha_s b x0) / sigma_t^2,  b sigma_s^2 / sigma_t^2),
        r = alpha_t / alpha_s,   b = sigma_t^2 - r^2 sigma_s^2

    Args:
        denoise: maps (x_t, t) to an estimate of x0, same shape as x_t.
        x: the state at row 0 of the steps, shape (B, *).
        steps: levels from noise to clean.
        noise: source of fresh noise, needed.
        eta: this sampler has none: only 0 is taken.
        callback: see `samplers.common.Callback`.

    Returns: x at the last row, shape (B, *).
    """
    refuse_eta(eta, "ddpm")
    for i, (t, alpha_t, sigma_t, alpha_s, sigma_s) in enumerate(steps.pairs()):
        x0 = denoise(x, t).x0
        r = alpha_t / alpha_s
        b = max(sigma_t**2 - r**2 * sigma_s**2, 0.0)
        x = (r * sigma_s**2 / sigma_t**2) * x + (alpha_s * b / sigma_t**2) * x0
        std = b**0.5 * sigma_s / sigma_t
        if std > 0:
            x = x + std * fresh(noise, x, "ddpm")
        x = report(callback, i, t, x, x0)
    return x
