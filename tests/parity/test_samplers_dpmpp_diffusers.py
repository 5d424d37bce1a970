"""The DPM-Solver++ family against diffusers' schedulers, in float32 as users run both.

Tolerance 2e-5 of the largest value, for the reasons of test_samplers_diffusers.py; measured against 0.42.1: 4e-6 at
most. What differs on purpose: the third order (`half_curvature`, and its SDE form), and the rows of 2S.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ldm_pipe import samplers
from ldm_pipe.denoiser import Denoiser
from ldm_pipe.noise import Noise
from ldm_pipe.samplers.common import half_log_snr, sde_step
from ldm_pipe.samplers.dpmpp import extrapolate
from ldm_pipe.schedule import NoiseSchedule
from tests.parity.test_samplers_diffusers import (
    NUM_STEPS,
    PREDICTIONS,
    SHAPE,
    SPACINGS,
    TOLERANCE,
    difference,
    net,
    start,
    theirs,
)

diffusers = pytest.importorskip("diffusers")

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SOLVERS = [
    ("euler", 1, "dpmsolver++"),
    ("dpmpp_2m", 2, "dpmsolver++"),
    ("dpmpp_3m", 3, "dpmsolver++"),
    ("euler_ancestral", 1, "sde-dpmsolver++"),
    ("dpmpp_2m_sde", 2, "sde-dpmsolver++"),
]


@pytest.mark.parametrize("num_steps", [3, 14, NUM_STEPS])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("name", "order", "algorithm"), SOLVERS)
def test_multistep_solvers_equal_diffusers(
    name: str, order: int, algorithm: str, prediction: Any, spacing: Any, num_steps: int
) -> None:
    """Fewer than 15 steps end with lower orders; order 1 is Euler, and Euler ancestral on the reverse diffusion."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **BETAS, steps_offset=1, prediction_type=PREDICTIONS[prediction], timestep_spacing=spacing,
        solver_order=order, algorithm_type=algorithm,
    )  # fmt: skip
    reference = theirs(scheduler, num_steps, generator=torch.Generator().manual_seed(3))
    schedule = NoiseSchedule(prediction=prediction, spacing=spacing)
    steps = schedule.steps(num_steps, grid="multistep")
    options = {"half_curvature": True} if order == 3 else {}
    noise = Noise.from_generator(torch.Generator().manual_seed(3))
    mine = samplers.get(name)(Denoiser(net, schedule), start(), steps, noise=noise, **options)
    assert difference(mine, reference) < TOLERANCE


def test_3m_sde_differs_from_diffusers_by_a_sign_and_a_half_of_the_curvature() -> None:
    """In one step: phi_3 = 1/2 - phi_2 / 2h is -1/2 - phi_2 / 2h there, times half of x0''; the rest is equal."""
    scheduler = diffusers.DPMSolverMultistepScheduler(**BETAS, solver_order=3, algorithm_type="sde-dpmsolver++")
    scheduler.set_timesteps(NUM_STEPS)
    scheduler._step_index = 6
    generator = torch.Generator().manual_seed(1)
    x, z, *outputs = (torch.randn(SHAPE, generator=generator) for _ in range(5))
    reference = scheduler.multistep_dpm_solver_third_order_update(outputs, sample=x, noise=z)

    edm = scheduler.sigmas[4:8].double().tolist()
    rows = [(1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)) for sigma in edm]
    *times, end = (half_log_snr(*row) for row in rows)
    past = list(zip(reversed(times), reversed(outputs), strict=True))
    mine = sde_step(x, extrapolate(past, end, rate=2.0), *rows[2], *rows[3], z)
    assert difference(mine, reference) > 0.01

    h = end - times[2]
    phi_3 = 0.5 - (1 + math.expm1(-2 * h) / (2 * h)) / (2 * h)
    slopes = [(past[i][1] - past[i + 1][1]) / (past[i][0] - past[i + 1][0]) for i in (0, 1)]
    half_second = (slopes[0] - slopes[1]) / (times[2] - times[0])
    deviation = ((phi_3 - 1) - 2 * phi_3) * h**2 * half_second
    assert difference(mine + rows[3][0] * deviation, reference) < TOLERANCE


@pytest.mark.parametrize("num_steps", [2, 3, 10])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_2s_equals_diffusers_given_our_rows(prediction: Any, num_steps: int) -> None:
    """diffusers takes every other of its rows for the stage; ours is half-way, so its rows are set to ours and that."""
    schedule = NoiseSchedule(prediction=prediction)
    steps = schedule.steps(num_steps, spacing="linspace", grid="multistep")
    t, edm = [], []
    for i, (row, alpha_t, sigma_t, alpha_s, sigma_s) in enumerate(steps.pairs()):
        t, edm = [*t, float(row)], [*edm, sigma_t / alpha_t]
        if i < num_steps - 1:
            u, alpha, sigma = steps.at(0.5 * (half_log_snr(alpha_t, sigma_t) + half_log_snr(alpha_s, sigma_s)))
            t, edm = [*t, float(u)], [*edm, sigma / alpha]
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        **BETAS, prediction_type=PREDICTIONS[prediction], lower_order_final=True
    )
    scheduler.set_timesteps(len(t))
    scheduler.timesteps, scheduler.sigmas = torch.tensor(t), torch.tensor([*edm, 0.0])
    x = start()
    for time in scheduler.timesteps:
        x = scheduler.step(net(x, time), time, x).prev_sample
    assert difference(samplers.dpmpp_2s(Denoiser(net, schedule), start(), steps), x) < TOLERANCE
