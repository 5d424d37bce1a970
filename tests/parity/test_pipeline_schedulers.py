"""A scheduler object of diffusers in our pipeline draws what it draws in diffusers' pipeline.

fp32, the same operators in another order: 1e-4 of [0, 1], as in test_pipeline_diffusers.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldm_pipe import LatentDiffusionPipeline
from ldm_pipe.pretrained import LdmPipeError
from tests.pipelines import TINY, tiny

diffusers = pytest.importorskip("diffusers", reason="the reference")

CALL: dict[str, Any] = {
    "prompt": ["red apple", "a worm"],
    "num_inference_steps": 6,
    "guidance_scale": 3.0,
    "output_type": "pt",
}


@pytest.fixture(scope="module")
def theirs() -> Any:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(TINY, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def ours() -> LatentDiffusionPipeline:
    return tiny()


def latents() -> torch.Tensor:
    return torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("UniPCMultistepScheduler", {}),
        ("HeunDiscreteScheduler", {}),
        ("PNDMScheduler", {"skip_prk_steps": True}),
        ("DPMSolverMultistepScheduler", {"thresholding": True, "sample_max_value": 2.0}),
    ],
)
def test_any_scheduler_drops_in(ours: LatentDiffusionPipeline, theirs: Any, kind: str, changes: dict[str, Any]) -> None:
    """HABITS: pipe.scheduler = X.from_config(pipe.scheduler.config)."""
    ours.scheduler = getattr(diffusers, kind).from_config(ours.scheduler.config, **changes)
    theirs.scheduler = ours.scheduler
    mine = ours(**CALL, latents=latents()).images
    assert float((mine - theirs(**CALL, latents=latents()).images).abs().max()) <= 1e-4


def test_a_stochastic_scheduler_draws_from_the_seeds(ours: LatentDiffusionPipeline, theirs: Any) -> None:
    kind = diffusers.EulerAncestralDiscreteScheduler
    theirs.scheduler = kind.from_config(ours.scheduler.config)
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    wanted = theirs(**CALL, generator=generators).images
    mine = ours(**CALL, seed=4, sampler=kind.from_config(ours.scheduler.config)).images
    assert float((mine - wanted).abs().max()) <= 1e-4
    assert ours.given_scheduler is None


def test_the_law_of_the_scheduler_is_taken_over(ours: LatentDiffusionPipeline) -> None:
    before = ours.scheduler
    kind = diffusers.DDIMScheduler
    ours.scheduler = kind.from_config(before.config, prediction_type="v_prediction", timestep_spacing="trailing")
    assert (ours.schedule.prediction, ours.schedule.spacing) == ("v", "trailing")
    assert (ours.defaults.sampler, ours.defaults.spacing) == ("ddim", None)
    ours.scheduler = before
    assert ours.schedule.prediction == "eps"
    assert ours.given_scheduler is None


@pytest.mark.parametrize("extra", [{"spacing": "trailing"}, {"timesteps": [5]}, {"eta": 0.5}, {"sampler_options": {}}])
def test_what_belongs_to_the_scheduler_is_refused_beside_it(
    ours: LatentDiffusionPipeline, extra: dict[str, Any]
) -> None:
    scheduler = diffusers.EulerDiscreteScheduler.from_config(ours.scheduler.config)
    with pytest.raises(LdmPipeError, match=next(iter(extra))):
        ours("x", sampler=scheduler, **extra)
