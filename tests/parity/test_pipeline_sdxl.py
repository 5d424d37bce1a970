"""SDXL, its refiner, its inpainting and Stable Diffusion 2's depth model draw as in diffusers 0.42, in fp32.

The folders are made by diffusers and transformers. Bounds are of pictures in [0, 1]: 1e-4, as for Stable Diffusion.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm_pipe import LatentDiffusionPipeline
from ldm_pipe.pipelines.export import compare_with_diffusers
from ldm_pipe.pretrained import LdmPipeError, read_json
from tests import foreign_models as make

diffusers = pytest.importorskip("diffusers", reason="the reference")

CALL: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": 4.0, "output_type": "pt"}
PROMPTS = {"prompt": ["red apple", "a worm"], "negative_prompt": ["", "green"]}


def build(kind: str, root: Path, **parts: Any) -> tuple[Any, LatentDiffusionPipeline]:
    """Build diffusers' pipeline, save it, and load it with ours."""
    theirs = getattr(diffusers, kind)(**parts)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(root)
    ours = LatentDiffusionPipeline.from_pretrained(root)
    ours.set_progress_bar_config(disable=True)
    return theirs, ours


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, LatentDiffusionPipeline]:
    root = tmp_path_factory.mktemp("base")
    return build("StableDiffusionXLPipeline", root, **make.sdxl(), add_watermarker=False)


