"""The files we write, built by diffusers, against our own steps: the same noise levels and times.

Tolerances. Levels sigma / alpha: 2e-4 relative, diffusers' float32 product of up to 1000 alphas. Times: 1e-3 where
diffusers keeps fractions, 1 where it rounds or cuts them to whole numbers; within one time it interpolates log sigma of
a ramp where we interpolate sigma, which is less than 0.1.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe.schedule import Law, NoiseSchedule
from ldm_pipe.schedule import read as schedule_config
from ldm_pipe.schedule.keys import KEYS
from ldm_pipe.schedule.laws import EDM, VE, ContinuousVP, Flow, ResolutionShift

diffusers = pytest.importorskip("diffusers")

NUM_STEPS = 12
WHOLE = {"ddim", "ddpm", "plms", "lcm"}
MULTISTEP = {"dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_2s", "unipc", "deis"}
TWICE = {"heun", "dpm2", "dpm2_ancestral", "dpmpp_sde"}  # diffusers lists every time of these twice but the first


def grid(sampler: str) -> Any:
    if sampler in WHOLE:
        return "integer"
    return "multistep" if sampler in MULTISTEP else "fractional"


def build(config: dict[str, Any], **settings: Any) -> Any:
    """Build the diffusers scheduler of a config, with its times set; a key it does not take is an error."""
    keys = {key: value for key, value in config.items() if not key.startswith("_")}
    scheduler = getattr(diffusers, config["_class_name"])(**keys)
    scheduler.set_timesteps(NUM_STEPS, **settings)
    return scheduler


def theirs(scheduler: Any, sampler: str) -> tuple[Tensor, Tensor]:
    """Return the times and the levels (diffusers' sigma) that a scheduler visits, each once."""
    t = scheduler.timesteps.double()
    if sampler in WHOLE:
        t = t.unique().flip(0)  # PLMS evaluates its second time twice
        return t, ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt().double()[t.long()]
    sigma = scheduler.sigmas.double()[: len(t)]
    if sampler in TWICE:
        middle = sampler != "heun"  # between two of their times the others list the middle one
        t = torch.cat([t[:1], t[2::2] if middle else t[1::2]])
        sigma = torch.cat([sigma[:1], sigma[1::2]])
    return t, sigma


def check(law: Law, sampler: str, **settings: Any) -> None:
    """Assert that the scheduler built from what we write visits our rows."""
    scheduler = build(law.to_config(sampler), **settings)
    t, sigma = theirs(scheduler, sampler)
    steps = law.steps(NUM_STEPS, grid=grid(sampler), final=law.final(sampler))
    flow = isinstance(law, Flow)
    mine = steps.sigma[:-1] if flow else (steps.sigma / steps.alpha)[:-1]
    assert torch.allclose(mine, sigma, rtol=2e-4, atol=2e-6)
    told = law.network_time(steps.t[:-1])
    ramped = isinstance(law, NoiseSchedule) and law.ramp is not None
    cut = not scheduler.timesteps.is_floating_point() or (ramped and sampler.startswith("dpm2"))
    assert torch.allclose(told, t, rtol=1e-5, atol=1.001 if cut and (ramped or flow) else 0.1 if ramped else 1e-3)
    end = scheduler.sigmas[-1].double() if hasattr(scheduler, "sigmas") else None
    if end is not None:
        last = steps.sigma[-1] / steps.alpha[-1]
        assert float(end) == pytest.approx(float(last), rel=2e-4)


@pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning")
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("ramp", [None, "karras", "exponential", "beta"])
def test_discrete_schedules_equal_diffusers(spacing: Any, ramp: Any) -> None:
    if ramp == "beta":
        pytest.importorskip("scipy", reason="diffusers needs it for beta sigmas")
    schedule = NoiseSchedule(spacing=spacing, ramp=ramp)
    samplers = {"euler", "heun", "lms", "dpm2", "dpm2_ancestral", "dpmpp_2m", "dpmpp_3m_sde", "unipc"}
    if diffusers.utils.is_torchsde_available():
        samplers.add("dpmpp_sde")
    if ramp is None:
        samplers |= (WHOLE | {"euler_ancestral"}) - {"lcm"}
    for sampler in samplers:
        check(schedule, sampler)
        if sampler in ("euler", "dpmpp_2m"):
            check(replace(schedule, noisy_end=(sampler,)), sampler)
    check(replace(schedule, noisy_end=("deis",)), "deis")
    if spacing == "linspace":
        check(schedule, "dpmpp_2s")


def test_the_other_discrete_schedules_equal_diffusers() -> None:
    check(NoiseSchedule(ramp="log_snr"), "dpmpp_2m")
    check(NoiseSchedule(spacing="lcm"), "lcm")
    for kind in ("sigmoid", "sqrt", "quadratic"):
        end = 1e-4 if kind == "sqrt" else 0.02
        check(NoiseSchedule(kind, end / 200, end, spacing="trailing"), "euler")
        check(NoiseSchedule(kind, end / 200, end, spacing="trailing"), "ddpm")


@pytest.mark.parametrize("kind", ["sigmoid", "sqrt", "jsd"])
def test_betas_that_diffusers_has_no_name_for_are_written_out(kind: Any) -> None:
    schedule = NoiseSchedule(kind, 1e-4, 0.02, spacing="trailing", prediction="v")
    scheduler = build(schedule.to_config("ddpm"))
    alpha_bar = schedule.alpha(torch.arange(1000)).square()
    assert torch.allclose(alpha_bar, scheduler.alphas_cumprod.double(), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("law", [EDM(), EDM(sigma_max=60.0, rho=5.0), EDM(spacing="exponential")])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "dpmpp_3m_sde"])
