"""How a call samples: every sampler and spacing, times one by one, any noise law, what the scheduler file asks for."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from ldm_pipe import LatentDiffusionPipeline, NoiseSchedule, UNet, samplers
from ldm_pipe.drawing.output import Defaults, Thresholding
from ldm_pipe.drawing.request.request import check_request
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import Law
from ldm_pipe.schedule.laws import EDM, VE, ContinuousVP, Flow
from ldm_pipe.schedule.spacing import Spacing
from tests.pipelines import TINY, tiny

CONFIG = json.loads((TINY / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
LATENT: dict[str, Any] = {"prompt": "red apple", "seed": 3, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe() -> LatentDiffusionPipeline:
    return tiny()


def with_law(pipe: LatentDiffusionPipeline, law: Law, unet: UNet | None = None) -> LatentDiffusionPipeline:
    """Return a pipeline of the same networks with another law, and no defaults of its own."""
    other = LatentDiffusionPipeline(unet or pipe.unet, pipe.autoencoder, pipe.text_encoders, law)
    other.set_progress_bar_config(disable=True)
    return other


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max())


class Bar:
    """A progress bar that keeps what it is told."""

    def __init__(self, total: int) -> None:
        self.n, self.total = 0, total

    def update(self, number: int = 1) -> None:
        self.n += number

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        return


# Samplers


@pytest.mark.parametrize("sampler", samplers.NAMES)
def test_progress_counts_steps_whatever_a_step_costs(
    pipe: LatentDiffusionPipeline, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[Bar] = []

    def progress_bar(total: int) -> Bar:
        bars.append(Bar(total))
        return bars[-1]

    monkeypatch.setattr(pipe, "progress_bar", progress_bar)
    drawn = pipe(**LATENT, sampler=sampler, num_inference_steps=5).images
    assert (bars[0].n, bars[0].total) == (5, 5)
    assert bool(torch.isfinite(drawn).all())


def test_options_reach_the_sampler(pipe: LatentDiffusionPipeline) -> None:
    """EDM without churn is Heun (arXiv:2206.00364, algorithms 1 and 2)."""
    call = {**LATENT, "num_inference_steps": 4}
    churned = pipe(**call, sampler="edm", sampler_options={"s_churn": 0.0})
    assert difference(churned.images, pipe(**call, sampler="heun").images) < 1e-4
    assert churned.infos[0].settings["Sampler options"] == "s_churn=0.0"


def test_an_unknown_sampler_is_told_the_nearest(pipe: LatentDiffusionPipeline) -> None:
    with pytest.raises(LdmPipeError, match=r"did you mean 'dpmpp_2m'.*known: ddpm"):
        pipe("x", sampler="DPM++ 2M Karras")


# Times


@pytest.mark.parametrize("spacing", get_args(Spacing))
def test_every_spacing_draws(pipe: LatentDiffusionPipeline, spacing: str) -> None:
    drawn = pipe(**LATENT, spacing=spacing, num_inference_steps=4)
    assert bool(torch.isfinite(drawn.images).all())
    assert drawn.infos[0].settings["Spacing"] == spacing
    assert drawn.infos[0].settings["Steps"] == "4"


@pytest.mark.parametrize(("sections", "count"), [("ddim5", 5), ("1,2,3", 6)])
def test_sections_count_the_steps_themselves(pipe: LatentDiffusionPipeline, sections: str, count: int) -> None:
    drawn = pipe(**LATENT, spacing=sections)
    assert drawn.infos[0].settings["Steps"] == str(count)
    times = pipe.schedule.steps(spacing=sections).t[:-1].tolist()
    assert torch.equal(drawn.images, pipe(**LATENT, timesteps=times).images)


def test_sigmas_are_the_levels_of_their_times(pipe: LatentDiffusionPipeline) -> None:
    times = [900.0, 500.0, 100.0]
    sigmas = [float(sigma / alpha) for alpha, sigma in map(pipe.schedule.alpha_sigma, times)]
    by_level = pipe(**LATENT, sigmas=sigmas).images
    assert difference(by_level, pipe(**LATENT, timesteps=times).images) < 1e-4


def test_strength_keeps_the_last_steps_of_any_spacing(pipe: LatentDiffusionPipeline) -> None:
    call = {"image": torch.zeros(3, 32, 32), "strength": 0.5, "spacing": "karras", "num_inference_steps": 6}
    seen: list[int] = []
    pipe("x", seed=0, callback_on_step_end=lambda _, i, t, tensors: seen.append(i) or tensors, **call)
    assert seen == [0, 1, 2]


# Laws


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m", "heun", "ddpm"])
@pytest.mark.parametrize(
    "law",
    [
        Flow(shift=3.0),
        VE(),
        EDM(),
        ContinuousVP(prediction="v"),
        NoiseSchedule(prediction="v", zero_terminal_snr=True),
    ],
    ids=lambda law: type(law).__name__,
)
def test_any_law_draws_and_starts_from_pictures(pipe: LatentDiffusionPipeline, law: Law, sampler: str) -> None:
    other = with_law(pipe, law)
    call = {**LATENT, "sampler": sampler, "num_inference_steps": 3, "spacing": "trailing"}
    drawn = other(**call).images
    assert bool(torch.isfinite(drawn).all())
    assert torch.equal(drawn, other(**call).images)
    assert bool(torch.isfinite(other(**call, image=torch.zeros(3, 32, 32), strength=0.7).images).all())


def test_times_are_those_the_network_is_told(pipe: LatentDiffusionPipeline) -> None:
    flow = with_law(pipe, Flow())
    by_time = flow(**LATENT, timesteps=[1000, 600, 200]).images
    assert difference(by_time, flow(**LATENT, sigmas=[1.0, 0.6, 0.2]).images) < 1e-4
    with pytest.raises(LdmPipeError, match="from 0 to 1000"):
        flow("x", timesteps=[1001, 5])


def test_a_network_that_learnt_the_variance_draws(pipe: LatentDiffusionPipeline) -> None:
    torch.manual_seed(0)
    unet = UNet.from_config({**pipe.unet.config, "out_channels": 8}).eval()
    other = with_law(pipe, pipe.schedule, unet)
    call = {**LATENT, "num_inference_steps": 3}
    for sampler in ("ddim", "ddpm"):
        assert bool(torch.isfinite(other(**call, sampler=sampler).images).all())
    learned = other(**call, sampler="ddpm", sampler_options={"variance": "learned"}).images
    small = other(**call, sampler="ddpm", sampler_options={"variance": "fixed_small"}).images
    assert difference(learned, small) > 1e-4


# What the scheduler file says


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        ({"sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}, Thresholding("dynamic", 0.9, cap=1.5)),
        ({"sample_max_value": 1.0}, Thresholding("static")),
    ],
)
@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_thresholding_of_the_scheduler_file_is_applied(
    pipe: LatentDiffusionPipeline, keys: dict[str, float], rule: Thresholding, sampler: str
) -> None:
    """diffusers: a setting that Euler ignores in silence."""
    other = with_law(pipe, NoiseSchedule.from_config({**CONFIG, "thresholding": True, **keys}))
    call = {**LATENT, "sampler": sampler, "num_inference_steps": 3}
    by_file = other(**call).images
    assert torch.equal(by_file, other(**call, thresholding=rule).images)
    assert difference(by_file, other(**call, thresholding="none").images) > 1e-3
    assert other(**call).infos[0].settings["Thresholding"].startswith(rule.kind)


def test_thresholding_of_the_scheduler_file_must_make_sense(pipe: LatentDiffusionPipeline) -> None:
    other = with_law(pipe, NoiseSchedule.from_config({**CONFIG, "thresholding": True, "sample_max_value": "much"}))
    with pytest.raises(LdmPipeError, match="sample_max_value"):
        other("x")


def test_defaults_with_a_cap_are_written_and_read() -> None:
    for rule in (Thresholding("dynamic", cap=2.0), Thresholding("dynamic")):
        defaults = Defaults(thresholding=rule)
        assert Defaults.read(json.loads(json.dumps(defaults.to_json(), allow_nan=False))) == defaults


# A scheduler object in the words of diffusers (its own classes: tests/parity/test_pipeline_schedulers.py)


def test_scheduler_shows_the_config_of_the_folder(pipe: LatentDiffusionPipeline) -> None:
    assert dict(pipe.scheduler.config) == CONFIG
    built = with_law(pipe, replace(pipe.schedule, config={}))
    assert built.scheduler.config.beta_end == CONFIG["beta_end"]
    assert NoiseSchedule.from_config(built.scheduler.config) == pipe.schedule


@pytest.mark.parametrize("wrong", [3, "ddim", NoiseSchedule, object()])
def test_what_is_no_scheduler_is_refused(pipe: LatentDiffusionPipeline, wrong: Any) -> None:
    with pytest.raises(LdmPipeError, match="no scheduler object"):
        pipe.scheduler = wrong
    assert pipe.given_scheduler is None


def test_a_request_holds_rows_that_are_ready_to_walk(pipe: LatentDiffusionPipeline) -> None:
    import inspect

    known = inspect.signature(pipe.__call__).parameters
    given = {name: parameter.default for name, parameter in known.items()}
    request = check_request(pipe, {**given, "prompt": "x", "sampler": "heun", "num_inference_steps": 7})
    assert (request.sampling.name, request.sampling.steps.num_steps) == ("heun", 7)
