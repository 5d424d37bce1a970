"""Laws of the samplers: order of convergence, distribution, ends, batches."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import samplers
from ldm_pipe.denoiser import Denoised
from ldm_pipe.noise import Noise
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import NoiseSchedule, Steps

MEAN, SPREAD = 0.7, 0.4
SCHEDULE = NoiseSchedule()
SHAPE = (4, 3, 5, 5)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(steps: Steps) -> Any:
    """Return E[x0 | x_t] for x0 ~ N(MEAN, SPREAD^2), exactly."""
    levels = {float(t): (float(a), float(s)) for t, a, s in zip(steps.t, steps.alpha, steps.sigma, strict=True)}

    def denoise(x: Tensor, t: Tensor) -> Denoised:
        alpha, sigma = levels[float(t)]
        gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
        return Denoised(MEAN + gain * (x - alpha * MEAN))

    return denoise


def even_steps(num_steps: int, start: float = -4.0, end: float = 4.0) -> Steps:
    """Return variance-preserving rows at even steps of half_log_snr, ending before clean."""
    half_log_snr = torch.linspace(start, end, num_steps + 1, dtype=torch.float64)
    alpha = torch.sigmoid(2 * half_log_snr).sqrt()
    return Steps(-half_log_snr, alpha, (1 - alpha.square()).sqrt())


def exact(x: Tensor, steps: Steps) -> Tensor:
    """Return where the probability flow of the Gaussian takes x: the same standard score at the last row."""

    def spread(i: int) -> float:
        return math.hypot(float(steps.alpha[i]) * SPREAD, float(steps.sigma[i]))

    return float(steps.alpha[-1]) * MEAN + spread(-1) / spread(0) * (x - float(steps.alpha[0]) * MEAN)


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("euler", 1), ("dpmpp_2m", 2)])
def test_order_of_convergence(name: str, order: int) -> None:
    """The slope of log error against log step is the solver's order."""
    x, errors = normal(100), []
    numbers = (40, 80, 160, 320)
    for num_steps in numbers:
        steps = even_steps(num_steps)
        errors.append(float((samplers.get(name)(gaussian(steps), x, steps) - exact(x, steps)).abs().max()))
    slopes = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert slopes[-1] == pytest.approx(order, abs=0.1), (errors, slopes)


@pytest.mark.parametrize(("name", "eta"), [("ddpm", 0.0), ("ddim", 1.0), ("ddim", 0.5), ("ddim", 0.0)])
def test_samples_have_the_moments_of_the_data(name: str, eta: float) -> None:
    """From pure noise, over all levels: mean and standard deviation, to 5 sampling errors and 2 % of discretisation."""
    count = 20_000
    schedule = NoiseSchedule(prediction="v", zero_terminal_snr=True)
    steps = schedule.steps(1000, spacing="trailing")
    x = normal(1, count)
    sampled = samplers.get(name)(gaussian(steps), x, steps, noise=Noise([1]), eta=eta)
    assert float(sampled.mean()) == pytest.approx(MEAN, abs=5 * SPREAD / count**0.5)
    assert float(sampled.std()) == pytest.approx(SPREAD, rel=0.02 + 5 / (2 * count) ** 0.5)


def test_ddpm_converges_in_distribution() -> None:
    """With the exact denoiser of a Gaussian the variance is off by O(step): halving the step halves the error."""
    errors = []
    for num_steps in (25, 50, 100):
        steps = even_steps(num_steps)
        variance = 0.0 + float(steps.sigma[0] ** 2 + steps.alpha[0] ** 2 * SPREAD**2)
        for _, alpha_t, sigma_t, alpha_s, sigma_s in steps.pairs():  # the recursion of the variance, by eq. 6-7
            r = alpha_t / alpha_s
            b = sigma_t**2 - r**2 * sigma_s**2
            gain = alpha_t * SPREAD**2 / (alpha_t**2 * SPREAD**2 + sigma_t**2)
            slope = r * sigma_s**2 / sigma_t**2 + alpha_s * b / sigma_t**2 * gain
            variance = slope**2 * variance + b * sigma_s**2 / sigma_t**2
        sampled = samplers.ddpm(gaussian(steps), _first(steps, 40_000), steps, noise=Noise([2]))
        assert float(sampled.var()) == pytest.approx(variance, rel=0.03)
        errors.append(abs(variance - float(steps.sigma[-1] ** 2 + steps.alpha[-1] ** 2 * SPREAD**2)))
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.3)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.2)


def _first(steps: Steps, count: int) -> Tensor:
    spread = math.hypot(float(steps.alpha[0]) * SPREAD, float(steps.sigma[0]))
    return float(steps.alpha[0]) * MEAN + spread * normal(1, count)


def test_ddim_eta_1_is_ddpm_on_the_same_noise() -> None:
    steps = SCHEDULE.steps(12)
    x, denoise = normal(*SHAPE), gaussian(steps)
    ancestral = samplers.ddpm(denoise, x, steps, noise=Noise(range(4)))
    assert torch.allclose(samplers.ddim(denoise, x, steps, eta=1.0, noise=Noise(range(4))), ancestral, atol=1e-10)
    assert not torch.allclose(samplers.ddim(denoise, x, steps), ancestral, atol=0.01)


def test_euler_is_ddim_on_the_same_rows() -> None:
    steps = SCHEDULE.steps(12)
    x, denoise = normal(*SHAPE), gaussian(steps)
    assert torch.allclose(samplers.euler(denoise, x, steps), samplers.ddim(denoise, x, steps), atol=1e-10)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 20])
