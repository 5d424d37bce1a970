"""Laws of the samplers: order of convergence, ends, batches, callbacks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import samplers
from ldm_pipe.denoiser import Denoised
from ldm_pipe.noise import Noise
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.samplers.dpmpp import extrapolate
from ldm_pipe.samplers.lms import lagrange_integrals
from ldm_pipe.schedule import NoiseSchedule, Steps
from tests.samplers import MEAN, even_law, even_steps, gaussian, normal, spread_at

SCHEDULE = NoiseSchedule()
ZERO_SNR = NoiseSchedule(prediction="v", zero_terminal_snr=True)
SHAPE = (4, 3, 5, 5)


def exact(x: Tensor, steps: Steps) -> Tensor:
    """Return where the probability flow of the Gaussian takes x: the same standard score at the last row."""
    score = (x - float(steps.alpha[0]) * MEAN) / spread_at(steps, 0)
    return float(steps.alpha[-1]) * MEAN + spread_at(steps, -1) * score


def slope(errors: list[float]) -> float:
    """Return the last slope of log error against log step, the number of steps doubling."""
    return math.log2(errors[-2] / errors[-1])


ORDERS: list[tuple[str, dict[str, Any], float]] = [
    ("ddim", {}, 1),
    ("euler", {}, 1),
    ("lms", {"order": 1}, 1),
    ("heun", {}, 2),
    ("edm", {"s_churn": 0.0}, 2),
    ("dpm2", {}, 2),
    ("dpmpp_2s", {}, 2),
    ("dpmpp_2m", {}, 2),
    ("dpmpp_3m", {"half_curvature": True}, 2),
    ("lms", {"order": 2}, 2),
    ("lms", {"order": 3}, 3),
    ("lms", {}, 4),
]


@pytest.mark.parametrize(("name", "options", "order"), ORDERS)
def test_order_of_convergence(name: str, options: dict[str, Any], order: float) -> None:
    """The slope of log error against log step is the solver's order; the higher ones approach it from below."""
    x, errors = normal(100), []
    for num_steps in (40, 80, 160, 320):
        steps = even_steps(num_steps)
        errors.append(
            float((samplers.get(name)(gaussian(even_law), x, steps, **options) - exact(x, steps)).abs().max())
        )
    assert slope(errors) == pytest.approx(order, abs=0.05 * order), errors


def two_peaks(x: Tensor, t: Tensor) -> Denoised:
    """Return E[x0 | x_t] of an uneven mixture of two Gaussians, on which errors do not cancel by symmetry."""
    alpha, sigma = even_law(t)
    means, std, weights = torch.tensor([[-1.0], [0.8]]), 0.2, torch.tensor([[0.3], [0.7]])
    variance = (alpha * std) ** 2 + sigma**2
    rest = x - alpha * means
    posterior = (weights.log() - rest.square() / (2 * variance)).softmax(0)
    return Denoised((posterior * (means + alpha * std**2 / variance * rest)).sum(0))


def test_3m_is_of_order_3_and_its_released_form_of_order_2() -> None:
    """The authors' code takes half of the second derivative: one order is lost (measured)."""
    x = normal(50)
    truth = samplers.lms(two_peaks, x, even_steps(800))
    for options, order in (({}, 3.0), ({"half_curvature": True}, 2.0)):
        errors = [
            float((samplers.get("dpmpp_3m")(two_peaks, x, even_steps(n), **options) - truth).abs().mean())
            for n in (160, 320)
        ]
        assert slope(errors) == pytest.approx(order, abs=0.25), errors


def test_lagrange_integrals_are_exact_for_polynomials() -> None:
    nodes, end = [9.0, 11.5, 12.0, 40.0], 4.0
    weights = lagrange_integrals(nodes, end)
    for power in range(4):
        integral = (end ** (power + 1) - nodes[0] ** (power + 1)) / (power + 1)
        assert sum(w * node**power for w, node in zip(weights, nodes, strict=True)) == pytest.approx(
            integral, rel=1e-12
        )
    assert lagrange_integrals([0.0, -1.0], 1.0) == pytest.approx([1.5, -0.5])  # Adams-Bashforth 2
    assert lagrange_integrals([], 1.0) == []


