"""Laws of PLMS, UniPC, DEIS, LCM and restart: order of convergence, exactness, contraction."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe.denoiser import Denoise, Denoised
from ldm_pipe.noise import Noise
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.samplers.common import flow_step
from ldm_pipe.samplers.deis import deis
from ldm_pipe.samplers.heun import heun
from ldm_pipe.samplers.lcm import lcm
from ldm_pipe.samplers.plms import plms
from ldm_pipe.samplers.quadrature import quadrature
from ldm_pipe.samplers.restart import restart
from ldm_pipe.samplers.unipc import unipc
from ldm_pipe.schedule import NoiseSchedule, Steps
from tests.samplers import MEAN, SPREAD, even_law, even_steps, gaussian, normal
from tests.unit.samplers.test_samplers import SHAPE, exact

ZERO_SNR = NoiseSchedule(prediction="v", zero_terminal_snr=True, spacing="trailing")
SOLVERS: dict[str, Callable[..., Tensor]] = {
    "plms": plms,
    **{f"unipc-{p}-{kind}": partial(unipc, order=p, variant=kind) for p in (1, 2, 3) for kind in ("bh1", "bh2")},
    **{f"deis-{p}": partial(deis, order=p) for p in (1, 2, 3)},
}


def even_edm(num_steps: int) -> Steps:
    """Return rows of `even_law` at even steps of sigma / alpha."""
    t = torch.linspace(3, 0.5, num_steps + 1, dtype=torch.float64).log()
    return Steps(t, *even_law(t))


def test_quadrature_integrates_polynomials() -> None:
    """The integral of u^k from 0 to 1 by values anywhere; with the ends and the middle it is Simpson's rule."""
    assert quadrature([0.0, 1.0, 0.5], [1, 1 / 2, 1 / 3]) == pytest.approx([1 / 6, 1 / 6, 2 / 3])
    nodes = [0.0, -1.3, 2.2, 0.4]
    weights = quadrature(nodes, [1, 1 / 2, 1 / 3, 1 / 4])
    for k in range(4):
        assert sum(w * u**k for w, u in zip(weights, nodes, strict=True)) == pytest.approx(1 / (k + 1))


@pytest.mark.parametrize(
    ("name", "rows", "order"),
    [
        ("plms", even_steps, 2),
        ("plms", even_edm, 3),
        *((f"unipc-{p}-{kind}", even_steps, p + 1) for p in (1, 2, 3) for kind in ("bh1", "bh2")),
        *((f"deis-{p}", even_steps, p) for p in (1, 2, 3)),
    ],
)
def test_order_of_convergence(name: str, rows: Callable[[int], Steps], order: int) -> None:
    """The slope of log error against log step is at least the order claimed: p + 1 for UniPC's corrector."""
    x, errors = normal(100), []
    for num_steps in (40, 80, 160):
        steps = rows(num_steps)
        errors.append(float((SOLVERS[name](gaussian(even_law), x, steps) - exact(x, steps)).abs().max()))
    slopes = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert slopes[-1] > order - 0.2, (errors, slopes)
    assert errors[-1] < 10 * 0.05**order


@pytest.mark.parametrize("name", ["deis-1", "unipc-1-bh2"])
def test_the_first_order_is_ddim(name: str) -> None:
    steps = even_steps(1)
    x, denoise = normal(*SHAPE), gaussian(even_law)
    by_hand = flow_step(x, denoise(x, steps.t[0]).x0, *next(steps.pairs())[1:])
    assert torch.allclose(SOLVERS[name](denoise, x, steps), by_hand, atol=1e-12)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_step_from_alpha_0_is_ddim_and_the_rest_keeps_its_order(name: str) -> None:
    states: list[Tensor] = []
    steps = ZERO_SNR.steps(400)
    x = normal(100)
    out = SOLVERS[name](gaussian(ZERO_SNR.alpha_sigma), x, steps, callback=lambda i, t, x, x0: states.append(x))
    x0 = torch.full_like(x, MEAN)  # pure noise says nothing else
    assert torch.allclose(states[0], flow_step(x, x0, *next(steps.pairs())[1:]), atol=1e-12)
    assert float((out - (MEAN + SPREAD * x)).abs().max()) < 0.02  # exact flow from N(0, 1) to N(MEAN, SPREAD^2)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 14, 15])
