"""The benchmark of fine-tuning runs as a whole, both sides on every kind of input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.measure import ROOT


@pytest.mark.slow
def test_both_sides_are_measured_with_and_without_caches(tmp_path: Path) -> None:
    for name in ("diffusers", "peft", "accelerate", "torchvision", "pyarrow"):
        pytest.importorskip(name, reason="the side we compare with needs it")
    command = [sys.executable, "benchmarks/training.py", "--method", "lora", "--batch", "2", "--steps", "1"]
    command += ["--repeats", "1", "--output", str(tmp_path / "result.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 6
    assert all(0 < row["ratio"] < 100 for row in rows)
    assert done.stdout.startswith("| measurement |")
