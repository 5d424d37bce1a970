"""Finding a sampler by name, and what it takes."""

from __future__ import annotations

import inspect
import math

import pytest

from ldm_pipe import samplers
from ldm_pipe.noise import Noise
from ldm_pipe.pretrained import LdmPipeError
from tests.samplers import even_law, even_steps, gaussian, normal


@pytest.mark.parametrize("name", samplers.NAMES)
def test_every_name_finds_the_function_of_that_name(name: str) -> None:
    sampler = samplers.get(name)
    assert (sampler.name, sampler.function.__name__) == (name, name)
    assert getattr(samplers, name) is sampler.function
    assert name in samplers.__all__
    assert sampler.evaluations_per_step >= 1
    assert {"noise", "eta", "callback"} <= set(inspect.signature(sampler.function).parameters)
    assert not (sampler.has_eta and sampler.always_stochastic)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("DDIMM", "ddim"),
        ("dpm++_2m", "dpmpp_2m"),
        ("eular", "euler"),
        # web interfaces
        ("Euler a", "euler_ancestral"),
        ("DPM2 a Karras", "dpm2_ancestral"),
        ("DPM++ 2M Karras", "dpmpp_2m"),
        ("DPM++ 2S a", "dpmpp_2s_ancestral"),
        ("DPM++ SDE", "dpmpp_sde"),
        ("DPM++ 2M SDE Exponential", "dpmpp_2m_sde"),
        ("DPM++ 3M SDE", "dpmpp_3m_sde"),
        ("LMS Karras", "lms"),
        ("UniPC", "unipc"),
        # diffusers
        ("PNDMScheduler", "plms"),
        ("UniPCMultistepScheduler", "unipc"),
        ("DEISMultistepScheduler", "deis"),
        ("LCMScheduler", "lcm"),
        ("ScoreSdeVeScheduler", "predictor_corrector"),
        ("DDPMScheduler", "ddpm"),
        ("EulerDiscreteScheduler", "euler"),
        ("EulerAncestralDiscreteScheduler", "euler_ancestral"),
        ("HeunDiscreteScheduler", "heun"),
        ("LMSDiscreteScheduler", "lms"),
        ("KDPM2DiscreteScheduler", "dpm2"),
        ("KDPM2AncestralDiscreteScheduler", "dpm2_ancestral"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("DPMSolverSinglestepScheduler", "dpmpp_2s"),
        ("DPMSolverSDEScheduler", "dpmpp_sde"),
        ("sde-dpmsolver++", "dpmpp_2m_sde"),
        ("EDMEulerScheduler", "edm"),
        ("FlowMatchEulerDiscreteScheduler", "euler"),
        # k-diffusion
        ("k_euler_a", "euler_ancestral"),
        ("sample_dpmpp_2s_ancestral", "dpmpp_2s_ancestral"),
        ("k_dpm_2_a", "dpm2_ancestral"),
        ("sample_dpm_2", "dpm2"),
        ("k_heun", "heun"),
    ],
)
def test_an_unknown_sampler_lists_the_known_and_the_nearest(typed: str, meant: str) -> None:
    """Other tools' names are no aliases, but the answer to them is ours."""
    with pytest.raises(LdmPipeError) as caught:
        samplers.get(typed)
    assert f"did you mean '{meant}'" in str(caught.value)
    assert all(name in str(caught.value) for name in samplers.NAMES)


def test_nothing_is_suggested_for_what_resembles_nothing() -> None:
    with pytest.raises(LdmPipeError) as caught:
        samplers.get("????")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_eta_outside_its_range_is_refused(eta: float) -> None:
    with pytest.raises(LdmPipeError, match="eta"):
        samplers.ddim(gaussian(even_law), normal(4, 3), even_steps(3), eta=eta, noise=Noise(range(4)))


@pytest.mark.parametrize("name", [name for name in samplers.NAMES if not samplers.get(name).has_eta])
def test_eta_of_a_sampler_that_has_none_is_refused(name: str) -> None:
    """Called by name or as a function."""
    for sampler in (samplers.get(name), getattr(samplers, name)):
        with pytest.raises(LdmPipeError, match=r"has no eta"):
            sampler(gaussian(even_law), normal(4, 3), even_steps(3), eta=0.5, noise=Noise(range(4)))


def test_options_reach_the_sampler_and_unknown_ones_are_refused_with_those_it_takes() -> None:
    steps, x, denoise = even_steps(6), normal(4, 3), gaussian(even_law)
    assert samplers.get("lms").options == ("order", "lower_order_final")
    assert samplers.get("heun").options == ()
    low, high = (samplers.get("lms")(denoise, x, steps, order=order) for order in (1, 4))
    assert not bool((low == high).all())
    with pytest.raises(LdmPipeError, match=r"edm has no churn(.|\n)*s_churn, s_tmin, s_tmax, s_noise"):
        samplers.get("edm")(denoise, x, steps, noise=Noise(range(4)), churn=3)
    with pytest.raises(LdmPipeError, match=r"heun has no eta and no order(.|\n)*no options"):
        samplers.get("heun")(denoise, x, steps, eta=1.0, order=3)
    with pytest.raises(LdmPipeError, match=r"ddim has no order(.|\n)*eta"):
        samplers.get("ddim")(denoise, x, steps, order=3)


@pytest.mark.parametrize("order", [0, 5, 2.5, "4"])
def test_an_order_that_lms_has_not_is_refused(order: object) -> None:
    with pytest.raises(LdmPipeError, match="order"):
        samplers.get("lms")(gaussian(even_law), normal(4, 3), even_steps(6), order=order)
