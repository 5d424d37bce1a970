"""Editing with noise: great circles keep the law of the noise, inversion finds the way back, ends are what is drawn."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from conditioning import Condition
from ldm_pipe import LatentDiffusionPipeline, NoiseSchedule, samplers
from ldm_pipe.denoiser import Denoised
from ldm_pipe.drawing.editing import blend, blend_condition, slerp
from ldm_pipe.noise import Noise
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.samplers import ddim_inversion
from ldm_pipe.schedule import Law
from tests.pipelines import tiny

SHAPE = (1, 4, 8, 8)


@pytest.fixture(scope="module")
def pipe() -> LatentDiffusionPipeline:
    return tiny()


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


# Great circles


@pytest.mark.parametrize("weight", [0.1, 0.25, 0.5, 0.9])
def test_slerp_keeps_unit_gaussian_marginals(weight: float) -> None:
    """Mean 0, variance 1, kurtosis 3 of 2 million numbers; on the straight line the variance is half at the middle."""
    a, b = Noise(range(32))((32, 4, 128, 128)), Noise(range(100, 132))((32, 4, 128, 128))
    x = slerp(a, b, weight).double()
    assert abs(float(x.mean())) < 4e-3
    assert abs(float(x.var()) - 1) < 5e-3
    assert abs(float(x.pow(4).mean()) - 3) < 3e-2
    norms = x.flatten(1).norm(dim=1)
    assert float((norms / x[0].numel() ** 0.5 - 1).abs().max()) < 2e-2


def test_slerp_ends_are_exact_and_equal_noise_stays() -> None:
    a, b = Noise([1])(SHAPE), Noise([2])(SHAPE)
    assert torch.equal(slerp(a, b, 0.0), a)
    assert torch.equal(slerp(a, b, 1.0), b)
    assert difference(slerp(a, a, 0.3), a) < 1e-6
    assert difference(slerp(a, a + 1e-7 * b, 0.3), a) < 1e-6
    assert difference(slerp(a, 3 * a, 0.5), 2 * a) < 1e-5


@pytest.mark.parametrize("shape", [SHAPE, (1, 1, 3, 3)])
@pytest.mark.parametrize("off", [0.0, 1e-12, 1e-6, 1e-2])
def test_slerp_of_opposite_noise_is_finite_and_long_enough(shape: tuple[int, ...], off: float) -> None:
    """An odd number of values has one that no pair turns: its norm is 1 % or so short, hence the tolerance."""
    a = Noise([1])(shape).double()
    b = -a + off * Noise([2])(shape).double()
    previous = a
    for i in range(1, 11):
        x = slerp(a, b, i / 10)
        assert bool(torch.isfinite(x).all())
        assert float(x.norm() / a.norm()) == pytest.approx(1, abs=2e-2)
        assert float((x - previous).norm() / a.norm()) == pytest.approx(0.31, abs=0.06), "steps of equal length"
        previous = x


def test_slerp_takes_each_sample_by_itself() -> None:
    a, b = Noise([1, 2, 3])((3, 4, 8, 8)), Noise([4, 5, 6])((3, 4, 8, 8))
    w = torch.tensor([0.2, 0.5, 1.0])
    together = slerp(a, b, w)
    for i in range(3):
        assert torch.equal(together[i : i + 1], slerp(a[i : i + 1], b[i : i + 1], float(w[i].double())))


def test_blend_goes_through_all_ends() -> None:
    ends = Noise([1, 2, 3])((3, 4, 8, 8))
    for straight in (False, True):
        way = blend(ends, [0.0, 0.5, 1.0, 1.75, 2.0], straight=straight)
        assert torch.equal(way[[0, 2, 4]], ends)
    assert difference(blend(ends, [0.5], straight=True)[0], (ends[0] + ends[1]) / 2) < 1e-6


def test_conditions_are_blended_slot_by_slot() -> None:
    ends = Condition(
        tokens=Noise([1, 2])((2, 3, 4)),
        token_mask=torch.tensor([[True, True, False], [True, False, False]]),
        labels=torch.tensor([5, 8]),
    )
    way = blend_condition(ends, [0.0, 0.25, 1.0])
    assert way.tokens is not None
    assert way.token_mask is not None
    assert way.labels is not None
    assert torch.equal(way.tokens[[0, 2]], ends.tokens)
    assert way.token_mask.tolist() == [[True, True, False]] * 3, "what either end shows is shown in between"
    assert way.labels.tolist() == [5, 5, 8]


# Inversion


def gaussian(law: Law, spread: float) -> Callable[[Tensor, Tensor], Denoised]:
    """Return the exact denoiser of Gaussian data with this standard deviation."""

    def denoise(x: Tensor, t: Tensor) -> Denoised:
        alpha, sigma = (float(v) for v in law.alpha_sigma(t))
        return Denoised(alpha * spread**2 / (alpha**2 * spread**2 + sigma**2) * x)

    return denoise


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_inversion_settles_on_the_exact_way_back(spacing: str, zero_snr: bool) -> None:
    """arXiv:2010.02502, section 4.3; the fixed point is ddim's own inverse, in float64 to 1e-8 of the data."""
    law = NoiseSchedule(prediction="v", zero_terminal_snr=zero_snr)
    steps, denoise = law.steps(20, spacing=spacing), gaussian(law, 0.7)
    x0 = 0.7 * Noise([0, 1])((2, 4, 8, 8)).double()
    errors = []
    for refinements in (0, 1, 4, 40):
        noise = ddim_inversion(denoise, x0, steps, num_refinements=refinements)
        assert bool(torch.isfinite(noise).all())
        errors.append(difference(samplers.ddim(denoise, noise, steps), x0))
    assert errors[0] > errors[1] > errors[2] > errors[3]
    if not zero_snr:  # from alpha = 0 any noise leads to the same x0: what is lost in the first step is lost
        assert errors[3] < 1e-8


