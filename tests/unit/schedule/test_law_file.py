"""Noise laws that diffusers has no scheduler for survive saving."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_pipe import LatentDiffusionPipeline
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import Law, NoiseSchedule, own_file
from ldm_pipe.schedule import read as schedule_config
from ldm_pipe.schedule.laws import EDM, VE, ContinuousVP, Flow, ResolutionShift
from tests.source import ROOT

LAWS = [
    NoiseSchedule(prediction="score", beta_schedule="sigmoid", beta_start=1e-4, beta_end=0.02),
    NoiseSchedule(prediction="mean", num_train_timesteps=3, trained_betas=(0.1, 0.2, 0.3)),
    ContinuousVP(kind="cosine", prediction="v"),
    VE(sigma_max=20.0, prediction="eps"),
    VE(sigma_data=1.0, prediction="edm"),
    EDM(sigma_data=1.0, prediction="x0", noisy_end=("euler",)),
    Flow(prediction="v", ends=(1.0, 0.01)),
    Flow(resolution=ResolutionShift(max_shift=1.3)),
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: f"{type(law).__name__}-{law.prediction}")
def test_a_law_comes_back_from_its_file(law: Law) -> None:
    config = json.loads(json.dumps(own_file.write(law)))
    back = schedule_config.read(config)
    assert back == law
    assert dict(back.config) == config


@pytest.mark.parametrize(
    ("change", "named"),
    [({"law": "Cubic"}, "Cubic"), ({"color": 1}, "color"), ({"sigma_min": "low"}, "sigma_min"), ({"told": 3}, "told")],
)
def test_a_damaged_file_is_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(LdmPipeError, match=named):
        schedule_config.read({**own_file.write(VE()), **change})


def test_a_pipeline_with_such_a_law_is_saved_loaded_and_draws(tmp_path: Path) -> None:
    tiny = LatentDiffusionPipeline.from_pretrained(ROOT / "tests" / "data" / "tiny_pipeline")
    pipe = LatentDiffusionPipeline(tiny.unet, tiny.autoencoder, tiny.text_encoders, VE(prediction="score"))
    with pytest.warns(UserWarning, match="diffusers cannot read"):
        pipe.save_pretrained(tmp_path / "ve")
    back = LatentDiffusionPipeline.from_pretrained(tmp_path / "ve")
    back.set_progress_bar_config(disable=True)
    assert back.schedule == pipe.schedule
    z = back("red apple", seed=0, num_inference_steps=3, sampler="euler", output_type="latent").images
    assert torch.isfinite(z).all()


def test_a_sampler_that_diffusers_lacks_leaves_it_another(tmp_path: Path) -> None:
    pipe = LatentDiffusionPipeline.from_pretrained(ROOT / "tests" / "data" / "tiny_pipeline")
    pipe.defaults = replace(pipe.defaults, sampler="edm")
    with pytest.warns(UserWarning, match="diffusers will draw with ddim"):
        pipe.save_pretrained(tmp_path / "edm")
    back = LatentDiffusionPipeline.from_pretrained(tmp_path / "edm")
    assert (back.schedule, back.defaults.sampler) == (pipe.schedule, "edm")
    assert back.schedule.config["_class_name"] == "DDIMScheduler"
