"""PLMS: DDIM's step along a linear combination of the last four estimates of the noise. Order 2 on any smooth rows."""

from __future__ import annotations

from torch import Tensor

from ldm_pipe.denoiser import Denoise
from ldm_pipe.noise import Draw
from ldm_pipe.samplers.common import Callback, flow_step, refuse_eta, report
from ldm_pipe.schedule import Steps
from ldm_pipe.schedule.process import eps_from_x0

# Adams-Bashforth for equal steps, newest estimate first; used with as many as there are
ADAMS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms(
    denoise: Denoise,
    x: Tensor,
    steps: Steps,
    *,
    noise: Draw | None = None,
    eta: float = 0.0,
    callback: Callback | None = None,
    lower_order_final: bool = True,
) -> Tensor:
    """Sample with pseudo linear multistep, PNDM without Runge-Kutta (Liu et al. 2022, arXiv:2202.09778, section 3).

        x_s = transfer(x_t, e) = alpha_s / alpha_t (x_t - sigma_t e) + sigma_s e
            = transfer(x_t, eps) + (sigma_s - sigma_t alpha_s / alpha_t) (e - eps)
        e = (55 eps - 59 eps_1 + 37 eps_2 - 9 eps_3) / 24

    where transfer is DDIM's step, which a step from alpha = 0 remains, and eps_k the estimate k steps ago. At first
    there are fewer of them, and in the first step e is the mean of the estimates at both its ends, one evaluation more,
    as latent diffusion does it (arXiv:2112.10752). The weights are those of equal steps whatever the rows: order 4,
    with this start 3, where sigma / alpha falls evenly, else 2.

    Args:
        denoise: maps (x_t, t) to an estimate of x0, same shape as x_t.
        x: the state at row 0 of the steps, shape (B, *).
        steps: levels from noise to clean.
        noise: not used; all samplers are called alike.
        eta: this sampler has none: only 0 is taken.
        callback: see `samplers.common.Callback`.
        lower_order_final: the step to sigma = 0 lands on x0 itself, which thresholding keeps in range; false
            extrapolates there too, as diffusers does.

    Returns: x at the last row, shape (B, *).
    """
    refuse_eta(eta, "plms")
    past: list[Tensor] = []  # estimates of eps, newest first
    for i, (t, alpha_t, sigma_t, alpha_s, sigma_s) in enumerate(steps.pairs()):
        x0 = denoise(x, t).x0
        eps = eps_from_x0(x, x0, alpha_t, sigma_t)
        past = [eps, *past[:3]]
        if i == 0 and alpha_t > 0 and steps.num_steps > 1:
            ahead = flow_step(x, x0, alpha_t, sigma_t, alpha_s, sigma_s)
            estimates = [eps, eps_from_x0(ahead, denoise(ahead, steps.t[1]).x0, alpha_s, sigma_s)]
            weights: tuple[float, ...] = (1 / 2, 1 / 2)
        else:
            estimates, weights = past, ADAMS[len(past) - 1]
        x = flow_step(x, x0, alpha_t, sigma_t, alpha_s, sigma_s)  # transfer(x_t, eps)
        if alpha_t > 0 and not (sigma_s == 0 and lower_order_final):
            span = sigma_s - sigma_t * alpha_s / alpha_t
            for weight, other in zip((weights[0] - 1, *weights[1:]), estimates, strict=True):  # e - eps
                x = x.add(other, alpha=span * weight)
        x = report(callback, i, t, x, x0)
    return x
