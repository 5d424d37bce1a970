"""Compare trained autoencoders: a table of what they reach, their curves, their reconstructions side by side.

    python scripts/compare_autoencoders.py runs/emoji/autoencoder-kl-f4 runs/emoji/vq-f4 \
        --evaluation runs/emoji/evaluation --output docs/images/autoencoder

What enters: folders of training runs, and for each a folder of the same name that `scripts/evaluate.py autoencoder`
wrote. What leaves: rows of a table on the standard output, `<output>-curves.png` and `<output>-sheet.webp`.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from autoencoder import load_autoencoder
from ldm_pipe.data.dataset import load_records
from ldm_pipe.data.images import make_grid, resize, to_pil, to_tensor
from ldm_pipe.pretrained import LdmPipeError, atomic_write
from ldm_pipe.training.run.config import run_script
from ldm_pipe.training.run.figures import figure_png, subplots
from scripts.plot_training import read_curve, smoothed

SET = "validation drawings"
COLUMNS = {
    "psnr": ("PSNR, dB", ".2f"),
    "ssim": ("SSIM", ".3f"),
    "perceptual": ("perceptual", ".3f"),
    "frechet": ("Frechet", ".3f"),
    "kl": ("KL, nats", ".0f"),
    "codebook_usage": ("codes used", ".1%"),
    "codebook_perplexity": ("perplexity", ".0f"),
}
PANELS = {
    "autoencoder/reconstruction": "training L1",
    "autoencoder/perceptual": "training perceptual distance",
    "autoencoder/perplexity": "perplexity of a batch's codes",
}
WINDOW = 5  # logged values in a running mean


def read_results(run: Path, evaluation: Path) -> dict[str, Any]:
    """Read what was measured of a run.

    Raises: LdmPipeError naming the command that measures it.
    """
    path = evaluation / run.name / "results.json"
    if not path.is_file():
        command = f"python scripts/evaluate.py autoencoder --model {run / 'vae'} --output {path.parent}"
        raise LdmPipeError("the run has not been evaluated", str(path), command)
    return json.loads(path.read_text(encoding="utf-8"))


def table(runs: list[Path], evaluation: Path) -> list[str]:
    """Return the rows of the table; what was not measured is a dash."""
    titles = ["run", *(title for title, _ in COLUMNS.values()), "weights", "pictures per second in training"]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for run in runs:
        facts = read_results(run, evaluation)
        measured = facts["results"][SET]
        cells = [format(measured[key], kind) if key in measured else "-" for key, (_, kind) in COLUMNS.items()]
        speed = read_curve(run, "images_per_second")[1][-1]
        lines.append(f"| {run.name} | {' | '.join(cells)} | {facts['num_parameters']:,} | {speed:.1f} |")
    return lines


def plot_curves(runs: list[Path]) -> bytes:
    """Draw one panel per quantity with a line for every run that logged it, and return the PNG."""
    figure, panels = subplots(1, len(PANELS), figsize=(5 * len(PANELS), 4), layout="constrained")
    for axes, (tag, title) in zip(panels, PANELS.items(), strict=True):
        for number, run in enumerate(runs):
            try:
                steps, values = read_curve(run, tag)
            except LdmPipeError:
                continue  # a run without this part of the objective
            axes.plot(steps, smoothed(values, WINDOW), color=f"C{number}", linewidth=1.2, label=run.name)
        axes.set(title=title, xlabel="step", yscale="log")
        axes.grid(alpha=0.3, which="both")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    return figure_png(figure, dpi=100)


@torch.no_grad()
def draw_sheet(runs: list[Path], pictures: Path, num: int) -> bytes:
    """Lay pictures out in the first row and each run's reconstructions in one row below; return the WebP."""
    records, models = load_records(pictures, caption_column="caption"), [load_autoencoder(run / "vae") for run in runs]
    num, side = min(num, len(records)), models[0].config["sample_size"]
    images = torch.stack([to_tensor(resize(records.image(i * len(records) // num), side)) for i in range(num)])
    rebuilt = [model.decode(model.encode(images)).clamp(-1, 1) for model in models]
    cells = [to_pil(image) for row in (images, *rebuilt) for image in row]
    names = ["originals", *(run.name.replace("-", " ") for run in runs)]
    labels = [text for name in names for text in (name, *[""] * (num - 1))]
    buffer = io.BytesIO()
    make_grid(cells, num, labels=labels).save(buffer, format="WEBP", quality=90)
    return buffer.getvalue()


def main(argv: list[str]) -> None:
    """Compare the runs named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of training runs")
    parser.add_argument("--evaluation", type=Path, default=Path("runs/emoji/evaluation"), help="folder of evaluations")
    parser.add_argument("--pictures", type=Path, default=Path("data/emoji/data/noto/validation.parquet"))
    parser.add_argument("--num_pictures", type=int, default=12, help="columns of the sheet (default 12)")
    parser.add_argument("--output", required=True, type=Path, help="beginning of the names of both pictures")
    args = parser.parse_args(argv)
    print("\n".join(table(args.runs, args.evaluation)))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(Path(f"{args.output}-curves.png"), plot_curves(args.runs))
    atomic_write(Path(f"{args.output}-sheet.webp"), draw_sheet(args.runs, args.pictures, args.num_pictures))


if __name__ == "__main__":
    run_script(main)
