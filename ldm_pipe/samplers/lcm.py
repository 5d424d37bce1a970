"""Multistep consistency sampling: jump to x0, diffuse back to the next level, jump again. For distilled networks."""

from __future__ import annotations

from torch import Tensor

from ldm_pipe.denoiser import Denoise
from ldm_pipe.noise import Draw
from ldm_pipe.samplers.common import Callback, fresh, refuse_eta, report
from ldm_pipe.schedule import Steps


def lcm(
    denoise: Denoise,
    x: Tensor,
    steps: Steps,
    *,
    noise: Draw | None = None,
    eta: float = 0.0,
    callback: Callback | None = None,
    timestep_scaling: float | None = None,
) -> Tensor:
    """Sample a consistency model in few steps (Luo et al. 2023, arXiv:2310.04378, algorithm 3).

        f = c_skip(t) x_t + c_out(t) x0,   x_s = alpha_s f + sigma_s noise

    With c_skip = 0, c_out = 1, the denoiser is the consistency function itself. Latent consistency models of discrete
    times are trained with the boundary c_skip = d^2 / (u^2 + d^2), c_out = u / sqrt(u^2 + d^2), u = 10 t, d = 0.5,
    which differs from that by 1e-5 and less from t = 19 on. A network that was not distilled gives its
    mean of x0 in each jump: blurred pictures.

    Args:
        denoise: maps (x_t, t) to x0, same shape as x_t: the end of the flow that passes x_t, not a mean.
        x: the state at row 0 of the steps, shape (B, *).
        steps: levels from noise to clean.
        noise: source of fresh noise, needed for more than one step.
        eta: this sampler has none: only 0 is taken.
        callback: see `samplers.common.Callback`.
        timestep_scaling: u / t of the boundary; None is without.

    Returns: x at the last row, shape (B, *).
    """
    refuse_eta(eta, "lcm")
    for i, (t, _, _, alpha_s, sigma_s) in enumerate(steps.pairs()):
        x0 = denoise(x, t).x0
        if timestep_scaling is not None:
            u, d = timestep_scaling * float(t), 0.5
            x0 = d**2 / (u**2 + d**2) * x + u / (u**2 + d**2) ** 0.5 * x0
        x = alpha_s * x0
        if sigma_s > 0:
            x = x.add(fresh(noise, x, "lcm"), alpha=sigma_s)
        x = report(callback, i, t, x, x0)
    return x
