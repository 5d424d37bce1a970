"""DEIS: the probability flow with the noise as a polynomial in log(sigma / alpha), integrated exactly. Order 1 to 3."""

from __future__ import annotations

import math

from torch import Tensor

from ldm_pipe.denoiser import Denoise
from ldm_pipe.noise import Draw
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.samplers.common import Callback, flow_step, half_log_snr, refuse_eta, report
from ldm_pipe.samplers.quadrature import quadrature
from ldm_pipe.schedule import Steps
from ldm_pipe.schedule.process import eps_from_x0


def deis(
    denoise: Denoise,
    x: Tensor,
    steps: Steps,
    *,
    noise: Draw | None = None,
    eta: float = 0.0,
    callback: Callback | None = None,
    order: int = 3,
) -> Tensor:
    """Sample with tAB-DEIS of log rho (Zhang & Chen 2022, arXiv:2204.13902, section 3).

        x_s = alpha_s / alpha_t x_t + alpha_s sum_j eps_j int_{rho_t}^{rho_s} l_j(log rho) d rho,   rho = sigma / alpha

    with l_j the Lagrange polynomials of the last `order` estimates of the noise. Order 1 is DDIM: at the start, from
    alpha = 0, which is not remembered as it is infinitely far, and in the step to sigma = 0, which would extrapolate
    without end. The last steps of fewer than 15 are of lower order, as in DPM-Solver.

    Args:
        denoise: maps (x_t, t) to an estimate of x0, same shape as x_t.
        x: the state at row 0 of the steps, shape (B, *).
        steps: levels from noise to clean.
        noise: not used; all samplers are called alike.
        eta: this sampler has none: only 0 is taken.
        callback: see `samplers.common.Callback`.
        order: 1 to 3.

    Returns: x at the last row, shape (B, *).
    """
    refuse_eta(eta, "deis")
    if order not in (1, 2, 3):
        raise LdmPipeError(f"deis of order {order!r}", how_to_fix="use 1, 2 or 3")
    past: list[tuple[float, Tensor]] = []  # (half_log_snr, estimate of eps), newest first
    for i, (t, alpha_t, sigma_t, alpha_s, sigma_s) in enumerate(steps.pairs()):
        x0 = denoise(x, t).x0
        eps, here = eps_from_x0(x, x0, alpha_t, sigma_t), half_log_snr(alpha_t, sigma_t)
        past = [(here, eps), *past[: order - 1]] if alpha_t > 0 else []
        p = min(len(past), steps.num_steps - i) if steps.num_steps < 15 else len(past)
        if p <= 1 or sigma_s == 0:
            x = flow_step(x, x0, alpha_t, sigma_t, alpha_s, sigma_s)
        else:
            x = (alpha_s / alpha_t) * x
            weights = _weights([here - there for there, _ in past[:p]], half_log_snr(alpha_s, sigma_s) - here)
            for weight, (_, e) in zip(weights, past[:p], strict=True):
                x = x.add(e, alpha=alpha_s * sigma_t / alpha_t * weight)
        x = report(callback, i, t, x, x0)
    return x


def _weights(nodes: list[float], h: float) -> list[float]:
    """Return int l_j(u) e^u du from u = 0 to -h for nodes u_j = log(rho_j / rho_t), in units of rho_t.

    The integrals of u^k e^u follow by parts: I_0 = e^-h - 1, I_k = (-h)^k e^-h - k I_(k - 1).
    """
    moments = [math.expm1(-h)]
    for k in range(1, len(nodes)):
        moments.append((-h) ** k * math.exp(-h) - k * moments[-1])
    return quadrature(nodes, moments)
