"""A folder of safetensors shards with a manifest: written whole or not at all, checked when read.

Enters: batches of named tensors, row by row along their first axis. Leaves: the same rows, in one tensor or read on
demand. This file does not know what the tensors mean.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm_pipe.pretrained import (
    LdmPipeError,
    atomic_write,
    load_tensors,
    read_json,
    safe_child,
    save_tensors,
    sync_folder,
)
from ldm_pipe.pretrained.locks import FileLock

MANIFEST = "manifest.json"
FORMAT = 1


def settings_key(settings: Mapping[str, Any]) -> str:
    """Return the sha256 of the settings (JSON, sorted keys): the name of the folder that holds what they produce."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Hash a file in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_shards(
    root: str | Path,
    settings: Mapping[str, Any],
    batches: Iterable[Mapping[str, Tensor]],
    *,
    shard_rows: int = 4096,
) -> Path:
    """Write batches to `root/<key of the settings>`; the folder appears under that name only when it is whole.

    If another process publishes the same folder first, its result is kept.
    """
    root = Path(root)
    target = root / settings_key(settings)
    temporary = root / f".tmp-{target.name[:16]}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    shards: list[dict[str, Any]] = []
    waiting: list[dict[str, Tensor]] = []
    try:
        temporary.mkdir(parents=True)
        for batch in batches:
            # copies: a row of a padded batch must not keep the whole batch in memory
            waiting.append({name: tensor.detach().to("cpu", copy=True) for name, tensor in batch.items()})
            if _num_rows(waiting) >= shard_rows:
                shards.append(_write_shard(temporary, len(shards), waiting))
                waiting = []
        if waiting:
            shards.append(_write_shard(temporary, len(shards), waiting))
        manifest = {"format": FORMAT, "settings": dict(settings), "shards": shards}
        atomic_write(temporary / MANIFEST, json.dumps(manifest, indent=1))
        try:
            os.rename(temporary, target)
        except OSError:
            if not (target / MANIFEST).is_file():
                raise
        else:
            sync_folder(root)
    except OSError as error:
        raise LdmPipeError(f"the cache cannot be written ({error.strerror or error})", str(root)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


@contextmanager
def only_one(root: str | Path, key: str) -> Iterator[None]:
    """Let one process at a time do some work; the others wait, and should then look whether it is done.

    The lock is the kernel's: it ends with the process that holds it. Where there is none (Windows), a second one is
    refused.
    """
    path = Path(root) / f".lock-{key[:16]}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, wait=True)
    except OSError as error:
        raise LdmPipeError(f"the cache cannot be written ({error.strerror or error})", str(root)) from error
    try:
        yield
    finally:
        lock.release()


def _num_rows(batches: Iterable[Mapping[str, Tensor]]) -> int:
    return sum(next(iter(batch.values())).shape[0] for batch in batches)


def _write_shard(folder: Path, number: int, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    tensors = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    path = folder / f"shard-{number:05d}.safetensors"
    save_tensors(path, tensors)
    return {
        "file": path.name,
        "rows": _num_rows(batches),
        "bytes": path.stat().st_size,
        "sha256": file_sha256(path),
    }


class Shards:
    """The rows of a folder written by `write_shards`.

    Args:
        folder: the folder.
        max_memory_bytes: up to this size all rows are held in memory as one tensor per name; beyond, they are read on
            demand.
        verify: compare the sha256 of every file with the manifest.
    Raises: LdmPipeError naming the file that is missing, of another size or damaged.
    """

    def __init__(self, folder: str | Path, *, max_memory_bytes: int = 4 << 30, verify: bool = True) -> None:
        self.folder = Path(folder)
        manifest = read_json(self.folder / MANIFEST)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise self._damaged(MANIFEST, "was written in another format")
        try:
            self.settings: dict[str, Any] = manifest["settings"]
            entries = [(str(s["file"]), int(s["rows"]), int(s["bytes"]), str(s["sha256"])) for s in manifest["shards"]]
        except (KeyError, TypeError, ValueError):
            raise self._damaged(MANIFEST, "lacks entries") from None
        if settings_key(self.settings) != self.folder.name:
            raise self._damaged(MANIFEST, "does not belong to this folder")
        self._paths = [safe_child(self.folder, name, str(self.folder / MANIFEST)) for name, *_ in entries]
        for path, (name, _, size, sha256) in zip(self._paths, entries, strict=True):
            if not path.is_file():
                raise self._damaged(name, "is missing")
            if path.stat().st_size != size:
                raise self._damaged(name, f"has {path.stat().st_size} bytes instead of {size}")
            if verify and file_sha256(path) != sha256:
                raise self._damaged(name, "does not have the recorded sha256")
        self._starts = np.cumsum([0, *(rows for _, rows, _, _ in entries)])
        self.tensors: dict[str, Tensor] | None = None
        if sum(size for _, _, size, _ in entries) <= max_memory_bytes:
            parts = [load_tensors(path) for path in self._paths]
            self.tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}

    def _damaged(self, name: str, what: str) -> LdmPipeError:
        return LdmPipeError(
            f"cache file {name} {what}", str(self.folder), "Delete this folder; it will be computed anew."
        )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, name: str, indices: Iterable[int]) -> Tensor:
        """Return rows of one tensor, in the order asked for."""
        index = np.asarray(list(indices), dtype=np.int64)
        if len(index) and not (index.min() >= 0 and index.max() < len(self)):
            raise LdmPipeError(f"row {index.min()}..{index.max()} of {len(self)} does not exist", str(self.folder))
        if self.tensors is not None:
            return self.tensors[name][torch.from_numpy(index)]
        found: list[Tensor | None] = [None] * len(index)
        shard_of = np.searchsorted(self._starts, index, side="right") - 1
        for shard in np.unique(shard_of):
            try:
                with safe_open(self._paths[shard], framework="pt") as file:
                    stored = file.get_slice(name)
                    for position in np.flatnonzero(shard_of == shard):
                        row = int(index[position] - self._starts[shard])
                        found[position] = stored[row : row + 1]
            except (OSError, SafetensorError) as error:
                raise self._damaged(self._paths[shard].name, f"cannot be read ({error})") from error
        return torch.cat([row for row in found if row is not None])