@pytest.fixture(scope="module")
def refiner(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, LatentDiffusionPipeline]:
    flags = {"add_watermarker": False, "requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
    return build("StableDiffusionXLImg2ImgPipeline", tmp_path_factory.mktemp("refiner"), **make.refiner(), **flags)


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


def latents(count: int = 1) -> Tensor:
    return torch.randn((count, 4, 8, 8), generator=torch.Generator().manual_seed(0))


def image(count: int = 1) -> Tensor:
    return torch.rand((count, 3, 16, 16), generator=torch.Generator().manual_seed(1))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


SIZES = {
    "plain": {},
    "sizes": {"original_size": (512, 768), "crops_coords_top_left": (8, 40), "target_size": (1024, 960)},
    "negative": {"negative_original_size": (256, 300), "negative_target_size": (64, 80)},
    "second prompts": {"prompt_2": "a red worm", "negative_prompt": "ugly", "negative_prompt_2": "apple"},
    "no negative": {"negative_prompt": None},
    "clip skip": {"clip_skip": 1, "negative_prompt": "green"},
}


@pytest.mark.parametrize("case", SIZES)
def test_text_to_image(base: tuple[Any, LatentDiffusionPipeline], case: str) -> None:
    theirs, ours = base
    call = {**CALL, "prompt": "red apple", "negative_prompt": "", "latents": latents(), **SIZES[case]}
    mine = ours(**call).images
    assert difference(mine, theirs(**call).images) <= 1e-4
    if case in ("sizes", "negative", "second prompts", "no negative"):
        plain = ours(**{**CALL, "prompt": "red apple", "negative_prompt": "", "latents": latents()}).images
        assert difference(mine, plain) > 1e-3, "what was asked for changes the picture"


def test_several_pictures(base: tuple[Any, LatentDiffusionPipeline]) -> None:
    """With negative sizes diffusers pairs them with the wrong rows of a batch; ours are those of single pictures."""
    theirs, ours = base
    call = {**CALL, **PROMPTS, "guidance_rescale": 0.3}
    wanted = theirs(**call, latents=latents(4), num_images_per_prompt=2).images
    assert difference(ours(**call, latents=latents(4), num_images_per_prompt=2).images, wanted) <= 1e-4
    sizes = {**CALL, "prompt": "red apple", "negative_prompt": "", **SIZES["negative"]}
    two = ours(**sizes, latents=latents(2), num_images_per_prompt=2).images
    assert difference(two[:1], theirs(**sizes, latents=latents(2)[:1]).images) <= 1e-4


def test_embeddings(base: tuple[Any, LatentDiffusionPipeline]) -> None:
    theirs, ours = base
    wanted = theirs.encode_prompt("red apple", negative_prompt="ugly")
    found = ours.encode_prompt("red apple", "ugly")
    assert [f.shape for f in found] == [w.shape for w in wanted]
    assert max(difference(f, w.detach()) for f, w in zip(found, wanted, strict=True)) < 1e-5
    second = {"prompt_2": "a worm", "negative_prompt_2": "green"}
    wanted_2 = theirs.encode_prompt("red apple", negative_prompt="ugly", **second)
    found_2 = ours.encode_prompt("red apple", "ugly", **second)
    assert max(difference(f, w.detach()) for f, w in zip(found_2, wanted_2, strict=True)) < 1e-5
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    call = {**CALL, "latents": latents()}
    from_texts = ours(**call, prompt="red apple", negative_prompt="ugly").images
    assert difference(ours(**call, **dict(zip(names, found, strict=True))).images, from_texts) <= 1e-6
    zeros = ours.encode_prompt("red apple")
    assert float(zeros[1].abs().max()) == float(zeros[3].abs().max()) == 0


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_image_to_image(base: tuple[Any, LatentDiffusionPipeline], strength: float) -> None:
    theirs, ours = base
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(**theirs.components, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    call = {**CALL, "prompt": "red apple", "image": image(), "strength": strength, "original_size": (40, 50)}
    call |= {"crops_coords_top_left": (8, 40), "negative_original_size": (512, 64)}
    wanted = pipe(**call, generator=generator()).images
    assert difference(ours(**call, generator=generator()).images, wanted) <= 1e-4


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_refiner(refiner: tuple[Any, LatentDiffusionPipeline], strength: float) -> None:
    theirs, ours = refiner
    call = {**CALL, "prompt": ["red apple", "a worm"], "image": image(2), "strength": strength}
    call |= {"aesthetic_score": 7.5, "negative_aesthetic_score": 1.0, "crops_coords_top_left": (3, 5)}
    wanted = theirs(**call, generator=generator()).images
    mine = ours(**call, generator=generator()).images
    assert difference(mine, wanted) <= 1e-4
    other = ours(**{**call, "aesthetic_score": 1.0}, generator=generator()).images
    assert difference(mine, other) > 1e-3


@pytest.mark.parametrize("sampler", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_two_stages(tmp_path: Path, sampler: str) -> None:
    """Steps down to 40 % by the base model, the rest by the refiner, both with the scheduler of the folder."""
    flags = {"add_watermarker": False}
    theirs, ours = build("StableDiffusionXLPipeline", tmp_path / "base", **make.sdxl(sampler=sampler), **flags)
    flags |= {"requires_aesthetics_score": True}
    parts = make.refiner(sampler)
    their_refiner, refiner = build("StableDiffusionXLImg2ImgPipeline", tmp_path / "refiner", **parts, **flags)
    call = {**CALL, **PROMPTS, "num_inference_steps": 10}
    first = {**call, "output_type": "latent", "denoising_end": 0.6, "latents": latents(2)}
    wanted = their_refiner(**call, image=theirs(**first).images, denoising_start=0.6).images
    handed = ours(**first).images
    assert difference(refiner(**call, image=handed, denoising_start=0.6).images, wanted) <= 1e-4
    again = refiner(**call, latents=handed, denoising_start=0.6).images
    assert difference(again, wanted) <= 1e-4
    whole = ours(**{**first, "denoising_end": None}).images
    rest = ours(**{**call, "output_type": "latent"}, latents=handed, denoising_start=0.6).images
    if sampler != "DPMSolverMultistepScheduler":  # which remembers the step before
        assert difference(rest, whole) <= 1e-4, "one model in two parts is the model"


def test_clean_latents_start_the_refiner(refiner: tuple[Any, LatentDiffusionPipeline]) -> None:
    theirs, ours = refiner
    call = {**CALL, "prompt": "red apple", "image": latents(), "strength": 0.4}
    wanted = theirs(**call, generator=generator()).images
    assert difference(ours(**call, generator=generator()).images, wanted) <= 1e-4


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting(tmp_path: Path, channels: int, strength: float) -> None:
    """Inside the mask; outside diffusers changes the known pixels (diffusers#4782) and we do not."""
    parts = make.sdxl(channels)
    theirs, ours = build("StableDiffusionXLInpaintPipeline", tmp_path, **parts, add_watermarker=False)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, 2:10] = 1
    call = {**CALL, "prompt": "a worm", "image": image(), "mask_image": mask, "strength": strength}
    call |= {"height": 16, "width": 16}
    wanted = theirs(**call, generator=generator()).images
    mine = ours(**call, generator=generator()).images
    inside = mask.bool().expand_as(mine)
    assert difference(mine[inside], wanted[inside]) <= 1e-4
    assert difference(mine[~inside], image()[~inside]) == 0


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_depth(tmp_path: Path, strength: float) -> None:
    parts = make.stable_diffusion(5)
    nobody = {"depth_estimator": None, "feature_extractor": None}
    theirs, ours = build("StableDiffusionDepth2ImgPipeline", tmp_path / "a", **parts, **nobody)
    depth = 5 + 3 * torch.randn(1, 24, 24, generator=generator())
    call = {**CALL, "prompt": "red apple", "image": image(), "depth_map": depth, "strength": strength}
    wanted = theirs(**call, generator=generator()).images
    mine = ours(**call, generator=generator()).images
    assert difference(mine, wanted) <= 1e-4
    assert difference(ours(**{**call, "depth_map": -depth}, generator=generator()).images, mine) > 1e-3
    grey = make.grey_picture((24, 24))
    from_picture = ours(**{**call, "depth_map": grey}, generator=generator()).images
    levels = torch.from_numpy(np.asarray(grey, dtype=np.float32))[None]
    from_levels = ours(**{**call, "depth_map": levels}, generator=generator()).images
    assert difference(from_picture, from_levels) <= 1e-5
    with pytest.raises(LdmPipeError, match="depth_map is missing"):
        ours("red apple", seed=0)
    with pytest.warns(UserWarning, match="depth estimator"):
        ours.save_pretrained(tmp_path / "b")
    load = diffusers.StableDiffusionDepth2ImgPipeline.from_pretrained
    again = load(tmp_path / "b", **nobody)
    again.set_progress_bar_config(disable=True)
    assert difference(again(**call, generator=generator()).images, wanted) <= 1e-4
    assert compare_with_diffusers(tmp_path / "b", num_steps=4)[0] <= 1e-4


def test_default_reload_has_one_dtype(base: tuple[Any, LatentDiffusionPipeline], tmp_path: Path) -> None:
    """A bf16 export reloads as parts of several dtypes, and fails on the first call."""
    base[1].save_pretrained(tmp_path, dtype=torch.bfloat16)
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path, add_watermarker=False)
    nets = [part for part in theirs.components.values() if isinstance(part, torch.nn.Module)]
    assert len(nets) == 4
    assert {net.dtype for net in nets} == {torch.float32}
    theirs.set_progress_bar_config(disable=True)
    call = {**CALL, "prompt": "red apple", "latents": latents()}
    ours = LatentDiffusionPipeline.from_pretrained(tmp_path)
    assert difference(ours(**call).images, theirs(**call).images) <= 1e-4


SAVED = {
    "StableDiffusionXLPipeline": (make.sdxl, {}),
    "StableDiffusionXLInpaintPipeline": (lambda: make.sdxl(9), {}),
    "StableDiffusionXLImg2ImgPipeline": (
        make.refiner,
        {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False},
    ),
}


@pytest.mark.parametrize("kind", SAVED)
def test_what_is_saved_diffusers_draws_alike(tmp_path: Path, kind: str) -> None:
    """No key is missing or unexpected, and both index and pictures come back."""
    parts, flags = SAVED[kind]
    _, ours = build(kind, tmp_path / "a", **parts(), **flags, add_watermarker=False)
    ours.save_pretrained(tmp_path / "b")
    index, again = (read_json(tmp_path / name / "model_index.json") for name in ("a", "b"))
    assert {k: v for k, v in index.items() if k[0] != "_"} == {k: v for k, v in again.items() if k[0] != "_"}
    assert index["_class_name"] == again["_class_name"]
    difference, said = compare_with_diffusers(tmp_path / "b", num_steps=4)
    assert difference <= 1e-4
    assert [line for line in said if "key" in line.lower() or "initialized" in line.lower()] == []
