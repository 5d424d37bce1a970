"""DPM-Solver++ (2M, 3M): multistep exponential integrators. Order 2 and 3 at one evaluation per step."""

from __future__ import annotations

import itertools
import math

from torch import Tensor

from ldm_pipe.denoiser import Denoise
from ldm_pipe.noise import Draw
from ldm_pipe.samplers.common import Callback, flow_step, half_log_snr, refuse_eta, report
from ldm_pipe.schedule import Steps

Past = list[tuple[float, Tensor]]  # (half_log_snr, x0) of the last evaluations, the newest first


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
        denoise, x, steps, callback: as in `samplers.euler`.
        noise: not used; all samplers are called alike.
        eta: this sampler has none: only 0 is taken.

    Returns: x at the last row, shape (B, *).
    """
    refuse_eta(eta, "dpmpp_2m")
    past: Past = []
    for i, (t, *levels) in enumerate(steps.pairs()):
        x0 = denoise(x, t).x0
        past = [(half_log_snr(*levels[:2]), x0), *past[:1]]
        order = usable_order(past, steps, i, levels[3])
        x = flow_step(x, extrapolate(past[:order], half_log_snr(*levels[2:])), *levels)
        x = report(callback, i, t, x, x0)
    return x


def dpmpp_3m(
    denoise: Denoise,
    x: Tensor,
    steps: Steps,
    *,
    noise: Draw | None = None,
    eta: float = 0.0,
    callback: Callback | None = None,
    half_curvature: bool = False,
) -> Tensor:
    """Sample with DPM-Solver++ 3M (Lu et al. 2022, arXiv:2211.01095, the multistep solver of order 3).

        x_s = sigma_s / sigma_t x_t + alpha_s integral_0^h exp(u - h) (x0 + u x0' + u^2 / 2 x0'') du

    with h the step in half_log_snr, and x0', x0'' there from the parabola through the last three x0; see
    `extrapolate`. The orders at the ends are those of `dpmpp_2m`, and 2 in the second and, of fewer than 15 steps, in
    the last but one.

    Args:
        denoise, x, steps, callback: as in `samplers.euler`.
        noise: not used; all samplers are called alike.
        eta: this sampler has none: only 0 is taken.
        half_curvature: take half of x0'', as the authors' code and diffusers do, which makes it a solver of order 2.

    Returns: x at the last row, shape (B, *).
    """
    refuse_eta(eta, "dpmpp_3m")
    past: Past = []
    for i, (t, *levels) in enumerate(steps.pairs()):
        x0 = denoise(x, t).x0
        past = [(half_log_snr(*levels[:2]), x0), *past[:2]]
        order = usable_order(past, steps, i, levels[3])
        d = extrapolate(past[:order], half_log_snr(*levels[2:]), curvature=0.5 if half_curvature else 1.0)
        x = flow_step(x, d, *levels)
        x = report(callback, i, t, x, x0)
    return x


def usable_order(past: Past, steps: Steps, i: int, sigma_s: float) -> int:
    """Return the order of step i: what the past gives, 1 to sigma = 0, and lower at the end of few steps."""
    left = steps.num_steps - i if steps.num_steps < 15 else 3
    return 1 if sigma_s == 0 else min(len(past), left)


def extrapolate(past: Past, end: float, *, rate: float = 1.0, curvature: float = 1.0) -> Tensor:
    """Return the x0 that, held over the step, does what the polynomial through the past x0 does.

        phi_1 D = integral_0^h rate exp(rate (u - h)) (x0 + u x0' + u^2 / 2 x0'') du
                = phi_1 x0 + phi_2 h x0' + phi_3 h^2 x0''
        phi_1 = 1 - exp(-r),   phi_2 = 1 - phi_1 / r,   phi_3 = 1/2 - phi_2 / r,   r = rate h

    With two estimates it is the simpler D = x0 + h / 2 x0' of algorithm 2 (arXiv:2211.01095), of the same order. An
    estimate at half_log_snr = -inf (alpha = 0) has no part in the slopes.

    Args:
        past: one to three estimates; their number is the order.
        end: half_log_snr at the end of the step; infinite only with one estimate.
        rate: 1 for the probability flow, 2 for the reverse diffusion.
        curvature: factor of x0''.
    """
    (now, x0), *older = past
    if not older:
        return x0
    h = end - now
    if len(older) == 1:
        before, last_x0 = older[0]
        return last_x0.lerp(x0, 1 + 0.5 * h / (now - before))
    slopes = [(a - b) / (at - before) for (at, a), (before, b) in itertools.pairwise(past)]
    last, first = older[0][0], older[1][0]
    second = (slopes[0] - slopes[1]) / (now - first)  # divided difference: half of x0''
    slope = slopes[0] + (now - last) * second
    phi_1 = -math.expm1(-rate * h)
    phi_2 = 1 - phi_1 / (rate * h)
    phi_3 = 0.5 - phi_2 / (rate * h)
    return x0 + (phi_2 / phi_1 * h) * slope + (phi_3 / phi_1 * h**2 * 2 * curvature) * second
