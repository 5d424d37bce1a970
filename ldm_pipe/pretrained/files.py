"""Files, read and written safely: JSON of sane size, safetensors, weights of one component, whole or not at all.

What enters: paths. What leaves: values, or one clear error. This file knows no networks and no hub.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import stat
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MAX_JSON_BYTES = 64 * 1024 * 1024  # a CLIP vocabulary is 1 MB; more than this is not a config
MAX_JSON_DEPTH = 32
MAPS = os.name == "posix"  # elsewhere a mapped file cannot be replaced

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# Eight bits: read as float16, which holds each of their values. They are made to be stored, not to be reckoned with.
FLOAT8 = {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
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
    """Count the levels of a value: those of plain values below lists and tables are one."""
    depth, level = 1, [value]
    while depth <= MAX_JSON_DEPTH:
        level = [item for item in level if isinstance(item, (dict, list)) and item]
        if not level:
            return depth
        level = list(chain.from_iterable(item.values() if isinstance(item, dict) else item for item in level))
        depth += 1
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
        raise LdmPipeError("the file does not exist", str(path), "Check the path, or fetch the folder anew.") from None
    except (OSError, ValueError, RecursionError) as error:  # also whole numbers of more than 4300 digits
        if isinstance(error, LdmPipeError):
            raise
        raise LdmPipeError(f"cannot be read as JSON ({error})", str(path), "Fetch or export the folder anew.") from None
    if _json_depth(value) > MAX_JSON_DEPTH:
        raise LdmPipeError(f"nested deeper than {MAX_JSON_DEPTH} levels", str(path), "This is not a config.")
    return value


def new_file(beside: Path) -> tuple[Path, int]:
    """Make an empty file of a name of its own in the folder of another; the kernel gives it the mode of the umask.

    Asking for the umask means setting it, for all threads: files made meanwhile would be open to everybody.
    Returns: its path, and its mode.
    """
    path = beside.with_name(f".{beside.name[:40]}.{uuid.uuid4().hex[:12]}.tmp")
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return path, stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)


def new_folder(beside: Path) -> Path:
    """Make an empty folder of a name of its own beside another path, with the mode that the umask asks for."""
    path = beside.with_name(f".{beside.name[:40]}.{uuid.uuid4().hex[:12]}.tmp")
    path.mkdir(mode=0o777)
    return path


@contextlib.contextmanager
def _atomically(path: Path, num_bytes: int) -> Iterator[Path]:
    """Give a temporary name to write to; then flush it to disk and rename it. It is there whole or not at all.

    The file gets the mode the umask asks for.
    Raises: LdmPipeError naming the path if it cannot be written.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, mode = new_file(path)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if stat.S_IMODE(os.stat(temporary).st_mode) != mode:  # safetensors' own writer leaves 0600
            os.chmod(temporary, mode)
        os.replace(temporary, path)
        temporary = None
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LdmPipeError(f"cannot be written ({reason}; {num_bytes} bytes are needed)", str(path)) from error
    finally:
        if temporary is not None and temporary.exists():
            temporary.unlink()


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write a file so that it is there whole or not at all.

    Raises: LdmPipeError naming the path if it cannot be written.
    """
    payload = data.encode("utf-8") if isinstance(data, str) else data
    with _atomically(Path(path), len(payload)) as temporary:
        temporary.write_bytes(payload)


def sync_folder(folder: str | Path) -> None:
    """Flush a folder's entries to disk, where the system can (a rename is only durable after this)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as one safetensors file, atomically; memory they share is written once per name.

    Only tensors that lie elsewhere than contiguously on the CPU are copied first.
    """
    whole: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu").contiguous()
        if plain.data_ptr() in seen or plain.untyped_storage().nbytes() != plain.nbytes:
            plain = plain.clone()
        seen.add(plain.data_ptr())
        whole[name] = plain
    with _atomically(Path(path), sum(x.nbytes for x in whole.values())) as temporary:
        save_file(whole, temporary, {"format": "pt", **(metadata or {})})


def _view(file: mmap.mmap, start: int, entry: Mapping[str, Any]) -> Tensor:
    """Show one tensor of a mapped file."""
    stored = FLOAT8.get(entry["dtype"])
    dtype, shape = stored or SAFETENSORS_DTYPES[entry["dtype"]], entry["shape"]
    first, last = entry["data_offsets"]
    if first == last:
        return torch.empty(shape, dtype=torch.float16 if stored else dtype)
    data = torch.frombuffer(file, dtype=torch.uint8, count=last - first, offset=start + first)
    aligned = (start + first) % dtype.itemsize == 0
    values = (data if aligned else data.clone()).view(dtype).view(shape)
    return values.half() if stored else values


def _place(source: Tensor, device: torch.device, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    """Copy a tensor straight to where it shall be; on other devices number type and layout are changed there."""
    if device.type != "cpu":
        return source.to(device, copy=True).to(dtype=dtype, memory_format=layout)
    return source.to(dtype, copy=True, memory_format=layout)


def _forget(file: mmap.mmap, first: int, last: int) -> None:
    """Let the pages of a part of a mapped file go; they come back when they are read again."""
    if hasattr(file, "madvise") and first < last:
        first -= first % mmap.PAGESIZE
        file.madvise(mmap.MADV_DONTNEED, first, last - first)


def is_finite(x: Tensor) -> bool:
    """Tell whether a tensor has neither NaN nor infinity; its sum tells it fastest, but that of halves may overflow."""
    return not x.is_floating_point() or bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def refuse_nonfinite(names: Iterable[str], where: str) -> None:
    """Raise LdmPipeError with the first ten names of tensors with NaN or infinity, if there are any."""
    if bad := list(names):
        raise LdmPipeError(f"NaN or infinity in {first_ten(bad)}", where, "Use an earlier checkpoint.")


def first_ten(lines: Iterable[str]) -> str:
    """Join the first ten lines, and say how many more there are."""
    lines = list(lines)
    more = f" and {len(lines) - 10} more" if len(lines) > 10 else ""
    return "; ".join(lines[:10]) + more


def refuse_dtypes(found: Iterable[str], where: str) -> None:
    """Refuse number types that are not read, and tell of those that are read as others.

    Raises: LdmPipeError naming them.
    """
    found = set(found)
    if unknown := sorted(found - SAFETENSORS_DTYPES.keys() - FLOAT8.keys()):
        fix = f"Save it in one of {', '.join(SAFETENSORS_DTYPES)}."
        raise LdmPipeError(f"the file is whole, but its numbers of type {unknown} are not read", where, fix)
    if eight := sorted(found & FLOAT8.keys()):
        warnings.warn(f"{where}: {eight} are read as float16; what 8 bits rounded away stays lost", stacklevel=3)


def load_tensors(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    finite: bool = False,
    mapped: bool = False,
) -> dict[str, Tensor]:
    """Read a safetensors file.

    Args:
        dtype: of floating-point tensors in memory; None is the file's.
        memory_format: of tensors with four axes.
        finite: also look at every number.
        mapped: tensors that need no change stay in the mapped file, where the system can replace mapped files. Writing
            to them is private to this process; the file may be replaced or deleted, but not changed in place.
    Raises: LdmPipeError naming the file if it is missing, truncated or of another format; tensors that are not finite.
    """
    path, device = Path(path), torch.device(device)
    if not path.is_file():
        raise LdmPipeError("the file does not exist", str(path), "Check the path, or fetch the folder anew.")
    found, bad = {}, []
    try:
        with safe_open(str(path), framework="pt"), path.open("rb") as stream:  # the former checks the header
            start = 8 + int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(start - 8))
            header.pop("__metadata__", None)
            refuse_dtypes({entry["dtype"] for entry in header.values()}, str(path))
            file = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        for name, entry in header.items():
            source = _view(file, start, entry)
            wanted = dtype if dtype and source.is_floating_point() else source.dtype
            layout = memory_format if source.ndim == 4 else torch.contiguous_format
            stays = mapped and MAPS and (device.type, wanted, layout) == ("cpu", source.dtype, torch.contiguous_format)
            found[name] = source if stays else _place(source, device, wanted, layout)
            if finite and not is_finite(found[name]):
                bad.append(name)
            _forget(file, *(start + offset for offset in entry["data_offsets"]))
    except LdmPipeError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise LdmPipeError(f"not a whole safetensors file ({error})", str(path), "Fetch or export it anew.") from None
    refuse_nonfinite(bad, str(path))
    return found


def tensor_names(path: str | Path) -> list[str]:
    """Read the names of the tensors of a safetensors file, from its header alone.

    Raises: LdmPipeError naming the file if it is missing, truncated or of another format.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise LdmPipeError(f"not a whole safetensors file ({error})", str(path), "Fetch it anew.") from None


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
    parts = name.replace("\\", "/").split("/")
    if not name or name.startswith(("/", "\\", "~")) or ".." in parts or ":" in name or "\0" in name:
        raise LdmPipeError(f"the file name {name!r} leads out of its folder", where, "Do not trust this model.")
    return folder / name


def check_links(folder: Path) -> None:
    """Refuse a folder with symbolic links that lead out of it; those of the hub's cache lead to its own blobs.

    Raises: LdmPipeError naming the first link and where it leads.
    """
    base = folder.resolve()
    snapshot = next((p for p in (base, *base.parents) if p.parent.name == "snapshots"), None)
    homes = [base] if snapshot is None else [base, snapshot.parent.parent / "blobs"]
    for root, folders, names in os.walk(base):
        for name in (*folders, *names):
            path = Path(root, name)
            if path.is_symlink() and not any(path.resolve().is_relative_to(home) for home in homes):
                what = f"{path.relative_to(base)} is a link to {path.resolve()}, outside of the folder"
                raise LdmPipeError(what, str(folder), "Copy what it links to, or do not trust this model.")
