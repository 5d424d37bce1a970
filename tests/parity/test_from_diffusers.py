"""Scheduler objects of diffusers as samplers: the same result as in diffusers' own loop, with our borders.

Tolerance 2e-5 of the largest value, as in test_samplers_diffusers.py: the output is turned into x0 and back.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe.denoiser import Denoised, Denoiser
from ldm_pipe.noise import Noise
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.samplers.from_diffusers import SchedulerSampler, sampler_of
from ldm_pipe.schedule import NoiseSchedule, Steps
from ldm_pipe.schedule.laws import EDM, Flow
from tests.parity.test_samplers_diffusers import TOLERANCE, difference, net, start

diffusers = pytest.importorskip("diffusers")

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPPING = {**BETAS, "steps_offset": 1, "timestep_spacing": "leading"}
CLASSES: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {**STEPPING, "clip_sample": False},
    "DDIMParallelScheduler": {**STEPPING, "clip_sample": False},
    "DDPMScheduler": {**STEPPING, "clip_sample": False},
    "PNDMScheduler": {**STEPPING, "skip_prk_steps": True},
    "LMSDiscreteScheduler": STEPPING,
    "EulerDiscreteScheduler": {**STEPPING, "timestep_spacing": "linspace"},
    "EulerAncestralDiscreteScheduler": STEPPING,
    "HeunDiscreteScheduler": {**STEPPING, "timestep_spacing": "trailing"},
    "KDPM2DiscreteScheduler": STEPPING,
    "KDPM2AncestralDiscreteScheduler": STEPPING,
    "DPMSolverMultistepScheduler": {**STEPPING, "algorithm_type": "sde-dpmsolver++"},
    "DPMSolverSinglestepScheduler": BETAS,
    "UniPCMultistepScheduler": STEPPING,
    "DEISMultistepScheduler": STEPPING,
    "SASolverScheduler": STEPPING,
    "LCMScheduler": BETAS,
    "TCDScheduler": BETAS,
}
LAW = NoiseSchedule()


def loop(scheduler: Any, raw: Callable[[Tensor, Tensor], Tensor], num_steps: int, **options: Any) -> Tensor:
    """Run a scheduler as the pipelines of diffusers do."""
    scheduler.set_timesteps(num_steps)
    x = start() * getattr(scheduler, "init_noise_sigma", 1.0)
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    for t in scheduler.timesteps:
        x = scheduler.step(raw(scale(x, t), t), t, x, **options).prev_sample
    return x


def draw(sampler: SchedulerSampler, denoise: Any, seeds: list[int] | None = None, **options: Any) -> Tensor:
    """Run the adapter from the same start; without seeds one generator is shared, as diffusers has it."""
    noise = Noise.from_generator(torch.Generator().manual_seed(3)) if seeds is None else Noise(seeds)
    return sampler(denoise, start() * sampler.steps.init_scale, sampler.steps, noise=noise, **options)


def seeded(scheduler: Any) -> dict[str, Any]:
    """Return what the pipelines of diffusers tell a scheduler's step."""
    told = {"generator": torch.Generator().manual_seed(3), "eta": 0.0}
    taken = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in told.items() if name in taken}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_scheduler_object_draws_what_diffusers_draws(name: str, prediction: str) -> None:
    scheduler = getattr(diffusers, name)(**CLASSES[name], prediction_type=prediction)
    law = NoiseSchedule(prediction="eps" if prediction == "epsilon" else "v")
    sampler = sampler_of(scheduler, law, 10)
    seen: list[int] = []
    mine = draw(sampler, Denoiser(net, law), callback=lambda i, t, x, x0: seen.append(i))
    assert difference(mine, loop(scheduler, net, 10, **seeded(scheduler))) < TOLERANCE
    assert seen == list(range(10))
    assert sampler.steps.num_steps == 10


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DPMSolverMultistepScheduler", {**STEPPING, "use_karras_sigmas": True}),  # diffusers rounds its times
        ("EulerDiscreteScheduler", {**STEPPING, "use_karras_sigmas": True}),
        ("HeunDiscreteScheduler", {**STEPPING, "use_exponential_sigmas": True}),
        ("PNDMScheduler", {**STEPPING, "skip_prk_steps": False}),
        ("DDIMScheduler", {**STEPPING, "clip_sample": True}),
        ("DPMSolverMultistepScheduler", {**STEPPING, "thresholding": True}),
        ("UniPCMultistepScheduler", {**STEPPING, "solver_order": 3, "final_sigmas_type": "sigma_min"}),
    ],
)
@pytest.mark.parametrize("num_steps", [12, 60])
def test_settings_of_a_scheduler_are_kept(name: str, options: dict[str, Any], num_steps: int) -> None:
    scheduler = getattr(diffusers, name)(**options)
    mine = draw(sampler_of(scheduler, LAW, num_steps), Denoiser(net, LAW))
    # 60 steps of Karras spacing end in very small ones; float32 tables of sigma
    assert difference(mine, loop(scheduler, net, num_steps, **seeded(scheduler))) < 5 * TOLERANCE


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_flow_schedulers(name: str) -> None:
    scheduler = getattr(diffusers, name)(shift=3.0)
    law = Flow()
    mine = draw(sampler_of(scheduler, law, 10), Denoiser(net, law))
    assert difference(mine, loop(scheduler, lambda x, t: net(x, t), 10)) < TOLERANCE


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_edm_schedulers(name: str, prediction: str) -> None:
    """Of v_prediction diffusers means -F; the denoiser scales the input, so that the scheduler must not."""
    scheduler = getattr(diffusers, name)(prediction_type=prediction)
    law = EDM()
    sign = 1 if prediction == "epsilon" else -1
    mine = draw(sampler_of(scheduler, law, 10), Denoiser(lambda x, t: net(x, 1000 * t), law))
    reference = loop(scheduler, lambda x, t: sign * net(x, 1000 * t), 10)
    assert difference(mine, reference) < 5 * TOLERANCE  # sigma reaches 80


