"""Export from the command line: diffusers loads the folder without a word about keys and draws the same picture."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm_pipe.cli import main
from ldm_pipe.pipelines.export import export_diffusers

pytest.importorskip("diffusers", reason="the reference")

TINY = Path(__file__).parents[1] / "data" / "tiny_pipeline"


def test_export_prints_the_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    """A training run holds its model in `pipeline/`."""
    shutil.copytree(TINY, tmp_path / "run" / "pipeline")
    with caplog.at_level(logging.WARNING):
        assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--sampler", "dpmpp_2m"]) == 0
    captured = capsys.readouterr()
    found = re.search(r"largest difference .*: ([0-9.e-]+)", captured.out)
    assert found is not None
    assert float(found[1]) <= 1e-4
    assert "note: Pass guidance_scale=3 in diffusers" in captured.out
    said = captured.err + caplog.text + captured.out
    assert not re.search(
        r"unexpected|missing|not initialized|newly initialized|were not used|steps_offset", said, re.IGNORECASE
    )
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_the_exported_folder_is_the_native_format(tmp_path: Path) -> None:
    assert main(["export", str(TINY), str(tmp_path / "out"), "--no-check"]) == 0
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "again"), "--no-check"]) == 0
    for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        first, second = (tmp_path / name / f"{part}.safetensors" for name in ("out", "again"))
        assert first.read_bytes() == second.read_bytes()


def test_a_target_that_cannot_be_written_is_told_and_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").touch()
    assert main(["export", str(TINY), str(tmp_path / "file" / "out")]) == 2
    assert main(["export", str(TINY), str(tmp_path / "out"), "--sampler", "edm"]) == 2
    assert main(["export", str(TINY), str(TINY), "--overwrite"]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
    assert "sampler 'edm'" in capsys.readouterr().err


def test_the_script_is_the_command() -> None:
    script = Path(__file__).parents[2] / "scripts" / "export_diffusers.py"
    run = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=True)
    assert "source" in run.stdout


@pytest.mark.parametrize("sampler", ["ddpm", "euler"])
def test_every_sampler_exports(tmp_path: Path, sampler: str) -> None:
    report = export_diffusers(TINY, tmp_path / "out", sampler=sampler, dtype=torch.bfloat16)
    assert report.difference is not None
    assert report.difference <= 1e-4
    assert [line for line in report.warnings if "Deprecat" not in line and "__array__" not in line] == []
