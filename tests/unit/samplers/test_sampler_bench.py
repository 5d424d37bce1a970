"""Every sampler x spacing x law x prediction against distributions whose answer is known (ldm_pipe/metrics/mixture.py).

Deterministic samplers start at the quantiles of the noise, so that what is measured is their own error; stochastic ones
at random numbers. Every value of a state of shape (20, 2, 5, 5) is a sample of its own of one 1-D mixture, so that one
run gives 1,000 samples and norms over a sample are those of 50 dimensions.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.sampler_error import Curve, apart, error, table
from ldm_pipe import samplers
from ldm_pipe.denoiser import Denoise, Denoised, Denoiser
from ldm_pipe.metrics.mixture import GaussianMixture
from ldm_pipe.noise import Noise
from ldm_pipe.schedule import Law, NoiseSchedule, Prediction, Steps
from ldm_pipe.schedule.laws import EDM, VE, ContinuousVP, Flow
from ldm_pipe.schedule.process import edm_spread, eps_from_x0, extras, from_x0_eps

MIXTURE = GaussianMixture([[-1.0], [1.0]], [0.5, 0.4], [1, 2])
SHAPE = (20, 2, 5, 5)
COUNT = math.prod(SHAPE)
QUANTILES = 200

LAWS: dict[str, Law] = {
    "linear": NoiseSchedule("linear", 1e-4, 0.02),
    "scaled_linear": NoiseSchedule(),
    "cosine": NoiseSchedule("squaredcos_cap_v2"),
    "sigmoid": NoiseSchedule("sigmoid", 1e-4, 0.02),
    "sqrt": NoiseSchedule("sqrt", 1e-8, 4e-4),
    "1/T": NoiseSchedule("jsd", prediction="v"),
    "zero_snr": NoiseSchedule(prediction="v", zero_terminal_snr=True),
    "vp_linear": ContinuousVP(),
    "vp_cosine": ContinuousVP("cosine", prediction="v"),
    "ve": VE(),
    "edm": EDM(sigma_max=20.0, sigma_data=1.0),
    "flow": Flow(shift=3.0),
}
ALL_SPACINGS = ("linear", "zero_snr", "edm", "flow")  # the others are sampled on two; on all in the slow tests
GEOMETRIC = {"annealed_langevin"}  # wants a geometric ladder of levels; elsewhere it needs thousands of evaluations
FROM_PURE_NOISE = ("1/T", "zero_snr", "vp_cosine", "flow")
RAMPS = ("karras", "exponential", "polynomial", "log_snr", "beta")

# the order in the step of half_log_snr that each deterministic sampler claims with its default options
ORDERS = {
    "ddim": 1, "euler": 1,
    "heun": 2, "dpm2": 2, "dpmpp_2s": 2, "dpmpp_2m": 2, "plms": 2,
    "dpmpp_3m": 3, "deis": 3, "unipc": 3,
    "lms": 4,
}  # fmt: skip
STOCHASTIC = {
    "ddpm", "euler_ancestral", "edm", "dpm2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde",
    "dpmpp_3m_sde", "annealed_langevin", "predictor_corrector", "restart", "lcm",
}  # fmt: skip


def spacings(law: Law, num_steps: int) -> list[tuple[str, int | None]]:
    """Return (spacing, num_steps) of all that the law has; a string of sections counts the steps itself.

    Without "beta" where the law is wide: it is about even in sigma, so thousands of steps would go to pure noise. And
    without "leading" on the law 1/T, where even 480 steps of it start at alpha = 0.2, which is not noise.
    """
    alpha, sigma = (float(value) for value in law.alpha_sigma(law.t_range[1]))
    ramps = RAMPS[:-1] if sigma > 300 * alpha else RAMPS
    if not isinstance(law, NoiseSchedule):
        return [(spacing, num_steps) for spacing in ("trailing", "linspace", *ramps)]
    even = ("trailing", "linspace") if law.beta_schedule == "jsd" else ("leading", "trailing", "linspace")
    named = [(spacing, num_steps) for spacing in (*even, *ramps)]
    third = num_steps // 3
    return [*named, (f"{third},{third},{num_steps - 2 * third}", None)] if third else [*named]


def exact(law: Law, *, consistent: bool = False) -> Denoise:
    """Return E[x0 | x_t] of each value, or (consistent) where the probability flow takes it: what LCM distils."""
    levels: dict[float, tuple[float, float]] = {}

    def denoise(x: Tensor, t: Tensor) -> Denoised:
        if float(t) not in levels:
            alpha, sigma = law.alpha_sigma(t)
            levels[float(t)] = float(alpha), float(sigma)
        level, column = levels[float(t)], x.reshape(-1, 1)
        x0 = MIXTURE.flow(column, level, (1.0, 0.0)) if consistent else MIXTURE.x0(column, *level)
        return Denoised(x0.reshape(x.shape))

    return denoise


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draws() -> Noise:
    return Noise.from_generator(torch.Generator().manual_seed(1))


def ranks(count: int) -> Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def test_every_sampler_is_on_the_bench() -> None:
    assert set(samplers.NAMES) == {*ORDERS, *STOCHASTIC}
    assert {name for name in samplers.NAMES if samplers.get(name).always_stochastic} == STOCHASTIC


class EvenLaw:
    """A law whose time is -half_log_snr, in one of the three frames; even steps in it are what orders speak of."""

    def __init__(self, frame: str) -> None:
        self.frame = frame

    def level(self, half_log_snr: float) -> tuple[float, float, float]:
        edm = math.exp(-half_log_snr)
        match self.frame:
            case "vp":
                alpha = 1 / math.hypot(1, edm)
            case "ve":
                alpha = 1.0
            case _:
                alpha = 1 / (1 + edm)
        return -half_log_snr, alpha, alpha * edm

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        _, alpha, sigma = self.level(-float(t))
        return torch.tensor(alpha, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64)

    def steps(self, num_steps: int) -> Steps:
        rows = [self.level(-4.0 + 8.0 * i / num_steps) for i in range(num_steps + 1)]
        return Steps(*torch.tensor(rows, dtype=torch.float64).T.contiguous(), levels=self.level)


def flow_error(name: str, law: EvenLaw, num_steps: int, options: dict[str, Any]) -> float:
    """Return the root mean square distance from where the exact flow goes."""
    steps = law.steps(num_steps)
    start, end = ((float(steps.alpha[i]), float(steps.sigma[i])) for i in (0, -1))
    u = ranks(48)
    x = MIXTURE.noised(*start).quantile(u)[:, None]
    out = samplers.get(name)(MIXTURE.denoiser(law), x, steps, **options)
    return float((out[:, 0] - MIXTURE.noised(*end).quantile(u)).square().mean().sqrt())


CLAIMS = [
    *((name, {}, order) for name, order in ORDERS.items()),
    ("unipc", {"order": 1}, 2),  # the corrector raises the order by one (arXiv:2302.04867, theorem 3.1)
    ("unipc", {"order": 3}, 4),
    ("deis", {"order": 2}, 2),
    ("lms", {"order": 2}, 2),
]


@pytest.mark.parametrize("frame", ["vp", "ve", "flow"])
@pytest.mark.parametrize(("name", "options", "order"), CLAIMS)
def test_the_order_is_the_slope_of_error_against_step(
    name: str, options: dict[str, Any], order: int, frame: str
) -> None:
    """By a fit to log error against log number; multistep solvers start with lower orders, so they only tend to it."""
    numbers = torch.tensor([64, 128, 256])
    errors = torch.tensor([flow_error(name, EvenLaw(frame), int(n), options) for n in numbers])
    logs, log_errors = numbers.log2(), errors.log2()
    slope = float(((logs - logs.mean()) * (log_errors - log_errors.mean())).sum() / (logs - logs.mean()).square().sum())
    assert -slope == pytest.approx(order, abs=0.3), errors.tolist()


def distance(name: str, law: Law, spacing: str, num_steps: int | None) -> float:
    """Return the largest difference of the distribution functions of samples and truth."""
    sampler, random = samplers.get(name), name in STOCHASTIC
    start = normal(*SHAPE) if random else torch.special.ndtri(ranks(QUANTILES)).reshape(-1, 2, 5, 5)
    steps = law.steps(num_steps, spacing=spacing, grid=sampler.grid)
    denoise = exact(law, consistent=name == "lcm")
    out = sampler(denoise, start * steps.init_scale, steps, noise=_noise(name))
    assert out.shape == start.shape
    return MIXTURE.kolmogorov(out.reshape(-1, 1))


def misses(name: str, law: Law, wanted: tuple[str, ...] | None) -> dict[Any, float]:
    """Return the spacings (all, or those wanted) whose samples stay wrong with 30, 120 and 480 steps.

    Right is within sampling error + 0.03. True samples exceed 1.95 / sqrt(n) once in a thousand times; the quantiles
    that deterministic samplers start from stay below 1 / n.
    """
    allowed = (1.95 / COUNT**0.5 if name in STOCHASTIC else 1 / QUANTILES) + 0.03
    fewest = 5 if name == "lcm" else 30
    left: list[int] = [k for k, (spacing, _) in enumerate(spacings(law, fewest)) if wanted is None or spacing in wanted]
    found: dict[Any, float] = {}
    for num_steps in (fewest, 4 * fewest, 16 * fewest):
        choices = spacings(law, num_steps)
        found = {choices[k]: distance(name, law, *choices[k]) for k in left}
        left = [k for k in left if not found[choices[k]] < allowed]
        found = {choices[k]: found[choices[k]] for k in left}
    return found


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", samplers.NAMES)
def test_samples_have_the_distribution(name: str, law: str) -> None:
    """On every spacing of four laws, and on two of the others; all of them are the slow test below."""
    wanted = None if law in ALL_SPACINGS else ("trailing", "karras")
    assert not misses(name, LAWS[law], ("log_snr",) if name in GEOMETRIC else wanted)


@pytest.mark.slow
@pytest.mark.parametrize("law", [law for law in LAWS if law not in ALL_SPACINGS])
@pytest.mark.parametrize("name", [name for name in samplers.NAMES if name not in GEOMETRIC])
def test_samples_have_the_distribution_on_every_spacing(name: str, law: str) -> None:
    assert not misses(name, LAWS[law], None)


class Exact:
    """A network that outputs the exact prediction of its kind, from what a network is shown."""

    def __init__(self, law: Law, prediction: Prediction) -> None:
        self.law, self.prediction, self.denoise = law, prediction, exact(law)
        self.t = torch.zeros(())

    def __call__(self, shown: Tensor, time: Tensor, **slots: object) -> Tensor:
        assert torch.allclose(time.double(), self.law.network_time(self.t), rtol=1e-6)
        alpha, sigma = self.law.alpha_sigma(self.t)
        extra = extras(self.law, self.prediction, self.t)
        x = shown if extra.sigma_data is None else shown * edm_spread(alpha, sigma, extra.sigma_data)
        x0 = self.denoise(x, self.t).x0
        return from_x0_eps(self.prediction, x0, eps_from_x0(x, x0, alpha, sigma), alpha, sigma, extra)


def predictions(law: Law) -> list[Prediction]:
    """Return all predictions that mean something on the law."""
    found: list[Prediction] = ["x0", "v", "flow"]
    if float(law.alpha(law.t_range[1])) > 0:
        found += ["eps", "score"]
    if isinstance(law, NoiseSchedule):
        found.append("mean")
    return [*found, "edm"] if isinstance(law, EDM) else found


def through(law: Law, prediction: Prediction) -> Denoise:
    """Return the real denoiser around a network that is right."""
    net = Exact(law, prediction)
    denoiser = Denoiser(net, law, prediction)

    def denoise(x: Tensor, t: Tensor) -> Denoised:
        net.t = t
        return denoiser(x, t)

    return denoise


@pytest.mark.parametrize("law", LAWS)
def test_every_prediction_becomes_the_same_x0_at_every_row(law: str) -> None:
    """On every spacing, through the real denoiser: the conversions are exact in float64."""
    x, right = normal(4, 1, 2, 2), exact(LAWS[law])
    for spacing, number in spacings(LAWS[law], 9):
        steps = LAWS[law].steps(number, spacing=spacing)
        for prediction in predictions(LAWS[law]):
            denoise = through(LAWS[law], prediction)
            for t, alpha, sigma, *_ in steps.pairs():
                x_t = (alpha + sigma) * x
                assert torch.allclose(denoise(x_t, t).x0, right(x_t, t).x0, rtol=1e-6, atol=1e-6), (prediction, t)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", samplers.NAMES)
def test_every_prediction_draws_the_same(name: str, law: str) -> None:
    sampler = samplers.get(name)
    steps = LAWS[law].steps(3, spacing="trailing", grid=sampler.grid)
    start = normal(2, 1, 2, 2) * steps.init_scale
    expected = sampler(exact(LAWS[law]), start, steps, noise=_noise(name))
    for prediction in predictions(LAWS[law]):
        out = sampler(through(LAWS[law], prediction), start, steps, noise=_noise(name))
        assert torch.allclose(out, expected, rtol=1e-6, atol=1e-6), prediction


def _noise(name: str) -> Noise | None:
    return draws() if name in STOCHASTIC else None


@pytest.mark.parametrize("law", LAWS)
def test_rows_fall_without_repeats_and_end_clean(law: str) -> None:
    """Karras spacing repeats the last sigma in diffusers, and duplicate times break its look-ups (diffusers#5687)."""
    for num_steps in (1, 2, 3, 10, 49):
        for spacing, number in spacings(LAWS[law], num_steps):
            for grid in ("integer", "fractional", "multistep"):
                if num_steps == 1 and spacing in ("leading", "linspace"):
                    continue  # one step that does not start at noise warns
                steps = LAWS[law].steps(number, spacing=spacing, grid=grid)
                edm = steps.sigma / steps.alpha
                assert steps.num_steps == num_steps
                assert bool((steps.t[1:] < steps.t[:-1]).all()), (spacing, grid)
                assert bool((edm[1:] < edm[:-1]).all()), (spacing, grid)
                assert (float(steps.alpha[-1]), float(steps.sigma[-1])) == (1, 0)


@pytest.mark.parametrize("law", FROM_PURE_NOISE)
@pytest.mark.parametrize("name", samplers.NAMES)
def test_from_alpha_0_every_state_is_finite_and_no_noise_is_left(name: str, law: str) -> None:
    """Heun in the sigma / alpha frame is NaN from alpha = 0; a last sigma that is not 0 stays visible (#5689)."""
    sampler, constant = samplers.get(name), normal(2, 3, 2, 2, seed=5)
    for num_steps in (1, 2, 3, 9):
        for spacing in ("trailing", *RAMPS):
            steps = LAWS[law].steps(num_steps, spacing=spacing, grid=sampler.grid)
            assert float(steps.alpha[0]) == 0
            seen: list[Tensor] = []
            out = sampler(
                lambda x, t: Denoised(constant),
                normal(2, 3, 2, 2),
                steps,
                noise=_noise(name),
                callback=lambda i, t, x, x0, seen=seen: seen.append(x),
            )
            assert len(seen) == num_steps
            assert all(bool(x.isfinite().all()) for x in seen), (spacing, num_steps)
            assert torch.allclose(out, constant, atol=1e-9), (spacing, num_steps)


@pytest.mark.parametrize("name", samplers.NAMES)
def test_a_gaussian_in_many_dimensions(name: str) -> None:
    """48 dimensions: the exact flow to 8 % of 2 spreads (first order; the others 4 %), or all means and
    variances to 5 sampling errors and 5 % (Langevin 15 %: its steps of size 0.2 shake 5 % too much at every level).
    """
    dim, count, spread = 48, 500, 0.5
    gaussian = GaussianMixture(normal(1, dim, seed=2), [spread])
    law, sampler = LAWS["zero_snr"], samplers.get(name)
    steps = law.steps(200, spacing="trailing", grid=sampler.grid)
    x = normal(count, 3, 4, 4)

    def denoise(x: Tensor, t: Tensor) -> Denoised:
        alpha, sigma = law.alpha_sigma(t)
        if name == "lcm":
            return Denoised(gaussian.flow(x, (float(alpha), float(sigma)), (1.0, 0.0)))
        return Denoised(gaussian.x0(x, alpha, sigma))

    out = sampler(denoise, x, steps, noise=_noise(name)).flatten(1)
    if name in ORDERS:
        tolerance = (0.08 if ORDERS[name] == 1 else 0.04) * 2 * spread
        assert torch.allclose(out, gaussian.flow(x, (0.0, 1.0), (1.0, 0.0)).flatten(1), atol=tolerance)
    else:
        own = 0.15 if name == "annealed_langevin" else 0.05
        assert torch.allclose(out.mean(0), gaussian.mean(), atol=5 * spread / count**0.5)
        variance = out.var(0)
        assert torch.allclose(variance, torch.full_like(variance, spread**2), rtol=own + 5 * (2 / count) ** 0.5)
        assert float(variance.mean()) == pytest.approx(spread**2, rel=own + 5 * (2 / (count * dim)) ** 0.5)


def test_the_benchmark_counts_evaluations_and_measures_both_kinds_of_error() -> None:
    coarse, fine = error("dpmpp_2m", 40, 0), error("dpmpp_2m", 80, 0)
    assert (coarse[0], fine[0]) == (40, 80)
    assert coarse[1] / fine[1] == pytest.approx(4, rel=0.15)
    assert error("heun", 10, 0)[0] == 19
    calls, far = error("ddpm", 80, 2000)
    assert calls == 80
    assert 0 < far < 0.2


def test_the_table_of_the_benchmark_has_its_rows_and_the_labels_stay_apart() -> None:
    curves = [
        Curve("a", False, (8, 31), (0.5, 0.2)),
        Curve("b", False, (8, 32), (0.5, 0.1)),
        Curve("c", True, (64,), (1.0,)),
    ]
    text = table(curves, 0.01, 100)
    assert "| `a` | 5.0e-01 |  | 2.0e-01 |  |  |  |" in text
    assert text.index("`b`") < text.index("`a`") < text.index("`c`")
    placed = apart([0.0, 0.01, -5.0], 0.1, -4.95)
    assert placed[1] - placed[0] == pytest.approx(0.1)
    assert placed[2] == pytest.approx(-5.0)
