"""What sampling costs besides the network: CPU time per step of our samplers and of diffusers' schedulers.

    python -m benchmarks.sampler_overhead [--only ddim,unipc] [--steps 50] [--size 16] [--repeats 9] [--output FILE]

There is no network: its output is always the same tensor. Both sides choose the times, turn the output into x0 and
step, in one process and one thread, by turns; diffusers in the loop of its pipelines. It takes 10 s of CPU.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Row, interleave, machine, markdown, write_results
from ldm_pipe import samplers
from ldm_pipe.denoiser import Denoiser
from ldm_pipe.noise import Noise
from ldm_pipe.schedule import Final, NoiseSchedule, Spacing

AIM = 1 / 3
# ours -> diffusers' class, its settings, and the spacing of both
PAIRS: dict[str, tuple[str, dict[str, Any], Spacing]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}, "leading"),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}, "leading"),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}, "leading"),
    "euler": ("EulerDiscreteScheduler", {}, "trailing"),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}, "trailing"),
    "heun": ("HeunDiscreteScheduler", {}, "trailing"),
    "dpm2": ("KDPM2DiscreteScheduler", {}, "trailing"),
    "lms": ("LMSDiscreteScheduler", {}, "trailing"),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}, "leading"),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "leading"),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}, "leading"),
    "unipc": ("UniPCMultistepScheduler", {}, "leading"),
    "deis": ("DEISMultistepScheduler", {"solver_order": 3}, "leading"),
    "lcm": ("LCMScheduler", {"clip_sample": False}, "lcm"),
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
Call = Callable[[], Tensor]


def ours(name: str, start: Tensor, output: Tensor, num_steps: int) -> Call:
    """Return one call of our sampler."""
    schedule, spacing = NoiseSchedule(), PAIRS[name][2]
    sampler = samplers.get(name)
    denoiser = Denoiser(lambda x, t: output, schedule)
    final: Final = "first" if name == "deis" else "clean"  # where diffusers' ends

    def call() -> Tensor:
        steps = schedule.steps(num_steps, spacing=spacing, grid=sampler.grid, final=final)
        noise = Noise.from_generator(torch.Generator().manual_seed(0))
        return sampler(lambda x, t: denoiser.to_denoised(output, x, t), start * steps.init_scale, steps, noise=noise)

    return call


def theirs(name: str, start: Tensor, output: Tensor, num_steps: int) -> Call:
    """Return one call of diffusers' scheduler."""
    import diffusers

    class_name, settings, spacing = PAIRS[name]
    spaced = {} if class_name == "LCMScheduler" else {"timestep_spacing": spacing, "steps_offset": 1}
    scheduler = getattr(diffusers, class_name)(**BETAS, **settings, **spaced)
    draws = name in ("ddpm", "euler_ancestral", "dpmpp_2m_sde", "lcm")

    def call() -> Tensor:
        scheduler.set_timesteps(num_steps)
        told = {"generator": torch.Generator().manual_seed(0)} if draws else {}
        x = start * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            scheduler.scale_model_input(x, t)
            x = scheduler.step(output, t, x, **told, return_dict=False)[0]
        return x

    return call


def compare(name: str, args: argparse.Namespace) -> Row:
    """Measure both sides by turns: microseconds of CPU per step."""
    start, output = torch.randn(2, 1, 4, args.size, args.size, generator=torch.Generator().manual_seed(1))
    calls = {side: make(name, start, output, args.steps) for side, make in (("ours", ours), ("diffusers", theirs))}
    found: dict[str, list[float]] = {side: [] for side in calls}
    for call in calls.values():
        call()
    for _, side in interleave(args.repeats):
        began = time.process_time()
        calls[side]()
        found[side].append((time.process_time() - began) / args.steps * 1e6)
    return Row(name, "us", tuple(found["ours"]), tuple(found["diffusers"]), aim=AIM)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PAIRS), help="samplers, comma-separated")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--size", type=int, default=16, help="side of the latents, which have 4 channels")
    parser.add_argument("--repeats", type=int, default=9, help="pairs of calls")
    parser.add_argument("--output", type=Path, help="JSON file for all numbers, versions and hardware")
    args = parser.parse_args(argv)
    args.only = args.only.split(",")
    unknown = [name for name in args.only if name not in PAIRS]
    if unknown:
        parser.error(f"no pair for {', '.join(unknown)}; known: {', '.join(PAIRS)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison, print the table, write the JSON."""
    args = parse(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    facts = machine()
    facts["command"] = shlex.join(
        ["python", "-m", "benchmarks.sampler_overhead", *(sys.argv[1:] if argv is None else argv)]
    )
    rows = [compare(name, args) for name in args.only]
    facts["load_average_after"] = machine()["load_average"]
    print(markdown(rows))
    print(f"\nCPU time per step of {args.steps}, latents (1, 4, {args.size}, {args.size}), {args.repeats} pairs")
    if args.output:
        write_results(args.output, rows, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