def test_a_scheduler_of_another_prediction_is_fed_what_it_takes() -> None:
    law = NoiseSchedule(prediction="v", spacing="leading")
    results = [
        draw(
            sampler_of(diffusers.DDIMScheduler(**CLASSES["DDIMScheduler"], prediction_type=p), law, 10),
            Denoiser(net, law),
        )
        for p in ("v_prediction", "epsilon", "sample")
    ]
    for other in results[1:]:
        assert difference(other, results[0]) < 5 * TOLERANCE  # eps and back at alpha = 0.07


@pytest.mark.parametrize("name", CLASSES)
def test_a_batch_is_its_samples_one_by_one(name: str) -> None:
    """The picture depends on the batch size (diffusers#3158): one generator per sample."""
    scheduler = getattr(diffusers, name)(**CLASSES[name])
    sampler = sampler_of(scheduler, LAW, 6)
    together = draw(sampler, Denoiser(net, LAW), seeds=[7, 8])
    for i, seed in enumerate((7, 8)):
        x = start()[i : i + 1] * sampler.steps.init_scale
        alone = sampler(Denoiser(net, LAW), x, sampler.steps, noise=Noise([seed]))
        assert difference(alone[0], together[i]) < TOLERANCE


@pytest.mark.parametrize("seeds", [[7, 8], [8, 7]])
def test_a_source_that_is_no_noise_object_seeds_a_generator_per_sample(seeds: list[int]) -> None:
    scheduler = diffusers.DDPMScheduler(**CLASSES["DDPMScheduler"])
    sampler = sampler_of(scheduler, LAW, 4)

    def run(chosen: list[int], rows: slice) -> Tensor:
        noise = Noise(chosen)
        x = torch.zeros_like(start())[rows]
        return sampler(Denoiser(net, LAW), x, sampler.steps, noise=lambda shape: noise(shape))

    together = run(seeds, slice(None))
    assert difference(run(seeds[:1], slice(1))[0], together[0]) < TOLERANCE
    assert difference(run(seeds[1:], slice(1))[0], together[1]) < TOLERANCE
    assert not torch.allclose(together[0], together[1], atol=0.1)


@pytest.mark.parametrize("name", CLASSES)
def test_the_object_is_left_alone_and_a_second_call_is_the_same(name: str) -> None:
    scheduler = getattr(diffusers, name)(**CLASSES[name])
    scheduler.set_timesteps(7)
    before = scheduler.timesteps.clone()
    sampler = sampler_of(scheduler, LAW, 5)
    assert torch.equal(draw(sampler, Denoiser(net, LAW), [1, 2]), draw(sampler, Denoiser(net, LAW), [1, 2]))
    assert torch.equal(scheduler.timesteps, before)
    assert scheduler.num_inference_steps == 7


@pytest.mark.parametrize("name", CLASSES)
def test_rows_fall_and_a_constant_x0_is_reached_from_any_of_them(name: str) -> None:
    """The start of an image-to-image run: the last rows of the steps, in the law's frame.

    Without noise at the end the constant is exact; diffusers' SD defaults leave the noise of t = 0, 3 %. In its own
    image-to-image LMS leaves all of it (diffusers#5630).
    """
    scheduler = getattr(diffusers, name)(**CLASSES[name])
    sampler = sampler_of(scheduler, LAW, 10)
    x0 = start() / 3
    for strength in (1.0, 0.5, 0.1):
        steps = sampler.steps.from_strength(strength)
        x = float(steps.alpha[0]) * x0 + float(steps.sigma[0]) * torch.randn(
            x0.shape, generator=torch.Generator().manual_seed(1)
        )
        assert steps.num_steps == round(10 * strength)
        out = sampler(lambda x, t: Denoised(x0), x, steps, noise=Noise([1, 2]))
        assert (out - x0).abs().max() < 0.15


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "DDIMScheduler", "PNDMScheduler"])
def test_the_callback_sees_states_of_the_laws_frame_and_may_change_them(name: str) -> None:
    scheduler = getattr(diffusers, name)(**CLASSES[name])
    sampler = sampler_of(scheduler, LAW, 8)
    other = start().flip(0)
    scales: list[float] = []

    def callback(i: int, t: Tensor, x: Tensor, x0: Tensor) -> Tensor | None:
        scales.append(float(x.std()))
        return other if i == 7 else x.clone()

    out = draw(sampler, lambda x, t: Denoised(torch.zeros_like(x)), callback=callback)
    assert torch.equal(out, other)
    # x_t of x0 = 0 is sigma eps: in EDM's frame it would reach 14
    expected = [*sampler.steps.sigma[1:-1].tolist()]
    assert scales[:-1] == pytest.approx(expected, rel=0.1)
    unchanged = draw(sampler, Denoiser(net, LAW))
    copied = draw(sampler, Denoiser(net, LAW), callback=lambda i, t, x, x0: x.clone())
    assert difference(copied, unchanged) < TOLERANCE


