"""The benchmark of prompts: both sides compute the same, and it writes what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks.prompt_encoding import encoders, main, steps

TINY = Path(__file__).resolve().parents[1] / "data" / "tiny_pipeline"


@torch.no_grad()
def test_both_sides_do_the_same_work() -> None:
    sides, grammar = encoders(TINY, 64, 2)
    ours, theirs = sides["ours"](), sides["diffusers"]()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert torch.equal(grammar().stages[0].conditions[0].tokens, ours)  # type: ignore[attr-defined]
    sides, anew = steps(TINY, 8)
    torch.testing.assert_close(sides["ours"](), sides["diffusers"](), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sides["ours"](), anew(), atol=1e-5, rtol=1e-5)


def test_the_table_has_both_rows_and_the_json_all_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.json"
    sizes = ["--width", "64", "--layers", "1", "--size", "8", "--repeats", "2"]
    assert main(["--model", str(TINY), *sizes, "--output", str(file)]) == 0
    assert "through the prompt grammar" in capsys.readouterr().out
    found = json.loads(file.read_text(encoding="utf-8"))
    assert [len(row["ours"]) for row in found["rows"]] == [2, 2]
    assert found["grammar_ratio"] > 0
