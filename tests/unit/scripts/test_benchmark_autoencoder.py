"""The autoencoder's benchmark compares like with like: same networks, same pictures, same weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.measure import ROOT


@pytest.mark.slow
def test_both_sides_decode_the_same_picture_and_train(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="the reference")
    pytest.importorskip("accelerate")
    sizes = ["--size", "32", "--decode_size", "64", "--batch", "2", "--widths", "8", "16", "16"]
    command = [sys.executable, "benchmarks/autoencoder.py", "--repeats", "1", "--steps", "1", *sizes]
    output = tmp_path / "report.json"
    done = subprocess.run([*command, "--output", output], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(output.read_text())
    assert len(report["rows"]) == 6
    assert all(row["ratio"] > 0 for row in report["rows"])
    checks = report["checks"]
    assert checks["whole, 64 pixels, batch 1: largest difference of the pictures"] < 1e-4
    losses = [value for name, value in checks.items() if "mean L1" in name]
    assert losses[0] == pytest.approx(losses[1], rel=0.5)
