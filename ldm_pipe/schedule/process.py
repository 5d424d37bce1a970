"""Diffuse clean data, step back, and convert between the predictions.

Everything lives in one frame, x_t = alpha x0 + sigma eps, for every noise law. Coefficients come in as floats, as
scalars or as one number per sample. This file does not know networks or samplers; of a schedule it asks one level.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule.discrete import Law, NoiseSchedule, Prediction

Coefficient = float | Tensor
Variance = Literal["fixed_small", "fixed_large", "learned"]  # of a step back; see `posterior` and `samplers.ddpm`


@dataclass(frozen=True)
class Extras:
    """What two of the predictions need beyond alpha and sigma.

    Attributes:
        below: (alpha, sigma) of the level that the posterior mean belongs to ("mean").
        sigma_data: standard deviation of the data ("edm").
    """

    below: tuple[Coefficient, Coefficient] | None = None
    sigma_data: float | None = None


NO_EXTRAS = Extras()


def extras(law: Law, prediction: Prediction, t: Tensor) -> Extras:
    """Return what a prediction needs at times t.

    Raises: LdmPipeError for a prediction that means nothing on this law.
    """
    match prediction:
        case "mean":
            if not isinstance(law, NoiseSchedule):
                raise LdmPipeError(
                    'prediction "mean" is the state one time earlier, but the times of this law are continuous',
                    where=type(law).__name__,
                    how_to_fix="use a NoiseSchedule, or another prediction",
                )
            return Extras(below=level_below(law, t))
        case "edm":
            sigma_data = getattr(law, "sigma_data", None)
            if sigma_data is None:
                raise LdmPipeError(
                    'prediction "edm" needs sigma_data, the standard deviation of the data, which this law has not',
                    where=type(law).__name__,
                    how_to_fix="use the law EDM, or VE(sigma_data=...), or another prediction",
                )
            return Extras(sigma_data=sigma_data)
    return NO_EXTRAS


def level_below(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return (alpha, sigma) one time earlier, float64 of t's shape; below t = 0 there is only clean data, (1, 0)."""
    alpha, sigma = schedule.alpha_sigma((t - 1).clamp_min(0))
    clean = t < 1
    return torch.where(clean, 1.0, alpha), torch.where(clean, 0.0, sigma)


class Posterior(NamedTuple):
    """q(x_s | x_t, x0) = N(of_x_t x_t + of_x0 x0, small); `large` is the variance of q(x_t | x_s)."""

    of_x_t: Coefficient
    of_x0: Coefficient
    small: Coefficient
    large: Coefficient


def posterior(alpha_t: Coefficient, sigma_t: Coefficient, alpha_s: Coefficient, sigma_s: Coefficient) -> Posterior:
    """Step back from level t to a cleaner level s at any distance (Ho et al. 2020, arXiv:2006.11239, eq. 6-7).

        large = sigma_t^2 - r^2 sigma_s^2,   r = alpha_t / alpha_s
        mean = (r sigma_s^2 x_t + alpha_s large x0) / sigma_t^2,   small = large sigma_s^2 / sigma_t^2

    In the paper's words, for neighbours, large is beta_t and small is beta_tilde_t. Needs sigma_t > 0 and alpha_s > 0.
    """
    r = alpha_t / alpha_s
    large = sigma_t * sigma_t - (r * sigma_s) * (r * sigma_s)
    large = large.clamp_min(0.0) if isinstance(large, Tensor) else max(large, 0.0)
    noise_t, noise_s = sigma_t * sigma_t, sigma_s * sigma_s
    return Posterior(r * noise_s / noise_t, alpha_s * large / noise_t, large * noise_s / noise_t, large)


def expand(coefficient: Coefficient, like: Tensor) -> Coefficient:
    """Reshape one coefficient per sample, (B,), to broadcast over `like`, (B, *); scalars pass unchanged."""
    if not isinstance(coefficient, Tensor) or coefficient.ndim == 0:
        return coefficient
    return coefficient.to(device=like.device, dtype=like.dtype).reshape(-1, *(1,) * (like.ndim - 1))


