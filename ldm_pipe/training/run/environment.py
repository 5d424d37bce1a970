"""What a run was made with: command, commit, versions, hardware. It knows no training."""

from __future__ import annotations

import os
import platform
import resource
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ldm_pipe.masking import masked
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.training.run.zero import check_zero, zero_stage

if TYPE_CHECKING:
    from accelerate import Accelerator


def start_processes(mixed_precision: str) -> Accelerator:
    """Join the processes that the launcher started; the run's config decides the precision, not the launcher.

    Raises: LdmPipeError for fp16 without a GPU, and where DeepSpeed cannot do what is asked for.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import patch_environment

    if zero_stage():
        check_zero(mixed_precision)
    if mixed_precision == "fp16" and not torch.cuda.is_available():
        raise LdmPipeError("fp16 needs a GPU", "mixed_precision", "Use bf16 or no.")
    AcceleratorState._reset_state()  # an earlier run in this process (a notebook) may have had another precision
    with patch_environment(ACCELERATE_USE_DEEPSPEED="false"):  # accelerate starts the processes, zero.py DeepSpeed
        return Accelerator(mixed_precision=mixed_precision, cpu=not torch.cuda.is_available())


def peak_memory(device: torch.device) -> int:
    """Return the most memory this process has held so far, in bytes: of the GPU, or of the machine without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def plain_errors(run_folder: str) -> Iterator[None]:
    """Say in words what libraries say when memory runs out or another process of the run ends.

    Raises: LdmPipeError for these two.
    """
    again = "Start again with --resume_from_checkpoint latest."
    try:
        yield
    except torch.OutOfMemoryError as error:
        fix = "Halve train_batch_size and double gradient_accumulation_steps, or use bf16 or gradient_checkpointing. "
        raise LdmPipeError(f"the GPU's memory is full ({error})", run_folder, fix + again) from error
    except RuntimeError as error:
        known = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe")
        if not torch.distributed.is_initialized() or not any(word in str(error).lower() for word in known):
            raise
        what = f"another process of this run ended ({' '.join(str(error).split()):.200})"
        raise LdmPipeError(what, run_folder, f"The last checkpoint is kept. {again}") from error


def git_commit() -> str | None:
    """Return the commit of this code, or None where it does not lie in a repository of its own, or without git."""
    here = Path(__file__).resolve()
    ask: dict[str, Any] = {"cwd": here.parent, "capture_output": True, "text": True, "check": False}
    try:
        if subprocess.run(["git", "ls-files", "--error-unmatch", here.name], **ask).returncode:
            return None  # installed, perhaps in a folder of somebody's project
        return subprocess.run(["git", "rev-parse", "HEAD"], **ask).stdout.strip() or None
    except OSError:
        return None


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
        "command": shlex.join(masked(sys.argv)),
        "commit": git_commit(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("ldm-pipe", "torch", "accelerate", "safetensors", "numpy")},
        "machine": platform.machine(),
        "hardware": hardware(device),
        "device": str(device),
        "num_processes": num_processes,
        "num_threads": torch.get_num_threads(),
        "parameters": {name: sum(p.numel() for p in module.parameters()) for name, module in networks.items()},
    }
