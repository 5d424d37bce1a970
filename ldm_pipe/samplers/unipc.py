"""UniPC: a multistep exponential integrator whose next evaluation also corrects the last step. Order p + 1."""

from __future__ import annotations

import math
from typing import Literal, get_args

from torch import Tensor

from ldm_pipe.denoiser import Denoise
from ldm_pipe.noise import Draw
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.samplers.common import Callback, flow_step, half_log_snr, refuse_eta, report
from ldm_pipe.samplers.quadrature import quadrature
from ldm_pipe.schedule import Steps

Variant = Literal["bh1", "bh2"]
Row = tuple[float, float, float, float]  # alpha_t, sigma_t, alpha_s, sigma_s
Past = list[tuple[float, Tensor]]  # (half_log_snr, estimate of x0) of the rows behind, newest first


def unipc(
    denoise: Denoise,
    x: Tensor,
    steps: Steps,
    *,
    noise: Draw | None = None,
    eta: float = 0.0,
    callback: Callback | None = None,
    order: int = 2,
    variant: Variant = "bh2",
) -> Tensor:
    """Sample with UniPC-p, multistep, data prediction (Zhao et al. 2023, arXiv:2302.04867, section 3).

    Each step predicts x_s from the last p estimates of x0 (UniP). The evaluation there then serves twice: it corrects
    x_s with one point more (UniC), and starts the next step. The order falls towards a clean end, where the step in
    half_log_snr is infinite; there x is x0. A start at alpha = 0, infinitely far, is a DDIM step not remembered. A
    state that the callback changed is not corrected.

    Args:
        denoise: maps (x_t, t) to an estimate of x0, same shape as x_t.
        x: the state at row 0 of the steps, shape (B, *).
        steps: levels from noise to clean.
        noise: not used; all samplers are called alike.
        eta: this sampler has none: only 0 is taken.
        callback: see `samplers.common.Callback`.
        order: p, 1 to 3.
        variant: B(h) of the paper, h or e^h - 1: counts where there is one remembered difference.

    Returns: x at the last row, shape (B, *).
    """
    refuse_eta(eta, "unipc")
    if order not in (1, 2, 3) or variant not in get_args(Variant):
        raise LdmPipeError(f"unipc of order {order!r}, {variant!r}", how_to_fix="use order 1, 2 or 3, and bh1 or bh2")
    clean = float(steps.sigma[-1]) == 0
    past: Past = []
    before, predicted, row, p = x, None, (0.0, 0.0, 0.0, 0.0), 0
    for i, (t, *levels) in enumerate(steps.pairs()):
        x0 = denoise(x, t).x0
        if past and x is predicted:
            x = _step(before, row, past[:p], variant, arrived=x0)
        row = (levels[0], levels[1], levels[2], levels[3])
        past = [(half_log_snr(levels[0], levels[1]), x0), *past[: order - 1]]
        p = min(len(past), steps.num_steps - i) if clean else len(past)
        before, predicted = x, _step(x, row, past[:p], variant)
        x = report(callback, i, t, predicted, x0)
        past = past if levels[0] > 0 else []
    return x


def _step(x: Tensor, row: Row, past: Past, variant: Variant, arrived: Tensor | None = None) -> Tensor:
    """Go from x at level t to level s: UniP-p, or UniC-p with the estimate of x0 on arrival; p is len(past).

    x_s = sigma_s / sigma_t x - alpha_s (e^-h - 1) m_0 - alpha_s B(h) sum_k a_k (m_k - m_0) / r_k
    """
    _, _, alpha_s, sigma_s = row
    (here, m0), *others = past
    h = half_log_snr(alpha_s, sigma_s) - here
    x_s = flow_step(x, m0, *row)  # the terms before the sum
    points = [((there - here) / h, m) for there, m in others]  # r_k: 0 at t, 1 at s
    if arrived is not None:
        points.append((1.0, arrived))
    for weight, (r, m) in zip(_weights([r for r, _ in points], h, variant), points, strict=True):
        x_s = x_s.sub(m - m0, alpha=alpha_s * weight / r)
    return x_s


def _weights(r: list[float], h: float, variant: Variant) -> list[float]:
    """Return B(h) a_k, from sum_k B(h) a_k r_k^(j - 1) = j! h phi_(j + 1)(-h); a single a_1 is 1 / 2."""
    if len(r) == 1:
        return [(-h if variant == "bh1" else math.expm1(-h)) / 2]
    moments, phi = [], math.expm1(-h)
    for j in range(1, len(r) + 1):
        phi = phi / -h - 1 / math.factorial(j)
        moments.append(math.factorial(j) * phi)
    return quadrature(r, moments)