def q_sample(x0: Tensor, eps: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """Diffuse x0 to one noise level (Ho et al. 2020, arXiv:2006.11239, eq. 4).

        x_t = alpha x0 + sigma eps

    Args:
        x0: clean data, shape (B, *).
        eps: unit Gaussian noise, shape (B, *).
        alpha: scalar or shape (B,).
        sigma: scalar or shape (B,).

    Returns: x_t, shape (B, *).
    """
    return expand(alpha, x0) * x0 + expand(sigma, x0) * eps


def q_step(x_s: Tensor, eps: Tensor, alpha_s: float, sigma_s: float, alpha_t: float, sigma_t: float) -> Tensor:
    """Diffuse from level s on to a noisier level t (arXiv:2006.11239, eq. 2, at any distance).

    x_t = r x_s + sqrt(sigma_t^2 - r^2 sigma_s^2) eps,   r = alpha_t / alpha_s
    """
    return alpha_t / alpha_s * x_s + posterior(alpha_t, sigma_t, alpha_s, sigma_s).large ** 0.5 * eps


def eps_from_x0(x_t: Tensor, x0: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """Return eps = (x_t - alpha x0) / sigma; needs sigma > 0."""
    if isinstance(alpha, float):  # numbers need fewer passes over the memory
        return x_t.sub(x0, alpha=alpha).div_(expand(sigma, x_t))
    return (x_t - expand(alpha, x_t) * x0) / expand(sigma, x_t)


def x0_from_eps(x_t: Tensor, eps: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """Return x0 = (x_t - sigma eps) / alpha; needs alpha > 0."""
    if isinstance(sigma, float):
        return x_t.sub(eps, alpha=sigma).div_(expand(alpha, x_t))
    return (x_t - expand(sigma, x_t) * eps) / expand(alpha, x_t)


def v_from_x0_eps(x0: Tensor, eps: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """Return v = alpha eps - sigma x0 (Salimans & Ho 2022, arXiv:2202.00512, section 4)."""
    return expand(alpha, x0) * eps - expand(sigma, x0) * x0


def x0_from_v(x_t: Tensor, v: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """Return x0 = (alpha x_t - sigma v) / (alpha^2 + sigma^2), finite at both ends (arXiv:2202.00512, appendix D)."""
    alpha, sigma = expand(alpha, x_t), expand(sigma, x_t)
    return (alpha * x_t - sigma * v) / (alpha * alpha + sigma * sigma)


def flow_from_x0_eps(x0: Tensor, eps: Tensor) -> Tensor:
    """Return flow = eps - x0, the velocity of the straight path (Liu et al. 2022, arXiv:2209.03003, eq. 1)."""
    return eps - x0


def x0_from_flow(x_t: Tensor, flow: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """Return x0 = (x_t - sigma flow) / (alpha + sigma), finite at both ends."""
    alpha, sigma = expand(alpha, x_t), expand(sigma, x_t)
    return (x_t - sigma * flow) / (alpha + sigma)


def edm_spread(alpha: Coefficient, sigma: Coefficient, sigma_data: float) -> Coefficient:
    """Return the standard deviation of x_t, sqrt(sigma^2 + alpha^2 sigma_data^2); c_in of EDM is alpha / spread."""
    return (sigma * sigma + alpha * alpha * sigma_data**2) ** 0.5


def x0_from_edm(x_t: Tensor, output: Tensor, alpha: Coefficient, sigma: Coefficient, sigma_data: float) -> Tensor:
    """Return x0 = c_skip x + c_out F (Karras et al. 2022, arXiv:2206.00364, eq. 7 and table 1), finite at both ends.

    With EDM's x = x_t / alpha and sigma_edm = sigma / alpha multiplied out:

        x0 = (alpha sigma_data^2 / spread^2) x_t + (sigma sigma_data / spread) F
    """
    spread = edm_spread(alpha, sigma, sigma_data)
    skip, out = alpha * sigma_data**2 / (spread * spread), sigma * sigma_data / spread
    return expand(skip, x_t) * x_t + expand(out, x_t) * output


def edm_from_x0_eps(x0: Tensor, eps: Tensor, alpha: Coefficient, sigma: Coefficient, sigma_data: float) -> Tensor:
    """Return F = (sigma / sigma_data x0 - alpha sigma_data eps) / spread, which `x0_from_edm` undoes."""
    spread = edm_spread(alpha, sigma, sigma_data)
    return expand(sigma / sigma_data / spread, x0) * x0 - expand(alpha * sigma_data / spread, x0) * eps


def _posterior_to(below: tuple[Coefficient, Coefficient] | None, alpha: Coefficient, sigma: Coefficient) -> Posterior:
    assert below is not None
    return posterior(alpha, sigma, *below)


def to_x0(
    prediction: Prediction,
    output: Tensor,
    x_t: Tensor,
    alpha: Coefficient,
    sigma: Coefficient,
    extra: Extras = NO_EXTRAS,
) -> Tensor:
    """Turn the network's output into x0.

    Args:
        prediction: what the output estimates; "score" is grad log p(x_t) = -eps / sigma, "mean" that of x_{t-1}.
        output: the network's output, shape (B, *).
        x_t: the network's input, shape (B, *).
        alpha: scalar or shape (B,); positive if the prediction is eps or score.
        sigma: scalar or shape (B,).
        extra: see `extras`; needed by "mean" and "edm".

    Returns: x0, shape (B, *).
    """
    match prediction:
        case "eps":
            return x0_from_eps(x_t, output, alpha, sigma)
        case "x0":
            return output
        case "v":
            return x0_from_v(x_t, output, alpha, sigma)
        case "flow":
            return x0_from_flow(x_t, output, alpha, sigma)
        case "score":
            return x0_from_eps(x_t, -expand(sigma, x_t) * output, alpha, sigma)
        case "mean":
            back = _posterior_to(extra.below, alpha, sigma)
            return (output - expand(back.of_x_t, x_t) * x_t) / expand(back.of_x0, x_t)
        case "edm":
            assert extra.sigma_data is not None
            return x0_from_edm(x_t, output, alpha, sigma, extra.sigma_data)


def from_x0_eps(
    prediction: Prediction,
    x0: Tensor,
    eps: Tensor,
    alpha: Coefficient,
    sigma: Coefficient,
    extra: Extras = NO_EXTRAS,
) -> Tensor:
    """Return the quantity named by `prediction` from x0 and eps, shape (B, *); arguments as in `to_x0`."""
    match prediction:
        case "eps":
            return eps
        case "x0":
            return x0
        case "v":
            return v_from_x0_eps(x0, eps, alpha, sigma)
        case "flow":
            return flow_from_x0_eps(x0, eps)
        case "score":
            return -eps / expand(sigma, eps)
        case "mean":
            back = _posterior_to(extra.below, alpha, sigma)
            return expand(back.of_x_t, x0) * q_sample(x0, eps, alpha, sigma) + expand(back.of_x0, x0) * x0
        case "edm":
            assert extra.sigma_data is not None
            return edm_from_x0_eps(x0, eps, alpha, sigma, extra.sigma_data)