@pytest.mark.parametrize("name", SOLVERS)
def test_every_order_ends_without_noise(name: str, num_steps: int) -> None:
    constant = normal(*SHAPE, seed=5)
    for schedule in (ZERO_SNR, NoiseSchedule(spacing="trailing")):
        steps = schedule.steps(num_steps)
        out = SOLVERS[name](lambda x, t: Denoised(constant), normal(*SHAPE), steps)
        assert torch.allclose(out, constant, atol=1e-12)


def test_plms_ends_at_the_first_level_without_looking_beyond() -> None:
    """final="first": there is noise in the last row, but its time is no time."""
    times: list[float] = []

    def denoise(x: Tensor, t: Tensor) -> Denoised:
        times.append(float(t))
        return Denoised(x)

    schedule = NoiseSchedule(spacing="trailing")
    for num_steps in (1, 3):
        steps = schedule.steps(num_steps, final="first")
        plms(denoise, normal(*SHAPE), steps)
        assert times[: 2 if num_steps > 1 else 1] == steps.t[: 2 if num_steps > 1 else 1].tolist()
        assert len(times) == num_steps + (num_steps > 1)
        times.clear()


def test_unipc_does_not_correct_what_a_callback_changed() -> None:
    """Known parts that are pasted back into the picture would be lost again."""
    steps = even_steps(5)
    other, states = normal(*SHAPE, seed=9), []

    def callback(i: int, t: Tensor, x: Tensor, x0: Tensor) -> Tensor | None:
        states.append((x, x0))
        return other if i == 1 else None

    denoise = gaussian(even_law)
    unipc(denoise, normal(*SHAPE), steps, order=1, callback=callback)
    row = list(steps.pairs())[2]
    x0 = denoise(other, row[0]).x0
    assert torch.equal(states[2][1], x0)
    assert torch.allclose(states[2][0], flow_step(other, x0, *row[1:]), atol=1e-12)


def consistency(schedule: NoiseSchedule) -> Denoise:
    """Return where the probability flow of the Gaussian takes x_t: a perfect consistency function."""

    def denoise(x: Tensor, t: Tensor) -> Denoised:
        alpha, sigma = (float(level) for level in schedule.alpha_sigma(t))
        return Denoised(MEAN + SPREAD / math.hypot(alpha * SPREAD, sigma) * (x - alpha * MEAN))

    return denoise


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_lcm_is_exact_in_any_number_of_steps_with_a_consistency_function(num_steps: int) -> None:
    count = 40_000
    steps = ZERO_SNR.steps(num_steps)
    x = normal(1, count)
    out = lcm(consistency(ZERO_SNR), x, steps, noise=Noise([1]))
    assert float(out.mean()) == pytest.approx(MEAN, abs=5 * SPREAD / count**0.5)
    assert float(out.std()) == pytest.approx(SPREAD, rel=5 / (2 * count) ** 0.5)
    if num_steps == 1:
        assert torch.allclose(out, MEAN + SPREAD * x, atol=1e-12)


def test_lcm_forgets_its_start_but_for_the_first_jump() -> None:
    """Each jump maps onto the data; what is left of x0 in the next level is alpha of it."""
    x, shift = normal(1, 1000), 0.5
    steps = ZERO_SNR.steps(2)
    moved = lcm(consistency(ZERO_SNR), x + shift, steps, noise=Noise([1])) - lcm(
        consistency(ZERO_SNR), x, steps, noise=Noise([1])
    )
    alpha, sigma = float(steps.alpha[1]), float(steps.sigma[1])
    assert torch.allclose(
        moved, torch.full_like(moved, SPREAD / math.hypot(alpha * SPREAD, sigma) * alpha * SPREAD * shift)
    )


