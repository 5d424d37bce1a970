"""Files, read and written safely: JSON of sane size, safetensors, weights of one component, whole or not at all.

What enters: paths. What leaves: values, or one clear error. This file knows no networks and no hub.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

MAX_JSON_BYTES = 64 * 1024 * 1024  # a CLIP vocabulary is 1 MB; more than this is not a config
MAX_JSON_DEPTH = 32

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class LdmPipeError(ValueError):
    """Report what came, where, and what to do: the one error of this package for what a user can get wrong."""

    def __init__(self, what: str, where: str = "", how_to_fix: str = "") -> None:
        """Keep the three parts, so that the command line can print them on three lines."""
        self.what, self.where, self.how_to_fix = what, where, how_to_fix
        super().__init__(what, where, how_to_fix)

    def __str__(self) -> str:
        """Join the parts to one line."""
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}. {self.how_to_fix}" if self.how_to_fix else text


def _json_depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        if depth > MAX_JSON_DEPTH:
            return depth
        children: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                children.extend(item.values())
            elif isinstance(item, list):
                children.extend(item)
        level = children
    return depth


def read_json(path: str | Path) -> Any:
    """Read a JSON file of sane size and depth.

    Raises: LdmPipeError if it is missing, too large, too deep or not JSON.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise LdmPipeError(f"the file is larger than {MAX_JSON_BYTES} bytes", str(path), "This is not a config.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LdmPipeError("the file does not exist", str(path)) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise LdmPipeError(f"cannot be read as JSON ({error})", str(path), "Fetch or export the folder anew.") from None
    if _json_depth(value) > MAX_JSON_DEPTH:
        raise LdmPipeError(f"nested deeper than {MAX_JSON_DEPTH} levels", str(path), "This is not a config.")
    return value


def _umask_mode() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write a file so that it is there whole or not at all: temporary name, flush to disk, rename.

    The file gets the mode the umask asks for (safetensors' own writer leaves 0600).
    Raises: LdmPipeError naming the path if it cannot be written.
    """
    path = Path(path)
    payload = data.encode("utf-8") if isinstance(data, str) else data
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:80]}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _umask_mode())
        os.replace(temporary, path)
        temporary = None
        sync_folder(path.parent)
    except OSError as error:
        need = f"{len(payload)} bytes are needed"
        raise LdmPipeError(f"cannot be written ({error.strerror or error}; {need})", str(path)) from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def sync_folder(folder: str | Path) -> None:
    """Flush a folder's entries to disk, where the system can (a rename is only durable after this)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as one safetensors file, atomically. Shared memory is written out once per name."""
    whole = {
        name: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    atomic_write(path, safetensors_bytes(whole, {"format": "pt", **(metadata or {})}))


def _read_tensor(stream: BinaryIO, start: int, entry: Mapping[str, Any]) -> Tensor:
    if entry["dtype"] not in SAFETENSORS_DTYPES:
        raise ValueError(f"a tensor of type {entry['dtype']}")
    tensor = torch.empty(entry["shape"], dtype=SAFETENSORS_DTYPES[entry["dtype"]])
    stream.seek(start + entry["data_offsets"][0])
    if stream.readinto(tensor.view(-1).view(torch.uint8).numpy()) != tensor.nbytes:  # type: ignore[attr-defined]
        raise ValueError("the file ends too early")
    return tensor


def load_tensors(path: str | Path, *, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file tensor by tensor, as pages of a mapped file stay beside what is made of them.

    Raises: LdmPipeError naming the file if it is missing, truncated or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise LdmPipeError("the file does not exist", str(path))
    try:
        with safe_open(str(path), framework="pt"), path.open("rb") as stream:  # the former checks the header
            start = 8 + int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(start - 8))
            header.pop("__metadata__", None)
            return {name: _read_tensor(stream, start, entry).to(device) for name, entry in header.items()}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise LdmPipeError(f"not a whole safetensors file ({error})", str(path), "Fetch or export it anew.") from None


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read the words in the header of a safetensors file.

    Raises: LdmPipeError naming the file if it is missing, truncated or of another format.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise LdmPipeError(f"not a whole safetensors file ({error})", str(path), "Fetch it anew.") from None


def safe_child(folder: Path, name: str, where: str) -> Path:
    """Join a name read from a file to its folder; a name that leads out of the folder is refused."""
    if not name or name.startswith(("/", "\\", "~")) or ".." in Path(name).parts or ":" in name or "\0" in name:
        raise LdmPipeError(f"the file name {name!r} leads out of its folder", where, "Do not trust this model.")
    return folder / name


def load_folder_tensors(
    folder: Path, weights_name: str, variant: str | None = None, *, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """Read the weights of one component: one safetensors file, or shards with their index.

    Raises: LdmPipeError; pickle files are named but not read.
    """
    suffix = f".{variant}" if variant else ""
    single = folder / f"{weights_name}{suffix}.safetensors"
    if single.is_file():
        return load_tensors(single, device=device)
    index = folder / f"{weights_name}.safetensors.index{suffix}.json"
    if index.is_file():
        files = sorted(set(read_json(index)["weight_map"].values()))
        tensors: dict[str, Tensor] = {}
        for name in files:
            tensors.update(load_tensors(safe_child(folder, str(name), str(index)), device=device))
        return tensors
    present = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    what = f"no {single.name} there, only {present}" if present else "the folder is missing or empty"
    raise LdmPipeError(what, str(folder), "Give a folder with safetensors weights, or another `variant`.")
