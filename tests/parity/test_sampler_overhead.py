"""The benchmark of the loops: both sides compute the same, and it writes what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks.sampler_overhead import PAIRS, main, ours, theirs
from tests.parity.test_samplers_diffusers import difference

# lms, dpm2: diffusers ends otherwise; heun, dpm2: the evaluations in between are told other times
SAME = sorted(set(PAIRS) - {"dpm2", "lms"})


@pytest.mark.parametrize("name", SAME)
def test_both_sides_do_the_same_work(name: str) -> None:
    start, output = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    mine, reference = (make(name, start, output, 20)() for make in (ours, theirs))
    assert difference(mine, reference) < 1e-4


def test_the_table_has_a_row_per_sampler_and_the_json_all_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "overhead.json"
    assert main(["--only", "ddim,unipc", "--steps", "4", "--repeats", "2", "--output", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:4]] == ["ddim", "unipc"]
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [row["name"] for row in rows] == ["ddim", "unipc"]
    assert all(len(row["ours"]) == len(row["diffusers"]) == 2 for row in rows)
    with pytest.raises(SystemExit):
        main(["--only", "nosuch"])
