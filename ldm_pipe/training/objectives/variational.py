"""The variational bound on the likelihood, in bits per dimension.

Enters: an estimate of x0 (and of a step's variance) at one level, or a `Denoise` and all levels. Leaves: terms of
L_vlb, which can be trained on or reported. This file does not know networks, samplers or data.

    L_vlb = L_T + sum_t L_{t-1} + L_0    (Ho et al. 2020, arXiv:2006.11239, eq. 5)

prior, steps and decoder. Data on a grid (pixels) have a decoder with bins, and L_vlb bounds the length of a lossless
code. Latents are continuous: without bins the decoder is a density, and L_vlb bounds the differential entropy, which
may be negative, depends on the scale of the data, and compares models of the same latents only.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_pipe.denoiser import Denoise, Denoised
from ldm_pipe.noise import Draw
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import NoiseSchedule, Steps
from ldm_pipe.schedule.process import Coefficient, Posterior, Variance, expand, level_below, posterior, q_sample


@dataclass(frozen=True)
class Decoder:
    """p(x0 | x_1), a Gaussian.

    Attributes:
        bin_width: distance of the values that data can have, 2 / 255 for 8-bit pixels in [-1, 1]; None: a density.
        bounds: smallest and largest value; their bins are open to the outside. None: there are none.
    """

    bin_width: float | None = None
    bounds: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.bin_width is not None and not self.bin_width > 0:
            raise LdmPipeError(f"bin_width is {self.bin_width}", how_to_fix="use a positive number, or None")


DENSITY = Decoder()


def _tensor(value: Coefficient) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def bits(nats: Tensor) -> Tensor:
    """Return the mean over all dimensions but the first in bits, shape (B,)."""
    return nats.flatten(1).mean(1) / math.log(2)


def kl_normal(difference: Tensor, log_var: Coefficient, other_log_var: Coefficient) -> Tensor:
    """Return KL(N(m, exp(log_var)) || N(m + difference, exp(other_log_var))) of each value, in nats."""
    gap = _tensor(other_log_var - log_var)
    precision = _tensor(-other_log_var).exp()
    return 0.5 * (gap + torch.expm1(-gap) + difference.square() * precision)


def discretised_log_likelihood(x0: Tensor, mean: Tensor, log_var: Tensor, decoder: Decoder) -> Tensor:
    """Return the log probability of each value's bin under a Gaussian (arXiv:2006.11239, eq. 13), in float64.

    log(Phi((x0 + bin / 2 - mean) / std) - Phi((x0 - bin / 2 - mean) / std))
    """
    assert decoder.bin_width is not None
    x0, half, std = x0.double(), decoder.bin_width / 2, (0.5 * log_var.double()).exp()
    upper, lower = (x0 + half - mean.double()) / std, (x0 - half - mean.double()) / std
    if decoder.bounds is not None:
        low, high = decoder.bounds
        upper = torch.where(x0 > high - half, math.inf, upper)
        lower = torch.where(x0 < low + half, -math.inf, lower)
    # both ends on the side where Phi is small: differences of numbers near 1 would have no digits
    mirrored = upper + lower > 0
    upper, lower = torch.where(mirrored, -lower, upper), torch.where(mirrored, -upper, lower)
    above, below = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return above + torch.log(-torch.expm1(below - above))


def log_density(x0: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """Return the log density of each value under a Gaussian, in float64."""
    error, log_var = x0.double() - mean.double(), log_var.double()
    return -0.5 * (error.square() * (-log_var).exp() + log_var + math.log(2 * math.pi))


def log_variance(back: Posterior, small: Coefficient, estimate: Denoised, variance: Variance | None) -> Tensor:
    """Return the log variance that the model gives a step (arXiv:2102.09672, eq. 15), shaped to broadcast over x0.

    Args:
        back: the step.
        small: the lower bound, back.small where that is positive.
        estimate: holds var_mix if the variance is learnt.
        variance: None is "learned" where there is a var_mix, else "fixed_small".
    """
    low, high = (expand(_tensor(bound).log(), estimate.x0) for bound in (small, back.large))
    if variance == "fixed_large":
        return _tensor(high)
    if variance == "fixed_small" or (variance is None and estimate.var_mix is None):
        return _tensor(low)
    if estimate.var_mix is None:
        raise LdmPipeError(
            'variance is "learned", but the network gives none', how_to_fix='use "fixed_small" or "fixed_large"'
        )
    return estimate.var_mix * high + (1 - estimate.var_mix) * low


def step_term(x0: Tensor, estimate: Denoised, back: Posterior, small: Coefficient, variance: Variance | None) -> Tensor:
    """Return L_{t-1} = KL(q(x_s | x_t, x0) || p(x_s | x_t)) in bits/dim, shape (B,) (arXiv:2006.11239, eq. 5).

    Both means hold x_t with the same factor, so they differ by that of x0 alone.
    """
    true_log_var = expand(_tensor(small).log(), x0)
    difference = expand(back.of_x0, x0) * (estimate.x0 - x0)
    return bits(kl_normal(difference, true_log_var, log_variance(back, small, estimate, variance)))


def decoder_term(
    x0: Tensor, estimate: Denoised, back: Posterior, small: Coefficient, variance: Variance | None, decoder: Decoder
) -> Tensor:
    """Return L_0 = -log p(x0 | x_1) in bits/dim, shape (B,).

    The posterior of the step to clean data has no variance. With bins, `small` and `large` are both that of the step
    before, as in the code of Nichol & Dhariwal. For a density that would be too narrow by half and cost 0.2 bits/dim
    whatever the model is: there both are sigma^2, what is left open of x0 where data are much wider (as in Kingma et
    al. 2021, arXiv:2107.00630, section 3.3). A learnt variance lies between the former and sigma^2.
    """
    if variance == "learned" or (variance is None and estimate.var_mix is not None):
        log_var = log_variance(back, small, estimate, variance)
    else:
        fixed = back.large if decoder.bin_width is None else small
        log_var = _tensor(expand(_tensor(fixed).log(), x0))
    if decoder.bin_width is None:
        return bits(-log_density(x0, estimate.x0, log_var))
    return bits(-discretised_log_likelihood(x0, estimate.x0, log_var, decoder))


def vlb_term(
    schedule: NoiseSchedule,
    x0: Tensor,
    estimate: Denoised,
    t: Tensor,
    *,
    variance: Variance | None = None,
    decoder: Decoder = DENSITY,
) -> Tensor:
    """Return the term of L_vlb that belongs to times t: L_{t-1}, or L_0 where t = 0.

    The sum over all t is the mean over uniform t times num_train_timesteps.

    Args:
        schedule: the discrete law.
        x0: clean data, shape (B, *).
        estimate: what the model makes of x_t.
        t: whole times, shape (B,).
        variance: of the model's step; None is "learned" where the estimate holds one, else "fixed_small".
        decoder: p(x0 | x_1).

    Returns: bits/dim, shape (B,).
    """
    back = posterior(*schedule.alpha_sigma(t), *level_below(schedule, t))
    small = torch.where(t < 1, smallest(schedule), torch.as_tensor(back.small))
    steps = step_term(x0, estimate, back, small, variance)
    first = decoder_term(x0, estimate, back, small, variance, decoder)
    return torch.where((t < 1).to(x0.device), first.to(steps), steps)


def smallest(schedule: NoiseSchedule) -> Tensor:
    """Return the variance of the posterior of the step from t = 1, the smallest that is not 0."""
    one = torch.ones(())
    return torch.as_tensor(posterior(*schedule.alpha_sigma(one), *level_below(schedule, one)).small)


@dataclass(frozen=True)
class Bound:
    """L_vlb of each sample, in bits/dim.

    Attributes:
        prior: L_T, shape (B,).
        levels: L_{t-1} from the noisiest step to the last but one, shape (n - 1, B).
        decoder: L_0, shape (B,).
    """

    prior: Tensor
    levels: Tensor
    decoder: Tensor

    @property
    def total(self) -> Tensor:
        """Return the sum, shape (B,)."""
        return self.prior + self.levels.sum(0) + self.decoder


def prior_term(x0: Tensor, steps: Steps) -> Tensor:
    """Return L_T = KL(q(x_T | x0) || N(0, init_scale^2)) in bits/dim, shape (B,)."""
    alpha, sigma = float(steps.alpha[0]), float(steps.sigma[0])
    return bits(kl_normal(alpha * x0, 2 * math.log(sigma), 2 * math.log(steps.init_scale)))


def vlb(
    denoise: Denoise,
    x0: Tensor,
    steps: Steps,
    noise: Draw,
    *,
    variance: Variance | None = None,
    decoder: Decoder = DENSITY,
) -> Bound:
    """Sum the bound over all levels of the forward process (arXiv:2006.11239, eq. 5); gradients pass.

    Each level gets noise of its own: the expectation is that of walking one trajectory, and as neighbouring states
    are not alike then, the sum varies less.

    Args:
        denoise: the model.
        x0: clean data, shape (B, *); float64 gives the most digits.
        steps: all levels of the model, noise to clean: `schedule.steps(num_train_timesteps, spacing="trailing")`, or
            fewer, of which the bound is that of the shorter chain. The last row must be clean.
        noise: one draw per step.
        variance: as in `vlb_term`.
        decoder: p(x0 | x_1).
    """
    if float(steps.sigma[-1]) != 0 or steps.next_alpha is not None:
        raise LdmPipeError(
            "L_vlb needs steps that follow each other down to clean data",
            how_to_fix='use final="clean" of a schedule',
        )
    rows = list(steps.pairs())
    backs = [posterior(alpha_t, sigma_t, alpha_s, sigma_s) for _, alpha_t, sigma_t, alpha_s, sigma_s in rows]
    small = backs[-2].small if len(rows) > 1 else backs[-1].large
    estimates = (denoise(q_sample(x0, noise(x0.shape).to(x0), alpha_t, sigma_t), t) for t, alpha_t, sigma_t, *_ in rows)
    terms = [
        step_term(x0, estimate, back, back.small, variance)
        for estimate, back in zip(itertools.islice(estimates, len(rows) - 1), backs[:-1], strict=True)
    ]
    last = decoder_term(x0, next(estimates), backs[-1], small, variance, decoder)
    return Bound(prior_term(x0, steps), torch.stack(terms) if terms else x0.new_zeros(0, len(x0)), last.to(x0))


@torch.no_grad()
def bits_per_dim(
    denoise: Denoise,
    x0: Tensor,
    steps: Steps,
    noise: Draw,
    *,
    variance: Variance | None = None,
    decoder: Decoder = DENSITY,
) -> Bound:
    """Measure the bound on the bits per dimension of data, in float64; see `vlb`."""
    return vlb(denoise, x0.double(), steps, noise, variance=variance, decoder=decoder)