def test_ddim_eta_1_is_ddpm_on_the_same_noise() -> None:
    steps = SCHEDULE.steps(12)
    x, denoise = normal(*SHAPE), gaussian(SCHEDULE.alpha_sigma)
    ancestral = samplers.ddpm(denoise, x, steps, noise=Noise(range(4)))
    assert torch.allclose(samplers.ddim(denoise, x, steps, eta=1.0, noise=Noise(range(4))), ancestral, atol=1e-10)
    assert not torch.allclose(samplers.ddim(denoise, x, steps), ancestral, atol=0.01)
    assert torch.allclose(samplers.euler_ancestral(denoise, x, steps, noise=Noise(range(4))), ancestral, atol=1e-10)


def test_deterministic_samplers_that_are_one_another_on_the_same_rows() -> None:
    steps = SCHEDULE.steps(16)
    x, denoise = normal(*SHAPE), gaussian(SCHEDULE.alpha_sigma)
    ddim, heun = samplers.ddim(denoise, x, steps), samplers.heun(denoise, x, steps)
    assert torch.allclose(samplers.euler(denoise, x, steps), ddim, atol=1e-10)
    assert torch.allclose(samplers.lms(denoise, x, steps, order=1), ddim, atol=1e-10)
    assert torch.allclose(samplers.edm(denoise, x, steps, s_churn=0.0), heun, atol=1e-10)
    assert not torch.allclose(heun, ddim, atol=1e-3)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 20])
@pytest.mark.parametrize("name", samplers.NAMES)
def test_finite_from_alpha_0_to_sigma_0(name: str, num_steps: int) -> None:
    """Solvers in the sigma / alpha frame are NaN from alpha = 0 (measured in k-diffusion)."""
    sampler = samplers.get(name)
    steps = ZERO_SNR.steps(num_steps, spacing="trailing", grid=sampler.grid)
    assert (float(steps.alpha[0]), float(steps.sigma[-1])) == (0, 0)
    seen: list[Tensor] = []
    out = sampler(
        gaussian(ZERO_SNR.alpha_sigma),
        normal(*SHAPE).float(),
        steps,
        noise=Noise(range(4)),
        callback=lambda i, t, x, x0: seen.append(x),
    )
    assert len(seen) == num_steps
    assert all(x.isfinite().all() for x in seen)
    assert torch.equal(seen[-1], out)
    assert float(seen[-1].abs().max()) < 10


@pytest.mark.parametrize("name", samplers.NAMES)
def test_every_sampler_can_leave_the_noise_of_the_first_level_in(name: str) -> None:
    """final="first": the last row has a time, at which solvers with two evaluations ask the network."""
    steps = SCHEDULE.steps(6, spacing="trailing", grid=samplers.get(name).grid, final="first")

    def denoise(x: Tensor, t: Tensor) -> Denoised:
        SCHEDULE.alpha_sigma(t)  # refuses what is no time
        return Denoised(0.1 * x)

    assert samplers.get(name)(denoise, normal(*SHAPE), steps, noise=Noise(range(4))).isfinite().all()


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


@pytest.mark.parametrize("name", samplers.NAMES)
def test_a_batch_of_four_is_four_singles(name: str) -> None:
    """The picture depends on the batch size (diffusers#3158, #6222)."""
    sampler = samplers.get(name)
    steps = SCHEDULE.steps(8, grid=sampler.grid)
    seeds = [3, 14, 15, 92]

    def draw(chosen: list[int], eta: float) -> Tensor:
        noise = Noise(chosen)
        denoise = gaussian(SCHEDULE.alpha_sigma)
        return sampler(denoise, noise((len(chosen), *SHAPE[1:])), steps, noise=noise, eta=eta)

    for eta in (0.0, 0.7) if sampler.has_eta else (0.0,):
        together = draw(seeds, eta)
        for i, seed in enumerate(seeds):
            assert torch.allclose(draw([seed], eta)[0], together[i], atol=1e-6)


