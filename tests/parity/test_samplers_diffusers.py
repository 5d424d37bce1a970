"""Schedules and samplers against diffusers' schedulers, in float32 as users run both.

Tolerance 2e-5 of the largest value: diffusers keeps float32 tables, the first x0 = (x - sigma eps) / alpha multiplies a
rounding of 6e-8 by 15, and 20 steps add up; measured against 0.42.1: 3e-6 at most.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import samplers, thresholding
from ldm_pipe.denoiser import Denoiser
from ldm_pipe.guidance.classifier_free import rescale_std
from ldm_pipe.noise import Noise
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import NoiseSchedule
from tests.samplers import stride

diffusers = pytest.importorskip("diffusers")

FIRST = ("ddpm", "ddim", "euler", "dpmpp_2m")
SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
NUM_STEPS = 20
TOLERANCE = 2e-5
SHAPE = (2, 4, 8, 8)


def net(x: Tensor, t: Tensor, **_: Any) -> Tensor:
    """Return a fixed nonlinear function of x and t that mixes channels and neighbours."""
    weight = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(5)) / 6
    mixed = torch.nn.functional.conv2d(x, weight, padding=1)
    return 0.5 * x + torch.tanh(mixed + torch.sin(t.float() / 150).reshape(-1, 1, 1, 1))


def start() -> Tensor:
    """Return the latents both sides start from."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def theirs(scheduler: Any, num_steps: int, **options: Any) -> Tensor:
    """Run a diffusers scheduler as its pipelines do."""
    scheduler.set_timesteps(num_steps)
    x = start() * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(net(scheduler.scale_model_input(x, t), t), t, x, **options).prev_sample
    return x


def ours(schedule: NoiseSchedule, sampler: str, num_steps: int, eta: float = 0.0, strided: bool = False) -> Tensor:
    """Run one of our samplers on its customary grid."""
    entry = samplers.get(sampler)
    steps = schedule.steps(num_steps, grid=entry.grid, final=schedule.final(sampler))
    steps = stride(steps, schedule) if strided else steps
    noise = Noise.from_generator(torch.Generator().manual_seed(3))
    return entry(Denoiser(net, schedule), start() * steps.init_scale, steps, eta=eta, noise=noise)


def scheduler_of(config: dict[str, Any]) -> Any:
    """Build the diffusers scheduler of a config; a key it does not take is an error."""
    keys = {key: value for key, value in config.items() if not key.startswith("_")}
    return getattr(diffusers, config["_class_name"])(**keys)


def difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference relative to the largest value."""
    assert a.isfinite().all()
    assert b.isfinite().all()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1))


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_alpha_bar_equals_diffusers(beta_schedule: Any, zero_snr: bool) -> None:
    schedule = NoiseSchedule(beta_schedule=beta_schedule, prediction="v", zero_terminal_snr=zero_snr)
    alpha_bar = schedule.alpha(torch.arange(1000)).square()
    reference = scheduler_of(schedule.to_config("ddim")).alphas_cumprod.double()
    # their float32 product of 1000 factors; relative, because the noisy end is tiny
    assert torch.allclose(alpha_bar, reference, rtol=2e-4, atol=1e-9)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", FIRST)
def test_sampler_equals_diffusers(sampler: str, prediction: Any, spacing: Any) -> None:
    schedule = NoiseSchedule(prediction=prediction, spacing=spacing)
    scheduler = scheduler_of(schedule.to_config(sampler))
    stochastic = {"generator": torch.Generator().manual_seed(3)} if sampler == "ddpm" else {}
    # linspace: DDIMScheduler steps to other times than it evaluates next
    mine = ours(schedule, sampler, NUM_STEPS, strided=sampler == "ddim")
    assert difference(mine, theirs(scheduler, NUM_STEPS, **stochastic)) < TOLERANCE


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_ddim_needs_no_stride_where_the_steps_divide_the_levels(prediction: Any, spacing: Any) -> None:
    schedule = NoiseSchedule(prediction=prediction, spacing=spacing)
    assert difference(ours(schedule, "ddim", 20), theirs(scheduler_of(schedule.to_config("ddim")), 20)) < TOLERANCE


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [2, 7, 30, 333])
def test_times_equal_diffusers_at_odd_numbers_of_steps(num_steps: int, spacing: Any) -> None:
    schedule = NoiseSchedule(spacing=spacing)
    for sampler in FIRST:
        scheduler = scheduler_of(schedule.to_config(sampler))
        scheduler.set_timesteps(num_steps)
        mine = schedule.steps(num_steps, grid=samplers.get(sampler).grid).t[:-1]
        assert torch.allclose(mine.float(), scheduler.timesteps.float(), atol=1e-4), sampler  # Euler's are float32


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_ddim_eta_equals_diffusers(eta: float, spacing: Any) -> None:
    schedule = NoiseSchedule(spacing=spacing)
    scheduler = scheduler_of(schedule.to_config("ddim"))
    reference = theirs(scheduler, NUM_STEPS, eta=eta, generator=torch.Generator().manual_seed(3))
    assert difference(ours(schedule, "ddim", NUM_STEPS, eta=eta, strided=True), reference) < TOLERANCE


@pytest.mark.parametrize("num_steps", [9, 20])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])
def test_end_at_the_first_level_equals_diffusers(sampler: str, num_steps: int) -> None:
    """Stable Diffusion 1 folders say set_alpha_to_one=false: the noise of t = 0 stays in."""
    schedule = NoiseSchedule(noisy_end=(sampler,))
    config = schedule.to_config(sampler)
    assert config.get("set_alpha_to_one") is False or config.get("final_sigmas_type") == "sigma_min"
    assert difference(ours(schedule, sampler, num_steps), theirs(scheduler_of(config), num_steps)) < TOLERANCE
    clean = schedule.steps(num_steps, grid=samplers.get(sampler).grid)
    assert (clean.alpha[-1], clean.sigma[-1]) == (1, 0)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_zero_terminal_snr_equals_diffusers(sampler: str) -> None:
    schedule = NoiseSchedule(prediction="v", spacing="trailing", zero_terminal_snr=True)
    stochastic = {"generator": torch.Generator().manual_seed(3)} if sampler == "ddpm" else {}
    reference = theirs(scheduler_of(schedule.to_config(sampler)), NUM_STEPS, **stochastic)
    assert difference(ours(schedule, sampler, NUM_STEPS), reference) < TOLERANCE


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_zero_terminal_snr_is_near_diffusers_approximation(sampler: str) -> None:
    """These two schedulers of diffusers put alpha_bar = 2^-24 for 0, which we do not: equal to about sqrt(2^-24)."""
    schedule = NoiseSchedule(prediction="v", spacing="trailing", zero_terminal_snr=True)
    reference = theirs(scheduler_of(schedule.to_config(sampler)), NUM_STEPS)
    assert difference(ours(schedule, sampler, NUM_STEPS), reference) < 3e-3


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m"])
@pytest.mark.parametrize("cap", [1.0, 1.5])
def test_dynamic_thresholding_equals_diffusers(sampler: str, cap: float) -> None:
    schedule = NoiseSchedule()
    config = schedule.to_config(sampler, thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=cap)
    generator = {"generator": torch.Generator().manual_seed(3)} if sampler == "ddpm" else {}
    reference = theirs(scheduler_of(config), NUM_STEPS, **generator)
    entry = samplers.get(sampler)
    with pytest.warns(UserWarning, match="no effect") if cap == 1 else contextlib.nullcontext():
        denoise = thresholding.from_config(Denoiser(net, schedule), config)
    noise = Noise.from_generator(torch.Generator().manual_seed(3))
    mine = entry(denoise, start(), schedule.steps(NUM_STEPS, grid=entry.grid), noise=noise)
    assert difference(mine, reference) < TOLERANCE


def test_rescale_equals_diffusers() -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    generator = torch.Generator().manual_seed(1)
    out, text = torch.randn(SHAPE, generator=generator) * 3, torch.randn(SHAPE, generator=generator)
    mine = rescale_std(out, text, 0.7)
    assert difference(mine, rescale_noise_cfg(out, text, 0.7)) < 1e-6


def test_one_generator_draws_what_diffusers_draws() -> None:
    from diffusers.utils.torch_utils import randn_tensor

    one = torch.Generator().manual_seed(8)
    assert torch.equal(
        Noise.from_generator(one)(SHAPE), randn_tensor(SHAPE, generator=torch.Generator().manual_seed(8))
    )
    several = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    assert torch.equal(Noise([4, 5])(SHAPE), randn_tensor(SHAPE, generator=several))


CLASSES = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("sampler", FIRST)
def test_scheduler_config_round_trip(sampler: str, beta_schedule: str, spacing: str) -> None:
    """Diffusers' own file -> our schedule -> diffusers: the same maths, and every key we write comes back unchanged."""
    cls = getattr(diffusers, CLASSES[sampler])
    clip = {"clip_sample": False} if sampler in ("ddim", "ddpm") else {}
    original = cls(
        beta_schedule=beta_schedule, timestep_spacing=spacing, steps_offset=1, prediction_type="v_prediction", **clip
    )
    file = json.loads(original.to_json_string())
    schedule = NoiseSchedule.from_config(file)
    assert schedule.config == file
    written = schedule.to_config(sampler)
    assert {key: value for key, value in written.items() if file[key] != value} == {}
    assert NoiseSchedule.from_config(written) == schedule
    assert torch.equal(scheduler_of(written).alphas_cumprod, original.alphas_cumprod)


