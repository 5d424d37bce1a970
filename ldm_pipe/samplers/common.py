"""What all samplers share: how they are called, the checks at their border, and the two steps they are made of."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from ldm_pipe.noise import Draw
from ldm_pipe.pretrained import LdmPipeError

# callback(i, t, x, x0) after step i, from time t: x is the state it reached; a returned tensor replaces it
Callback = Callable[[int, Tensor, Tensor, Tensor], Tensor | None]


def report(callback: Callback | None, i: int, t: Tensor, x: Tensor, x0: Tensor) -> Tensor:
    """Tell the callback about a finished step and return the state to go on with."""
    changed = None if callback is None else callback(i, t, x, x0)
    return x if changed is None else changed


def fresh(noise: Draw | None, like: Tensor, sampler: str) -> Tensor:
    """Draw unit Gaussian noise of the shape, dtype and device of `like`."""
    if noise is None:
        raise LdmPipeError(f"{sampler} draws noise in every step, but got none", how_to_fix="pass noise=Noise(seeds)")
    return noise(like.shape).to(like)


def refuse_eta(eta: float, sampler: str) -> None:
    """Refuse an eta that the sampler would ignore."""
    if eta != 0:
        raise LdmPipeError(
            f"eta is {eta}, but the sampler {sampler} has no eta", how_to_fix='leave it at 0, or use the sampler "ddim"'
        )


def half_log_snr(alpha: float, sigma: float) -> float:
    """Return log(alpha / sigma), infinite at either end."""
    if alpha == 0:
        return -math.inf
    return math.inf if sigma == 0 else math.log(alpha / sigma)


def flow_step(x: Tensor, x0: Tensor, alpha_t: float, sigma_t: float, alpha_s: float, sigma_s: float) -> Tensor:
    """Follow the probability flow from level t to s with x0 held: exact if x0 is, order 1 if it is the one at t.

        x_s = r x_t + (alpha_s - r alpha_t) x0,   r = sigma_s / sigma_t

    This is DDIM (arXiv:2010.02502, eq. 12), Euler's step in x / alpha (arXiv:2206.00364, algorithm 1), and, as
    r alpha_t = alpha_s exp(-h) with the step h of half_log_snr, DPM-Solver++ 1 (arXiv:2211.01095).
    """
    r = sigma_s / sigma_t
    return (r * x).add(x0, alpha=alpha_s - r * alpha_t)


def sde_step(
    x: Tensor, x0: Tensor, alpha_t: float, sigma_t: float, alpha_s: float, sigma_s: float, z: Tensor
) -> Tensor:
    """Follow the reverse diffusion from level t to s with x0 held and unit noise z: exact if x0 is.

        x_s = sigma_s / sigma_t exp(-h) x_t + alpha_s (1 - exp(-2 h)) x0 + sigma_s sqrt(1 - exp(-2 h)) z

    with the step h of half_log_snr. This is DDPM's step (arXiv:2006.11239, eq. 6-7) and SDE-DPM-Solver++ 1
    (arXiv:2211.01095); at sigma_s = 0 it returns x0.
    """
    h = half_log_snr(alpha_s, sigma_s) - half_log_snr(alpha_t, sigma_t)
    fresh_share = -math.expm1(-2 * h)
    mean = ((sigma_s / sigma_t * math.exp(-h)) * x).add(x0, alpha=alpha_s * fresh_share)
    return mean.add(z, alpha=sigma_s * fresh_share**0.5)
