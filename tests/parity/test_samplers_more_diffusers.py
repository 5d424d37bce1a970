"""PLMS, UniPC, DEIS and LCM against diffusers' schedulers, in float32 as users run both.

Tolerance 2e-5 of the largest value, for the reasons of test_samplers_diffusers.py; measured against 0.42.1: see each.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from ldm_pipe.denoiser import Denoiser
from ldm_pipe.noise import Noise
from ldm_pipe.samplers.deis import deis
from ldm_pipe.samplers.lcm import lcm
from ldm_pipe.samplers.plms import plms
from ldm_pipe.samplers.unipc import unipc
from ldm_pipe.schedule import NoiseSchedule
from tests.parity.test_samplers_diffusers import PREDICTIONS, SPACINGS, TOLERANCE, difference, net, start, theirs

diffusers = pytest.importorskip("diffusers")

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def schedule_of(prediction: Any = "eps", spacing: Any = "leading") -> NoiseSchedule:
    return NoiseSchedule(prediction=prediction, spacing=spacing)


@pytest.mark.parametrize("final", ["clean", "first"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 5, 8, 20])
def test_plms_equals_diffusers(num_steps: int, spacing: Any, final: Any) -> None:
    """With eps: diffusers combines the outputs, whatever they are, and v of different levels are not one quantity.

    Steps that divide the 1000 levels: elsewhere PNDMScheduler steps to other times than it evaluates, as its DDIM.
    """
    schedule = schedule_of(spacing=spacing)
    scheduler = diffusers.PNDMScheduler(
        **BETAS, timestep_spacing=spacing, skip_prk_steps=True, set_alpha_to_one=final == "clean"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # few leading steps start where there is little noise
        steps = schedule.steps(num_steps, final=final)
    mine = plms(Denoiser(net, schedule), start(), steps, lower_order_final=False)
    assert difference(mine, theirs(scheduler, num_steps)) < TOLERANCE


@pytest.mark.parametrize("num_steps", [1, 2, 3, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_unipc_equals_diffusers(variant: Any, order: int, num_steps: int) -> None:
    """With bh1 their last step to sigma = 0 is NaN (infinity times 0), so it ends at the level t = 0 here."""
    clean = variant == "bh2"
    schedule = schedule_of("v", "trailing")
    scheduler = diffusers.UniPCMultistepScheduler(
        **BETAS,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        solver_order=order,
        solver_type=variant,
        final_sigmas_type="zero" if clean else "sigma_min",
        lower_order_final=clean,
    )
    steps = schedule.steps(num_steps, grid="multistep", final="clean" if clean else "first")
    mine = unipc(Denoiser(net, schedule), start(), steps, order=order, variant=variant)
    assert difference(mine, theirs(scheduler, num_steps)) < TOLERANCE


@pytest.mark.parametrize("num_steps", [1, 2, 3, 14, 15, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_equals_diffusers(order: int, num_steps: int) -> None:
    """Their DEIS always ends at the level t = 0."""
    schedule = schedule_of("v", "trailing")
    scheduler = diffusers.DEISMultistepScheduler(
        **BETAS, timestep_spacing="trailing", prediction_type="v_prediction", solver_order=order
    )
    steps = schedule.steps(num_steps, grid="multistep", final="first")
    mine = deis(Denoiser(net, schedule), start(), steps, order=order)
    assert difference(mine, theirs(scheduler, num_steps)) < TOLERANCE


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["unipc", "deis"])
def test_the_multistep_samplers_equal_diffusers_on_all_spacings_and_predictions(
    name: str, prediction: Any, spacing: Any
) -> None:
    schedule = schedule_of(prediction, spacing)
    options = {**BETAS, "timestep_spacing": spacing, "prediction_type": PREDICTIONS[prediction]}
    denoise = Denoiser(net, schedule)
    if name == "unipc":
        mine = unipc(denoise, start(), schedule.steps(20, grid="multistep"))
        scheduler = diffusers.UniPCMultistepScheduler(**options)
    else:
        mine = deis(denoise, start(), schedule.steps(20, grid="multistep", final="first"), order=2)
        scheduler = diffusers.DEISMultistepScheduler(**options)
    assert difference(mine, theirs(scheduler, 20)) < TOLERANCE


@pytest.mark.parametrize("num_steps", [1, 4, 7, 50])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_lcm_equals_diffusers(prediction: Any, num_steps: int) -> None:
    schedule = schedule_of(prediction, "trailing")
    scheduler = diffusers.LCMScheduler(
        **BETAS, prediction_type=PREDICTIONS[prediction], clip_sample=False, set_alpha_to_one=True
    )
    steps = schedule.steps(num_steps, spacing="lcm")
    noise = Noise.from_generator(torch.Generator().manual_seed(3))
    mine = lcm(Denoiser(net, schedule), start(), steps, noise=noise, timestep_scaling=10.0)
    reference = theirs(scheduler, num_steps, generator=torch.Generator().manual_seed(3))
    assert difference(mine, reference) < TOLERANCE
    noise = Noise.from_generator(torch.Generator().manual_seed(3))
    assert difference(lcm(Denoiser(net, schedule), start(), steps, noise=noise), reference) < 1e-4
