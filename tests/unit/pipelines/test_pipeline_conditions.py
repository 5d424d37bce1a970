"""What a model reads beside its prompts: maps, several text encoders, numbers; kept in its folder, else refused."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conditioning import CLIPTextEncoder, Reading
from conditioning.spatial import SpatialInput
from conditioning.text import SDXL, SDXL_2
from ldm_pipe import LatentDiffusionPipeline, UNet
from ldm_pipe.cli.draw import draw as draw_by_command
from ldm_pipe.interop.single.file import export_single_file
from ldm_pipe.pipelines.export import check_representable
from ldm_pipe.pretrained import LdmPipeError, load_tensors, read_json
from tests.single_files import make_folder, random_weights

TINY = Path(__file__).parents[2] / "data" / "tiny_pipeline"
CALL: dict[str, Any] = {"prompt": "red apple", "seed": 0, "output_type": "pt", "num_inference_steps": 3}


@pytest.fixture(scope="module")
def tiny() -> LatentDiffusionPipeline:
    return LatentDiffusionPipeline.from_pretrained(TINY)


def with_unet(tiny: LatentDiffusionPipeline, encoders: Any = None, **config: Any) -> tuple[Any, ...]:
    unet = UNet.from_config({**tiny.unet.config, **config}).eval()
    random_weights(unet, 1)
    return unet, tiny.autoencoder, encoders or tiny.text_encoders, tiny.schedule


def quiet(pipe: LatentDiffusionPipeline) -> LatentDiffusionPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reloaded(pipe: LatentDiffusionPipeline, folder: Path) -> LatentDiffusionPipeline:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers cannot read it
        pipe.save_pretrained(folder)
    return quiet(LatentDiffusionPipeline.from_pretrained(folder))


def draw(pipe: LatentDiffusionPipeline, **call: Any) -> Tensor:
    return pipe(**{**CALL, **call}).images


def half() -> Tensor:
    return torch.cat([torch.ones(1, 2, 32, 16), torch.zeros(1, 2, 32, 16)], dim=3)


# Maps


@pytest.fixture(scope="module")
def mapped(tiny: LatentDiffusionPipeline) -> LatentDiffusionPipeline:
    parts = with_unet(tiny, in_channels=6)
    return quiet(LatentDiffusionPipeline(*parts, defaults=tiny.defaults, spatial=SpatialInput(2)))


def test_a_map_steers_and_no_map_is_zeros(mapped: LatentDiffusionPipeline) -> None:
    free, steered = draw(mapped), draw(mapped, spatial=half())
    assert float((free - steered).abs().max()) > 1e-3
    grey = draw(mapped, spatial=torch.full((2, 32, 32), 0.5), guidance_scale=1.0)
    assert torch.equal(grey, draw(mapped, guidance_scale=1.0)), "0.5 is shown as 0, which is no map"
    small = torch.nn.functional.interpolate(half(), size=(8, 8), mode="area")
    assert torch.equal(draw(mapped, spatial=small), steered), "a map may have the size of the latents"


def test_a_map_per_prompt(mapped: LatentDiffusionPipeline) -> None:
    maps = torch.cat([half(), half().flip(3)])
    both = draw(mapped, prompt=["red apple", "a worm"], spatial=maps, num_images_per_prompt=2, seed=[0, 1, 0, 1])
    alone = draw(mapped, prompt="a worm", spatial=maps[1:], num_images_per_prompt=2)
    assert torch.allclose(both[2:], alone, atol=1e-5)
    one_by_one = draw(mapped, prompt=["red apple", "a worm"], spatial=maps, seed=[0, 0], deterministic_batch=True)
    assert torch.allclose(one_by_one[1], alone[0], atol=1e-5)


def test_a_map_goes_with_pictures_grammar_and_ways(mapped: LatentDiffusionPipeline) -> None:
    weighted = draw(mapped, spatial=half(), prompt_syntax="weighted")
    assert torch.equal(weighted, draw(mapped, spatial=half()))
    image, mask = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.zeros(32, 32)
    mask[8:20] = 1
    painted = draw(mapped, image=image, mask_image=mask, spatial=half())
    assert torch.equal(painted[0, :, :8], image[0, :, :8])
    settings = {"num_frames": 2, "seed": 0, "output_type": "pt", "num_inference_steps": 3}
    frames = mapped.interpolate(["red apple", "a worm"], spatial=half(), **settings).images
    assert torch.allclose(frames[:1], draw(mapped, spatial=half()), atol=1e-5)
    found = mapped.invert(image, "red apple", spatial=half(), num_inference_steps=8, num_refinements=3)
    assert found.latents.isfinite().all()


def test_a_model_with_maps_is_kept_whole(mapped: LatentDiffusionPipeline, tmp_path: Path) -> None:
    again = reloaded(mapped, tmp_path / "m")
    assert again.spatial == SpatialInput(2)
    assert read_json(tmp_path / "m" / "model_index.json")["_class_name"] == "LatentDiffusionPipeline"
    assert torch.allclose(draw(again, spatial=half()), draw(mapped, spatial=half()), atol=1e-5)
    with pytest.raises(LdmPipeError, match="2 channels of maps"):
        check_representable(mapped, "ddim")


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(1, 1, 32, 32),
        torch.zeros(1, 2, 16, 16),
        torch.zeros(3, 2, 32, 32),
        torch.zeros(1, 2, 32, 32) + 2,
        torch.full((1, 2, 32, 32), float("nan")),
        "no/such/file.png",
        3,
        [],
    ],
    ids=["channels", "size", "count", "range", "nan", "path", "number", "list"],
)
def test_a_map_that_does_not_fit_is_one_clear_error(mapped: LatentDiffusionPipeline, bad: Any) -> None:
    with pytest.raises(LdmPipeError):
        draw(mapped, spatial=bad)


def test_channels_must_be_those_of_the_map(tiny: LatentDiffusionPipeline) -> None:
    with pytest.raises(LdmPipeError, match="it must take 7"):
        LatentDiffusionPipeline(*with_unet(tiny, in_channels=6), spatial=SpatialInput(3))
    with pytest.raises(LdmPipeError, match="6 channels"):
        LatentDiffusionPipeline(*with_unet(tiny, in_channels=6))


@pytest.mark.parametrize("channels", [6, 9])
def test_maps_and_known_pictures_in_bfloat16(tiny: LatentDiffusionPipeline, channels: int) -> None:
    """A float32 map beside bfloat16 latents made both float32, and the first convolution refused."""
    spatial = SpatialInput(2) if channels == 6 else None
    parts = LatentDiffusionPipeline(*with_unet(tiny, in_channels=channels), spatial=spatial).parts()
    pipe = quiet(LatentDiffusionPipeline.from_parts(copy.deepcopy(parts)).to(torch.bfloat16))
    painted = {"image": torch.rand(1, 3, 32, 32), "mask_image": torch.ones(32, 32)}
    assert draw(pipe, **({"spatial": half()} if spatial else painted)).isfinite().all()


# Several text encoders, numbers


def encoders(tiny: LatentDiffusionPipeline, *readings: Reading) -> tuple[CLIPTextEncoder, ...]:
    first = tiny.text_encoders[0]
    made = []
    for seed, reading in enumerate(readings):
        config = {**first.config, "architectures": ["CLIPTextModelWithProjection"], "projection_dim": 24}
        encoder = CLIPTextEncoder(config, first.tokenizer, reading).eval()  # type: ignore[arg-type]
        random_weights(encoder, seed)
        made.append(encoder)
    return tuple(made)


def test_any_two_encoders_are_kept_in_a_folder(tiny: LatentDiffusionPipeline, tmp_path: Path) -> None:
    two = encoders(tiny, Reading(skip=1), Reading())
    pipe = quiet(LatentDiffusionPipeline(*with_unet(tiny, two, cross_attention_dim=64)))
    again = reloaded(pipe, tmp_path / "m")
    assert [encoder.reading for encoder in again.text_encoders] == [Reading(skip=1), Reading()]
    call = {"prompt_2": "a worm"}
    assert torch.allclose(draw(again, **call), draw(pipe, **call), atol=1e-5)
    assert float((draw(pipe, **call) - draw(pipe)).abs().max()) > 1e-3
    with pytest.raises(LdmPipeError, match="2 text encoders"):
        check_representable(pipe, "ddim")


NUMBERS = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "cross_attention_dim": 64}


@pytest.fixture(scope="module")
def xl(tiny: LatentDiffusionPipeline) -> LatentDiffusionPipeline:
    two = encoders(tiny, SDXL, SDXL_2)
    parts = with_unet(tiny, two, **NUMBERS, projection_class_embeddings_input_dim=24 + 6 * 8)
    return quiet(LatentDiffusionPipeline(*parts, zero_empty_prompt=True))


def test_a_vector_of_the_wrong_width_is_refused_with_both_widths(tiny: LatentDiffusionPipeline) -> None:
    two = encoders(tiny, SDXL, SDXL_2)
    with pytest.raises(LdmPipeError, match=r"vector 50 wide, the text encoders give 24"):
        LatentDiffusionPipeline(*with_unet(tiny, two, **NUMBERS, projection_class_embeddings_input_dim=50))


@pytest.mark.parametrize(
    "bad",
    [
        {"original_size": (0, 5)},
        {"original_size": "512x512"},
        {"crops_coords_top_left": (-1, 0)},
        {"target_size": (1, 2, 3)},
        {"aesthetic_score": 6.0},
        {"negative_aesthetic_score": 1.0},
        {"prompt_2": ["a", "b"]},
        {"prompt_2": 3},
        {"prompt_2": "x", "prompt_syntax": "weighted"},
        {"prompt": None, "prompt_embeds": torch.zeros(1, 16, 64)},
        {"prompt": None, "prompt_embeds": torch.zeros(1, 16, 64), "pooled_prompt_embeds": torch.zeros(1, 23)},
        {"pooled_prompt_embeds": torch.zeros(1, 24)},
    ],
    ids=lambda bad: " ".join(f"{k}={v!r:.24}" for k, v in bad.items()),
)
def test_numbers_and_texts_that_do_not_fit(xl: LatentDiffusionPipeline, bad: dict[str, Any]) -> None:
    with pytest.raises(LdmPipeError):
        xl(**{**CALL, **bad})


def test_sizes_are_told_in_the_picture(xl: LatentDiffusionPipeline) -> None:
    info = xl(**CALL, original_size=(512, 768), prompt_2="a worm").infos[0]
    assert info.settings["Sizes"] == "512 768 0 0 32 32"
    assert info.settings["Second prompt"] == "a worm"


def test_no_negative_prompt_is_zeros_whatever_the_grammar(xl: LatentDiffusionPipeline) -> None:
    zeros, texts = draw(xl), draw(xl, negative_prompt="")
    assert float((zeros - texts).abs().max()) > 1e-3
    assert torch.equal(draw(xl, prompt_syntax="weighted"), zeros)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun", "dpmpp_2m", "unipc", "restart"])
def test_a_hand_over_stops_where_the_next_begins(tiny: LatentDiffusionPipeline, sampler: str) -> None:
    """Without memory of earlier steps, one model in two parts is the model."""
    pipe = quiet(LatentDiffusionPipeline.from_parts(tiny.parts()))
    call = {**CALL, "num_inference_steps": 10, "sampler": sampler, "output_type": "latent"}
    seen: list[int] = []

    def count(_: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(int(t))
        return tensors

    handed = pipe(**call, denoising_end=0.6, callback_on_step_end=count).images
    rest = pipe(**{**call, "latents": handed}, denoising_start=0.6, callback_on_step_end=count).images
    assert sorted(set(seen), reverse=True) == list(dict.fromkeys(seen))
    assert min(t for t in seen if t >= 400) and max(t for t in seen if t < 400)
    if sampler in ("ddim", "euler", "heun"):
        assert torch.allclose(rest, pipe(**call).images, atol=1e-4)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("IFPipeline", "PixelDiffusionPipeline"), ("StableDiffusionUpscalePipeline", "UpscalePipeline")],
)
def test_a_folder_of_another_family_names_the_class_that_draws_it(tmp_path: Path, theirs: str, ours: str) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": theirs}), encoding="utf-8")
    with pytest.raises(LdmPipeError, match=rf"ldm_pipe\.pipelines\.{ours}"):
        LatentDiffusionPipeline.from_pretrained(tmp_path)


def test_a_folder_with_the_wrong_encoders_is_refused(tiny: LatentDiffusionPipeline, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TINY, tmp_path / "m"))
    index = read_json(folder / "model_index.json")
    for change in (
        {"_class_name": "StableDiffusionXLPipeline"},
        {"text_encoder_2": ["transformers", "CLIPTextModel"], "tokenizer_2": ["transformers", "CLIPTokenizer"]},
        {"text_encoder_9": ["transformers", "CLIPTextModel"]},
        {"text_encoder": [None, None]},
        {"requires_aesthetics_score": True},
    ):
        (folder / "model_index.json").write_text(json.dumps({**index, **change}), encoding="utf-8")
        with pytest.raises(LdmPipeError):
            LatentDiffusionPipeline.from_pretrained(folder)


def test_the_command_hands_over_to_a_refiner(tiny: LatentDiffusionPipeline) -> None:
    pipe = quiet(LatentDiffusionPipeline.from_parts(tiny.parts()))
    call = {**CALL, "prompt": ["red apple", "a worm"], "seed": [3, 4], "num_inference_steps": 10}
    args = Namespace(refiner="other", refiner_start=0.6)
    drawn = draw_by_command(pipe, pipe, args, dict(call))
    assert torch.allclose(drawn.images, pipe(**call).images, atol=1e-4)
    assert drawn.seeds == [3, 4]
    assert drawn.infos[0].settings["Refiner"] == "tiny"
    assert drawn.infos[0].settings["Seed"] == "3"


@pytest.mark.parametrize(("family", "channels"), [("sd2", 9), ("sdxl", 4), ("sdxl", 9), ("sdxl-refiner", 4)])
def test_the_families_of_single_files_draw_and_go_back(tmp_path: Path, family: str, channels: int) -> None:
    """Folder -> pipeline -> folder -> single file holds the bits of folder -> single file."""
    pipe = quiet(LatentDiffusionPipeline.from_pretrained(make_folder(tmp_path / "a", family, channels=channels)))
    call: dict[str, Any] = {"height": 16, "width": 16, "guidance_scale": 2.0, "prompt": "a bad cab"}
    if channels == 9:
        call |= {"image": torch.rand(1, 3, 16, 16), "mask_image": torch.ones(16, 16)}
    assert draw(pipe, **call).isfinite().all()
    again = reloaded(pipe, tmp_path / "b")
    assert torch.allclose(draw(again, **call), draw(pipe, **call), atol=1e-5)
    for name in "ab":
        export_single_file(tmp_path / name, tmp_path / f"{name}.safetensors")
    first, second = (load_tensors(tmp_path / f"{name}.safetensors") for name in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
