"""The linear multistep method: a polynomial through the last noise estimates. Order 4 at one evaluation per step."""

from __future__ import annotations

from torch import Tensor

from ldm_pipe.denoiser import Denoise
from ldm_pipe.noise import Draw
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.samplers.common import Callback, flow_step, refuse_eta, report
from ldm_pipe.schedule import Steps
from ldm_pipe.schedule.process import eps_from_x0


def lms(
    denoise: Denoise,
    x: Tensor,
    steps: Steps,
    *,
    noise: Draw | None = None,
    eta: float = 0.0,
    callback: Callback | None = None,
    order: int = 4,
    lower_order_final: bool = True,
) -> Tensor:
    """Sample with Adams-Bashforth steps in the frame x / alpha, at uneven distances (k-diffusion's "LMS").

        x_s / alpha_s = x_t / alpha_t + sum_j w_j eps_j,   w_j = integral of Lagrange's polynomial j from t_edm to s_edm

    with the last `order` estimates eps_j at t_edm = sigma_t / alpha_t; the weights are exact. The first steps have
    fewer estimates; one at alpha = 0, infinitely far away, is not kept. As sum_j w_j = s_edm - t_edm, the step is
    Euler's plus alpha_s sum_j w_j (eps_j - eps_t), and divides by no alpha.

    Args:
        denoise, x, steps, callback: as in `samplers.euler`.
        noise: not used; all samplers are called alike.
        eta: this sampler has none: only 0 is taken.
        order: how many estimates to use, 1 (Euler) to 4.
        lower_order_final: step to sigma = 0 by Euler, onto x0; False extrapolates there too, as diffusers does.

    Returns: x at the last row, shape (B, *).

    Raises: LdmPipeError for an order outside 1 to 4.
    """
    refuse_eta(eta, "lms")
    if order not in (1, 2, 3, 4):
        raise LdmPipeError(f"order is {order!r}", how_to_fix="use 1, 2, 3 or 4")
    past: list[tuple[float, Tensor]] = []  # (sigma / alpha, eps), the newest first
    for i, (t, alpha_t, sigma_t, alpha_s, sigma_s) in enumerate(steps.pairs()):
        x0 = denoise(x, t).x0
        eps = eps_from_x0(x, x0, alpha_t, sigma_t)
        x = flow_step(x, x0, alpha_t, sigma_t, alpha_s, sigma_s)
        if alpha_t > 0:
            past = [(sigma_t / alpha_t, eps), *past[: order - 1]]
        if sigma_s > 0 or not lower_order_final:
            weights = lagrange_integrals([level for level, _ in past], sigma_s / alpha_s)
            for weight, (_, old) in zip(weights[1:], past[1:], strict=True):
                x = x.add(old - eps, alpha=alpha_s * weight)
        x = report(callback, i, t, x, x0)
    return x


def lagrange_integrals(nodes: list[float], end: float) -> list[float]:
    """Return the integral of each Lagrange polynomial of the nodes, from the first node to `end`.

    Polynomial j is 1 at node j and 0 at the others; the coefficients are multiplied out in u = (node - first) / (end -
    first), where the interval is [0, 1].
    """
    span = end - nodes[0] if nodes else 1.0
    u = [(node - nodes[0]) / span for node in nodes]
    integrals = []
    for j, at in enumerate(u):
        coefficients = [1.0]  # of u^0, u^1, ...
        for k, root in enumerate(u):
            if k != j:
                times_u, times_root = [0.0, *coefficients], [*coefficients, 0.0]
                coefficients = [(a - root * b) / (at - root) for a, b in zip(times_u, times_root, strict=True)]
        integrals.append(span * sum(c / (power + 1) for power, c in enumerate(coefficients)))
    return integrals
