"""Measure whole processes: CPU time, wall time and peak memory of a command, in an order that is fair to both sides.

What enters: commands. What leaves: numbers and their ratios. This file imports no torch on purpose: the kernel counts
the memory of the process that forks into the peak of its child, so whoever measures must be small.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("ours", "diffusers")
THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "pillow")


@dataclass(frozen=True)
class Usage:
    """What one process cost, and what it printed about itself (its last line, if that is JSON)."""

    cpu_s: float  # user + system
    wall_s: float
    peak_mib: float
    report: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of the table: a number of both sides, pair by pair, and what the ratio ours / diffusers should be."""

    name: str
    unit: str
    ours: tuple[float, ...]
    diffusers: tuple[float, ...]
    aim: float | None = None
    better: Literal["less", "more"] = "less"

    @property
    def ratios(self) -> list[float]:
        """Return ours / diffusers of each pair; a pair was measured one directly after the other."""
        return [a / b for a, b in zip(self.ours, self.diffusers, strict=True)]

    @property
    def ratio(self) -> float:
        """Return the median ratio."""
        return statistics.median(self.ratios)

    @property
    def met(self) -> bool | None:
        """Tell whether the aim is met; None where there is none."""
        if self.aim is None:
            return None
        return self.ratio <= self.aim if self.better == "less" else self.ratio >= self.aim


def environment(threads: int) -> dict[str, str]:
    """Return the environment of all children: the same threads, byte code kept, no network."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    env.update(dict.fromkeys(THREADS, str(threads)))
    return env | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}


def run(command: Sequence[str], *, threads: int = 1) -> Usage:
    """Run a command from the root of the project and return what it cost.

    Raises: RuntimeError with the end of its output, if it fails.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.perf_counter()
        child = subprocess.Popen(command, cwd=ROOT, env=environment(threads), stdout=out, stderr=err)
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            raise
        wall = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace").strip())
    if child.returncode != 0:
        raise RuntimeError(
            f"exit code {child.returncode} from {' '.join(command)}\n{texts[0][-500:]}\n{texts[1][-3000:]}"
        )
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
    last = texts[0].splitlines()[-1:] or [""]
    report = json.loads(last[0]) if last[0].startswith("{") else {}
    return Usage(usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss * unit / 2**20, report)


def interleave(repeats: int) -> Iterator[tuple[int, str]]:
    """Yield (pair, side) as A B, B A, A B, ...: a drift of the machine then favours neither side."""
    for i in range(repeats):
        for side in SIDES if i % 2 == 0 else SIDES[::-1]:
            yield i, side


def compare(commands: Mapping[str, Sequence[str]], repeats: int, *, threads: int = 1) -> dict[str, list[Usage]]:
    """Measure both sides `repeats` times, interleaved."""
    found: dict[str, list[Usage]] = {side: [] for side in SIDES}
    for i, side in interleave(repeats):
        usage = run(commands[side], threads=threads)
        found[side].append(usage)
        cost = f"{usage.cpu_s:6.2f} s CPU, {usage.wall_s:6.2f} s wall, {usage.peak_mib:5.0f} MiB"
        print(f"  {side:9} {i + 1}/{repeats}: {cost}", file=sys.stderr, flush=True)
    return found


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Write median (least to most) with significant digits."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}g} ({low:.{digits}g} to {high:.{digits}g})"


def markdown(rows: Sequence[Row]) -> str:
    """Write the table for docs/results.md."""
    lines = [
        "| measurement | ours | diffusers | ours / diffusers | aim | met |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        sign = "<=" if row.better == "less" else ">="
        aim = "" if row.aim is None else f"{sign} {row.aim:g}"
        met = {None: "", True: "yes", False: "no"}[row.met]
        numbers = f"{spread(row.ours)} {row.unit} | {spread(row.diffusers)} {row.unit} | {spread(row.ratios)}"
        lines.append(f"| {row.name} | {numbers} | {aim} | {met} |")
    return "\n".join(lines)


def write_results(path: Path, rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
    """Write facts and rows as JSON, with every ratio and whether its aim is met."""
    told = [asdict(row) | {"ratio": row.ratio, "met": row.met} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**facts, "rows": told}, indent=1) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """Describe hardware and versions, and how busy the machine is with other things."""
    versions = {"python": platform.python_version()}
    for name in ("ldm-pipe", *PACKAGES):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": versions,
        "commit": commit.stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