@pytest.mark.parametrize("sampler", FIRST)
def test_every_key_of_a_scheduler_file_is_needed_or_harmless(sampler: str) -> None:
    """Drop each key in turn: refused, or the same times, levels and result as with it."""
    clip = {"clip_sample": False} if sampler in ("ddim", "ddpm") else {}
    changed = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    original = getattr(diffusers, CLASSES[sampler])(**changed, timestep_spacing="trailing", **clip)
    if "rescale_betas_zero_snr" in original.config:
        flags = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
        original = getattr(diffusers, CLASSES[sampler])(**changed, **flags, **clip)
    file = json.loads(original.to_json_string())
    whole = NoiseSchedule.from_config(file)
    refused = []
    for key in file:
        partial = {k: v for k, v in file.items() if k != key}
        try:
            harmless = NoiseSchedule.from_config(partial) == whole
        except LdmPipeError:
            with pytest.raises(LdmPipeError, match=key):
                NoiseSchedule.from_config(partial)
            refused.append(key)
        else:
            assert harmless, key
    needed = {
        "beta_start",
        "beta_end",
        "beta_schedule",
        "prediction_type",
        "timestep_spacing",
        "rescale_betas_zero_snr",
    }
    assert needed <= set(refused)


def test_stable_diffusion_pipeline_does_not_rewrite_what_we_write() -> None:
    """diffusers' SD pipeline turns steps_offset 0 into 1 and clip_sample on into off: we write 1 and off, or refuse."""
    for sampler in FIRST:
        for spacing in SPACINGS:
            for offset in (0, 1):
                schedule = NoiseSchedule(spacing=spacing, steps_offset=offset)
                if spacing == "leading" and offset == 0:
                    with pytest.raises(LdmPipeError, match="rewrites"):
                        schedule.to_config(sampler)
                    continue
                config = schedule.to_config(sampler)
                before = scheduler_of(config)
                pipe = diffusers.StableDiffusionPipeline(
                    None, None, None, None, before, None, None, requires_safety_checker=False
                )
                for key, value in config.items():
                    if not key.startswith("_"):
                        assert pipe.scheduler.config[key] == value, key


def test_old_files_without_the_newer_keys_are_read() -> None:
    """The file of Stable Diffusion 1.5 is older than prediction_type and timestep_spacing."""
    file = {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.6.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    }
    schedule = NoiseSchedule.from_config(file)
    assert (schedule.prediction, schedule.spacing, schedule.steps_offset) == ("eps", "leading", 1)
    scheduler = diffusers.DDIMScheduler.from_config(diffusers.PNDMScheduler.from_config(file).config)
    assert difference(ours(schedule, "ddim", NUM_STEPS), theirs(scheduler, NUM_STEPS)) < TOLERANCE