def test_inversion_finds_unit_noise_and_its_error_falls_with_the_steps() -> None:
    law = NoiseSchedule(prediction="v")
    denoise, x0 = gaussian(law, 0.7), 0.7 * Noise([0])((1, 4, 64, 64)).double()
    errors = []
    for num_steps in (10, 20, 40, 80):
        steps = law.steps(num_steps, spacing="trailing")
        noise = ddim_inversion(denoise, x0, steps)
        errors.append(difference(samplers.ddim(denoise, noise, steps), x0))
    assert float(noise.std()) == pytest.approx(1, abs=0.05)
    assert all(later < 0.7 * earlier for earlier, later in pairwise(errors))


def test_inversion_reports_each_step_and_takes_each_sample_by_itself() -> None:
    law = NoiseSchedule(prediction="v")
    steps, denoise, seen = law.steps(5), gaussian(law, 1.0), []
    x0 = Noise([0, 1])((2, 4, 8, 8))
    noise = ddim_inversion(denoise, x0, steps, callback=lambda i, t, x, _: seen.append((i, float(t))))
    assert seen == [(i, float(steps.t[i])) for i in (4, 3, 2, 1, 0)]
    assert difference(noise[1:], ddim_inversion(denoise, x0[1:], steps)) < 1e-6
    with pytest.raises(LdmPipeError, match="num_refinements"):
        ddim_inversion(denoise, x0, steps, num_refinements=-1)


