"""Laws of the samplers that draw noise: right in distribution, by exact recursion of mean and variance."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from ldm_pipe import samplers
from ldm_pipe.noise import Noise
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import Steps
from tests.samplers import MEAN, SPREAD, even_law, even_steps, gaussian, moments, normal, spread_at, whole_steps

EVERYWHERE = {"s_tmin": 0.0, "s_tmax": math.inf}
ORDERS: list[tuple[str, dict[str, Any], float]] = [
    ("ddpm", {}, 1),
    ("ddim", {"eta": 0.5}, 1),
    ("ddim", {"eta": 1.0}, 1),
    ("euler_ancestral", {}, 1),
    ("edm", {"s_churn": 3.0, **EVERYWHERE}, 2),
    ("dpm2_ancestral", {}, 2),
    ("dpmpp_2s_ancestral", {}, 2),
    ("dpmpp_sde", {}, 2),
    ("dpmpp_2m_sde", {}, 2),
    ("dpmpp_3m_sde", {}, 2),
]


@pytest.mark.parametrize(("name", "options", "order"), ORDERS)
def test_the_variance_converges_with_the_order(name: str, options: dict[str, Any], order: float) -> None:
    """On a Gaussian, whose denoiser is known: the mean is right at once, halving the step divides by 2^order."""
    errors = []
    for num_steps in (80, 160):
        steps = even_steps(num_steps)
        mean, variance = moments(samplers.get(name), steps, even_law, **options)
        assert mean == pytest.approx(float(steps.alpha[-1]) * MEAN, abs=1e-9)
        errors.append(abs(variance / spread_at(steps, -1) ** 2 - 1))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1), errors


@pytest.mark.parametrize(("name", "options", "order"), [*ORDERS, ("ddim", {}, 1), ("edm", {}, 1), ("heun", {}, 2)])
def test_the_moments_are_those_of_the_data(name: str, options: dict[str, Any], order: float) -> None:
    """From pure noise at alpha = 0 to clean, to what 80 steps of the order leave."""
    mean, variance = moments(samplers.get(name), whole_steps(80), even_law, **options)
    assert mean == pytest.approx(MEAN, abs=1e-9)
    assert variance == pytest.approx(SPREAD**2, rel=0.12 if order == 1 else 0.02)


def test_a_sample_has_the_moments_that_the_recursion_gives() -> None:
    """The recursion counts each draw once and as independent: drawn numbers agree, to 5 sampling errors."""
    count, steps = 40_000, even_steps(12)
    for name in ("ddpm", "dpmpp_sde"):
        mean, variance = moments(samplers.get(name), steps, even_law)
        x = float(steps.alpha[0]) * MEAN + spread_at(steps, 0) * normal(1, count)
        drawn = samplers.get(name)(gaussian(even_law), x, steps, noise=Noise([2]))
        assert float(drawn.mean()) == pytest.approx(mean, abs=5 * (variance / count) ** 0.5)
        assert float(drawn.var()) == pytest.approx(variance, rel=5 * (2 / count) ** 0.5)


def test_edm_is_algorithm_2_in_its_own_frame() -> None:
    """Where alpha = 1 it is the paper's listing (arXiv:2206.00364), line by line, on the same noise."""
    sigma = torch.tensor([80.0, 20.0, 5.0, 1.0, 0.3, 0.02, 0.0], dtype=torch.float64)
    steps = Steps(sigma, torch.ones(7, dtype=torch.float64), sigma, levels=lambda h: (math.exp(-h), 1.0, math.exp(-h)))
    denoise = gaussian(lambda t: (1.0, t))
    options = {"s_churn": 2.0, "s_tmin": 0.1, "s_tmax": 50.0, "s_noise": 1.01}

    noise, x = Noise([4]), 80 * normal(1, 20)
    for t, s in itertools.pairwise(sigma):
        gamma = min(2.0 / 6, math.sqrt(2) - 1) if 0.1 <= t <= 50 else 0.0
        hat = t + gamma * t
        if gamma > 0:
            x = x + (hat**2 - t**2).sqrt() * 1.01 * noise(x.shape)
        d = (x - denoise(x, hat).x0) / hat
        x_s = x + (s - hat) * d
        if s > 0:
            x_s = x + (s - hat) * (d / 2 + (x_s - denoise(x_s, s).x0) / (2 * s))
        x = x_s
    mine = samplers.edm(denoise, 80 * normal(1, 20), steps, noise=Noise([4]), **options)
    assert torch.allclose(mine, x, atol=1e-12)


def test_churn_adds_noise_only_within_its_range() -> None:
    """Without range for it the sampler is deterministic; with it, two seeds differ."""
    steps, x = even_steps(10), normal(2, 50)
    draws = {
        (s_tmax, seed): samplers.edm(gaussian(even_law), x, steps, noise=Noise([seed, 9]), s_tmin=0.0, s_tmax=s_tmax)
        for s_tmax in (1e-9, 50.0)
        for seed in (0, 1)
    }
    assert torch.equal(draws[1e-9, 0], draws[1e-9, 1])
    assert not torch.equal(draws[50.0, 0][0], draws[50.0, 1][0])
    assert torch.equal(draws[50.0, 0][1], draws[50.0, 1][1])


@pytest.mark.parametrize("options", [{"s_churn": -1.0}, {"s_tmin": 2.0, "s_tmax": 1.0}, {"s_noise": math.nan}])
def test_churn_that_means_nothing_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(LdmPipeError, match="s_churn"):
        samplers.edm(gaussian(even_law), normal(1, 2), even_steps(3), noise=Noise([0]), **options)
