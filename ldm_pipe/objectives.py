"""Training objectives: what the network should output, and how much each noise level counts.

Pure functions of tensors. This file knows neither networks, data nor the training loop.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.process import Coefficient, from_x0_eps
from ldm_pipe.schedule import Prediction


def target(prediction: Prediction, x0: Tensor, eps: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """Return what the network should output at x_t = alpha x0 + sigma eps, shape (B, *)."""
    return from_x0_eps(prediction, x0, eps, alpha, sigma)


def squared_error(output: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Compute the simple loss of each sample (Ho et al. 2020, arXiv:2006.11239, eq. 14), in float32.

        L_simple = weight * mean((output - target)^2)

    Args:
        output: the network's output, shape (B, *).
        target: what it should be, shape (B, *).
        weight: one number per sample, shape (B,); None is 1.

    Returns: the loss of each sample, shape (B,).
    """
    if output.shape != target.shape:
        raise LdmPipeError(
            f"the network's output has shape {tuple(output.shape)}, its target {tuple(target.shape)}",
            where="objectives.squared_error",
            how_to_fix="give the network as many output channels as the latents have",
        )
    # float32 because squares and means of half precision overflow and round
    loss = (output.float() - target.float()).square().flatten(1).mean(1)  # (B,)
    return loss if weight is None else loss * weight.to(loss)


def min_snr_weight(prediction: Prediction, alpha: Tensor, sigma: Tensor, gamma: float = 5.0) -> Tensor:
    """Weigh noise levels by min-SNR (Hang et al. 2023, arXiv:2303.09556, section 3.4), finite at both ends.

        w_x0 = min(snr, gamma),   w_eps = w_x0 / snr,   w_v = w_x0 / (snr + 1),   w_flow = w_x0 sigma^2 / (alpha +
        sigma)^2

    with snr = alpha^2 / sigma^2: the same weight min(snr, gamma) on the error of x0, written for the error of each
    prediction.

    Args:
        prediction: what the network outputs and the loss compares.
        alpha: shape (B,).
        sigma: shape (B,).
        gamma: the largest weight of an error of x0, > 0.

    Returns: weights, shape (B,).
    """
    if not gamma > 0:
        raise LdmPipeError(f"snr_gamma is {gamma}: it must be positive", how_to_fix="use 5, the paper's value")
    signal, noise = alpha.double().square(), sigma.double().square()
    tiny = torch.finfo(torch.float64).tiny
    match prediction:
        case "eps":  # tends to 1 as the signal vanishes
            return (gamma * noise / signal.clamp_min(tiny)).clamp_max(1.0)
        case "x0":  # tends to gamma as the noise vanishes
            return (signal / noise.clamp_min(tiny)).clamp_max(gamma)
        case "v":
            return torch.minimum(signal, gamma * noise) / (signal + noise)
        case "flow":
            return torch.minimum(signal, gamma * noise) / (alpha.double() + sigma.double()).square()


def offset_noise(eps: Tensor, offset: Tensor, strength: float) -> Tensor:
    """Add the same shift to every pixel of a channel, so that the mean brightness is learnt (Guttenberg 2023).

    Args:
        eps: unit Gaussian noise, shape (B, C, h, w).
        offset: unit Gaussian noise, shape (B, C).
        strength: 0.05 to 0.1 are customary.

    Returns: the noise to diffuse with, shape (B, C, h, w).
    """
    return eps + strength * offset.to(eps)[:, :, None, None]
