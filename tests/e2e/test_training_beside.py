"""scripts/train_diffusion.py with two text encoders, a map and a class: two steps, then a model that draws with all."""

from __future__ import annotations

import importlib
import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from PIL import Image, ImageDraw

from conditioning import LabelInput, SpatialInput
from ldm_pipe import LatentDiffusionPipeline
from ldm_pipe.pretrained import LdmPipeError
from tests.source import ROOT

pandas = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")
pytest.importorskip("accelerate")

MODEL = ROOT / "tests" / "data" / "tiny_pipeline"
NAMES = {"red apple": "food", "green apple": "food", "octopus": "animals", "worm": "animals"}


def script(name: str) -> ModuleType:
    return importlib.import_module(f"scripts.{name}")


def png(image: Image.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = []
    for i, (name, group) in enumerate(NAMES.items()):
        picture, mask = Image.new("RGB", (32, 32), "white"), Image.new("L", (32, 32))
        for image, colour in ((picture, "red"), (mask, 255)):
            ImageDraw.Draw(image).rectangle((4, 4, 12 + 4 * i, 20), fill=colour)
        plain = dict.fromkeys(("is_skin_tone_variant", "is_gender_variant", "is_flag"), False)
        words = {"id": f"{i:x}", "caption": name, "concept": name, "group": group}
        rows.append({"image": png(picture), "mask": png(mask), **words, **plain})
    path = tmp_path_factory.mktemp("drawings") / "train.parquet"
    pandas.DataFrame(rows).to_parquet(path)
    return path


def config(folder: Path, drawings: Path, **data: Any) -> Path:
    unet = {
        "block_out_channels": [8, 16], "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "attention_head_dim": 2, "norm_num_groups": 4,
    }  # fmt: skip
    columns = {"mask_column": "mask", "label_column": "group", **data}
    values = {
        "output_dir": str(folder / "run"), "autoencoder": str(MODEL / "vae"), "text_encoder": str(MODEL),
        "text_encoder_2": str(MODEL),
        "cache_dir": str(folder / "cache"), "unet": unet, "num_caption_variants": 1, "max_train_steps": 2,
        "train_batch_size": 2, "num_threads": 1, "report_to": "none", "validation_steps": 2,
        "validation_prompts": ["red apple", "a word it never saw"], "validation_num_inference_steps": 2,
        "optim": {"learning_rate": 1.0e-3, "lr_warmup_steps": 1},
        "data": {"train_data_dir": str(drawings), "caption_column": "caption", "resolution": 32, **columns},
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, drawings: Path) -> Path:
    folder = tmp_path_factory.mktemp("beside")
    with torch.random.fork_rng():
        script("train_diffusion").main(["--config", str(config(folder, drawings))])
    return folder / "run"


def test_text_map_and_class_are_trained_together_and_drawn_with(run: Path) -> None:
    assert (run / "grids" / "step-000002.png").is_file()
    pipe = LatentDiffusionPipeline.from_pretrained(run)
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe.text_encoders) == 2
    assert (pipe.spatial, pipe.labels) == (SpatialInput(1), LabelInput(("animals", "food")))
    assert pipe.unet.config.in_channels == pipe.autoencoder.latent_channels + 1
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:24, 8:24] = 1
    call: dict[str, Any] = {"seed": 0, "num_inference_steps": 2, "output_type": "pt"}
    free = pipe("red apple", **call).images
    for more in ({"spatial": mask}, {"class_labels": "food"}):
        assert not torch.equal(pipe("red apple", **call, **more).images, free), more


def test_masks_are_evaluated(run: Path, drawings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["mask", "--model", str(run), "--train_file", str(drawings), "--output", str(tmp_path)]
    script("evaluate").main([*words, "--num_prompts", "3", "--num_inference_steps", "2", "--device", "cpu"])
    assert "| 4 | " in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [set(row) for row in results] == [{"guidance_scale", "own", "swapped", "unasked", "chance"}]
    assert all(0 <= value <= 1 for name, value in results[0].items() if name != "guidance_scale")
    with Image.open(tmp_path / "masks-4.png") as sheet:
        assert sheet.height > 4 * 32


def test_streams_and_mirrored_masks_are_refused_before_any_work(drawings: Path, tmp_path: Path) -> None:
    train = script("train_diffusion")
    for data, message in (
        ({"streaming": True}, "a stream has no cached latents"),
        ({"random_flip": True}, "masks are"),
    ):
        with pytest.raises(LdmPipeError, match=message):
            train.main(["--config", str(config(tmp_path, drawings, **data))])
    assert not (tmp_path / "run").exists()
