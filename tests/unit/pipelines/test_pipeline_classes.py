"""A model that is told a class beside the text: drawn, guided, kept in its folder, else refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conditioning import LabelInput, SpatialInput
from ldm_pipe import LatentDiffusionPipeline, UNet
from ldm_pipe.pipelines.export import check_representable
from ldm_pipe.pretrained import LdmPipeError
from tests.single_files import random_weights

TINY = Path(__file__).parents[2] / "data" / "tiny_pipeline"
CLASSES = LabelInput(("animals", "food"))


@pytest.fixture(scope="module")
def tiny() -> LatentDiffusionPipeline:
    return LatentDiffusionPipeline.from_pretrained(TINY)


@pytest.fixture(scope="module")
def pipe(tiny: LatentDiffusionPipeline) -> LatentDiffusionPipeline:
    """Text, a map and a class at once."""
    unet = UNet.from_config({**tiny.unet.config, "in_channels": 5, "num_class_embeds": 3}).eval()
    random_weights(unet, 1)
    more: dict[str, Any] = {"defaults": tiny.defaults, "spatial": SpatialInput(1), "labels": CLASSES}
    made = LatentDiffusionPipeline(unet, tiny.autoencoder, tiny.text_encoders, tiny.schedule, **more)
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe: LatentDiffusionPipeline, **call: Any) -> Tensor:
    return pipe(**{"prompt": "red apple", "seed": 0, "output_type": "pt", "num_inference_steps": 2, **call}).images


def test_a_class_steers_by_name_or_number(pipe: LatentDiffusionPipeline) -> None:
    food, animals, none = draw(pipe, class_labels="food"), draw(pipe, class_labels=0), draw(pipe)
    assert torch.equal(food, draw(pipe, class_labels=1))
    assert float((food - animals).abs().max()) > 1e-3
    assert float((food - none).abs().max()) > 1e-3
    assert torch.equal(none, draw(pipe, class_labels=[None]))


def test_the_file_of_a_picture_tells_the_class(pipe: LatentDiffusionPipeline) -> None:
    call: dict[str, Any] = {"num_inference_steps": 1, "output_type": "latent", "seed": [0, 0]}
    first, second = pipe(["red apple", "worm"], class_labels=["food", None], **call).infos
    assert first.settings["Class"] == "1"
    assert "Class" not in second.settings


def test_a_class_per_prompt_beside_a_map(pipe: LatentDiffusionPipeline) -> None:
    maps = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    call: dict[str, Any] = {"num_images_per_prompt": 2, "deterministic_batch": True}
    both = draw(pipe, prompt=["red apple", "worm"], class_labels=["food", None], spatial=maps, seed=[0, 1] * 2, **call)
    for row, (prompt, label) in enumerate((("red apple", "food"), ("worm", None))):
        one = draw(pipe, prompt=prompt, class_labels=label, spatial=maps[row], seed=[0, 1], **call)
        torch.testing.assert_close(both[2 * row : 2 * row + 2], one, atol=1e-4, rtol=0)


def test_guidance_pushes_away_from_no_class(pipe: LatentDiffusionPipeline) -> None:
    """With an empty prompt and no map, the class alone is what the two evaluations differ by."""
    call: dict[str, Any] = {"prompt": "", "class_labels": "food"}
    assert float((draw(pipe, **call, guidance_scale=1.0) - draw(pipe, **call, guidance_scale=6.0)).abs().max()) > 1e-3
    plain = [draw(pipe, prompt="", guidance_scale=scale) for scale in (1.0, 6.0)]
    torch.testing.assert_close(plain[0], plain[1], atol=1e-4, rtol=0)


def test_the_folder_keeps_the_classes(pipe: LatentDiffusionPipeline, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers cannot read it
        pipe.save_pretrained(tmp_path)
    loaded = LatentDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.labels == CLASSES
    assert loaded.spatial == SpatialInput(1)
    drawn = draw(pipe, class_labels="animals")
    torch.testing.assert_close(draw(loaded, class_labels="animals"), drawn, atol=1e-5, rtol=0)
    with pytest.raises(LdmPipeError, match="channels of maps"):
        check_representable(loaded, "ddim")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("tools", "no class 'tools'"),
        (2.0, "label 0 is 2.0"),
        ([0, 1], "2 class_labels for 1 prompts"),
        ([7], "label 0 is 7, expected 0 to 1"),
        ([], "0 class_labels"),
    ],
)
def test_bad_labels_are_one_clear_error(labels: Any, message: str, pipe: LatentDiffusionPipeline) -> None:
    with pytest.raises(LdmPipeError, match=message):
        draw(pipe, class_labels=labels)


def test_models_and_labels_that_do_not_fit_are_refused(tiny: LatentDiffusionPipeline) -> None:
    with pytest.raises(LdmPipeError, match="this model knows no classes"):
        tiny("red apple", class_labels="food")
    unet = UNet.from_config({**tiny.unet.config, "num_class_embeds": 5})
    rest = (tiny.autoencoder, tiny.text_encoders, tiny.schedule)
    with pytest.raises(LdmPipeError, match="a table of 5 classes, 3 are named"):
        LatentDiffusionPipeline(unet, *rest, labels=CLASSES)
    with pytest.raises(LdmPipeError, match="a table of None classes, 3 are named"):
        LatentDiffusionPipeline(tiny.unet, *rest, labels=CLASSES)
    with pytest.raises(LdmPipeError, match="a table of 5 classes, None are named"):
        LatentDiffusionPipeline(unet, *rest)