def test_eta_is_passed_on_or_refused() -> None:
    ddim = sampler_of(diffusers.DDIMScheduler(**CLASSES["DDIMScheduler"]), LAW, 6)
    assert ddim.has_eta
    reference = loop(ddim.scheduler, net, 6, eta=0.7, generator=torch.Generator().manual_seed(3))
    assert difference(draw(ddim, Denoiser(net, LAW), eta=0.7), reference) < TOLERANCE
    euler = sampler_of(diffusers.EulerDiscreteScheduler(**STEPPING), LAW, 6)
    with pytest.raises(LdmPipeError, match="eta"):
        draw(euler, Denoiser(net, LAW), eta=0.7)


def test_a_learned_variance_reaches_the_scheduler() -> None:
    scheduler = diffusers.DDPMScheduler(**CLASSES["DDPMScheduler"], variance_type="learned_range")

    def raw(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([net(x, t), torch.tanh(x)], dim=1)

    def denoise(x: Tensor, t: Tensor) -> Denoised:
        return Denoised(Denoiser(net, LAW)(x, t).x0, (torch.tanh(x) + 1) / 2)

    mine = draw(sampler_of(scheduler, LAW, 6), denoise)
    assert difference(mine, loop(scheduler, raw, 6, generator=torch.Generator().manual_seed(3))) < TOLERANCE


def test_a_scheduler_that_draws_from_brownian_trees_is_seeded_by_sample() -> None:
    """Without noise_sampler_seed it would take the global random state."""
    pytest.importorskip("torchsde", reason="DPMSolverSDEScheduler needs it")
    sampler = sampler_of(diffusers.DPMSolverSDEScheduler(**STEPPING), LAW, 6)
    assert sampler.needs_noise(0.0)
    together = draw(sampler, Denoiser(net, LAW), [7, 8])
    assert torch.equal(draw(sampler, Denoiser(net, LAW), [7, 8]), together)
    x = start()[1:] * sampler.steps.init_scale
    alone = sampler(Denoiser(net, LAW), x, sampler.steps, noise=Noise([8]))
    assert difference(alone[0], together[1]) < TOLERANCE
    assert difference(draw(sampler, Denoiser(net, LAW), [7, 9])[1], together[1]) > 0.01
    reference = diffusers.DPMSolverSDEScheduler(**STEPPING, noise_sampler_seed=[7, 8])
    assert difference(loop(reference, net, 6), together) < 5 * TOLERANCE


def test_what_is_no_scheduler_is_refused() -> None:
    for wrong in (diffusers.DDIMScheduler, "ddim", object()):
        with pytest.raises(LdmPipeError, match="no scheduler object"):
            sampler_of(wrong, LAW, 5)
    with pytest.raises(LdmPipeError, match="prediction_type"):
        sampler_of(diffusers.IPNDMScheduler(), LAW, 5)
    sampler = sampler_of(diffusers.DDPMScheduler(**CLASSES["DDPMScheduler"]), LAW, 5)
    with pytest.raises(LdmPipeError, match="noise"):
        sampler(Denoiser(net, LAW), start(), sampler.steps)


def test_pndm_with_runge_kutta_does_not_start_in_the_middle() -> None:
    sampler = sampler_of(diffusers.PNDMScheduler(**STEPPING, skip_prk_steps=False), LAW, 10)
    with pytest.raises(LdmPipeError, match="skip_prk_steps"):
        sampler(Denoiser(net, LAW), start(), sampler.steps.from_strength(0.5))


def test_it_equals_our_own_samplers_on_their_rows() -> None:
    from ldm_pipe import samplers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = sampler_of(diffusers.EulerDiscreteScheduler(**{**STEPPING, "timestep_spacing": "trailing"}), LAW, 8)
    steps: Steps = LAW.steps(8, spacing="trailing", grid="fractional")
    assert torch.allclose(theirs.steps.t[:-1], steps.t[:-1])
    assert torch.allclose(theirs.steps.alpha, steps.alpha)
    assert theirs.steps.init_scale == pytest.approx(steps.init_scale, rel=1e-6)
    mine = samplers.euler(Denoiser(net, LAW), start() * steps.init_scale, steps)
    assert difference(draw(theirs, Denoiser(net, LAW)), mine) < TOLERANCE