@pytest.mark.parametrize("num_steps", [1, 9])
@pytest.mark.parametrize("name", [name for name in samplers.NAMES if name not in ("plms", "restart")])
def test_evaluations_are_as_many_as_stated_and_visit_every_row(name: str, num_steps: int) -> None:
    """The table of error against evaluations counts on it; the step to sigma = 0 may do with fewer."""
    sampler, times = samplers.get(name), []
    steps = SCHEDULE.steps(num_steps, spacing="trailing", grid=sampler.grid)

    def denoise(x: Tensor, t: Tensor) -> Denoised:
        times.append(float(t))
        return Denoised(0.5 * x)

    sampler(denoise, normal(*SHAPE), steps, noise=Noise(range(4)))
    assert sampler.evaluations_per_step * (num_steps - 1) < len(times) <= sampler.evaluations_per_step * num_steps
    if sampler.evaluations_per_step == 1:
        assert times == steps.t[:-1].tolist()
    elif name != "edm":  # it looks at noisier levels than the rows
        assert set(steps.t[:-1].tolist()) <= set(times)
        assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("name", samplers.NAMES)
def test_the_callback_sees_each_step_and_may_change_it(name: str) -> None:
    sampler, calls = samplers.get(name), []
    steps = SCHEDULE.steps(4, spacing="trailing", grid=sampler.grid)

    def callback(i: int, t: Tensor, x: Tensor, x0: Tensor) -> Tensor | None:
        calls.append((i, float(t)))
        return torch.full_like(x, 8.0) if i == 3 else None

    denoise = gaussian(SCHEDULE.alpha_sigma)
    out = sampler(denoise, normal(*SHAPE), steps, noise=Noise(range(4)), callback=callback)
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


@pytest.mark.parametrize("name", samplers.NAMES)
def test_noise_is_demanded_where_it_is_drawn(name: str) -> None:
    steps, sampler = SCHEDULE.steps(3), samplers.get(name)
    denoise = gaussian(SCHEDULE.alpha_sigma)
    for eta in (0.0, 0.5) if sampler.has_eta else (0.0,):
        if sampler.needs_noise(eta):
            with pytest.raises(LdmPipeError, match="noise"):
                sampler(denoise, normal(*SHAPE), steps, eta=eta)
        else:
            sampler(denoise, normal(*SHAPE), steps, eta=eta)


def test_steps_built_by_hand_cannot_be_looked_between() -> None:
    known = even_steps(4)
    steps = Steps(known.t, known.alpha, known.sigma)
    with pytest.raises(LdmPipeError, match="between their rows"):
        samplers.dpm2(gaussian(even_law), normal(*SHAPE), steps)
    samplers.heun(gaussian(even_law), normal(*SHAPE), steps)


@pytest.mark.parametrize("rate", [1.0, 2.0])
def test_extrapolate_is_exact_for_parabolas_at_uneven_distances(rate: float) -> None:
    """phi_1 D = integral of rate exp(rate (u - h)) p(u), whose antiderivative is p - p' / rate + p'' / rate^2."""

    def p(at: float) -> float:
        return 1 + 0.3 * at - 0.2 * at**2

    def antiderivative(at: float) -> float:
        return p(at) - (0.3 - 0.4 * at) / rate - 0.4 / rate**2

    past, end = [-0.4, -1.1, -3.0], 0.7
    d = extrapolate([(at, torch.tensor(p(at), dtype=torch.float64)) for at in past], end, rate=rate)
    decay = math.exp(-rate * (end - past[0]))
    assert float(d) * (1 - decay) == pytest.approx(antiderivative(end) - decay * antiderivative(past[0]), rel=1e-12)
