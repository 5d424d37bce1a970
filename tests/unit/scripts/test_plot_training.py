"""The plot of loss curves: resumed runs, running means, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm_pipe.pretrained import LdmPipeError
from scripts.plot_training import main, read_curve, smoothed

pytest.importorskip("tensorboard")
pytest.importorskip("matplotlib")


def write(run: Path, losses: dict[int, float], suffix: str) -> None:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run / "tensorboard"), filename_suffix=suffix)
    for step, loss in losses.items():
        writer.add_scalar("unet/loss", loss, step)
    writer.close()


def test_a_running_mean_keeps_constants_and_lengths() -> None:
    assert smoothed([2.0] * 5, 3) == [2.0] * 5
    assert smoothed([1.0, 2.0, 3.0, 4.0], 2) == [1.0, 1.5, 2.5, 3.5]


def test_every_step_of_a_run_counts_once_and_the_picture_is_written(tmp_path: Path) -> None:
    write(tmp_path / "run", {1: 3.0, 2: 2.0}, ".0")
    assert read_curve(tmp_path / "run", "unet/loss") == ([1, 2], [3.0, 2.0])
    main([str(tmp_path / "run"), "--output", str(tmp_path / "plots" / "loss.png")])
    assert (tmp_path / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_missing_curves_are_named(tmp_path: Path) -> None:
    with pytest.raises(LdmPipeError, match="no TensorBoard files"):
        read_curve(tmp_path, "unet/loss")
    write(tmp_path / "run", {1: 3.0}, ".0")
    with pytest.raises(LdmPipeError, match=r"use one of unet/loss"):
        read_curve(tmp_path / "run", "loss")
