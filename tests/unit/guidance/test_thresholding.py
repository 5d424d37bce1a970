"""Laws of thresholding x0, for every sampler alike."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import samplers
from ldm_pipe.denoiser import Denoised
from ldm_pipe.guidance.thresholding import dynamic, from_config, static, threshold
from ldm_pipe.noise import Noise
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import NoiseSchedule

T = torch.tensor(500.0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def saturated(x_t: Tensor, t: Tensor) -> Denoised:
    return Denoised(3 * torch.sin(5 * x_t))


class Halver:
    """An autoencoder whose latents are half the pixels."""

    def decode(self, z: Tensor) -> Tensor:
        return 2 * z

    def encode(self, image: Tensor) -> Tensor:
        return image / 2


def test_static_clips_and_leaves_the_rest() -> None:
    x0 = 3 * normal(2, 100)
    clipped = static(x0, 1.5)
    inside = x0.abs() <= 1.5
    assert torch.equal(clipped[inside], x0[inside])
    assert torch.equal(clipped[~inside], 1.5 * x0[~inside].sign())


def test_dynamic_is_imagens() -> None:
    """Clip at the percentile s, divide by s (arXiv:2205.11487, section 2.3); s below the range changes nothing."""
    x0 = torch.linspace(-4, 4, 801)[None]
    out = dynamic(x0, percentile=0.75)
    assert torch.allclose(out, x0.clamp(-3, 3) / 3, atol=1e-5)
    small = 0.2 * x0
    assert torch.allclose(dynamic(small, percentile=0.995), small)


def test_dynamic_scales_to_the_range_of_the_data() -> None:
    x0 = 6 * normal(2, 4, 8, 8)
    out = dynamic(x0, 0.9, max_value=3.0)
    assert torch.allclose(out, 3 * dynamic(x0 / 3, 0.9), atol=1e-5)
    assert float(out.abs().max()) == pytest.approx(3.0)


def test_a_cap_at_the_range_is_exactly_the_static_clip_and_warns() -> None:
    """diffusers' default sample_max_value=1.0 turns dynamic thresholding into the static clip."""
    x0 = 3 * normal(2, 100)
    assert torch.equal(dynamic(x0, 0.9, cap=1.0), static(x0))
    assert not torch.allclose(dynamic(x0, 0.9), static(x0))
    with pytest.warns(UserWarning, match="sample_max_value"):
        threshold(saturated, "dynamic", cap=1.0)
    with pytest.warns(UserWarning, match="sample_max_value"):
        from_config(saturated, NoiseSchedule().to_config("dpmpp_2m", thresholding=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "static", "percentile": 0.9},
        {"kind": "static", "cap": 2.0},
        {"kind": "static", "autoencoder": Halver()},
    ],
)
def test_a_setting_without_effect_warns(settings: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="no effect"):
        threshold(saturated, **settings)


def test_samples_do_not_see_their_neighbours() -> None:
    x = normal(3, 4, 8, 8)
    denoise = threshold(saturated, "dynamic", percentile=0.8)
    whole = denoise(x, T).x0
    for i in range(3):
        assert torch.equal(denoise(x[i : i + 1], T).x0[0], whole[i])


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_pixels_are_thresholded_between_decoding_and_encoding(kind: Any) -> None:
    x = normal(2, 3, 8, 8)
    squeeze = static if kind == "static" else dynamic
    out = threshold(saturated, kind, space="pixel", autoencoder=Halver())(x, T).x0
    assert torch.allclose(out, squeeze(2 * saturated(x, T).x0) / 2)
    assert float((2 * out).abs().max()) <= 1


@pytest.mark.parametrize("name", samplers.NAMES)
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_every_sampler_ends_within_the_range(name: str, kind: Any) -> None:
    """Euler and others have no thresholding in diffusers (#1636): here the last step of each returns the kept x0."""
    sampler = samplers.get(name)
    steps = NoiseSchedule().steps(6, spacing="trailing", grid=sampler.grid)
    x = normal(2, 4, 8, 8)
    free = sampler(saturated, x, steps, noise=Noise([0, 1]))
    kept = sampler(threshold(saturated, kind, max_value=0.8), x, steps, noise=Noise([0, 1]))
    assert float(free.abs().max()) > 2
    assert float(kept.abs().max()) <= 0.8 + 1e-6


def test_config_without_thresholding_changes_nothing() -> None:
    assert from_config(saturated, NoiseSchedule().to_config("ddim")) is saturated
    clip = from_config(saturated, {"clip_sample": True, "clip_sample_range": 0.5})
    assert float(clip(normal(2, 9), T).x0.abs().max()) == 0.5


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "none"},
        {"space": "image"},
        {"percentile": 0.0},
        {"percentile": 1.1},
        {"max_value": 0.0},
        {"max_value": math.inf},
        {"cap": -1.0},
        {"space": "pixel"},
    ],
)
def test_what_means_nothing_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(LdmPipeError, match="thresholding"):
        threshold(saturated, **settings)
