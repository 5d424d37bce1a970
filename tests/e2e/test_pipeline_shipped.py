"""The model inside the package: it loads without a name, is small enough to ship, and draws the same in diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_pipe import LatentDiffusionPipeline
from ldm_pipe.interop.folders.folder import SHIPPED

pytestmark = pytest.mark.skipif(not (SHIPPED / "model_index.json").is_file(), reason="no model is shipped yet")


@pytest.fixture(scope="module")
def shipped() -> LatentDiffusionPipeline:
    pipe = LatentDiffusionPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_fits_into_the_package() -> None:
    assert sum(p.stat().st_size for p in SHIPPED.rglob("*") if p.is_file()) <= 32 * 2**20
    assert not [p for p in SHIPPED.rglob("*") if p.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


def test_the_prompt_decides_the_picture(shipped: LatentDiffusionPipeline) -> None:
    drawn = shipped(["red apple", "blue car"], seed=[0, 0], num_inference_steps=8, output_type="pt").images
    assert drawn.isfinite().all()
    assert (drawn[0] - drawn[1]).abs().mean() > 0.02
    assert drawn.std() > 0.05


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_diffusers_draws_the_same_picture(shipped: LatentDiffusionPipeline, sampler: str) -> None:
    """Same latents, fp32: at most 1e-3 of [0, 1]."""
    diffusers = pytest.importorskip("diffusers", reason="the reference")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(SHIPPED, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    config = shipped.schedule.to_config(sampler)
    theirs.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    height, width = shipped.default_size
    shape = (1, shipped.autoencoder.latent_channels, height // shipped.factor, width // shipped.factor)
    call: dict[str, Any] = {
        "prompt": "red apple",
        "height": height,
        "width": width,
        "latents": torch.randn(shape, generator=torch.Generator().manual_seed(0)),
        "num_inference_steps": 10,
        "guidance_scale": 5.0,
        "output_type": "pt",
    }
    ours = shipped(**call, sampler=sampler, spacing=shipped.schedule.spacing, thresholding="none", guidance_rescale=0.0)
    assert float((ours.images - theirs(**call).images).abs().max()) <= 1e-3


def test_its_card_names_the_licence() -> None:
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    assert "licence: not recorded" not in card
    assert Path(SHIPPED / "ldm_pipe.json").is_file()
