"""The page at the end of a run: `summary.md` with figures, loss curve, sheets and config, beside `losses.png`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ldm_pipe.pretrained import atomic_write, read_json
from ldm_pipe.training.run.figures import figure_png, subplots
from ldm_pipe.training.run.records import Records


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each value and the window - 1 before it."""
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i + 1 - window) : i + 1])]


def curve(history: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return steps and values of one name."""
    rows = [row for row in history if row.get(name) is not None]
    return [row["step"] for row in rows], [row[name] for row in rows]


def draw_curves(history: Sequence[Mapping[str, Any]], names: Sequence[str]) -> bytes | None:
    """Draw one panel per name as PNG, raw values pale behind their running mean; None without matplotlib."""
    size = (4.5 * len(names), 3)
    try:
        figure, grid = subplots(1, len(names), figsize=size, squeeze=False, layout="constrained")
    except ImportError:
        return None
    for name, axes in zip(names, grid.flat, strict=True):
        steps, values = curve(history, name)
        axes.plot(steps, values, color="C0", alpha=0.25, linewidth=0.8)
        axes.plot(steps, smoothed(values, max(1, len(values) // 20)), color="C0", linewidth=1.5)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("step", fontsize=9)
        if values and 0 < 10 * min(values) < max(values):
            axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
    return figure_png(figure, dpi=110)


def _table(rows: Mapping[str, Any]) -> str:
    return "| what | value |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows.items())


def _last_values(history: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the mean of the last tenth of every curve."""
    known: dict[str, None] = {}
    for row in history:
        known |= dict.fromkeys(name for name, value in row.items() if name != "step" and value is not None)
    means = {}
    for name in known:
        _, values = curve(history, name)
        tail = values[-max(1, len(values) // 10) :]
        means[name] = f"{sum(tail) / len(tail):.5g}"
    return means


def write_summary(folder: Path, figures: Mapping[str, Any], records: Records) -> None:
    """Write the page of a run whose `config.yaml` and `run.json` lie in the folder.

    Args:
        folder: of the run.
        figures: steps, epochs, memory and so on, by their words.
        records: history and sheets.
    """
    history, environment = records.history, read_json(folder / "run.json")
    names = [name for name in _last_values(history) if name.endswith("/loss")]
    picture = draw_curves(history, names) if names else None
    speed = records.pictures / records.seconds if records.seconds else 0.0
    lines = [f"# {folder.name}\n", _table({**figures, "pictures per second": f"{speed:.1f}"})]
    if picture is not None:
        atomic_write(folder / "losses.png", picture)
        lines.append("![losses](losses.png)\n")
    elif names:
        lines.append("No curve: matplotlib is not installed.\n")
    for name, path in records.sheets.items():
        lines.append(f"## {name}\n\n![{name}]({quote(Path(os.path.relpath(path, folder)).as_posix())})\n")
    lines.append("## Numbers at the end\n\nMeans of the last tenth of each curve.\n\n" + _table(_last_values(history)))
    plain = {name: value for name, value in environment.items() if name not in ("before", "command")}
    lines.append(f"## Made with\n\n```\n{environment['command']}\n```\n\n" + _table(plain))
    config = (folder / "config.yaml").read_text(encoding="utf-8")
    lines.append(f"## Config\n\n```yaml\n{config}```\n")
    atomic_write(folder / "summary.md", "\n".join(lines))
