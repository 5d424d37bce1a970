"""Draw pictures again and again with one side, in this process, and report the time of a batch as JSON.

python -m benchmarks.draw_warm --side ours --model FOLDER --batch 8 --pictures out.f32
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

PROMPTS = ("red apple", "octopus", "grinning face", "racing car", "pizza", "cat face", "rocket", "red heart")


def clock(device: str) -> tuple[float, float]:
    """Return CPU and wall seconds, once the device has done all it was given."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()
    return time.process_time(), time.perf_counter()


def load(side: str, model: str, device: str) -> Any:
    """Load the pipeline of a side, in float32 whatever the files hold."""
    import torch

    if side == "ours":
        from ldm_pipe import LatentDiffusionPipeline

        pipe: Any = LatentDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
    else:
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def first_latents(model: str, batch: int) -> Any:
    """Draw the same noise for both sides, shape (B, C, h, w)."""
    import torch

    config = json.loads((Path(model) / "unet" / "config.json").read_text(encoding="utf-8"))
    shape = (batch, config["in_channels"], config["sample_size"], config["sample_size"])
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def measure(draw: Callable[[], np.ndarray], calls: int, device: str) -> tuple[np.ndarray, float, float]:
    """Draw once to warm up, then `calls` times: (pictures, CPU seconds per call, wall seconds per call)."""
    pictures = draw()
    cpu, wall = clock(device)
    for _ in range(calls):
        draw()
    cpu_end, wall_end = clock(device)
    return pictures, (cpu_end - cpu) / calls, (wall_end - wall) / calls


def main() -> None:
    """Measure one side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=("ours", "diffusers"), required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--scale", type=float, default=4.0)
    parser.add_argument("--calls", type=int, default=2)
    parser.add_argument("--pictures", required=True, help="file for the pictures, raw float32")
    args = parser.parse_args()
    pipe = load(args.side, args.model, args.device)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(args.batch)]
    latents = first_latents(args.model, args.batch).to(args.device)
    settings = {"num_inference_steps": args.steps, "guidance_scale": args.scale, "output_type": "np"}
    pictures, cpu, wall = measure(
        lambda: pipe(prompts, latents=latents.clone(), **settings).images, args.calls, args.device
    )
    pictures.astype("float32").tofile(args.pictures)
    report = {"cpu_s": cpu, "wall_s": wall, "sampler": type(getattr(pipe, "scheduler", None)).__name__}
    if args.device != "cpu":
        import torch

        report["device_mib"] = torch.cuda.max_memory_allocated() / 2**20
    print(json.dumps(report))


if __name__ == "__main__":
    main()
