"""Plot the loss curves of training runs side by side.

    python scripts/plot_training.py runs/emoji/objective-eps runs/emoji/objective-v --output docs/images/objectives.png

What enters: run folders with TensorBoard files. What leaves: a PNG with one panel per run, each on its own scale, since
losses of different objectives are not comparable; the axis of the steps is shared.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ldm_pipe.pretrained import LdmPipeError, atomic_write
from ldm_pipe.training.run.config import run_script
from ldm_pipe.training.run.figures import figure_png, subplots
from ldm_pipe.training.run.summary import smoothed


def read_curve(run: Path, tag: str) -> tuple[list[int], list[float]]:
    """Read one scalar of a run; where a resumed run wrote a step again, the later value counts.

    Raises: LdmPipeError if there is no TensorBoard file or no such scalar in it; the known ones are listed.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run / "tensorboard"
    files = sorted(folder.glob("events.*"))
    if not files:
        raise LdmPipeError("no TensorBoard files", str(folder), "train with --report_to tensorboard")
    values: dict[int, float] = {}
    known: set[str] = set()
    for file in files:
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        known |= set(events.Tags()["scalars"])
        if tag in events.Tags()["scalars"]:
            values |= {event.step: event.value for event in events.Scalars(tag)}
    if not values:
        raise LdmPipeError(f"no scalar {tag!r}", str(folder), f"use one of {', '.join(sorted(known))}")
    steps = sorted(values)
    return steps, [values[step] for step in steps]


def plot(runs: list[Path], tag: str, window: int) -> bytes:
    """Draw one panel per run, the raw values pale behind their running mean, and return the PNG."""
    columns = min(3, len(runs))
    lines = -(-len(runs) // columns)
    figure, grid = subplots(
        lines, columns, figsize=(3.6 * columns, 2.4 * lines), sharex=True, squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(runs) :]:
        axes.set_visible(False)
    for run, axes in zip(runs, grid.flat[: len(runs)], strict=True):
        steps, values = read_curve(run, tag)
        axes.plot(steps, values, color="C0", alpha=0.2, linewidth=0.7)
        axes.plot(steps, smoothed(values, window), color="C0", linewidth=1.5)
        axes.set_title(run.name, fontsize=9)
        axes.set_yscale("log" if min(values) > 0 else "linear")
        axes.grid(alpha=0.3, which="both")
    figure.supxlabel("step", fontsize=9)
    figure.supylabel(tag, fontsize=9)
    return figure_png(figure, dpi=120)


def main(argv: list[str]) -> None:
    """Plot the runs named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of training runs")
    parser.add_argument("--tag", default="unet/loss", help="scalar to plot (default unet/loss)")
    parser.add_argument("--window", type=int, default=10, help="logged values in the running mean (default 10)")
    parser.add_argument("--output", required=True, type=Path, help="PNG file to write")
    args = parser.parse_args(argv)
    if args.window < 1:
        raise LdmPipeError(f"--window is {args.window}", how_to_fix="Use a whole number from 1.")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(args.output, plot(args.runs, args.tag, args.window))
    sys.stdout.write(f"{args.output}\n")


if __name__ == "__main__":
    run_script(main)