def test_edm_equals_diffusers(law: Law, sampler: str) -> None:
    check(law, sampler)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("spacing", ["linspace", "karras", "exponential"])
@pytest.mark.parametrize("terminal", [None, 0.1])
def test_flow_match_equals_diffusers(shift: float, spacing: Any, terminal: float | None) -> None:
    law = Flow(shift=shift, spacing=spacing, terminal=terminal)
    check(law, "euler")
    if spacing == "linspace" and terminal is None:
        check(law, "heun")


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2s", "unipc"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_sigmas_of_solvers_equal_diffusers(sampler: str, shift: float) -> None:
    ends = (1.0, 0.001) if sampler == "unipc" else (0.999, 0.0)
    check(Flow(shift=shift, ends=ends), sampler)
    if sampler == "unipc":
        check(Flow(shift=shift, ends=ends, terminal=0.05), sampler)


@pytest.mark.parametrize("num_tokens", [256, 1024, 4096])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_resolution_shift_equals_diffusers(num_tokens: int, kind: Any) -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    shift = ResolutionShift(kind=kind)
    law = Flow(resolution=shift)
    assert shift.mu(num_tokens) == pytest.approx(calculate_shift(num_tokens))
    for sampler in ("euler", "unipc"):
        scheduler = build(law.to_config(sampler), mu=shift.mu(num_tokens))
        steps = law.at_resolution(num_tokens).steps(NUM_STEPS, grid=grid(sampler))
        assert torch.allclose(steps.sigma, scheduler.sigmas.double(), atol=2e-6)


def test_score_sdes_equal_diffusers() -> None:
    ve = VE(sigma_max=1348.0, told="sigma")
    scheduler = build(ve.to_config("predictor_corrector"))
    scheduler.set_sigmas(NUM_STEPS)
    steps = ve.steps(NUM_STEPS)
    assert torch.allclose(steps.sigma[:-1], scheduler.sigmas.double(), rtol=2e-4)  # their last time is 1e-5
    assert torch.allclose(steps.sigma[:-1], scheduler.discrete_sigmas.double().flip(0), rtol=1e-5)
    vp = ContinuousVP()
    from diffusers.schedulers.deprecated.scheduling_sde_vp import ScoreSdeVpScheduler

    config = vp.to_config("predictor_corrector")
    theirs_vp = ScoreSdeVpScheduler(**{key: value for key, value in config.items() if not key.startswith("_")})
    theirs_vp.set_timesteps(NUM_STEPS)
    assert torch.allclose(vp.steps(NUM_STEPS).t[:-1], theirs_vp.timesteps.double(), atol=1e-6)


@pytest.mark.parametrize("class_name", sorted(set(KEYS) - {"ScoreSdeVpScheduler"}))
def test_the_default_file_of_every_class_is_read(class_name: str) -> None:
    """What diffusers itself saves, every key of it; the law is that of the built scheduler, and its keys are real."""
    cls = getattr(diffusers, class_name)
    if class_name == "DPMSolverSDEScheduler" and not diffusers.utils.is_torchsde_available():
        pytest.skip("diffusers builds it only where torchsde is installed")
    file = json.loads(cls().to_json_string())
    assert set(KEYS[class_name]) <= set(file)
    assert {key: default for key, (_, default) in KEYS[class_name].items() if file[key] != default} == {}
    law = schedule_config.read(file)
    assert law.config == file
    name = schedule_config.sampler_name(file)
    assert name is not None or class_name == "PNDMScheduler"  # whose Runge-Kutta start no sampler here has
    if isinstance(law, NoiseSchedule):
        alpha_bar = law.alpha(torch.arange(law.num_train_timesteps)).square()
        assert torch.allclose(alpha_bar, cls().alphas_cumprod.double(), rtol=2e-4, atol=1e-9)


def test_a_published_flow_file_is_read() -> None:
    """The scheduler of FLUX.1-dev, and of Stable Diffusion 3."""
    flux = {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.30.0.dev0",
        "base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15,
        "num_train_timesteps": 1000, "shift": 3.0,
        "use_dynamic_shifting": True,
    }  # fmt: skip
    law = schedule_config.read(flux)
    assert isinstance(law, Flow)
    assert law.resolution == ResolutionShift()
    sd3 = {key: value for key, value in flux.items() if key not in ("use_dynamic_shifting", "base_shift", "max_shift")}
    law = schedule_config.read({**sd3, "_diffusers_version": "0.29.0.dev0"})
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(28)
    assert torch.allclose(law.steps(28).sigma, scheduler.sigmas.double(), atol=1e-6)
    assert math.isclose(float(law.network_time(law.steps(28).t)[0]), 1000)
