"""Training objectives: what the network should output, and how much each noise level counts.

Pure functions of tensors. This file knows neither networks, data nor the training loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ldm_pipe.denoiser import Denoised, split_variance
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import Law, NoiseSchedule, Prediction
from ldm_pipe.schedule.process import NO_EXTRAS, Coefficient, Extras, Variance, extras, from_x0_eps, posterior, to_x0
from ldm_pipe.training.objectives import variational

Kind = Literal["simple", "hybrid", "vlb"]
Weighting = Literal["none", "snr", "min_snr", "soft_min_snr", "p2", "edm"]
LossType = Literal["l2", "huber", "pseudo_huber"]


@dataclass(frozen=True)
class Objective:
    """What a run minimises; see `losses`.

    Attributes:
        kind: "simple": the weighted error of the prediction; "vlb": the variational bound in bits/dim; "hybrid":
            simple + vlb_weight * vlb, in which vlb trains the variance alone.
        weighting: of the noise levels in "simple"; see `level_weight`.
        gamma: of the weightings that have one.
        loss_type: how an error counts in "simple"; see `error`.
        huber_c: where the Huber losses turn from square to straight.
        vlb_weight: lambda of "hybrid"; 0.001 in arXiv:2102.09672, section 3.1.
        variance: of the step back in the bound; "learned" needs a network with twice the channels.
    """

    kind: Kind = "simple"
    weighting: Weighting = "none"
    gamma: float = 5.0
    loss_type: LossType = "l2"
    huber_c: float = 0.1
    vlb_weight: float = 0.001
    variance: Variance = "fixed_small"

    def __post_init__(self) -> None:
        choices = (
            ("kind", self.kind, get_args(Kind)),
            ("weighting", self.weighting, get_args(Weighting)),
            ("loss_type", self.loss_type, get_args(LossType)),
            ("variance", self.variance, get_args(Variance)),
        )
        for name, value, known in choices:
            if value not in known:
                raise LdmPipeError(f"{name} is {value!r}", "Objective", f"use one of {', '.join(known)}")
        for name in ("gamma", "huber_c", "vlb_weight"):
            if not getattr(self, name) > 0:
                raise LdmPipeError(f"{name} is {getattr(self, name)}", "Objective", "it must be positive")
        if self.kind == "hybrid" and self.variance != "learned":
            raise LdmPipeError("L_hybrid is for a learned variance", "Objective", "learn it, or use L_simple")
        if self.kind == "simple" and self.variance == "learned":
            raise LdmPipeError("L_simple does not train a variance", "Objective", "use L_hybrid or L_vlb")


def losses(objective: Objective, law: Law, output: Tensor, x0: Tensor, eps: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Compute the loss of each sample.

        L_hybrid = L_simple + lambda L_vlb    (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 16)

    L_vlb is T times the term of t, in bits/dim, an unbiased estimate of the whole but for its constant prior.

    Args:
        objective: what is minimised.
        law: the noise law; names the prediction.
        output: the network's output at (x_t, t), shape (B, C, *), or (B, 2C, *) where the variance is learned.
        x0: clean data, shape (B, C, *).
        eps: the noise to be found in x_t, shape (B, C, *).
        x_t: what the network was shown, shape (B, C, *).
        t: times, shape (B,).

    Returns: shape (B,).

    Raises: LdmPipeError for L_vlb or L_hybrid on a law without discrete times.
    """
    alpha, sigma = (c.to(x0.device) for c in law.alpha_sigma(t))
    extra, mix = extras(law, law.prediction, t), None
    if objective.variance == "learned":
        output, mix = split_variance(output, x0.shape[1])
    simple = None
    if objective.kind != "vlb":
        sigma_data = getattr(law, "sigma_data", 1.0)
        weight = level_weight(
            objective.weighting, law.prediction, alpha, sigma, extra, gamma=objective.gamma, sigma_data=sigma_data
        )
        wanted = target(law.prediction, x0, eps, alpha, sigma, extra)
        simple = error(output, wanted, weight, objective.loss_type, objective.huber_c)
    if objective.kind == "simple":
        assert simple is not None
        return simple
    if not isinstance(law, NoiseSchedule):
        what = f"L_{objective.kind} sums over discrete times, which this law has not"
        raise LdmPipeError(what, type(law).__name__, "use L_simple, or a NoiseSchedule")
    estimate = to_x0(law.prediction, output.to(x0), x_t, alpha, sigma, extra)
    estimate = estimate if simple is None else estimate.detach()
    term = variational.vlb_term(
        law, x0, Denoised(estimate, None if mix is None else mix.to(x0)), t, variance=objective.variance
    )
    bound = term * law.num_train_timesteps
    return bound if simple is None else simple + objective.vlb_weight * bound


def target(
    prediction: Prediction,
    x0: Tensor,
    eps: Tensor,
    alpha: Coefficient,
    sigma: Coefficient,
    extra: Extras = NO_EXTRAS,
) -> Tensor:
    """Return what the network should output at x_t = alpha x0 + sigma eps, shape (B, *)."""
    return from_x0_eps(prediction, x0, eps, alpha, sigma, extra)


