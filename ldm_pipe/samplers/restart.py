"""Restart: an ODE solver that goes back up once it is nearly down, adds noise, and comes down again."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm_pipe.denoiser import Denoise
from ldm_pipe.noise import Draw
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.samplers.common import Callback, fresh, refuse_eta, report
from ldm_pipe.samplers.heun import heun
from ldm_pipe.schedule import Steps


def restart(
    denoise: Denoise,
    x: Tensor,
    steps: Steps,
    *,
    noise: Draw | None = None,
    eta: float = 0.0,
    callback: Callback | None = None,
    low: float = 0.06,
    high: float = 0.3,
    num_restarts: int = 2,
    num_restart_steps: int = 3,
) -> Tensor:
    """Sample with Restart (Xu et al. 2023, arXiv:2306.14878, section 3).

        x_high = alpha_high / alpha_low x_low + sqrt(b) noise, then Heun's method down to x_low;   num_restarts times

    with b the variance that the diffusion adds between the two levels. It forgets the errors made above, which an ODE
    alone carries to the end; an SDE all the way would pay for that with errors of discretisation everywhere.

    Args:
        denoise, x, steps: as in `samplers.heun`, which takes all other steps; the steps must know their `levels`.
        noise: source of fresh noise, needed.
        eta: this sampler has none: only 0 is taken.
        callback: see `samplers.common.Callback`; the restarts belong to the step that arrives at `low`.
        low: sigma / alpha to restart from; the nearest row is taken, and none if that is not below `high`.
        high: sigma / alpha to go back to. 0.06 and 0.3 are the paper's for EDM on CIFAR-10.
        num_restarts: K of the paper, at least 1.
        num_restart_steps: steps from high to low, at levels even in (sigma / alpha)^(1/7), at least 1.

    Returns: x at the last row, shape (B, *).
    """
    refuse_eta(eta, "restart")
    if not (0 < low < high and num_restarts >= 1 and num_restart_steps >= 1):
        raise LdmPipeError(
            f"low, high, num_restarts, num_restart_steps are {low}, {high}, {num_restarts}, {num_restart_steps}",
            how_to_fix="low must lie between 0 and high, and the numbers must be 1 or more",
        )
    again = _nearest(steps, low, high)
    descent = None if again is None else _descent(steps, high, again, num_restart_steps)

    def come_down_again(i: int, t: Tensor, x: Tensor, x0: Tensor) -> Tensor:
        if descent is not None and i + 1 == again:
            r = float(descent.alpha[0] / descent.alpha[-1])
            b = float(descent.sigma[0] ** 2 - (r * descent.sigma[-1]) ** 2)
            for _ in range(num_restarts):
                x = heun(denoise, r * x + math.sqrt(b) * fresh(noise, x, "restart"), descent)
        return report(callback, i, t, x, x0)

    return heun(denoise, x, steps, callback=come_down_again)


def _nearest(steps: Steps, low: float, high: float) -> int | None:
    """Return the row with sigma / alpha nearest to `low`, but not the first nor clean; None if none is below `high`."""
    rows = enumerate(zip(steps.alpha.tolist(), steps.sigma.tolist(), strict=True))
    far = {i: abs(math.log(sigma / alpha / low)) for i, (alpha, sigma) in rows if i > 0 and sigma > 0}
    row = min(far, key=far.__getitem__, default=None)
    return row if row is not None and steps.sigma[row] < high * steps.alpha[row] else None


def _descent(steps: Steps, high: float, row: int, num_steps: int) -> Steps:
    """Return the steps from sigma / alpha = high to a row of `steps`, even in (sigma / alpha)^(1/7)."""
    end = (steps.t[row], float(steps.alpha[row]), float(steps.sigma[row]))
    top, bottom = high ** (1 / 7), (end[2] / end[1]) ** (1 / 7)
    edm = [(top + i / num_steps * (bottom - top)) ** 7 for i in range(num_steps)]
    t, alpha, sigma = zip(*(steps.at(-math.log(level)) for level in edm), end, strict=True)
    return Steps(torch.stack(t), torch.tensor(alpha, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64))
