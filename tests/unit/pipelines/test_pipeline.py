"""The pipeline's laws: one seed per picture, known pixels kept, callbacks and threads heard."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conditioning import Condition
from ldm_pipe import LatentDiffusionPipeline, UNet, samplers
from ldm_pipe.pretrained import LdmPipeError
from tests.pipelines import tiny

LATENTS = (4, 8, 8)


@pytest.fixture(scope="module")
def pipe() -> LatentDiffusionPipeline:
    return tiny()


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (7, 9, 22, 21))
    return mask


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max())


# One seed per picture


@pytest.mark.parametrize("sampler", samplers.NAMES)
def test_batch_of_four_is_four_singles(pipe: LatentDiffusionPipeline, sampler: str) -> None:
    """fp32 sums in another order in another batch: 1e-5."""
    call = {"sampler": sampler, "output_type": "pt", "eta": 0.5 if samplers.get(sampler).has_eta else 0.0}
    batch = pipe(["red apple", "a worm"], num_images_per_prompt=2, seed=7, **call)
    assert batch.seeds == [7, 8, 9, 10]
    for i, prompt in enumerate(["red apple", "red apple", "a worm", "a worm"]):
        assert difference(pipe(prompt, seed=7 + i, **call).images[0], batch.images[i]) <= 1e-5
    assert difference(batch.images[0], batch.images[1]) > 0.05


def test_deterministic_batch_has_the_same_bits(
    pipe: LatentDiffusionPipeline, picture: Image.Image, mask: Image.Image
) -> None:
    call: dict[str, Any] = {
        "image": picture,
        "mask_image": mask,
        "strength": 0.7,
        "sampler": "ddpm",
        "output_type": "pt",
    }
    batch = pipe("red apple", seed=[5, 1, 9], num_images_per_prompt=3, deterministic_batch=True, **call).images
    for i, seed in enumerate([5, 1, 9]):
        assert torch.equal(batch[i], pipe("red apple", seed=seed, **call).images[0])


def test_a_drawn_seed_is_told(pipe: LatentDiffusionPipeline) -> None:
    first = pipe("red apple", output_type="pt", num_images_per_prompt=2)
    assert torch.equal(
        first.images, pipe("red apple", output_type="pt", num_images_per_prompt=2, seed=first.seeds).images
    )


def test_list_of_generators_equals_seeds(pipe: LatentDiffusionPipeline) -> None:
    generators = [torch.Generator().manual_seed(s) for s in (3, 4)]
    drawn = pipe(["a", "b"], generator=generators, sampler="ddpm", output_type="pt")
    assert drawn.seeds is None
    assert torch.equal(drawn.images, pipe(["a", "b"], seed=3, sampler="ddpm", output_type="pt").images)


def test_one_generator_draws_the_whole_batch(pipe: LatentDiffusionPipeline) -> None:
    drawn = pipe(["a", "b"], generator=torch.Generator().manual_seed(3), output_type="pt").images
    noise = torch.randn((2, *LATENTS), generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn, pipe(["a", "b"], latents=noise, output_type="pt").images)


# Output


def test_outputs_agree(pipe: LatentDiffusionPipeline) -> None:
    call = {"prompt": "red apple", "seed": 3}
    pil = pipe(**call).images[0]
    array, tensor = pipe(**call, output_type="np").images, pipe(**call, output_type="pt").images
    latent = pipe(**call, output_type="latent", return_latents=True)
    assert pil.size == (32, 32)
    assert np.array_equal(np.asarray(pil), (array[0] * 255).round().astype(np.uint8))
    assert np.array_equal(array[0], tensor[0].permute(1, 2, 0).numpy())
    assert torch.equal(latent.images, latent.latents)
    assert difference((pipe.autoencoder.decode(latent.images) / 2 + 0.5).clamp(0, 1), tensor) < 1e-5
    assert pipe(**call, return_dict=False)[1] is None


def test_model_defaults_stand_for_untouched_arguments(pipe: LatentDiffusionPipeline) -> None:
    settings = pipe("red apple", seed=1).infos[0].settings
    assert (settings["Steps"], settings["CFG scale"], settings["Sampler"]) == ("4", "3", "DDIM")
    settings = pipe("red apple", seed=1, num_inference_steps=3, guidance_scale=7.5, sampler="euler").infos[0].settings
    assert (settings["Steps"], settings["CFG scale"], settings["Sampler"]) == ("3", "7.5", "Euler")


def test_embeddings_equal_their_prompt(pipe: LatentDiffusionPipeline) -> None:
    tokens, null = pipe.encode_prompt(["red apple", "a worm"], "ugly")
    assert tokens.shape == (2, 16, 32)
    given = pipe(prompt_embeds=tokens, negative_prompt_embeds=null, seed=1, output_type="pt").images
    assert torch.equal(given, pipe(["red apple", "a worm"], negative_prompt="ugly", seed=1, output_type="pt").images)


def test_no_guidance_is_one_evaluation_per_step(pipe: LatentDiffusionPipeline) -> None:
    rows: list[int] = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        pipe("red apple", guidance_scale=1.0, seed=0, num_inference_steps=3)
        assert rows == [1, 1, 1]
        rows.clear()
        pipe("red apple", guidance_scale=2.0, seed=0, num_inference_steps=3)
        assert rows == [2, 2, 2]
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("sampler", "rule"),
    [
        *((name, {"kind": "static", "max_value": 0.3}) for name in samplers.NAMES),
        ("ddim", "static"),
        ("ddim", "dynamic"),
        ("ddim", {"kind": "dynamic", "space": "pixel"}),
    ],
)
def test_thresholding_has_an_effect_in_every_sampler(pipe: LatentDiffusionPipeline, sampler: str, rule: Any) -> None:
    call = {"prompt": "red apple", "seed": 3, "sampler": sampler, "output_type": "latent", "num_inference_steps": 3}
    plain, bounded = pipe(**call).images, pipe(**call, thresholding=rule).images
    assert difference(plain, bounded) > 1e-3
    if sampler == "ddim" and rule != {"kind": "dynamic", "space": "pixel"}:
        assert bounded.abs().max() <= (0.3 if isinstance(rule, dict) else 1.0) + 1e-6


# Pictures in


@pytest.mark.parametrize(
    ("sampler", "output_type"), [*((name, "pil") for name in samplers.NAMES), ("ddim", "np"), ("ddim", "pt")]
)
def test_known_pixels_come_back_unchanged(
    pipe: LatentDiffusionPipeline, picture: Image.Image, mask: Image.Image, sampler: str, output_type: str
) -> None:
    drawn = pipe("red apple", image=picture, mask_image=mask, seed=0, sampler=sampler, output_type=output_type).images[
        0
    ]
    known, here = np.asarray(mask) == 0, np.asarray(picture)
    array = drawn.permute(1, 2, 0).numpy() if output_type == "pt" else np.asarray(drawn)
    wanted = here if output_type == "pil" else here.astype(np.float32) / 255
    assert np.array_equal(array[known], wanted[known])
    assert (array[~known] != wanted[~known]).mean() > 0.5


def test_known_latents_are_put_back_at_every_step(
    pipe: LatentDiffusionPipeline, picture: Image.Image, mask: Image.Image
) -> None:
    drawn = pipe("x", image=picture, mask_image=mask, seed=0, output_type="latent").images
    z0 = pipe.autoencoder.encode(
        torch.from_numpy(np.asarray(picture).astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None],
        torch.randn((1, *LATENTS), generator=torch.Generator().manual_seed(0)),
    )
    assert difference(drawn[0, :, 0, 0], z0[0, :, 0, 0]) < 1e-5
    assert difference(drawn[0, :, 4, 4], z0[0, :, 4, 4]) > 1e-2


def test_strength_decides_how_far_the_picture_is_left(pipe: LatentDiffusionPipeline, picture: Image.Image) -> None:
    call = {"prompt": "x", "image": picture, "seed": 0, "num_inference_steps": 10, "output_type": "pt"}
    image = torch.from_numpy(np.asarray(picture).astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    z0 = pipe.autoencoder.encode(image).detach()
    start = (pipe.autoencoder.decode(z0) / 2 + 0.5).clamp(0, 1).detach()
    distances = [float((pipe(**call, strength=s).images - start).square().mean()) for s in (0.1, 0.5, 1.0)]
    assert distances[0] < distances[1] < distances[2]


def test_inpainting_unet_of_nine_channels(
    pipe: LatentDiffusionPipeline, picture: Image.Image, mask: Image.Image
) -> None:
    torch.manual_seed(0)
    unet = UNet.from_config({**pipe.unet.config, "in_channels": 9}).eval()
    painter = LatentDiffusionPipeline(unet, pipe.autoencoder, pipe.text_encoders, pipe.schedule)
    painter.set_progress_bar_config(disable=True)
    drawn = painter("x", image=picture, mask_image=mask, seed=0, num_inference_steps=2).images[0]
    known = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(drawn)[known], np.asarray(picture)[known])
    for missing in ({}, {"image": picture}):
        with pytest.raises(LdmPipeError, match="mask_image"):
            painter("x", **missing)


@pytest.mark.parametrize("kind", ["pil", "path", "array", "uint8", "tensor", "list"])
def test_kinds_of_pictures(pipe: LatentDiffusionPipeline, picture: Image.Image, kind: str, tmp_path: Path) -> None:
    array = np.asarray(picture)
    picture.save(tmp_path / "a.png")
    unit = array.astype(np.float32) / 255
    given = {
        "pil": picture,
        "path": tmp_path / "a.png",
        "array": unit,
        "uint8": array,
        "tensor": torch.from_numpy(unit).permute(2, 0, 1),
        "list": [picture],
    }[kind]
    call = {"prompt": "x", "seed": 0, "strength": 0.5, "output_type": "pt"}
    assert torch.equal(pipe(**call, image=given).images, pipe(**call, image=picture).images)


# Callbacks


def test_callback_sees_and_changes_the_latents(pipe: LatentDiffusionPipeline) -> None:
    seen = []

    def callback(view: Any, i: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append((i, float(t), sorted(tensors), view.num_timesteps, view.guidance_scale))
        return {"latents": tensors["latents"] * 0}

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    drawn = pipe(
        "x", seed=0, output_type="latent", callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names
    )
    assert drawn.images.abs().max() == 0
    assert [s[0] for s in seen] == [0, 1, 2, 3]
    assert seen[0][2:] == (sorted(names), 4, 3.0)


def test_interrupt_stops_this_call_only(pipe: LatentDiffusionPipeline) -> None:
    seen = []

    def callback(view: Any, i: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(i)
        view._interrupt = i == 1
        return tensors

    assert len(pipe("x", seed=0, callback_on_step_end=callback).images) == 1
    assert seen == [0, 1]
    seen.clear()
    pipe("x", seed=0, callback_on_step_end=lambda view, i, t, tensors: seen.append(i) or tensors)
    assert seen == [0, 1, 2, 3]


def test_guidance_may_be_switched_off_on_the_way(pipe: LatentDiffusionPipeline) -> None:
    rows: list[int] = []

    def callback(view: Any, i: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if i == 1:
            view._guidance_scale = 0.0
        return tensors

    hook = pipe.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        pipe("x", seed=0, callback_on_step_end=callback)
    finally:
        hook.remove()
    assert rows == [2, 2, 1, 1]
    assert pipe.guidance_scale == 1.0  # the pipeline itself is left as it was


def test_raising_in_a_callback_leaves_the_pipeline_usable(pipe: LatentDiffusionPipeline) -> None:
    def callback(*_: Any) -> dict[str, torch.Tensor]:
        raise KeyboardInterrupt

    before = pipe("x", seed=0, output_type="pt").images
    with pytest.raises(KeyboardInterrupt):
        pipe("x", seed=0, callback_on_step_end=callback)
    assert torch.equal(before, pipe("x", seed=0, output_type="pt").images)


@pytest.mark.parametrize("step", [0, 2, 3])
def test_nan_latents_are_an_error_that_names_the_step_not_a_black_picture(
    pipe: LatentDiffusionPipeline, step: int
) -> None:
    def callback(view: Any, i: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"latents": tensors["latents"] * (float("nan") if i == step else 1.0)}

    with pytest.raises(LdmPipeError, match=f"NaN.*step {step}"):
        pipe("x", seed=0, callback_on_step_end=callback)


# Threads


def test_threads_share_one_pipeline(pipe: LatentDiffusionPipeline) -> None:
    """diffusers#1606: the scheduler's state is shared, so threads draw wrong pictures without an error."""
    calls = [
        {
            "prompt": f"p{i}",
            "seed": i,
            "sampler": samplers.NAMES[i % 4],
            "num_inference_steps": 2 + i % 3,
            "output_type": "latent",
        }
        for i in range(8)
    ]
    wanted = [pipe(**call).images for call in calls]
    wrong: list[int] = []

    def work(start: int) -> None:
        for k in range(len(calls)):
            i = (start + k) % len(calls)
            if not torch.equal(pipe(**calls[i]).images, wanted[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(3 * n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# Parts


def test_attention_slicing_says_that_it_does_nothing(pipe: LatentDiffusionPipeline) -> None:
    with pytest.warns(UserWarning, match="no effect"):
        pipe.enable_attention_slicing()


def test_parts_that_do_not_fit_are_refused(pipe: LatentDiffusionPipeline) -> None:
    wrong = UNet.from_config({**pipe.unet.config, "cross_attention_dim": 16})
    with pytest.raises(LdmPipeError, match="32 wide"):
        LatentDiffusionPipeline(wrong, pipe.autoencoder, pipe.text_encoders, pipe.schedule)


def test_out_of_memory_is_explained(pipe: LatentDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(z: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pipe.autoencoder, "decode", decode)
    with pytest.raises(LdmPipeError, match="1 pictures of 32x32"):
        pipe("x", num_inference_steps=1)
    monkeypatch.undo()
    assert pipe("x", num_inference_steps=1).images


def test_condition_of_the_pipeline_reaches_the_network(pipe: LatentDiffusionPipeline) -> None:
    """The prompt changes the picture, beside a U-Net called by hand with the same tokens."""
    tokens, _ = pipe.encode_prompt("red apple")
    x = torch.randn((1, *LATENTS), generator=torch.Generator().manual_seed(0))
    steps = pipe.schedule.steps(1)
    direct = pipe.unet(x, steps.t[0].float(), **Condition(tokens=tokens).slots())
    x0 = (x - float(steps.sigma[0]) * direct) / float(steps.alpha[0])
    drawn = pipe("red apple", seed=0, num_inference_steps=1, guidance_scale=1.0, output_type="latent").images
    assert difference(x0, drawn) < 1e-4
    other = pipe("a worm", seed=0, num_inference_steps=1, guidance_scale=1.0, output_type="latent").images
    assert difference(drawn, other) > 1e-3