def error(
    output: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    loss_type: LossType = "l2",
    huber_c: float = 0.1,
) -> Tensor:
    """Compute the simple loss of each sample (Ho et al. 2020, arXiv:2006.11239, eq. 14), in float32.

        L_simple = weight * mean(rho(output - target)),   rho(e) = e^2                              l2
                                                                   e^2 if |e| < c, else c (2 |e| - c)  huber
                                                                   2 c (sqrt(e^2 + c^2) - c)        pseudo_huber

    Huber's losses count outliers by their size instead of their square (Charbonnier et al. 1997; for diffusion Song &
    Dhariwal 2023, arXiv:2310.14189, section 3.3), scaled here so that small errors count as in l2.

    Args:
        output: the network's output, shape (B, *).
        target: what it should be, shape (B, *).
        weight: one number per sample, shape (B,); None is 1.
        loss_type: rho.
        huber_c: c.

    Returns: the loss of each sample, shape (B,).
    """
    if output.shape != target.shape:
        raise LdmPipeError(
            f"the network's output has shape {tuple(output.shape)}, its target {tuple(target.shape)}",
            where="objectives.error",
            how_to_fix="give the network as many output channels as the latents have",
        )
    # float32 because squares and means of half precision overflow and round
    difference = output.float() - target.float()
    squared = difference.square()
    if loss_type == "huber":
        size = difference.abs()
        squared = torch.where(size < huber_c, squared, huber_c * (2 * size - huber_c))
    elif loss_type == "pseudo_huber":
        squared = 2 * huber_c * squared / ((squared + huber_c**2).sqrt() + huber_c)
    loss = squared.flatten(1).mean(1)  # (B,)
    return loss if weight is None else loss * weight.to(loss)


def level_weight(
    weighting: Weighting,
    prediction: Prediction,
    alpha: Tensor,
    sigma: Tensor,
    extra: Extras = NO_EXTRAS,
    *,
    gamma: float = 5.0,
    sigma_data: float = 1.0,
) -> Tensor | None:
    """Weigh noise levels: one weight on the error of x0, written for the error of any prediction, finite at both ends.

    With snr = alpha^2 / sigma^2, the weight on the error of x0 is

        snr            snr: L_simple of eps; for scores sigma^2, denoising score matching over noise levels (Song &
                       Ermon 2019, arXiv:1907.05600, eq. 5-6)
        min_snr        min(snr, gamma) (Hang et al. 2023, arXiv:2303.09556, section 3.4)
        soft_min_snr   snr gamma / (snr + gamma) (Crowson et al. 2024, arXiv:2401.11605)
        p2             snr / (1 + snr)^gamma (Choi et al. 2022, arXiv:2204.00227, section 3.2, with k = 1)
        edm            1 / sigma_data^2 + snr, under which every level of EDM's F counts alike (Karras et al. 2022,
                       arXiv:2206.00364, table 1)

    and divided by the square of d output / d x0 it is that of the output.

    Args:
        weighting: as above; "none" weighs the errors of the output alike.
        prediction: what the network outputs and the loss compares.
        alpha: shape (B,).
        sigma: shape (B,).
        extra: see `process.extras`.
        gamma: of min_snr, soft_min_snr and p2, > 0.
        sigma_data: of edm, standard deviation of the data.

    Returns: weights, float64, shape (B,); None for "none".
    """
    if not gamma > 0:
        raise LdmPipeError(f"gamma is {gamma}: it must be positive", how_to_fix="min-SNR's paper uses 5, P2's 1")
    alpha, sigma = alpha.double(), sigma.double()
    snr = (alpha.square() / sigma.square()).clamp(1e-100, 1e100)  # the limits at both ends, without 0 / 0
    match weighting:
        case "none":
            return None
        case "snr":
            weight = snr
        case "min_snr":
            weight = snr.clamp_max(gamma)
        case "soft_min_snr":
            weight = gamma / (1 + gamma / snr)
        case "p2":
            weight = snr * (1 + snr) ** -gamma
        case "edm":
            weight = snr + sigma_data**-2
    return weight * _squared_gain(prediction, snr, alpha, sigma, extra)


def _squared_gain(prediction: Prediction, snr: Tensor, alpha: Tensor, sigma: Tensor, extra: Extras) -> Tensor:
    """Return (d x0 / d output)^2 at fixed x_t, through snr wherever alpha or sigma may vanish."""
    power = alpha.square() + sigma.square()
    match prediction:
        case "eps":
            return 1 / snr
        case "x0":
            return torch.ones_like(snr)
        case "v":
            return 1 / (power * (1 + snr))
        case "flow":
            return (1 + snr.sqrt()) ** -2
        case "score":
            return power / (snr * (1 + snr))
        case "mean":
            assert extra.below is not None
            below = (torch.as_tensor(level).to(alpha) for level in extra.below)
            return torch.as_tensor(posterior(alpha, sigma, *below).of_x0) ** -2
        case "edm":
            assert extra.sigma_data is not None
            return 1 / (extra.sigma_data**-2 + snr)


def offset_noise(eps: Tensor, offset: Tensor, strength: float) -> Tensor:
    """Add the same shift to every pixel of a channel, so that the mean brightness is learnt (Guttenberg 2023).

    Args:
        eps: unit Gaussian noise, shape (B, C, h, w).
        offset: unit Gaussian noise, shape (B, C).
        strength: 0.05 to 0.1 are customary.

    Returns: the noise to diffuse with, shape (B, C, h, w).
    """
    return eps + strength * offset.to(eps)[:, :, None, None]


def perturb_input(eps: Tensor, other: Tensor, strength: float) -> Tensor:
    """Diffuse with more noise than the network is asked for (Ning et al. 2023, arXiv:2301.11706, DDPM-IP).

    A sampler's states hold the errors of the steps before; a network trained so has seen such states.

    Args:
        eps: the noise to be predicted, shape (B, *).
        other: unit Gaussian noise, shape (B, *).
        strength: gamma, 0.1 in the paper.

    Returns: the noise to diffuse with, shape (B, *).
    """
    return eps + strength * other
