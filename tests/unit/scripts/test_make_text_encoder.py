"""The script that makes untrained text encoders: its configs build, and what it writes is read again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from conditioning import load_text_encoder
from ldm_pipe.training.run.config import build_config, read_yaml
from scripts import make_text_encoder

ROOT = Path(__file__).resolve().parents[3]
YAMLS = sorted((ROOT / "configs" / "emoji").glob("text_encoder_*.yaml"))


def pictures(folder: Path) -> Path:
    for name in ("red apple", "cat", "dog"):
        Image.new("RGB", (16, 16)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name)
    return folder


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_config_builds_and_its_diffusion_config_names_its_folder(path: Path) -> None:
    config = build_config(make_text_encoder.TextEncoderConfig, read_yaml(path), str(path))
    partner = path.with_name(path.name.replace("text_encoder_", "diffusion_"))
    values = read_yaml(partner)
    assert values["text_encoder"] == config.output_dir
    assert values["train_text_encoder"] is True
    assert values["data"]["caption_column"] == config.data.caption_column


@pytest.mark.parametrize("kind", ["clip", "transformer", "t5", "labels"])
def test_what_is_made_is_read_again(kind: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    values = {
        "output_dir": str(tmp_path / "out"), "kind": kind, "vocab_size": 520, "max_length": 8, "hidden_size": 16,
        "num_layers": 1, "num_heads": 2, "data": {"train_data_dir": str(pictures(tmp_path / "data")), "resolution": 16},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    made = []
    for _ in range(2):
        make_text_encoder.main(["--config", str(tmp_path / "run.yaml")])
        made.append(load_text_encoder(tmp_path / "out"))
    tokens = made[0].encode(["red apple", ""]).tokens
    assert tokens.shape == (2, 1 if kind == "labels" else 8, 16)
    assert not torch.allclose(tokens[0], tokens[1])
    first, second = (encoder.state_dict() for encoder in made)
    assert all(torch.equal(value, second[name]) for name, value in first.items()), "the same seed, other weights"
