"""Laws of Langevin dynamics: stationary distributions, the papers' own formulas, one noise level in two frames."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe.denoiser import Denoised
from ldm_pipe.noise import Noise
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.samplers.langevin import annealed_langevin, predictor_corrector
from ldm_pipe.schedule import NoiseSchedule, Steps
from tests.samplers import MEAN, SPREAD, Law, gaussian, normal
from tests.unit.samplers.test_samplers import SHAPE


def rows(alpha: Tensor, sigma: Tensor) -> Steps:
    """Return rows with the times 0, -1, -2, ..."""
    return Steps(-torch.arange(len(alpha), dtype=torch.float64), alpha.double(), sigma.double())


def law_of(steps: Steps) -> Law:
    """Return the levels of the rows, and of no other time."""
    levels = {float(t): (a, s) for t, a, s in zip(steps.t, steps.alpha, steps.sigma, strict=True)}
    return lambda t: levels[float(t)]


def ladder(largest: float, smallest: float, num_levels: int) -> Tensor:
    """Return the geometric levels of NCSN and the clean one."""
    sigma = torch.logspace(math.log10(largest), math.log10(smallest), num_levels, dtype=torch.float64)
    return torch.cat([sigma, sigma.new_zeros(1)])


@pytest.mark.parametrize("step_size", [0.1, 0.5])
def test_langevin_at_one_level_converges_to_the_diffused_gaussian(step_size: float) -> None:
    """Whatever the start. With a step a the variance v becomes v / (1 - a / (4 v)), by its own recursion."""
    alpha, sigma, count = 0.8, 0.6, 20_000
    level = rows(torch.tensor([alpha, alpha]), torch.tensor([sigma, sigma / 2]))  # arrives where it was
    x = torch.full((1, count), 3.0, dtype=torch.float64)
    out = annealed_langevin(gaussian(law_of(level)), x, level, noise=Noise([1]), num_inner=200, step_size=step_size)
    variance = alpha**2 * SPREAD**2 + sigma**2
    stationary = variance / (1 - step_size * sigma**2 / (4 * variance))
    assert float(out.mean()) == pytest.approx(alpha * MEAN, abs=5 * (stationary / count) ** 0.5)
    assert float(out.var()) == pytest.approx(stationary, rel=5 * (2 / count) ** 0.5)


def test_annealed_langevin_reaches_the_data() -> None:
    """From ten times the spread of the data, over close levels; the mean and the spread of the data come out."""
    count, sigma = 20_000, ladder(4, 0.02, 40)
    steps = rows(torch.ones(41), sigma)
    out = annealed_langevin(gaussian(law_of(steps)), 4 * normal(1, count), steps, noise=Noise([1]), num_inner=20)
    assert float(out.mean()) == pytest.approx(MEAN, abs=5 * SPREAD / count**0.5)
    assert float(out.std()) == pytest.approx(SPREAD, rel=0.05)


def test_annealed_langevin_is_the_same_in_both_frames() -> None:
    """The same levels of sigma / alpha, exploding or preserved, and the same noise: x_vp / alpha = x_ve."""
    edm = ladder(5, 0.05, 8)
    exploding = rows(torch.ones(9), edm)
    preserved = rows((1 + edm.square()).rsqrt(), edm * (1 + edm.square()).rsqrt())
    x = normal(*SHAPE)
    results = [
        annealed_langevin(gaussian(law_of(steps)), float(steps.alpha[0]) * x, steps, noise=Noise(range(4)))
        for steps in (exploding, preserved)
    ]
    assert torch.allclose(*results, atol=1e-10)


def test_annealed_langevin_is_algorithm_1() -> None:
    """Of arXiv:1907.05600, with its own symbols: alpha_i = epsilon sigma_i^2 / sigma_L^2; then the mean of x0."""
    sigma = ladder(1, 0.01, 10)
    steps = rows(torch.ones(11), sigma)
    denoise, epsilon, num_inner = gaussian(law_of(steps)), 2e-5, 5
    x, z = normal(*SHAPE), Noise(range(4))
    for i in range(10):
        a = epsilon * sigma[i] ** 2 / sigma[9] ** 2
        for _ in range(num_inner):
            score = (denoise(x, steps.t[i]).x0 - x) / sigma[i] ** 2
            x = x + a / 2 * score + a.sqrt() * z(x.shape)
    ours = annealed_langevin(denoise, normal(*SHAPE), steps, noise=Noise(range(4)), num_inner=num_inner)
    assert torch.allclose(ours, denoise(x, steps.t[9]).x0, atol=1e-6)


def langevin_step(x: Tensor, score: Tensor, z: Tensor, snr: float, alpha: float) -> Tensor:
    """Return the correctors of algorithms 4 (alpha 1) and 5 of arXiv:2011.13456, norms by sample."""
    norms = [v.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) for v in (z, score)]
    epsilon = 2 * alpha * (snr * norms[0] / norms[1]) ** 2
    return x + epsilon * score + (2 * epsilon).sqrt() * z


def test_the_variance_preserving_predictor_corrector_is_algorithms_3_and_5() -> None:
    schedule = NoiseSchedule()
    steps = schedule.steps(1000, spacing="trailing").from_strength(0.01)  # t = 9 .. 0
    alpha_bar = schedule.alpha(torch.arange(10)).square()
    beta = 1 - alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]])
    denoise, z, x = gaussian(schedule.alpha_sigma), Noise(range(4)), normal(*SHAPE)

    def score(x: Tensor, i: int) -> Tensor:
        return (alpha_bar[i].sqrt() * denoise(x, torch.tensor(float(i))).x0 - x) / (1 - alpha_bar[i])

    states: list[Tensor] = []
    predictor_corrector(
        denoise, x, steps, noise=Noise(range(4)), snr=0.2, callback=lambda i, t, x, x0: states.append(x)
    )
    for i in range(9, 0, -1):
        x = langevin_step(x, score(x, i), z(x.shape).double(), 0.2, float(1 - beta[i]))
        x = (2 - (1 - beta[i]).sqrt()) * x + beta[i] * score(x, i) + beta[i].sqrt() * z(x.shape)
        assert torch.allclose(states[9 - i], x, atol=1e-6)
    assert len(states) == 10


def test_the_variance_exploding_predictor_corrector_is_algorithms_2_and_4() -> None:
    sigma = ladder(5, 0.5, 6)
    steps = rows(torch.ones(7), sigma)
    denoise, z, x = gaussian(law_of(steps)), Noise(range(4)), 5 * normal(*SHAPE)
    states: list[Tensor] = []
    predictor_corrector(denoise, x, steps, noise=Noise(range(4)), callback=lambda i, t, x, x0: states.append(x))
    for i in range(5):
        score = (denoise(x, steps.t[i]).x0 - x) / sigma[i] ** 2
        x = langevin_step(x, score, z(x.shape).double(), 0.16, 1.0)
        score = (denoise(x, steps.t[i]).x0 - x) / sigma[i] ** 2
        added = sigma[i] ** 2 - sigma[i + 1] ** 2
        x = x + added * score + added.sqrt() * z(x.shape)
        assert torch.allclose(states[i], x, atol=1e-6)
    assert len(states) == 6


@pytest.mark.parametrize("num_corrections", [0, 1])
def test_predictor_corrector_reaches_the_data(num_corrections: int) -> None:
    count = 20_000
    schedule = NoiseSchedule(prediction="v", zero_terminal_snr=True)
    steps = schedule.steps(250, spacing="trailing")
    # one long row would have one norm: Langevin steps are sized by sample
    x = normal(count // 100, 100)
    out = predictor_corrector(
        gaussian(schedule.alpha_sigma), x, steps, noise=Noise(range(200)), num_corrections=num_corrections
    )
    assert float(out.mean()) == pytest.approx(MEAN, abs=5 * SPREAD / count**0.5)
    assert float(out.std()) == pytest.approx(SPREAD, rel=0.03 + 5 / (2 * count) ** 0.5)


@pytest.mark.parametrize("run", [annealed_langevin, predictor_corrector])
def test_a_batch_is_its_samples_and_the_start_may_have_no_signal(run: Any) -> None:
    """The authors' norms are means over the batch: a picture would depend on its neighbours."""
    schedule = NoiseSchedule(prediction="v", zero_terminal_snr=True)
    steps, seeds = schedule.steps(5, spacing="trailing"), [3, 14, 15]

    def draw(chosen: list[int]) -> Tensor:
        noise = Noise(chosen)
        x = noise((len(chosen), *SHAPE[1:])) * torch.tensor([float(s) for s in chosen]).reshape(-1, 1, 1, 1)
        return run(gaussian(schedule.alpha_sigma), x, steps, noise=noise)

    together = draw(seeds)
    assert together.isfinite().all()
    for i, seed in enumerate(seeds):
        assert torch.allclose(draw([seed])[0], together[i], atol=1e-5)


@pytest.mark.parametrize(("run", "per_step"), [(annealed_langevin, 11), (predictor_corrector, 2)])
def test_evaluations(run: Any, per_step: int) -> None:
    times: list[float] = []

    def denoise(x: Tensor, t: Tensor) -> Denoised:
        times.append(float(t))
        return Denoised(x / 2)

    steps = NoiseSchedule().steps(4, spacing="trailing")
    run(denoise, normal(*SHAPE), steps, noise=Noise(range(4)))
    assert times == [t for t in steps.t[:-1].tolist() for _ in range(per_step)]


@pytest.mark.parametrize(
    ("run", "options"),
    [
        (annealed_langevin, {"num_inner": 0}),
        (annealed_langevin, {"step_size": 2.0}),
        (predictor_corrector, {"num_corrections": -1}),
        (predictor_corrector, {"snr": 0.0}),
    ],
)
def test_options_outside_their_range_are_refused(run: Any, options: dict[str, Any]) -> None:
    steps = NoiseSchedule().steps(4, spacing="trailing")
    with pytest.raises(LdmPipeError, match=next(iter(options))):
        run(lambda x, t: Denoised(x), normal(*SHAPE), steps, noise=Noise(range(4)), **options)