def test_a_picture_comes_back_from_its_noise(pipe: LatentDiffusionPipeline, picture: Image.Image) -> None:
    """diffusers#4654: DDIM inversion does not reproduce the image. A network of random weights is the worst case."""
    call = {"num_inference_steps": 20, "guidance_scale": 1.0}
    errors = []
    for refinements in (0, 2, 8):
        found = pipe.invert(picture, "red apple", num_refinements=refinements, **call)
        back = pipe("red apple", latents=found.latents, output_type="latent", **call).images
        errors.append(float((back - found.encoded).square().mean().sqrt() / found.encoded.square().mean().sqrt()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.5 * errors[0]


def test_inverted_batch_is_its_singles(pipe: LatentDiffusionPipeline, picture: Image.Image) -> None:
    """fp32 sums in another order in another batch, and a network of random weights amplifies it upwards: 1e-4."""
    other = Image.new("RGB", (32, 32), "teal")
    both = pipe.invert([picture, other], ["red apple", "a worm"], num_inference_steps=4)
    assert both.latents.shape == (2, *SHAPE[1:])
    assert difference(both.latents[1:], pipe.invert(other, "a worm", num_inference_steps=4).latents) < 1e-4


# Ways


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler_ancestral"])
def test_ends_of_a_way_are_what_the_pipeline_draws(pipe: LatentDiffusionPipeline, sampler: str) -> None:
    call: dict[str, Any] = {"sampler": sampler, "output_type": "pt", "num_inference_steps": 3, "guidance_scale": 3.0}
    frames = pipe.interpolate(["red apple", "a worm"], seed=[7, 9], num_frames=5, **call).images
    assert difference(frames[0], pipe("red apple", seed=7, **call).images[0]) < 1e-5
    assert difference(frames[4], pipe("a worm", seed=9, **call).images[0]) < 1e-5
    assert difference(frames[2], frames[0]) > 1e-3


def test_a_way_of_three_points_passes_through_the_middle_one(pipe: LatentDiffusionPipeline) -> None:
    call: dict[str, Any] = {"output_type": "pt", "num_inference_steps": 2}
    frames = pipe.interpolate("x", seed=[1, 2, 3], num_frames=5, **call)
    assert difference(frames.images[2], pipe("x", seed=2, **call).images[0]) < 1e-5
    assert frames.seeds is None
    assert frames.infos[1].settings["Seeds"] == "1 -> 2 -> 3"
    assert frames.infos[1].settings["Frame"] == "2/5"


def test_one_seed_holds_the_noise_while_the_prompt_changes(pipe: LatentDiffusionPipeline) -> None:
    call: dict[str, Any] = {"output_type": "pt", "num_inference_steps": 2, "negative_prompt": "ugly"}
    frames = pipe.interpolate(["red apple", "a worm"], seed=5, num_frames=3, **call)
    same = pipe(["red apple", "a worm"], seed=[5, 5], **call).images
    assert difference(frames.images[[0, 2]], same) < 1e-5
    assert frames.infos[0].prompt == "red apple -> a worm"


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_frames_do_not_depend_on_the_batch(pipe: LatentDiffusionPipeline, sampler: str) -> None:
    call: dict[str, Any] = {"output_type": "pt", "num_inference_steps": 2, "seed": [1, 2], "num_frames": 5}
    whole = pipe.interpolate("x", sampler=sampler, **call).images
    assert difference(whole, pipe.interpolate("x", sampler=sampler, batch_size=2, **call).images) < 1e-5


def test_a_way_between_inverted_pictures(pipe: LatentDiffusionPipeline, picture: Image.Image) -> None:
    found = pipe.invert([picture, Image.new("RGB", (32, 32), "teal")], "x", num_inference_steps=4)
    call: dict[str, Any] = {"guidance_scale": 1.0, "num_inference_steps": 4, "output_type": "pt"}
    frames = pipe.interpolate("x", latents=found.latents, num_frames=3, **call).images
    assert difference(frames[[0, 2]], pipe(["x", "x"], latents=found.latents, **call).images) < 1e-5


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_frames_of_every_kind(pipe: LatentDiffusionPipeline, output_type: str) -> None:
    frames = pipe.interpolate(
        "x", seed=[1, 2], num_frames=3, batch_size=2, num_inference_steps=1, output_type=output_type
    ).images
    assert len(frames) == 3
    assert isinstance(frames, {"pil": list, "np": np.ndarray}.get(output_type, Tensor))


# Relatives


def test_strength_is_the_share_of_fresh_noise(pipe: LatentDiffusionPipeline, picture: Image.Image) -> None:
    call: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent"}
    drawn = {
        strength: pipe.vary(picture, "x", strength=strength, seed=3, num_images_per_prompt=2, **call).images
        for strength in (0.0, 0.2, 0.6, 1.0)
    }
    back = pipe("x", latents=pipe.invert(picture, "x", num_inference_steps=4).latents, **call).images
    assert difference(drawn[0.0], back.expand(2, -1, -1, -1)) < 1e-5
    distances = [float((one - back).square().mean()) for one in drawn.values()]
    assert distances[0] < distances[1] < distances[2] < distances[3]
    assert difference(drawn[1.0], pipe("x", seed=3, num_images_per_prompt=2, **call).images) < 1e-5
    assert difference(drawn[0.2][0], drawn[0.2][1]) > 1e-3


# Wrong input

BAD: list[tuple[str, dict[str, Any]]] = [
    ("invert", {"image": None}),
    ("invert", {"image": "no/such/file.png"}),
    ("invert", {"image": torch.zeros(3, 33, 32)}),
    ("invert", {"num_refinements": -1}),
    ("invert", {"num_refinements": 1.5}),
    ("invert", {"num_inference_steps": 0}),
    ("invert", {"guidance_scale": float("nan")}),
    ("invert", {"latents": torch.zeros(SHAPE)}),
    ("invert", {"colour": "red"}),
    ("invert", {"prompt": ["a", "b", "c"], "image": torch.zeros(2, 3, 32, 32)}),
    ("interpolate", {"prompt": "x"}),
    ("interpolate", {"prompt": []}),
    ("interpolate", {"prompt": ["a", "b"], "seed": [1, 2, 3]}),
    ("interpolate", {"prompt": ["a", 3]}),
    ("interpolate", {"prompt": ["a", "b"], "num_frames": 1}),
    ("interpolate", {"prompt": ["a", "b"], "num_frames": 2.5}),
    ("interpolate", {"prompt": ["a", "b"], "batch_size": 0}),
    ("interpolate", {"prompt": ["a", "b"], "seed": -1}),
    ("interpolate", {"prompt": ["a", "b"], "latents": torch.zeros(2, 3, 8, 8)}),
    ("interpolate", {"prompt": ["a", "b"], "latents": "noise"}),
    ("interpolate", {"prompt": ["a", "b"], "generator": torch.Generator()}),
    ("interpolate", {"prompt": ["a", "b"], "image": torch.zeros(3, 32, 32)}),
    ("vary", {"image": None}),
    ("vary", {"strength": 1.5}),
    ("vary", {"strength": "much"}),
    ("vary", {"num_images_per_prompt": 0}),
    ("vary", {"mask_image": torch.zeros(32, 32)}),
]


@pytest.mark.parametrize(("name", "bad"), BAD, ids=lambda v: v if isinstance(v, str) else " ".join(map(str, v)))
def test_wrong_input_is_one_clear_error(pipe: LatentDiffusionPipeline, name: str, bad: dict[str, Any]) -> None:
    good: dict[str, Any] = {} if name == "interpolate" else {"image": torch.zeros(3, 32, 32)}
    with pytest.raises(LdmPipeError) as caught:
        getattr(pipe, name)(**{**good, **bad})
    assert len(str(caught.value)) < 700
