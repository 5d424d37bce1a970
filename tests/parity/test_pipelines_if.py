"""DeepFloyd IF, both stages, against diffusers' pipelines (0.42) on tiny random models, fp32.

1e-4 of [0, 1], from the same noise, through T5, guidance, dynamic thresholding and a learnt variance.
"""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm_pipe import load_pipeline
from ldm_pipe.cli import main
from ldm_pipe.drawing.start import fitting
from ldm_pipe.pipelines import PixelDiffusionPipeline, UpscalePipeline
from ldm_pipe.pretrained import LdmPipeError
from tests.pipelines import OF_IF, close, quiet, seeded, unit
from tests.text_encoders import unigram_tokenizer

diffusers = pytest.importorskip("diffusers", reason="the reference")
transformers = pytest.importorskip("transformers")
scheduling_ddpm = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
randn_tensor = scheduling_ddpm.randn_tensor

STAGE_1: dict[str, Any] = {
    **OF_IF,
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
    "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
}
STAGE_2 = {**STAGE_1, "sample_size": 16, "in_channels": 6, "class_embed_type": "timestep"}
LAW: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon"}
PROMPT = "A Red Apple, please"


def texts(tmp_path: Path) -> dict[str, Any]:
    """Make a tiny T5 and its Unigram tokenizer."""
    torch.manual_seed(1)
    config = transformers.T5Config(vocab_size=70, d_model=24, d_kv=8, num_heads=3, d_ff=32, num_layers=2)
    return {"tokenizer": unigram_tokenizer(), "text_encoder": transformers.T5EncoderModel(config).eval()}


