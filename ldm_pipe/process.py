"""Diffuse clean data and convert between the predictions eps, x0, v and flow.

Everything lives in one frame, x_t = alpha x0 + sigma eps, for every noise law. Coefficients come in as floats, as
scalars or as one number per sample. This file does not know schedules, networks or samplers.
"""

from __future__ import annotations

from torch import Tensor

from ldm_pipe.schedule import Prediction

Coefficient = float | Tensor


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


def eps_from_x0(x_t: Tensor, x0: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """Return eps = (x_t - alpha x0) / sigma; needs sigma > 0."""
    return (x_t - expand(alpha, x_t) * x0) / expand(sigma, x_t)


def x0_from_eps(x_t: Tensor, eps: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """Return x0 = (x_t - sigma eps) / alpha; needs alpha > 0."""
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


def to_x0(prediction: Prediction, output: Tensor, x_t: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """Turn the network's output into x0.

    Args:
        prediction: what the output estimates.
        output: the network's output, shape (B, *).
        x_t: the network's input, shape (B, *).
        alpha: scalar or shape (B,); positive if the prediction is eps.
        sigma: scalar or shape (B,).

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


def from_x0_eps(prediction: Prediction, x0: Tensor, eps: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """Return the quantity named by `prediction` from x0 and eps, shape (B, *)."""
    match prediction:
        case "eps":
            return eps
        case "x0":
            return x0
        case "v":
            return v_from_x0_eps(x0, eps, alpha, sigma)
        case "flow":
            return flow_from_x0_eps(x0, eps)
