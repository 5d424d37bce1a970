"""Measure the error of every sampler against the number of network evaluations, on known answers.

    python benchmarks/sampler_error.py

writes the table of docs/samplers.md (between its markers) and docs/images/sampler-error.png. The data are a mixture of
three Gaussians, the denoiser is exact (ldm_pipe/metrics/mixture.py), noise law and spacing are EDM's, so all of the
error is the sampler's. Deterministic samplers: root mean square distance of where they take a point from where the
exact flow takes it. Stochastic ones have no such point: Wasserstein-1 distance of their samples from the distribution,
which even true samples have; that floor is measured too.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm_pipe import samplers
from ldm_pipe.denoiser import Denoised
from ldm_pipe.metrics.mixture import GaussianMixture
from ldm_pipe.noise import Noise
from ldm_pipe.pretrained import atomic_write
from ldm_pipe.schedule.laws import EDM
from ldm_pipe.training.run.figures import figure_png, subplots

ROOT = Path(__file__).resolve().parents[1]
MIXTURE = GaussianMixture([[-1.2], [0.2], [1.3]], [0.25, 0.35, 0.15], [3, 4, 2])
LAW = EDM(sigma_data=1.0)
EVALUATIONS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
IN_TABLE = (8, 16, 32, 64, 128, 256)
NUM_POINTS = 200
WIDTH = 50  # values of one state: samplers that take norms need more than one
WITHOUT = "lcm"  # jumps along the flow, which only a distilled network knows
BEGIN, END = "<!-- errors: written by benchmarks/sampler_error.py -->", "<!-- /errors -->"
# one hue per family, the more stages the darker; what is stochastic has a panel of its own
COLOURS = {
    "ddim": "#7f7f7f", "euler": "#7f7f7f", "heun": "#1b9e77", "dpm2": "#66a61e", "lms": "#e6ab02", "plms": "#a6761d",
    "deis": "#d95f02", "dpmpp_2s": "#9ecae1", "dpmpp_2m": "#4292c6", "dpmpp_3m": "#08306b", "unipc": "#e7298a",
    "ddpm": "#7f7f7f", "euler_ancestral": "#bdbdbd", "dpm2_ancestral": "#66a61e", "dpmpp_2s_ancestral": "#9ecae1",
    "dpmpp_sde": "#6baed6", "dpmpp_2m_sde": "#2171b5", "dpmpp_3m_sde": "#08306b", "edm": "#1b9e77",
    "restart": "#d95f02", "annealed_langevin": "#e6ab02", "predictor_corrector": "#7570b3",
}  # fmt: skip
SAME = {"euler": "ddim", "euler_ancestral": "ddpm"}  # on the same rows, the latter where alpha is 1; one line for both


@dataclass(frozen=True)
class Curve:
    """The error of one sampler at rising numbers of evaluations."""

    name: str
    random: bool
    evaluations: tuple[int, ...]
    errors: tuple[float, ...]

    def near(self, number: int) -> float | None:
        """Return the error at a number of evaluations, None if none was measured within 15 % of it."""
        best = min(self.evaluations, key=lambda found: abs(math.log(found / number)))
        return self.errors[self.evaluations.index(best)] if abs(best - number) <= 0.15 * number else None


def error(name: str, num_steps: int, num_samples: int) -> tuple[int, float]:
    """Return the number of evaluations and the error of one run."""
    sampler = samplers.get(name)
    steps = LAW.steps(num_steps, grid=sampler.grid)
    calls = 0
    if sampler.always_stochastic:
        generator = torch.Generator().manual_seed(0)
        unit = torch.randn(num_samples, generator=generator, dtype=torch.float64)
    else:
        unit = torch.special.ndtri((torch.arange(NUM_POINTS, dtype=torch.float64) + 0.5) / NUM_POINTS)
    x = steps.init_scale * unit.reshape(-1, WIDTH)

    def denoise(x: Tensor, t: Tensor) -> Denoised:
        nonlocal calls
        calls += 1
        return Denoised(MIXTURE.x0(x.reshape(-1, 1), *LAW.alpha_sigma(t)).reshape(x.shape))

    noise = Noise.from_generator(torch.Generator().manual_seed(num_steps))
    out = sampler(denoise, x, steps, noise=noise if sampler.always_stochastic else None)
    if sampler.always_stochastic:
        return calls, MIXTURE.wasserstein(out)
    start = (1.0, float(steps.sigma[0]))
    true = MIXTURE.flow(x.reshape(-1, 1), start, (1.0, 0.0)).reshape(x.shape)
    return calls, float((out - true).square().mean().sqrt())


def measure(name: str, num_samples: int) -> Curve:
    """Run a sampler with as many steps as each number of evaluations allows."""
    few, more = (error(name, n, 2 * WIDTH)[0] for n in (20, 40))
    per_step = (more - few) / 20
    found: dict[int, float] = {}
    for number in IN_TABLE if samplers.get(name).always_stochastic else EVALUATIONS:
        num_steps = round((number - few) / per_step) + 20
        if num_steps >= 2:
            calls, value = error(name, num_steps, num_samples)
            found[calls] = value
    return Curve(name, samplers.get(name).always_stochastic, tuple(found), tuple(found.values()))


def floor(num_samples: int) -> float:
    """Return the mean distance that as many true samples have."""
    draws = [MIXTURE.sample(num_samples, torch.Generator().manual_seed(seed)) for seed in range(8)]
    return sum(map(MIXTURE.wasserstein, draws)) / len(draws)


def table(curves: Sequence[Curve], lowest: float, num_samples: int) -> str:
    """Write both tables in Markdown, best at 32 evaluations first."""
    parts = []
    for random, title in (
        (False, "Deterministic: root mean square distance from the exact flow"),
        (True, f"Stochastic: Wasserstein-1 distance of {num_samples:,} samples; true samples have {lowest:.4f}"),
    ):
        rows = sorted((c for c in curves if c.random == random), key=lambda c: c.near(32) or math.inf)
        head = " | ".join(str(number) for number in IN_TABLE)
        lines = [f"**{title}**", "", f"| evaluations | {head} |", "|---|" + "---:|" * len(IN_TABLE)]
        for curve in rows:
            cells = ["" if value is None else f"{value:.1e}" for value in map(curve.near, IN_TABLE)]
            lines.append(f"| `{curve.name}` | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def apart(heights: Sequence[float], gap: float, lowest: float) -> list[float]:
    """Move labels until neighbours are a gap apart and none is below the lowest, as little as needs be."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed = list(heights)
    for below, above in itertools.pairwise(order):
        placed[above] = max(placed[above], placed[below] + gap)
    shift = sum(placed[i] - heights[i] for i in order) / len(order)
    shift = min(shift, max(min(placed) - lowest, 0))
    return [height - shift for height in placed]