def pipeline(kind: str, tmp_path: Path, **law: Any) -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**(STAGE_2 if "SuperResolution" in kind else STAGE_1)).eval()
    with torch.no_grad():
        unet.conv_out.weight.mul_(1.5)
    parts = {**texts(tmp_path), "unet": unet, "safety_checker": None, "feature_extractor": None, "watermarker": None}
    dynamic = {"thresholding": True, "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5}
    parts["scheduler"] = diffusers.DDPMScheduler(**LAW, **{"variance_type": "learned_range", **dynamic, **law})
    if "SuperResolution" in kind:
        parts["image_noising_scheduler"] = diffusers.DDPMScheduler(**LAW)
    pipe = getattr(diffusers, kind)(**parts, requires_safety_checker=False)
    return quiet(pipe)


def load(kind: Any, path: Path) -> Any:
    return quiet(kind.from_pretrained(path))


CALL: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": "eyes", "num_inference_steps": 5}


@pytest.mark.parametrize("thresholding", [True, False])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_stage_1(scale: float, thresholding: bool, tmp_path: Path) -> None:
    """Ancestral steps from one generator; without dynamic thresholding the file's clip_sample stands."""
    theirs = pipeline("IFPipeline", tmp_path, thresholding=thresholding)
    theirs.save_pretrained(tmp_path)
    ours = load(PixelDiffusionPipeline, tmp_path)
    call = {**CALL, "guidance_scale": scale, "num_images_per_prompt": 2}
    call |= {} if scale > 1 else {"negative_prompt": None}
    wanted = theirs(**call, generator=seeded(), clean_caption=False, output_type="np").images
    close(ours(**call, generator=seeded(), output_type="pt").images, unit(wanted))


def test_stage_2(tmp_path: Path) -> None:
    """The small picture is enlarged bilinearly, corners on corners, and its noise is drawn after the first noise."""
    theirs = pipeline("IFSuperResolutionPipeline", tmp_path)
    theirs.save_pretrained(tmp_path)
    ours = load(UpscalePipeline, tmp_path)
    small = torch.rand((1, 3, 8, 8), generator=seeded(7))
    call = {**CALL, "guidance_scale": 2.0, "noise_level": 100}
    wanted = theirs(**call, image=small * 2 - 1, generator=seeded(), clean_caption=False, output_type="np").images
    got = ours(**call, image=small, generator=seeded(), output_type="pt").images
    assert got.shape == (1, 3, 16, 16)
    close(got, unit(wanted))
    assert ours(**call, image=small, height=24, width=20, seed=1, output_type="pt").images.shape == (1, 3, 24, 20)


def in_float32(shape: Any, *args: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """Draw diffusers' noise in float32, whatever the model computes in."""
    return randn_tensor(shape, *args, dtype=torch.float32, **options).to(dtype)


@pytest.mark.parametrize("kind", ["IFPipeline", "IFSuperResolutionPipeline"])
def test_diffusers_draws_what_was_written(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read, written, read by diffusers without a word on keys, drawn: the same picture a third time.

    Diffusers computes in float64 here. In float32 its picture moves by up to 1.1e-4 from load to load, with where its
    weights lie in memory, and ours stays within 1e-5 of the float64 one.
    """
    pipeline(kind, tmp_path).save_pretrained(tmp_path / "theirs")
    ours_class: Any = PixelDiffusionPipeline if kind == "IFPipeline" else UpscalePipeline
    load(ours_class, tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    with caplog.at_level(logging.WARNING, logger="diffusers"):
        again = getattr(diffusers, kind).from_pretrained(tmp_path / "ours", safety_checker=None, watermarker=None)
    told = [record.message for record in caplog.records]
    assert [line for line in told if "key" in line.lower() or "initialized" in line.lower()] == []
    again.set_progress_bar_config(disable=True)
    again.to(torch.float64)
    for module in (scheduling_ddpm, inspect.getmodule(type(again))):  # the noise stays that of float32
        monkeypatch.setattr(module, "randn_tensor", in_float32)
    small = torch.rand((1, 3, 8, 8), generator=seeded(7))
    mine, others = ({}, {}) if kind == "IFPipeline" else ({"image": small}, {"image": (small * 2 - 1).double()})
    wanted = again(**CALL, **others, generator=seeded(), clean_caption=False, output_type="np").images
    ours = load(ours_class, tmp_path / "ours")
    close(ours(**CALL, **mine, generator=seeded(), output_type="pt").images, unit(wanted))


def test_without_a_text_encoder_embeddings_are_asked_for(tmp_path: Path) -> None:
    """IF is often loaded in two halves, so that T5 leaves the memory first."""
    theirs = pipeline("IFPipeline", tmp_path)
    ours = load(PixelDiffusionPipeline, _saved(theirs, tmp_path / "whole"))
    tokens = ours.text_encoders[0].encode([PROMPT]).tokens
    theirs.register_modules(text_encoder=None, tokenizer=None)
    bare = load(PixelDiffusionPipeline, _saved(theirs, tmp_path / "bare"))
    with pytest.raises(LdmPipeError, match="no text encoder"):
        bare(PROMPT)
    call: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 1.0, "seed": 2, "output_type": "pt"}
    close(bare(prompt_embeds=tokens, **call).images, ours(PROMPT, **call).images)


def _saved(pipe: Any, path: Path) -> Path:
    pipe.save_pretrained(path)
    return path


def mask() -> Tensor:
    """Paint the right half anew."""
    return (torch.arange(8) >= 4).float().expand(1, 1, 8, 8)


@pytest.mark.parametrize("kind", ["IFImg2ImgPipeline", "IFInpaintingPipeline"])
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_from_a_picture(strength: float, kind: str, tmp_path: Path) -> None:
    """Stage I from a diffused picture, or into a part of one, of which the rest is shown without noise."""
    theirs = pipeline(kind, tmp_path)
    theirs.save_pretrained(tmp_path)
    ours: Any = quiet(load_pipeline(tmp_path))
    assert type(ours) is PixelDiffusionPipeline
    picture = torch.rand((1, 3, 8, 8), generator=seeded(7))
    call = {**CALL, "guidance_scale": 3.0, "num_images_per_prompt": 2, "strength": strength}
    call |= {"mask_image": mask()} if kind == "IFInpaintingPipeline" else {}
    wanted = theirs(**call, image=picture * 2 - 1, generator=seeded(), clean_caption=False, output_type="np").images
    got = ours(**call, image=picture, generator=seeded(), output_type="pt").images
    close(got, unit(wanted))
    if kind == "IFInpaintingPipeline":
        torch.testing.assert_close(got[..., :4], picture.expand(2, -1, -1, -1)[..., :4], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["IFImg2ImgSuperResolutionPipeline", "IFInpaintingSuperResolutionPipeline"])
def test_stage_2_from_a_picture(kind: str, tmp_path: Path) -> None:
    """The large picture is diffused, or painted into, beside the small one."""
    theirs = pipeline(kind, tmp_path)
    theirs.save_pretrained(tmp_path)
    ours: Any = quiet(load_pipeline(tmp_path))
    assert type(ours) is UpscalePipeline
    small, large = (torch.rand((1, 3, side, side), generator=seeded(side)) for side in (8, 16))
    call = {**CALL, "guidance_scale": 3.0, "strength": 0.6}
    painting = kind == "IFInpaintingSuperResolutionPipeline"
    call |= {"mask_image": mask().repeat_interleave(2, 2).repeat_interleave(2, 3)} if painting else {}
    their_pictures = {"image": small * 2 - 1, "original_image": large * 2 - 1}
    wanted = theirs(**call, **their_pictures, generator=seeded(), clean_caption=False, output_type="np").images
    got = ours(**call, image=small, original_image=large, generator=seeded(), output_type="pt")
    close(got.images, unit(wanted))
    if painting:
        torch.testing.assert_close(got.images[..., :8], large[..., :8], rtol=0, atol=1e-6)
    call.pop("strength")
    told = ours(**call, image=small, original_image=large, seed=1).infos[0].settings
    assert told["Denoising strength"] == "0.8"
    for wrong in ({"strength": 2.0}, {"original_image": None}, {"mask_image": 3}):
        with pytest.raises(LdmPipeError):
            ours(**{**call, "image": small, "original_image": large, "mask_image": large[:, :1], **wrong})


def test_a_picture_is_brought_to_the_size_of_the_training(tmp_path: Path) -> None:
    """The shorter side is the U-Net's, the longer one a multiple of 8, as in diffusers; defaults are of pictures."""
    from diffusers.pipelines.deepfloyd_if.pipeline_if_img2img import resize

    ours = load(PixelDiffusionPipeline, _saved(pipeline("IFPipeline", tmp_path), tmp_path / "model"))
    for size in ((40, 21), (21, 40), (8, 8), (30, 31)):
        assert fitting(size[::-1], 64) == resize(Image.new("RGB", size), 64).size[::-1]
    picture = Image.new("RGB", (40, 21), "red")
    few: dict[str, Any] = {"prompt": PROMPT, "image": picture, "seed": 1, "strength": 0.05, "output_type": "pt"}
    drawn = ours(**few)
    assert drawn.images.shape == (1, 3, 8, 16)
    assert {key: drawn.infos[0].settings[key] for key in ("Steps", "CFG scale")} == {"Steps": "80", "CFG scale": "10"}
    assert ours(**few, height=16, width=8).images.shape == (1, 3, 16, 8)
    words = ["draw", PROMPT, "--model", str(tmp_path / "model"), "--steps", "5", "--strength", "0.4", "--quiet"]
    for name, shown in (("image", picture), ("mask-image", Image.new("L", (8, 8), 255))):
        shown.save(tmp_path / f"{name}.png")
        words += [f"--{name}", str(tmp_path / f"{name}.png")]
    assert main([*words, "-o", str(tmp_path / "drawn.png")]) == 0
    assert Image.open(tmp_path / "drawn.png").size == (16, 8)
    alone = ours(**{**few, "seed": 2}).images[0]
    torch.testing.assert_close(ours(**few, num_images_per_prompt=2).images[1], alone, rtol=0, atol=1e-4)
    for wrong in (
        {"image": None, "mask_image": picture},
        {"strength": 0.0},
        {"strength": 1.5},
        {"num_inference_steps": 5},
        {"image": [picture, picture]},
        {"latents": torch.zeros(1, 3, 8, 16)},
        {"mask_image": 3},
    ):
        with pytest.raises(LdmPipeError):
            ours(**{**few, **wrong})
