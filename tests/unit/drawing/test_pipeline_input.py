"""Wrong input to the pipeline: one clear error before any work, a warning for what has no effect."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldm_pipe import LatentDiffusionPipeline
from ldm_pipe.pretrained import LdmPipeError
from tests.pipelines import tiny


@pytest.fixture(scope="module")
def pipe() -> LatentDiffusionPipeline:
    return tiny()


class Odd:
    """Something no argument takes."""


NAN = float("nan")
BAD_CALLS: list[dict[str, Any]] = [
    {"prompt": None},
    {"prompt": []},
    {"prompt": 3},
    {"prompt": ["a", 3]},
    {"prompt": "\ud800"},
    {"prompt": "x" * 200_000},
    {"prompt_embeds": torch.zeros(1, 16, 32)},
    {"prompt": None, "prompt_embeds": torch.zeros(1, 16, 31)},
    {"prompt": None, "prompt_embeds": torch.zeros(16, 32)},
    {"prompt": None, "prompt_embeds": torch.full((1, 16, 32), NAN)},
    {"prompt": None, "prompt_embeds": torch.zeros(1, 15, 32)},
    {"negative_prompt": ["a", "b"]},
    {"negative_prompt": 3},
    {"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, 16, 32)},
    {"height": 33},
    {"width": 0},
    {"width": -32},
    {"height": 2**40},
    {"height": 32.0},
    {"num_inference_steps": 0},
    {"num_inference_steps": -1},
    {"num_inference_steps": 1001},
    {"num_inference_steps": 2.5},
    {"num_inference_steps": True},
    {"guidance_scale": NAN},
    {"guidance_scale": -1.0},
    {"guidance_scale": float("inf")},
    {"guidance_scale": "7"},
    {"guidance_rescale": 2.0},
    {"num_images_per_prompt": 0},
    {"num_images_per_prompt": 10**9},
    {"eta": -1.0},
    {"eta": NAN},
    {"seed": -1},
    {"seed": 2**70},
    {"seed": [1, 2]},
    {"seed": "7"},
    {"seed": 1, "generator": torch.Generator()},
    {"generator": [torch.Generator(), torch.Generator()]},
    {"generator": 3},
    {"latents": torch.zeros(1, 4, 8, 9), "height": 32, "width": 32},
    {"latents": torch.zeros(2, 4, 8, 8)},
    {"latents": torch.full((1, 4, 8, 8), NAN)},
    {"latents": torch.zeros(1, 4, 8, 8, dtype=torch.int64)},
    {"output_type": "jpeg"},
    {"sampler": "dpm"},
    {"sampler": 3},
    {"sampler": "ddim", "sampler_options": {"order": 3}},
    {"sampler_options": "order"},
    {"eta": 0.5, "sampler": "euler"},
    {"spacing": "karas"},
    {"spacing": "ddim0"},
    {"spacing": "10,2000"},
    {"spacing": 3},
    {"spacing": "ddim5", "num_inference_steps": 6},
    {"spacing": "trailing", "timesteps": [5]},
    {"thresholding": "soft"},
    {"thresholding": {"kind": "static", "max": 1}},
    {"thresholding": {"kind": "dynamic", "percentile": 0}},
    {"thresholding": {"kind": "dynamic", "max_value": -1}},
    {"thresholding": 3},
    {"timesteps": [1, 2]},
    {"timesteps": [5000]},
    {"timesteps": []},
    {"timesteps": "all"},
    {"timesteps": [5, -1]},
    {"timesteps": [5.0, NAN]},
    {"sigmas": [1.0, 2.0]},
    {"sigmas": [1e9]},
    {"sigmas": []},
    {"sigmas": "all"},
    {"sigmas": [2.0, 1.0], "timesteps": [500]},
    {"clip_skip": -1},
    {"clip_skip": 99},
    {"callback_on_step_end": 3},
    {"callback_on_step_end": lambda *_: 3},
    {"callback_on_step_end": lambda *_: {"latents": torch.zeros(1)}},
    {"callback_on_step_end_tensor_inputs": ["unet"]},
    {"callback_on_step_end_tensor_inputs": "latents"},
    {"image": "no/such/file.png"},
    {"image": Odd()},
    {"image": []},
    {"image": torch.zeros(3, 33, 32)},
    {"image": torch.zeros(3, 32, 32) + 2},
    {"image": torch.full((3, 32, 32), NAN)},
    {"image": torch.zeros(1, 32, 32)},
    {"image": np.zeros((32, 32, 4))},
    {"image": np.array(["x"])},
    {"image": torch.zeros(2, 3, 32, 32)},
    {"image": torch.zeros(3, 32, 32), "strength": 0.0},
    {"image": torch.zeros(3, 32, 32), "strength": 0.1},
    {"image": torch.zeros(3, 32, 32), "strength": 1.1},
    {"image": torch.zeros(3, 32, 32), "strength": NAN},
    {"image": torch.zeros(3, 32, 32), "latents": torch.zeros(1, 4, 8, 8)},
    {"image": torch.zeros(3, 32, 32), "mask_image": torch.zeros(32, 36)},
    {"mask_image": torch.zeros(32, 32)},
    {"prompt_2": "x"},
    {"negative_prompt_2": "x"},
    {"original_size": (32, 32)},
    {"negative_target_size": (32, 32)},
    {"aesthetic_score": 6.0},
    {"pooled_prompt_embeds": torch.zeros(1, 32)},
    {"spatial": torch.zeros(1, 1, 8, 8)},
    {"depth_map": torch.zeros(1, 8, 8)},
    {"denoising_start": 0.5},
    {"denoising_start": 0.5, "latents": torch.zeros(1, 4, 8, 8), "strength": 0.5},
    {"denoising_start": 0.5, "image": torch.zeros(3, 32, 32)},
    {"denoising_start": 0.5, "denoising_end": 0.4, "latents": torch.zeros(1, 4, 8, 8)},
    {"denoising_end": 0.001},
    {"denoising_end": 1.0},
    {"denoising_end": NAN},
    {"image": torch.zeros(1, 4, 8, 8), "latents": torch.zeros(1, 4, 8, 8)},
    {"image": torch.zeros(1, 4, 8, 8), "mask_image": torch.zeros(32, 32)},
    {"image": torch.full((1, 4, 8, 8), NAN)},
    {"image": torch.zeros(3, 4, 8, 8)},
]


@pytest.mark.parametrize("bad", BAD_CALLS, ids=lambda bad: " ".join(f"{k}={v!r:.24}" for k, v in bad.items()))
def test_wrong_input_is_one_clear_error(pipe: LatentDiffusionPipeline, bad: dict[str, Any]) -> None:
    with pytest.raises(LdmPipeError) as caught:
        pipe(**{"prompt": "x", **bad})
    assert len(str(caught.value)) < 600


def test_a_wrong_size_names_the_nearest_ones(pipe: LatentDiffusionPipeline) -> None:
    with pytest.raises(LdmPipeError, match=r"height is 500.*500|height is 501.*500 or 504"):
        pipe("x", height=501, width=512)


ANY = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 4), st.floats(), st.text(max_size=8),
    st.lists(st.integers(-1, 3), max_size=2), st.lists(st.text(max_size=3), max_size=2), st.just({}), st.builds(Odd),
    st.just(torch.zeros(1)), st.just(np.zeros(2)),
)  # fmt: skip
NAMES = (
    "prompt", "height", "width", "num_inference_steps", "timesteps", "guidance_scale", "negative_prompt", "eta", "seed",
    "num_images_per_prompt", "generator", "latents", "prompt_embeds", "negative_prompt_embeds", "output_type", "image",
    "guidance_rescale", "clip_skip", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "sampler", "spacing",
    "thresholding", "strength", "mask_image", "sigmas", "sampler_options", "prompt_2", "negative_prompt_2", "spatial",
    "depth_map", "original_size", "crops_coords_top_left", "target_size", "aesthetic_score", "denoising_start",
    "denoising_end", "pooled_prompt_embeds", "negative_pooled_prompt_embeds", "negative_original_size",
)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(bad=st.dictionaries(st.sampled_from(NAMES), ANY, min_size=1, max_size=2))
def test_no_other_exception_comes_out(pipe: LatentDiffusionPipeline, bad: dict[str, Any]) -> None:
    """FAULTS 29: 0 exceptions other than ours."""
    small = {"prompt": "x", "num_inference_steps": 1, "output_type": "latent", "guidance_scale": 1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(LdmPipeError):
            pipe(**{**small, **bad})


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ({"negative_prompt": "a", "guidance_scale": 1.0}, "negative_prompt"),
        ({"guidance_rescale": 0.5, "guidance_scale": 1.0}, "guidance_rescale"),
        ({"strength": 0.5}, "strength"),
        ({"guidance_scale": 0.5}, "guidance_scale"),
        ({"prompt": "apple " * 40}, "cut"),
    ],
)
def test_a_setting_without_effect_warns(pipe: LatentDiffusionPipeline, setting: dict[str, Any], word: str) -> None:
    with pytest.warns(UserWarning, match=word):
        pipe(**{"prompt": "x", "num_inference_steps": 1, **setting})


IGNORED: dict[str, dict[str, Any]] = {
    "guidance_scale": {"guidance_scale": 0.5},
    "guidance_rescale": {"guidance_scale": 1.0, "guidance_rescale": 0.7},
    "negative_prompt": {"guidance_scale": 1.0, "negative_prompt": "eyes"},
    "negative_prompt_embeds": {"guidance_scale": 1.0, "negative_prompt_embeds": torch.zeros(1, 16, 32)},
    "strength": {"strength": 0.5},
}


@pytest.mark.parametrize("name", IGNORED)
def test_a_warning_names_the_line_of_the_call(pipe: LatentDiffusionPipeline, name: str) -> None:
    """However deep the check stands, and through every verb: it pointed at our own files."""
    call = {"prompt": "red apple", "num_inference_steps": 1, "output_type": "latent", "seed": 0, **IGNORED[name]}
    ways: list[Any] = [lambda: pipe(**call)]
    if name in ("guidance_rescale", "negative_prompt"):
        ways.append(lambda: pipe.interpolate(**{**call, "prompt": ["red apple", "cat"]}, num_frames=2))
    for draw in ways:
        with pytest.warns(UserWarning, match=f"^{name}.* has no effect") as caught:
            draw()
        assert {warning.filename for warning in caught if name in str(warning.message)} == {__file__}