@pytest.mark.parametrize("name", samplers.NAMES)
def test_finite_from_alpha_0_to_sigma_0(name: str, num_steps: int) -> None:
    """Solvers in the sigma / alpha frame are NaN from alpha = 0 (measured in k-diffusion)."""
    schedule = NoiseSchedule(prediction="v", zero_terminal_snr=True)
    sampler = samplers.get(name)
    steps = schedule.steps(num_steps, spacing="trailing", grid=sampler.grid)
    assert (float(steps.alpha[0]), float(steps.sigma[-1])) == (0, 0)
    seen: list[Tensor] = []
    out = sampler(
        gaussian(steps),
        normal(*SHAPE).float(),
        steps,
        noise=Noise(range(4)),
        callback=lambda i, t, x, x0: seen.append(x),
    )
    assert len(seen) == num_steps
    assert all(x.isfinite().all() for x in seen)
    assert torch.equal(seen[-1], out)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", samplers.NAMES)
def test_a_constant_denoiser_returns_its_constant(name: str, spacing: Any) -> None:
    """Whatever the start: no noise is left at the end (diffusers#5689)."""
    sampler = samplers.get(name)
    constant = normal(*SHAPE, seed=5).float()
    for num_steps in (3, 25):
        steps = SCHEDULE.steps(num_steps, spacing=spacing, grid=sampler.grid)
        out = sampler(lambda x, t: Denoised(constant), normal(*SHAPE).float(), steps, noise=Noise(range(4)))
        assert torch.equal(out, constant) or torch.allclose(out, constant, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "eta"), [("ddpm", 0.0), ("ddim", 0.7), ("ddim", 0.0), ("euler", 0.0), ("dpmpp_2m", 0.0)]
)
def test_a_batch_of_four_is_four_singles(name: str, eta: float) -> None:
    """The picture depends on the batch size (diffusers#3158, #6222)."""
    sampler = samplers.get(name)
    steps = SCHEDULE.steps(8, grid=sampler.grid)
    seeds = [3, 14, 15, 92]

    def draw(chosen: list[int]) -> Tensor:
        noise = Noise(chosen)
        return sampler(gaussian(steps), noise((len(chosen), *SHAPE[1:])), steps, noise=noise, eta=eta)

    together = draw(seeds)
    for i, seed in enumerate(seeds):
        assert torch.allclose(draw([seed])[0], together[i], atol=1e-6)


@pytest.mark.parametrize("name", samplers.NAMES)
def test_one_evaluation_per_step_at_falling_times(name: str) -> None:
    sampler, times = samplers.get(name), []
    steps = SCHEDULE.steps(9, grid=sampler.grid)

    def denoise(x: Tensor, t: Tensor) -> Denoised:
        times.append(float(t))
        return Denoised(x)

    sampler(denoise, normal(*SHAPE), steps, noise=Noise(range(4)))
    assert times == steps.t[:-1].tolist()


@pytest.mark.parametrize("name", samplers.NAMES)
def test_the_callback_sees_each_step_and_may_change_it(name: str) -> None:
    sampler, calls = samplers.get(name), []
    steps = SCHEDULE.steps(4, spacing="trailing", grid=sampler.grid)

    def callback(i: int, t: Tensor, x: Tensor, x0: Tensor) -> Tensor | None:
        calls.append((i, float(t)))
        return torch.full_like(x, 8.0) if i == 3 else None

    out = sampler(gaussian(steps), normal(*SHAPE), steps, noise=Noise(range(4)), callback=callback)
    assert calls == list(enumerate(steps.t[:-1].tolist()))
    assert bool((out == 8).all())


@pytest.mark.parametrize("name", samplers.NAMES)
def test_inputs_are_left_alone_and_half_latents_end_in_float32(name: str) -> None:
    sampler = samplers.get(name)
    steps = SCHEDULE.steps(3, grid=sampler.grid)
    x = normal(*SHAPE).to(torch.bfloat16)
    before = x.clone()
    out = sampler(lambda x, t: Denoised(x.float()), x, steps, noise=Noise(range(4)))
    assert torch.equal(x, before)
    assert out.dtype == torch.float32


def test_noise_is_demanded_where_it_is_drawn() -> None:
    steps = SCHEDULE.steps(3)
    for name, eta in (("ddpm", 0.0), ("ddim", 0.5)):
        assert samplers.get(name).needs_noise(eta)
        with pytest.raises(LdmPipeError, match="noise"):
            samplers.get(name)(gaussian(steps), normal(*SHAPE), steps, eta=eta)
    assert not samplers.get("ddim").needs_noise(0.0)
    samplers.ddim(gaussian(steps), normal(*SHAPE), steps)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_eta_outside_its_range_is_refused(eta: float) -> None:
    steps = SCHEDULE.steps(3)
    with pytest.raises(LdmPipeError, match="eta"):
        samplers.ddim(gaussian(steps), normal(*SHAPE), steps, eta=eta, noise=Noise(range(4)))


@pytest.mark.parametrize("name", ["ddpm", "euler", "dpmpp_2m"])
def test_eta_of_a_sampler_that_has_none_is_refused(name: str) -> None:
    steps = SCHEDULE.steps(3)
    with pytest.raises(LdmPipeError, match=f"{name} has no eta"):
        samplers.get(name)(gaussian(steps), normal(*SHAPE), steps, eta=0.5, noise=Noise(range(4)))


@pytest.mark.parametrize(("typo", "nearest"), [("DDIMM", "ddim"), ("dpm++_2m", "dpmpp_2m"), ("eular", "euler")])
def test_an_unknown_sampler_lists_the_known_and_the_nearest(typo: str, nearest: str) -> None:
    with pytest.raises(LdmPipeError) as caught:
        samplers.get(typo)
    assert f"did you mean '{nearest}'" in str(caught.value)
    assert all(name in str(caught.value) for name in samplers.NAMES)
