"""Data whose answers are known, for the tests of samplers: a Gaussian, noised by an even law of half_log_snr."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ldm_pipe.denoiser import Denoised
from ldm_pipe.samplers import Sampler
from ldm_pipe.schedule import NoiseSchedule, Steps

MEAN, SPREAD = 0.7, 0.4
Law = Callable[[Tensor], tuple[Any, Any]]  # t -> (alpha, sigma)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Return unit Gaussian numbers, float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def even_law(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma of the variance-preserving law whose time is -half_log_snr."""
    return torch.sigmoid(-2 * t).sqrt(), torch.sigmoid(2 * t).sqrt()


def even_steps(num_steps: int, start: float = -4.0, end: float = 4.0) -> Steps:
    """Return rows of `even_law` at even steps of half_log_snr, ending before clean."""
    t = -torch.linspace(start, end, num_steps + 1, dtype=torch.float64)

    def levels(half_log_snr: float) -> tuple[float, float, float]:
        alpha, sigma = even_law(torch.tensor(-half_log_snr, dtype=torch.float64))
        return -half_log_snr, float(alpha), float(sigma)

    return Steps(t, *even_law(t), levels=levels)


def whole_steps(num_steps: int) -> Steps:
    """Return rows of `even_law` from alpha = 0 to sigma = 0: noise, then `even_steps` of -4 to 5, then clean."""
    middle = even_steps(num_steps - 2, end=5.0)
    t = torch.cat([middle.t.new_tensor([400.0]), middle.t, middle.t.new_tensor([-6.0])])
    alpha = torch.cat([middle.t.new_zeros(1), middle.alpha, middle.t.new_ones(1)])
    sigma = torch.cat([middle.t.new_ones(1), middle.sigma, middle.t.new_zeros(1)])
    return Steps(t, alpha, sigma, levels=middle.levels)


def gaussian(law: Law) -> Any:
    """Return E[x0 | x_t] for x0 ~ N(MEAN, SPREAD^2), exactly."""

    def denoise(x: Tensor, t: Tensor) -> Denoised:
        alpha, sigma = (float(level) for level in law(t))
        gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
        return Denoised(MEAN + gain * (x - alpha * MEAN))

    return denoise


def spread_at(steps: Steps, i: int) -> float:
    """Return the standard deviation of x_t at row i."""
    return math.hypot(float(steps.alpha[i]) * SPREAD, float(steps.sigma[i]))


def moments(sampler: Sampler, steps: Steps, law: Law, **options: Any) -> tuple[float, float]:
    """Return mean and variance at the last row, without sampling error.

    The denoiser of a Gaussian is affine, and so are the samplers: the state is followed as its coefficients, of 1, of
    the unit Gaussian at the start, and of each draw of noise.
    """
    denoise, columns = gaussian(law), itertools.count(2)
    x = torch.zeros(1, 2 + 2 * steps.num_steps, dtype=torch.float64)
    x[0, :2] = torch.tensor([float(steps.alpha[0]) * MEAN, spread_at(steps, 0)])

    def linear(x: Tensor, t: Tensor) -> Denoised:
        offset = denoise(torch.zeros(1, dtype=torch.float64), t).x0
        x0 = denoise(x, t).x0 - offset
        x0[:, :1] += offset
        return Denoised(x0)

    def noise(shape: Any) -> Tensor:
        draw = torch.zeros(shape, dtype=torch.float64)
        draw[0, next(columns)] = 1
        return draw

    out = sampler(linear, x, steps, noise=noise, **options)[0]
    return float(out[0]), float(out[1:].square().sum())


def stride(steps: Steps, schedule: NoiseSchedule) -> Steps:
    """Let each step end num_train_timesteps // num_steps below its start, as diffusers' DDIMScheduler does.

    With linspace, or where the division leaves a rest, the network is then told a time that is not the state's.
    """
    landing = steps.t[:-1] - schedule.num_train_timesteps // steps.num_steps
    levels = zip(schedule.alpha_sigma(landing.clamp_min(0)), (steps.alpha[-1], steps.sigma[-1]), strict=True)
    alpha, sigma = (torch.where(landing < 0, end, level) for level, end in levels)
    return replace(steps, next_alpha=alpha, next_sigma=sigma)
