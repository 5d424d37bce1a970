"""The command `plan`: what a training run will cost, before it is started."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm_pipe.training.tasks.plan import Cost


def _size(num: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if num < 1000:
            return f"{num:.0f} {unit}" if unit == "bytes" else f"{num:.3g} {unit}"
        num /= 1000
    return f"{num:.3g} TB"


def run_plan(args: argparse.Namespace) -> int:
    """Print the plan of a config."""
    import torch

    from ldm_pipe.training.tasks.plan import plan, read_plan_config

    config = read_plan_config(args.config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    costs = plan(config, device, measure=not args.no_measure)
    if args.json:
        sys.stdout.write(json.dumps([dataclasses.asdict(cost) for cost in costs], indent=2) + "\n")
        return 0
    lines = [line for cost in costs for line in _told(cost, config.train_batch_size)]
    disk, kept = sum(cost.disk for cost in costs), config.checkpoints_total_limit
    lines.append(f"memory of a process: {_size(sum(cost.memory for cost in costs))} and what libraries take")
    lines.append(f"disk: {_size(disk)} per checkpoint; {_size(disk * (kept + 1))} while one beyond {kept} is written")
    times = [cost.seconds for cost in costs if cost.seconds is not None]
    if len(times) < len(costs):
        lines.append("time: not measured")
    else:
        steps, hours = config.max_train_steps, sum(times) * config.max_train_steps / 3600
        what = f"{sum(times):.3g} s per step of the networks alone, measured on this {device.type}"
        lines.append(f"time: {what}; {steps} steps take {hours:.3g} h")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _told(cost: Cost, batch: int) -> list[str]:
    sizes = {
        "weights": cost.weights,
        "gradients": cost.gradients,
        "optimiser": cost.optimizer,
        "average": cost.average,
        f"activations of {batch} pictures": cost.activations,
    }
    first = f"{cost.name}: {cost.parameters:,} parameters, {cost.operations / 1e9:.4g} GFLOP per step"
    return [first, *(f"  {_size(size):>9}  {name}" for name, size in sizes.items() if size)]
