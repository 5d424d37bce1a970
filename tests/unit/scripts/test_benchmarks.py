"""The benchmark measures what it says: processes, pairs, ratios; and, where diffusers is installed, runs as a whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.against_diffusers import float_difference, parse, png_difference
from benchmarks.measure import ROOT, SIDES, Row, environment, interleave, markdown, run

TINY = ROOT / "tests" / "data" / "tiny_pipeline"


def test_both_sides_run_equally_often_and_take_turns_at_being_first() -> None:
    order = list(interleave(4))
    assert [[side for i, side in order if i == pair] for pair in range(4)] == [[*SIDES], [*SIDES[::-1]]] * 2


def test_run_counts_the_cpu_time_of_the_child() -> None:
    idle = run([sys.executable, "-S", "-c", "import time; time.sleep(0.3)"])
    busy = run([sys.executable, "-S", "-c", "import time\nwhile time.process_time() < 0.3: pass"])
    assert idle.wall_s >= 0.3 > idle.cpu_s
    assert busy.cpu_s >= 0.29


def test_a_small_process_sees_the_memory_of_the_child_alone() -> None:
    code = (
        "import sys; from benchmarks.measure import run\n"
        "fill = 'data = bytearray(200 * 2**20); data[::4096] = data[::4096]'\n"
        "print(*(run([sys.executable, '-S', '-c', code]).peak_mib for code in ('pass', fill)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    small, large = map(float, done.stdout.split())
    assert small < 60
    assert 200 <= large < 260


def test_run_reads_the_report_of_the_child_and_passes_its_threads_on() -> None:
    code = "import json, os; print('noise'); print(json.dumps({'threads': os.environ['OMP_NUM_THREADS']}))"
    assert run([sys.executable, "-c", code], threads=3).report == {"threads": "3"}
    assert set(environment(2)["OMP_NUM_THREADS"]) == {"2"}


def test_a_failing_command_ends_the_comparison_with_what_it_said() -> None:
    with pytest.raises(RuntimeError, match=r"exit code 1[^\0]*no such thing"):
        run([sys.executable, "-c", "raise SystemExit('no such thing')"])


def test_a_ratio_is_that_of_the_pairs_and_meets_its_aim_on_the_right_side() -> None:
    row = Row("time", "s", (1.0, 3.0, 2.0), (2.0, 3.0, 8.0), aim=0.5)
    assert row.ratios == [0.5, 1.0, 0.25]
    assert row.ratio == 0.5
    assert row.met is True
    assert Row("speed", "/s", (2.0,), (2.0,), aim=1.2, better="more").met is False
    assert Row("wall", "s", (2.0,), (2.0,)).met is None
    assert markdown([row]).splitlines()[-1].endswith("| 0.5 (0.25 to 1) | <= 0.5 | yes |")


def test_differences_of_pictures_are_found(tmp_path: Path) -> None:
    import array

    from PIL import Image

    one, two = Image.new("RGB", (3, 2), (10, 20, 30)), Image.new("RGB", (3, 2), (10, 20, 30))
    two.putpixel((2, 1), (10, 27, 30))
    for name, image in (("one", one), ("two", two)):
        image.save(tmp_path / f"{name}.png")
    a, b = ((tmp_path / f"{name}.png").read_bytes() for name in ("one", "two"))
    assert png_difference(a, a) == 0
    assert png_difference(a, b) == 7
    floats = array.array("f", [0.0, 1.0, -0.5]).tobytes()
    assert float_difference(floats, array.array("f", [0.0, 0.75, -0.5]).tobytes()) == 0.25
    with pytest.raises(RuntimeError, match="drew 3 and 2"):
        float_difference(floats, floats[:8])


def test_steps_and_scale_are_the_models_own_unless_given() -> None:
    own = json.loads((TINY / "ldm_pipe.json").read_text(encoding="utf-8"))["defaults"]
    args = parse(["--model", str(TINY), "--device", "cpu"])
    assert (args.steps, args.scale) == (own.get("num_inference_steps", 50), own.get("guidance_scale", 7.5))
    given = parse(["--model", str(TINY), "--device", "cpu", "--steps", "3", "--scale", "1", "--only", "warm"])
    assert (given.steps, given.scale, given.parts) == (3, 1.0, ["warm"])
    with pytest.raises(SystemExit):
        parse(["--model", str(TINY), "--only", "hot"])


@pytest.mark.slow
def test_the_whole_comparison_runs_and_both_sides_draw_the_same(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="diffusers is what we compare with")
    pytest.importorskip("accelerate", reason="both training loops use it")
    out = tmp_path / "result.json"
    command = [sys.executable, "benchmarks/against_diffusers.py", "--model", str(TINY), "--device", "cpu"]
    command += ["--repeats", "1", "--steps", "3", "--calls", "1", "--train-batch", "2", "--train-steps", "1"]
    done = subprocess.run([*command, "--output", str(out)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    assert {row["name"].split(",")[0].split(":")[0] for row in result["rows"]} == {"cold", "warm", "train"}
    assert all(0 < row["ratio"] < 100 for row in result["rows"])
    checks = result["checks"]
    assert all(value <= 1 for name, value in checks.items() if "levels of 255" in name)
    assert all(value <= 1e-4 for name, value in checks.items() if "in [0, 1]" in name)
    assert done.stdout.startswith("| measurement |")
