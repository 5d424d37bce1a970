"""The loading benchmark measures both sides in fresh processes and writes what it found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.loading import commands, main, parse
from benchmarks.measure import ROOT, SIDES

TINY = ROOT / "tests" / "data" / "tiny_pipeline"


def test_both_sides_get_the_same_model_dtype_and_device() -> None:
    args = parse(["--model", str(TINY), "--device", "cpu"])
    both = commands(args, "float16", "--first-step")
    assert set(both) == set(SIDES)
    ours, theirs = ([word for word in both[side] if word != side] for side in SIDES)
    assert ours == theirs
    assert ours[-1] == "--first-step"


@pytest.mark.parametrize("words", [["--only", "all"], ["--repeats", "0"], ["--side", "ours"]])
def test_wrong_options_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse(words)


@pytest.mark.slow
def test_it_runs_as_a_whole(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    out = tmp_path / "loading.json"
    assert main(["--model", str(TINY), "--dtypes", "float32", "--repeats", "1", "--output", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"].split(",")[0] for row in rows] == ["load"] * 5 + ["cold start to first step"] * 3
    assert all(row["ours"][0] > 0 and row["diffusers"][0] > 0 for row in rows)
