"""scripts/tutorial_1d.py: what is learnt has the known distribution."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
PICTURES = {f"tutorial-{name}.png" for name in ("forward", "reverse", "loss", "swiss-roll")}


@pytest.fixture(scope="module")
def tutorial() -> ModuleType:
    return importlib.import_module("scripts.tutorial_1d")


def test_a_short_run_draws_all_pictures_and_learns(
    tutorial: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the processes, a few steps: the loss falls by bits, and the same seed gives the same numbers."""
    monkeypatch.setattr(tutorial, "PROCESSES", tutorial.PROCESSES[::3])
    line, rolls = tutorial.main(["--output", str(tmp_path), "--steps", "60"])
    assert {path.name for path in tmp_path.iterdir()} == PICTURES
    assert sum(line.course[-5:]) / 5 < line.course[0] - 1
    assert set(rolls) == {"true samples", *(p.title.replace("\n", ", ") for p in tutorial.PROCESSES)}
    assert "share of the right mode" in capsys.readouterr().out
    again = tutorial.run_line(tmp_path, 20, 0)
    assert again.course[:3] == pytest.approx(line.course[:3], rel=1e-4)


def test_the_forward_walk_has_the_known_distribution_at_every_level(tutorial: ModuleType) -> None:
    """Step by step it is what the closed form says at once; true samples exceed 1.95 / sqrt(n) once in a thousand."""
    states = tutorial.diffuse_line(4000, 0)
    rows = tutorial.CHAIN.steps(tutorial.CHAIN.num_train_timesteps)
    for x, alpha, sigma in zip(states.flip(0), rows.alpha.tolist(), rows.sigma.tolist(), strict=True):
        assert tutorial.MIXTURE.noised(alpha, sigma).kolmogorov(x[:, None]) < 1.95 / 4000**0.5


def test_the_swiss_roll_is_a_spiral_of_about_unit_spread(tutorial: ModuleType) -> None:
    points = tutorial.swiss_roll(4000, torch.Generator().manual_seed(0))
    radius = points.norm(dim=1) * 7
    assert float(points.std()) == pytest.approx(1, abs=0.15)
    assert float(radius.min()) > 1.5 * torch.pi - 1.5
    assert float(radius.max()) < 4.5 * torch.pi + 1.5
    angle = torch.atan2(points[:, 1], points[:, 0])
    assert float(((radius - angle + torch.pi) % (2 * torch.pi) - torch.pi).abs().median()) < 0.4


@pytest.mark.slow
def test_the_full_tutorial_learns_both_distributions(tutorial: ModuleType, tmp_path: Path) -> None:
    """The weights 1 : 2 to 5 %, the bound to a quarter of a bit, distances to 3 times those of true samples."""
    line, rolls = tutorial.main(["--output", str(tmp_path)])
    last = sum(line.course[-20:]) / 20
    assert line.entropy - 0.02 < last < line.entropy + 0.25
    assert line.right == pytest.approx(2 / 3, abs=0.05)
    assert line.distance < 0.12
    found: dict[str, Any] = {title: distance for title, (_, _, distance) in rolls.items()}
    assert all(distance < 0.1 for distance in found.values()), found
