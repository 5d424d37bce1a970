"""Checkpoints that are whole or absent: staged folder, manifest of sizes and sha256, rename, only then prune.

What enters: named groups of tensors and a JSON state. What leaves: the same, verified. It knows no model and no
optimiser class beyond torch's `state_dict` form, and writes no pickle.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_pipe.data.shards import file_sha256
from ldm_pipe.pretrained import (
    LdmPipeError,
    atomic_write,
    load_tensors,
    read_json,
    safe_child,
    save_tensors,
    sync_folder,
)
from ldm_pipe.pretrained.locks import FileLock, is_alive

FORMAT = 1
PREFIX = "checkpoint-"
ASIDE = ".tmp-old"


def _needed_bytes(groups: Mapping[str, Mapping[str, Tensor]]) -> int:
    return sum(t.numel() * t.element_size() for tensors in groups.values() for t in tensors.values())


def save_checkpoint(
    run_folder: Path, step: int, groups: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], *, keep: int = 2
) -> Path:
    """Write `checkpoint-<step>` so that at every moment at least one whole checkpoint exists.

    Args:
        groups: one safetensors file per name, for instance {"unet": ..., "unet.ema": ..., "optimizer": ...}.
        state: JSON values (step, fingerprint, ...).
        keep: whole checkpoints to keep, at least 2.
    Returns: the new folder.
    Raises: LdmPipeError naming path, need and free space if the disk is too full; older checkpoints are untouched.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
    need, free = _needed_bytes(groups) + (1 << 20), shutil.disk_usage(run_folder).free
    if need > free:
        raise LdmPipeError(
            f"no room for a checkpoint: {need} bytes needed, {free} free", str(run_folder), "Free space."
        )
    final = run_folder / f"{PREFIX}{step}"
    staged = run_folder / f".tmp-{step}-{os.getpid()}"
    aside = run_folder / f"{ASIDE}{step}-{os.getpid()}"
    shutil.rmtree(staged, ignore_errors=True)
    try:
        staged.mkdir()
        for name, tensors in groups.items():
            save_tensors(staged / f"{name}.safetensors", tensors)
        atomic_write(staged / "state.json", json.dumps({**state, "step": step}, indent=1, sort_keys=True))
        files = {p.name: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in sorted(staged.iterdir())}
        atomic_write(staged / "manifest.json", json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1))
        if final.exists():  # this step was written before; `list_checkpoints` still finds it when it is set aside
            os.replace(final, aside)
        os.replace(staged, final)
        shutil.rmtree(aside, ignore_errors=True)
        sync_folder(run_folder)
    except OSError as error:
        raise LdmPipeError(
            f"checkpoint not written ({error})", str(final), "Older checkpoints are untouched."
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    _prune(run_folder, step, max(keep, 2))
    return final


def step_of(folder: Path) -> int:
    """Return the step in the name `checkpoint-<step>` or `.tmp-old<step>-<pid>`, or -1."""
    name = folder.name
    digits = name[len(ASIDE) :].split("-")[0] if name.startswith(ASIDE) else name[len(PREFIX) :]
    return int(digits) if digits.isascii() and digits.isdigit() else -1


def _prune(run_folder: Path, step: int, keep: int) -> None:
    """Remove what lies before the last `keep` checkpoints up to this step; later ones are never counted or touched.

    A damaged later checkpoint may stand beside the whole one that the run fell back to.
    """
    for old in [p for p in list_checkpoints(run_folder) if step_of(p) <= step][:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    for stale in run_folder.glob(".tmp-*"):
        pid = stale.name.rsplit("-", 1)[-1]
        if pid.isdigit() and not is_alive(int(pid)):
            shutil.rmtree(stale, ignore_errors=True)


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Return the checkpoint folders that carry a manifest, oldest first (not yet verified).

    One that was set aside by a process that ended before its replacement was in place counts too.
    """
    found: dict[int, Path] = {}
    for folder in (*run_folder.glob(f"{ASIDE}*"), *run_folder.glob(f"{PREFIX}*")):
        if step_of(folder) >= 0 and (folder / "manifest.json").is_file():
            found[step_of(folder)] = folder
    return [found[step] for step in sorted(found)]


def refuse_old_run(run_folder: Path) -> None:
    """Refuse to start anew where another run's checkpoints would be mistaken for this one's."""
    old = list_checkpoints(run_folder)
    if old:
        what = f"the folder holds checkpoints of an earlier run, the last is {old[-1].name}"
        raise LdmPipeError(what, str(run_folder), "Add --resume_from_checkpoint latest, or use another output_dir.")


def verify_checkpoint(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises: LdmPipeError naming the first file that is missing, of another size or of another sha256.
    """
    manifest = read_json(folder / "manifest.json")
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise LdmPipeError("the manifest is damaged", str(folder))
    if manifest.get("format") != FORMAT:
        raise LdmPipeError(f"checkpoint format {manifest.get('format')!r}, this version reads {FORMAT}", str(folder))
    for name, facts in manifest["files"].items():
        path = safe_child(folder, name, str(folder))
        facts = facts if isinstance(facts, dict) else {}
        try:
            whole = path.stat().st_size == facts.get("bytes") and file_sha256(path) == facts.get("sha256")
        except OSError as error:  # never there, or pruned by the run that writes here while it was read
            raise LdmPipeError(f"{name} is missing ({error.strerror})", str(folder)) from None
        if not whole:
            raise LdmPipeError(f"{name} is damaged (size or sha256 differs from the manifest)", str(folder))


def find_checkpoint(run_folder: Path, which: str) -> Path | None:
    """Choose the checkpoint to resume from: always a whole one.

    Args:
        which: "latest" (newest whole one, an error if there is none), "auto" (the same, else None) or a path.
    """
    if which not in ("latest", "auto"):
        folder = Path(which)
        verify_checkpoint(folder)
        return folder
    for folder in reversed(list_checkpoints(run_folder)):
        try:
            verify_checkpoint(folder)
            return folder
        except LdmPipeError as error:
            warnings.warn(f"{error}; falling back to the checkpoint before it", stacklevel=2)
    if which == "auto":
        return None
    raise LdmPipeError(
        "no whole checkpoint to resume from", str(run_folder), "Use --resume_from_checkpoint auto to start."
    )


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a verified checkpoint back: (groups, state)."""
    verify_checkpoint(folder)
    names = [name for name in read_json(folder / "manifest.json")["files"] if name.endswith(".safetensors")]
    groups = {name[: -len(".safetensors")]: load_tensors(folder / name) for name in sorted(names)}
    return groups, read_json(folder / "state.json")


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Flatten an optimiser's per-parameter state to tensors named `<parameter index>.<entry>`.

    Numbers become float64 tensors; what bitsandbytes wraps in a dict of its own lies beside the others. The
    hyper-parameters are not saved: they come from the run's config.
    """
    flat: dict[str, Tensor] = {}
    for index, entries in optimizer.state_dict()["state"].items():
        wrapped = [entry for entry in entries.values() if isinstance(entry, dict)]
        for name, value in itertools.chain(entries.items(), *(entry.items() for entry in wrapped)):
            if not isinstance(value, dict):
                number = isinstance(value, (int, float))
                flat[f"{index}.{name}"] = torch.tensor(value, dtype=torch.float64) if number else value
    return flat


def restore_optimizer(optimizer: torch.optim.Optimizer, flat: Mapping[str, Tensor]) -> None:
    """Put flattened state back into an optimiser over the same parameters."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in flat.items():
        index, name = key.split(".", 1)
        counted = value.ndim == 0 and value.dtype == torch.float64  # was a number; all of them count steps
        state.setdefault(int(index), {})[name] = int(value) if counted else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class RunLock(FileLock):
    """One writer per run folder: a lock file that the kernel holds for this process; a dead one's is taken over."""

    def __init__(self, run_folder: Path) -> None:
        """Take the lock, or raise LdmPipeError naming its holder."""
        fix = "Choose another folder."
        try:
            run_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LdmPipeError(f"cannot be made ({error.strerror})", str(run_folder), fix) from error
        try:
            super().__init__(run_folder / ".lock")
        except OSError as error:
            raise LdmPipeError(f"cannot be written ({error.strerror})", str(run_folder), fix) from error
