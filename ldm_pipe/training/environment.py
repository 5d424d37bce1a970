"""What a run was made with: command, commit, versions, hardware. It knows no training."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn


def git_commit() -> str | None:
    """Return the commit of the present folder, or None without git or outside a repository."""
    try:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return asked.stdout.strip() or None


def process_device() -> torch.device:
    """Return this process's own device: with several GPUs, the launcher tells each process its number."""
    number = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", number) if torch.cuda.is_available() else torch.device("cpu")


def hardware(device: torch.device) -> str:
    """Name the processor or GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def describe_environment(device: torch.device, num_processes: int, networks: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Describe a run as JSON values."""
    return {
        "command": " ".join(sys.argv),
        "commit": git_commit(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "accelerate", "safetensors", "numpy")},
        "machine": platform.machine(),
        "hardware": hardware(device),
        "device": str(device),
        "num_processes": num_processes,
        "num_threads": torch.get_num_threads(),
        "parameters": {name: sum(p.numel() for p in module.parameters()) for name, module in networks.items()},
    }
