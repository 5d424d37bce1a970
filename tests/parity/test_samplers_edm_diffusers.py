"""The samplers of EDM's frame (k-diffusion's family) against diffusers' schedulers, in float32 as users run both.

Tolerance 2e-5 of the largest value, for the reasons of test_samplers_diffusers.py; measured against 0.42.1: 1.3e-5 for
Heun, 3e-6 for others. DPM2 and DPM++ SDE look between the rows, at times that diffusers finds with float32 logarithms,
3e-4 of a level off: 1e-4 there, measured 5e-5. Two habits of diffusers are told to our side: it interpolates the
logarithm of sigma for those times, and its LMS extrapolates onto sigma = 0 instead of landing on x0.
"""

from __future__ import annotations

import importlib
import math
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm_pipe import samplers
from ldm_pipe.denoiser import Denoiser
from ldm_pipe.noise import Noise
from ldm_pipe.schedule import NoiseSchedule
from ldm_pipe.schedule.laws import EDM
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

BETWEEN_ROWS = 1e-4
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def their_levels(scheduler: Any) -> Callable[[float], tuple[float, float, float]]:
    """Return half_log_snr -> (t, alpha, sigma) with t as diffusers finds it."""
    edm = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt().numpy()

    def levels(half_log_snr: float) -> tuple[float, float, float]:
        sigma_edm = math.exp(-half_log_snr)
        t = float(scheduler._sigma_to_t(np.array(sigma_edm), np.log(edm)))
        return t, 1 / math.hypot(1, sigma_edm), sigma_edm / math.hypot(1, sigma_edm)

    return levels


def ours(name: str, scheduler: Any, prediction: Any, spacing: Any, num_steps: int, **options: Any) -> Tensor:
    """Run our sampler on its customary rows."""
    schedule, sampler = NoiseSchedule(prediction=prediction, spacing=spacing), samplers.get(name)
    steps = replace(schedule.steps(num_steps, grid=sampler.grid), levels=their_levels(scheduler))
    noise = Noise.from_generator(torch.Generator().manual_seed(3))
    return sampler(Denoiser(net, schedule), start() * steps.init_scale, steps, noise=noise, **options)


CLASSES = {
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "dpm2": "KDPM2DiscreteScheduler",
    "dpm2_ancestral": "KDPM2AncestralDiscreteScheduler",
}
WITHOUT_X0 = ("euler_ancestral", "dpm2", "dpm2_ancestral")  # these classes do not take prediction_type "sample"
DRAWN = ("euler_ancestral", "dpm2_ancestral")


@pytest.mark.parametrize("num_steps", [2, NUM_STEPS])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    ("name", "prediction"), [(n, p) for n in CLASSES for p in PREDICTIONS if not (n in WITHOUT_X0 and p == "x0")]
)
def test_sampler_equals_diffusers(name: str, prediction: Any, spacing: Any, num_steps: int) -> None:
    if name == "lms":
        pytest.importorskip("scipy", reason="diffusers integrates the weights of LMS with it")
    cls = getattr(diffusers, CLASSES[name])
    scheduler = cls(**BETAS, prediction_type=PREDICTIONS[prediction], timestep_spacing=spacing)
    options = {"lower_order_final": False} if name == "lms" else {}
    drawn = {"generator": torch.Generator().manual_seed(3)} if name in DRAWN else {}
    reference = theirs(scheduler, num_steps, **drawn)
    tolerance = BETWEEN_ROWS if name.startswith("dpm2") else TOLERANCE
    assert difference(ours(name, scheduler, prediction, spacing, num_steps, **options), reference) < tolerance


@pytest.mark.parametrize("order", [1, 2, 3])
def test_lms_of_lower_order_equals_diffusers(order: int) -> None:
    pytest.importorskip("scipy", reason="diffusers integrates the weights of LMS with it")
    scheduler = diffusers.LMSDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    mine = ours("lms", scheduler, "eps", "trailing", 10, order=order, lower_order_final=False)
    assert difference(mine, theirs(scheduler, 10, order=order)) < TOLERANCE


class OnePath:
    """What diffusers asks of torchsde: the noise of a path from one level to another, of unit variance.

    The second question of a step is for all of it, so it contains the first answer, in the clock of 1 / sigma^2.
    """

    def __init__(self) -> None:
        self.noise, self.first = Noise.from_generator(torch.Generator().manual_seed(3)), None

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        if self.first is None:
            self.first = (self.noise(SHAPE), sigma_next)
            return self.first[0]
        (z, middle), self.first = self.first, None
        share = (middle**-2 - sigma**-2) / (sigma_next**-2 - sigma**-2)
        return share.sqrt() * z + (1 - share).sqrt() * self.noise(SHAPE)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_dpmpp_sde_equals_diffusers(prediction: Any, spacing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its noise comes from torchsde there, in the clock of sigma; both sides get the same noise here instead."""
    for name in ("torchsde", "diffusers.schedulers.scheduling_dpmsolver_sde"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))  # imported there, not called here
    module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")

    class WithOurNoise(module.DPMSolverSDEScheduler):
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            super().set_timesteps(*args, **kwargs)
            self.noise_sampler = OnePath()

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, OnePath() if name == "noise_sampler" else value)

    scheduler = WithOurNoise(**BETAS, prediction_type=PREDICTIONS[prediction], timestep_spacing=spacing)
    reference = theirs(scheduler, NUM_STEPS)
    assert difference(ours("dpmpp_sde", scheduler, prediction, spacing, NUM_STEPS), reference) < BETWEEN_ROWS


EDM_CLASSES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "euler": ("EDMEulerScheduler", {}, {}),
    "dpmpp_2m": ("EDMDPMSolverMultistepScheduler", {"solver_order": 2}, {}),
    "dpmpp_3m": ("EDMDPMSolverMultistepScheduler", {"solver_order": 3}, {"half_curvature": True}),
    "dpmpp_2m_sde": ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
}


@pytest.mark.parametrize("name", EDM_CLASSES)
def test_sampler_on_the_law_of_edm_equals_diffusers(name: str) -> None:
    """Karras' rows from 80 to 0.002, network and preconditioning included."""
    cls, config, options = EDM_CLASSES[name]
    scheduler = getattr(diffusers, cls)(**config)
    scheduler.set_timesteps(NUM_STEPS)
    x, drawn = 80 * start(), {"generator": torch.Generator().manual_seed(3)} if name.endswith("sde") else {}
    for t in scheduler.timesteps:
        x = scheduler.step(net(scheduler.scale_model_input(x, t), t), t, x, **drawn).prev_sample
    law = EDM()
    noise = Noise.from_generator(torch.Generator().manual_seed(3))
    mine = samplers.get(name)(Denoiser(net, law), 80 * start(), law.steps(NUM_STEPS), noise=noise, **options)
    assert difference(mine, x) < TOLERANCE
