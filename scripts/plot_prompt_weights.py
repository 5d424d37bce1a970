"""Plot how much red a picture has against the weight of "red" in its prompt.

What enters: a model folder. What leaves: a plot and a JSON file of the shares of red pixels, by weight and emphasis.

    python scripts/plot_prompt_weights.py --output docs/images/prompt-weights.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_pipe import LatentDiffusionPipeline
from ldm_pipe.pretrained import atomic_write
from ldm_pipe.training.run.figures import figure_png, subplots

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
PROMPTS = ("(red:{w}) apple", "(red:{w}) circle", "(red:{w}) square", "(red:{w}) green apple")
EMPHASES = ("context", "interpolate", "scale")


def red_share(images: Tensor) -> Tensor:
    """Return the share of red among the pixels that are not white, shape (B,).

    A pixel is red where its red is above 0.4 and at least 1.5 times its green and its blue.

    Args:
        images: in [0, 1], shape (B, 3, H, W).
    """
    red, green, blue = images.unbind(1)
    is_red = (red > 0.4) & (red > 1.5 * green) & (red > 1.5 * blue)
    drawn = images.amin(dim=1) < 0.9
    return is_red.sum(dim=(1, 2)) / drawn.sum(dim=(1, 2)).clamp(min=1)


def measure(pipe: LatentDiffusionPipeline, args: argparse.Namespace) -> dict[str, list[list[float]]]:
    """Return the mean share of each prompt for each weight, by emphasis; every weight is drawn from the same seeds."""
    seeds, found = list(range(args.num_images)), {}
    for emphasis in EMPHASES:
        found[emphasis] = []
        for weight in WEIGHTS:
            images: Any = pipe(
                [prompt.format(w=weight) for prompt in PROMPTS], num_images_per_prompt=args.num_images,
                seed=seeds * len(PROMPTS), output_type="pt", num_inference_steps=args.steps,
                prompt_syntax={"emphasis": emphasis},
            ).images  # fmt: skip
            found[emphasis].append(red_share(images).reshape(len(PROMPTS), -1).mean(dim=1).tolist())
    return found


def plot(found: dict[str, list[list[float]]], path: Path) -> None:
    """Draw one line per emphasis, the mean of all prompts, and thin ones for the prompts."""
    figure, axes = subplots(figsize=(5, 3.5))
    for emphasis, rows in found.items():
        shares = torch.tensor(rows)  # (W, P)
        (line,) = axes.plot(WEIGHTS, shares.mean(dim=1), marker="o", label=emphasis)
        axes.plot(WEIGHTS, shares, color=line.get_color(), alpha=0.25, linewidth=1)
    axes.set(xlabel='weight of "red"', ylabel="share of red pixels", ylim=(0, 1))
    axes.legend()
    atomic_write(path, figure_png(figure, dpi=130, bbox_inches="tight"))


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, measure, plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder; without it the shipped model")
    parser.add_argument("--num-images", type=int, default=8, help="per prompt and weight")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, required=True, help="PNG file; the numbers go beside it")
    args = parser.parse_args(argv)
    pipe = LatentDiffusionPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    found = measure(pipe, args)
    plot(found, args.output)
    facts = {"weights": WEIGHTS, "prompts": PROMPTS, "images": args.num_images, "steps": args.steps, "red": found}
    atomic_write(args.output.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")
    for emphasis, rows in found.items():
        print(emphasis, *(f"{w:g}: {sum(row) / len(row):.3f}" for w, row in zip(WEIGHTS, rows, strict=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
