"""DDIM upwards: from a picture to the noise that the deterministic sampler turns into it."""

from __future__ import annotations

from torch import Tensor

from ldm_pipe.denoiser import Denoise
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.samplers.common import Callback, report
from ldm_pipe.schedule import Steps
from ldm_pipe.schedule.process import eps_from_x0


def ddim_inversion(
    denoise: Denoise, x: Tensor, steps: Steps, *, num_refinements: int = 0, callback: Callback | None = None
) -> Tensor:
    """Walk up the steps that `ddim` walks down (Song et al. 2021, arXiv:2010.02502, section 4.3 and eq. 14).

        x_t = r x_s + (sigma_t - r sigma_s) eps(x_t, t),   r = alpha_t / alpha_s

    is the step of ddim from t to s solved for x_t, which also stands on the right. It is solved by iteration (Pan et
    al. 2023, arXiv:2309.04907), from the eps of the step before: that one alone is the paper's explicit Euler step,
    and the first evaluation at (x_t, t) already corrects it, at the same cost. No number is divided by alpha_t.

    Args:
        denoise: maps (x_t, t) to an estimate of x0, same shape as x_t; under guidance the iteration may not settle.
        x: clean data, the state at the last row of the steps, shape (B, *).
        steps: levels from noise to clean; they are walked from the last row to row 0.
        num_refinements: further iterations per step, one evaluation each.
        callback: called after each step as (i, t, x_t, x0), i falling to 0; see `samplers.common.Callback`.

    Returns: x at row 0, shape (B, *); `ddim` leads from there back to x.
    """
    if num_refinements < 0:
        raise LdmPipeError(f"num_refinements is {num_refinements}", how_to_fix="use a whole number from 0")
    eps = None
    for i, (t, alpha_t, sigma_t, alpha_s, sigma_s) in reversed(list(enumerate(steps.pairs()))):
        x_s, r = x, alpha_t / alpha_s
        if eps is not None:
            x = r * x_s + (sigma_t - r * sigma_s) * eps
        for _ in range(num_refinements + 1):
            x0 = denoise(x, t).x0
            eps = eps_from_x0(x, x0, alpha_t, sigma_t)
            x = r * x_s + (sigma_t - r * sigma_s) * eps
        x = report(callback, i, t, x, x0)
    return x