def label_ends(axes: Any, curves: Sequence[Curve], gap: float) -> None:
    """Write the name of each curve at its right end, in its colour, without overlap; gap in decades."""
    ends = [math.log10(curve.errors[-1]) for curve in curves]
    lowest = math.log10(axes.get_ylim()[0]) + gap / 2
    for curve, end, height in zip(curves, ends, apart(ends, gap, lowest), strict=True):
        colour = COLOURS[curve.name]
        twins = [name for name, twin in SAME.items() if twin == curve.name]
        axes.plot([curve.evaluations[-1], 290], [10**end, 10**height], color=colour, lw=0.6, clip_on=False)
        axes.text(300, 10**height, " = ".join([curve.name, *twins]), color=colour, va="center", fontsize=9)


def plot(curves: Sequence[Curve], lowest: float, path: Path) -> None:
    """Draw both panels."""
    figure, (left, right) = subplots(1, 2, figsize=(13.5, 6.2))
    left.set_title("Deterministic: distance from the exact flow", loc="left", fontsize=11)
    left.set_ylabel("root mean square error of a trajectory")
    numbers = torch.tensor([8.5, 26.0])
    for order in (1, 2, 3):  # a fan of slopes where no curve is
        line = 1.5e-3 * (numbers / 8.5) ** -order
        left.plot(numbers, line, color="0.6", lw=0.9, ls=(0, (4, 3)))
        left.text(27, float(line[-1]), f"order {order}", color="0.45", fontsize=8.5, va="center")
    left.set_ylim(4e-6, 2)
    right.set_title("Stochastic: distance from the distribution", loc="left", fontsize=11)
    right.set_ylabel("Wasserstein-1 distance of the samples")
    right.axhspan(1e-9, lowest, color="0.94", zorder=0)
    right.text(7.3, lowest * 0.95, "as many true samples", color="0.45", fontsize=8.5, va="top")
    right.set_ylim(lowest / 4, 3)
    for axes, random, gap in ((left, False, 0.17), (right, True, 0.1)):
        shown = [curve for curve in curves if curve.random == random and curve.name not in SAME]
        axes.set(xscale="log", yscale="log", xlim=(7, 280), xlabel="network evaluations")
        for curve in shown:
            axes.plot(curve.evaluations, curve.errors, color=COLOURS[curve.name], lw=1.8, marker="o", ms=3)
        label_ends(axes, shown, gap)
        axes.set_xticks(IN_TABLE, [str(number) for number in IN_TABLE])
        axes.minorticks_off()
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(w_pad=8)
    atomic_write(path, figure_png(figure, dpi=110, bbox_inches="tight"))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all samplers and write the table and the plot."""
    parser = argparse.ArgumentParser(description="Error of every sampler against evaluations, on known answers.")
    parser.add_argument("--samples", type=int, default=20_000, help="of the stochastic samplers, a multiple of 50")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "samplers.md")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "images" / "sampler-error.png")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    names = [name for name in samplers.NAMES if name != WITHOUT]
    curves = [measure(name, args.samples) for name in tqdm(names, unit="sampler")]
    lowest = floor(args.samples)
    before, rest = args.page.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    text = f"{before}{BEGIN}\n\n{table(curves, lowest, args.samples)}\n\n{END}{after}"
    args.page.write_text(text, encoding="utf-8")
    plot(curves, lowest, args.plot)
    print(f"wrote {args.page} and {args.plot}")


if __name__ == "__main__":
    main()