@pytest.mark.parametrize(("t", "size"), [(0.0, 1.0), (1.0, 0.0025), (19.0, 7e-6)])
def test_lcm_boundary_keeps_x_at_time_0(t: float, size: float) -> None:
    alpha, sigma = (float(level) for level in NoiseSchedule().alpha_sigma(t))
    row = [torch.tensor(pair, dtype=torch.float64) for pair in ((t, -1.0), (alpha, 1.0), (sigma, 0.0))]
    x = normal(*SHAPE)
    out = lcm(lambda x, t: Denoised(torch.zeros_like(x)), x, Steps(*row), timestep_scaling=10.0)
    assert float((out / x).mean()) == pytest.approx(size, rel=0.02)


def difference_of_starts(run: Callable[..., Tensor], steps: Steps) -> float:
    """Return by how much 1 more at the start changes the end, with the same noise; all is linear here."""
    x = normal(1, 4)
    ends = [run(gaussian(NoiseSchedule().alpha_sigma), start, steps, noise=Noise([1])) for start in (x, x + 1)]
    return float((ends[1] - ends[0]).mean())


@pytest.mark.parametrize("num_restarts", [1, 3])
def test_restart_contracts_the_errors_made_above_as_the_exact_flow_does(num_restarts: int) -> None:
    """Each round through the noise shrinks a difference by spread(low) / spread(high), in the frame x / alpha."""
    low, high = 0.1, 1.5
    steps = NoiseSchedule().steps(60, spacing="karras")
    edm = steps.sigma / steps.alpha
    row = int((edm[:-1].log() - math.log(low)).abs().argmin())
    again = partial(restart, low=low, high=high, num_restarts=num_restarts, num_restart_steps=30)
    shrunk = difference_of_starts(again, steps) / difference_of_starts(heun, steps)
    expected = (math.hypot(SPREAD, float(edm[row])) / math.hypot(SPREAD, high)) ** num_restarts
    assert shrunk == pytest.approx(expected, rel=0.03)


def test_restart_keeps_the_distribution() -> None:
    count = 20_000
    steps = NoiseSchedule().steps(60, spacing="karras")
    x = normal(1, count) * steps.init_scale
    out = restart(gaussian(NoiseSchedule().alpha_sigma), x, steps, noise=Noise([1]), num_restart_steps=6)
    assert float(out.mean()) == pytest.approx(MEAN, abs=5 * SPREAD / count**0.5 + 0.01)
    assert float(out.std()) == pytest.approx(SPREAD, rel=0.01 + 5 / (2 * count) ** 0.5)


def test_restart_evaluates_where_it_says() -> None:
    times: list[float] = []

    def denoise(x: Tensor, t: Tensor) -> Denoised:
        times.append(float(t))
        return Denoised(x)

    schedule = NoiseSchedule()
    steps = schedule.steps(10, spacing="karras")
    calls: list[int] = []
    restart(denoise, normal(*SHAPE), steps, noise=Noise(range(4)), callback=lambda i, t, x, x0: calls.append(i))
    assert calls == list(range(10))
    assert len(times) == (2 * 10 - 1) + 2 * (2 * 3)
    high = float(schedule.t_of(-math.log(0.3)))
    assert sum(abs(t - high) < 1e-9 for t in times) == 2
    times.clear()
    few = schedule.steps(2, spacing="trailing")  # its inner row is above 0.3: nowhere to restart from
    restart(denoise, normal(*SHAPE), few)
    assert len(times) == 3


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_restart_is_finite_from_alpha_0(num_steps: int) -> None:
    out = restart(
        gaussian(ZERO_SNR.alpha_sigma), normal(*SHAPE), ZERO_SNR.steps(num_steps), noise=Noise(range(4)), high=5.0
    )
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("run", "options"),
    [
        (unipc, {"order": 4}),
        (unipc, {"variant": "bh3"}),
        (deis, {"order": 0}),
        (restart, {"low": 0.3, "high": 0.1}),
        (restart, {"num_restarts": 0}),
        (restart, {"num_restart_steps": 0}),
    ],
)
def test_options_outside_their_range_are_refused(run: Any, options: dict[str, Any]) -> None:
    with pytest.raises(LdmPipeError, match=str(next(iter(options.values())))):
        run(gaussian(ZERO_SNR.alpha_sigma), normal(*SHAPE), ZERO_SNR.steps(3), noise=Noise(range(4)), **options)
