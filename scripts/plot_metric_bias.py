"""Plot what too few pictures do to each metric: two halves of one set of drawings, against a set of another style.

    python scripts/plot_metric_bias.py --output docs/images/metric-bias.png

What enters: the drawings, as thumbnails. What leaves: one plot. A distance of two sets of one kind should be 0; it is
shown as a share of the distance between the two styles at the largest N. Shares of neighbours are shown as they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ldm_pipe.metrics.features import load_features
from ldm_pipe.metrics.frechet import frechet_distance
from ldm_pipe.metrics.kernels import cmmd, kid, median_distance
from ldm_pipe.metrics.neighbours import manifolds
from ldm_pipe.metrics.pictures import open_pictures
from ldm_pipe.metrics.scores import vendi_score
from ldm_pipe.metrics.sliced import mind
from ldm_pipe.pretrained import LdmPipeError, atomic_write
from ldm_pipe.training.run.config import run_script
from ldm_pipe.training.run.figures import figure_png, subplots

FOLDER = "data/emoji/data"
PLAIN = {"is_skin_tone_variant": False, "is_gender_variant": False, "is_flag": False}
NUMBERS = (20, 40, 80, 160, 320, 600)


def metrics(width: float) -> tuple[dict[str, Callable[[Tensor, Tensor], float]], dict[str, Callable[..., float]]]:
    """Return distances, which should be 0, and shares.

    Args:
        width: of the Gaussian kernel.
    """
    distances = {
        "KID": lambda a, b: kid(a, b).value,
        "MMD, Gaussian": lambda a, b: cmmd(a, b, sigma=width).value,
        "MMD, Gaussian, biased": lambda a, b: cmmd(a, b, sigma=width, unbiased=False).value,
        "MIND": lambda a, b: mind(a, b, num_projections=200).value,
        "Frechet": frechet_distance,
    }
    shares = {
        "precision, k = 3": lambda a, b: manifolds(a, b, k=3).precision.value,
        "recall, k = 3": lambda a, b: manifolds(a, b, k=3).recall.value,
        "density, k = 5": lambda a, b: manifolds(a, b, k=5).density.value,
        "coverage, k = 5": lambda a, b: manifolds(a, b, k=5).coverage.value,
        "Vendi / 10": lambda a, b: vendi_score(b) / 10,
    }
    return distances, shares


def main(argv: list[str]) -> None:
    """Measure and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", default="pixels:8", help="as for evaluate.py metrics (pixels:8)")
    parser.add_argument("--repeats", type=int, default=8, help="random halves at each N (8)")
    parser.add_argument("--output", type=Path, default=Path("docs/images/metric-bias.png"))
    args = parser.parse_args(argv)
    if args.repeats < 2:
        raise LdmPipeError(f"--repeats is {args.repeats}", "plot_metric_bias", "Use at least 2.")
    net, sets = load_features(args.features), []
    for style in ("noto", "twemoji"):
        pictures = open_pictures(f"{FOLDER}/{style}/train.parquet", side=64, filters=PLAIN)
        parts = [range(i, min(i + 100, len(pictures))) for i in range(0, len(pictures), 100)]
        sets.append(torch.cat([net(pictures.read(part))["vectors"] for part in parts]).double())
    drawings, others = sets
    generator = torch.Generator().manual_seed(0)
    distances, shares = metrics(median_distance(drawings))
    figure, axes = subplots(1, 2, figsize=(11, 4.2))
    print("| metric | " + " | ".join(f"N = {num}" for num in NUMBERS) + " |\n|---" + "|---" * len(NUMBERS) + "|")
    for axis, group in zip(axes, (distances, shares), strict=True):
        for name, measure in group.items():
            unit = measure(drawings[: NUMBERS[-1]], others[: NUMBERS[-1]]) if group is distances else 1.0
            rows = []
            for num in NUMBERS:
                found = []
                for _ in range(args.repeats):
                    order = torch.randperm(len(drawings), generator=generator)
                    found.append(measure(drawings[order[:num]], drawings[order[num : 2 * num]]) / unit)
                rows.append(torch.tensor(found).double())
            mean, spread = torch.stack(rows).mean(1), torch.stack(rows).std(1)
            axis.errorbar(NUMBERS, mean, spread, marker="o", markersize=3, capsize=2, label=name)
            print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in mean.tolist()) + " |", flush=True)
        axis.set(xscale="log", xlabel="N in each half")
        axis.set_xticks(NUMBERS, [str(num) for num in NUMBERS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set(title="distances, as a share of that between two styles")
    axes[0].set_yscale("symlog", linthresh=0.1)
    axes[1].set(title=f"shares and scores ({net.name})")
    figure.tight_layout()
    atomic_write(args.output, figure_png(figure, dpi=110))
    print(args.output)


if __name__ == "__main__":
    run_script(main)
