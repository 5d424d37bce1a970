"""What an evaluation reads and leaves behind: batches of drawings; `results.json` with everything needed to measure
again, and pictures.

Records, facts and pictures enter; batches and files leave, each file whole or not at all.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm_pipe.data import images
from ldm_pipe.data.dataset import Records
from ldm_pipe.data.images import resize, to_tensor
from ldm_pipe.masking import masked
from ldm_pipe.pretrained import atomic_write
from ldm_pipe.training.run.environment import git_commit, hardware
from ldm_pipe.training.run.figures import figure_png, subplots


def write_results(folder: Path, device: torch.device, facts: dict[str, Any], began: float) -> None:
    """Write `results.json`: the facts, with command, commit, date, hardware and time.

    Args:
        folder: of the evaluation.
        device: on which it ran.
        facts: what was measured.
        began: reading of `time.perf_counter()` at the start.
    """
    report = {
        "command": "python " + shlex.join(masked(sys.argv)),
        "commit": git_commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": hardware(device),
        "seconds": round(time.perf_counter() - began, 1),
        **facts,
    }
    atomic_write(folder / "results.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a small PNG, as those in docs/images are."""
    images.save_picture(picture, path, optimize=True)


def plot_rates(results: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw both hit rates over the guidance scale."""
    figure, axes = subplots(figsize=(5, 3.2))
    scales = [row["guidance_scale"] for row in results]
    axes.plot(scales, [row["top5"] for row in results], "s--", label="among the first five")
    axes.plot(scales, [row["top1"] for row in results], "o-", label="first")
    axes.set(xlabel="guidance scale", ylabel="right concept", ylim=(0, 1), title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    atomic_write(path, figure_png(figure, dpi=120, bbox_inches="tight"))


def image_batches(records: Records, resolution: int, batch_size: int, name: str) -> Iterator[Tensor]:
    """Yield all pictures of a set in order, (B, 3, R, R), behind a progress bar."""
    with tqdm(total=len(records), desc=name) as bar:
        for first in range(0, len(records), batch_size):
            rows = range(first, min(first + batch_size, len(records)))
            yield torch.stack([to_tensor(resize(records.image(row), resolution)) for row in rows])
            bar.update(len(rows))
