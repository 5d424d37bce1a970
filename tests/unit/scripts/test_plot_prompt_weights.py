"""The measure of red, and the script from a model to a plot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from scripts import plot_prompt_weights

ROOT = Path(__file__).resolve().parents[3]


def test_the_share_of_red_counts_what_is_drawn() -> None:
    colours = torch.tensor([[1.0, 0.1, 0.1], [0.1, 1.0, 0.1], [1.0, 1.0, 1.0], [0.9, 0.8, 0.1]])
    images = colours.T[None, :, :, None].repeat(2, 1, 1, 1)  # (2, 3, 4, 1): red, green, white, yellow
    images[1] = 1.0
    assert plot_prompt_weights.red_share(images).tolist() == pytest.approx([1 / 3, 0])


def test_the_script_draws_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(plot_prompt_weights, "WEIGHTS", (0.0, 1.0))
    monkeypatch.setattr(plot_prompt_weights, "PROMPTS", ("(red:{w}) apple",))
    model = str(ROOT / "tests" / "data" / "tiny_pipeline")
    options = ["--num-images", "2", "--steps", "2", "--output", str(tmp_path / "red.png")]
    assert plot_prompt_weights.main(["--model", model, *options]) == 0
    assert (tmp_path / "red.png").read_bytes()[:4] == b"\x89PNG"
    found = json.loads((tmp_path / "red.json").read_text())["red"]
    assert {name: len(shares) for name, shares in found.items()} == {"context": 2, "interpolate": 2, "scale": 2}
