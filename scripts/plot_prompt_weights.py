"""Plot how much red a picture has against the weight of "red" in its prompt.

What enters: a model folder. What leaves: a plot and a JSON file of the shares of red pixels, by weight and emphasis.

    python scripts/plot_prompt_weights.py --model runs/emoji/diffusion/pipeline --output docs/images/prompt-weights.png
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

WEIGHTS = (0.0, 0.5, 0.8, 1.0, 1.2, 1.5, 2.0)
PROMPTS = ("(red:{w}) apple", "(red:{w}) heart", "(red:{w}) car", "(red:{w}) balloon")
EMPHASES = ("interpolate", "scale")


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


def measure(pipe: LatentDiffusionPipeline, args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the mean share for each weight, by emphasis; every weight is drawn from the same seeds."""
    seeds = list(range(args.num_images))
    found: dict[str, list[float]] = {}
    for emphasis in EMPHASES:
        found[emphasis] = []
        for weight in WEIGHTS:
            shares = []
            for prompt in PROMPTS:
                images: Any = pipe(
                    prompt.format(w=weight), num_images_per_prompt=args.num_images, seed=seeds, output_type="pt",
                    num_inference_steps=args.steps, prompt_syntax={"emphasis": emphasis},
                ).images  # fmt: skip
                shares.append(red_share(images).mean())
            found[emphasis].append(float(torch.stack(shares).mean()))
    return found


def plot(found: dict[str, list[float]], path: Path) -> None:
    """Draw one line per emphasis."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.5))
    for emphasis, shares in found.items():
        axes.plot(WEIGHTS, shares, marker="o", label=emphasis)
    axes.set(xlabel='weight of "red"', ylabel="share of red pixels", ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


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
    args.output.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for emphasis, shares in found.items():
        print(emphasis, *(f"{w:g}: {share:.3f}" for w, share in zip(WEIGHTS, shares, strict=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
