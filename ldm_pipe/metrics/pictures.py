"""Where the pictures of an evaluation come from: guided-diffusion's .npz, folders, parquet, or a function that draws.

A path enters; leaves what has a length and gives rows as uint8 tensors, without holding all pictures in memory.
"""

from __future__ import annotations

import hashlib
import io
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_pipe.data.dataset import Records, load_records
from ldm_pipe.data.images import resize
from ldm_pipe.pretrained import LdmPipeError, atomic_write

Filters = dict[str, Any]


@dataclass(frozen=True)
class Pictures:
    """A set of pictures of one size, read as they are asked for.

    Attributes:
        name: of the set, for the table.
        num: of pictures.
        read: rows to uint8, (B, 3, H, W).
        key: changes with the pictures.
        captions: of every picture, or None.
    """

    name: str
    num: int
    read: Callable[[range], Tensor]
    key: str
    captions: list[str] | None = None

    def __len__(self) -> int:
        """Return the number of pictures."""
        return self.num

    def first(self, num: int | None) -> Pictures:
        """Keep the first so many.

        Raises: LdmPipeError if there are fewer.
        """
        if num is None or num == self.num:
            return self
        if num > self.num:
            raise LdmPipeError(f"{self.num} pictures, {num} are wanted", self.name, "Ask for fewer, or give more.")
        captions = self.captions and self.captions[:num]
        return Pictures(self.name, num, self.read, f"{self.key} first {num}", captions)


def of_tensor(images: Tensor, name: str = "pictures") -> Pictures:
    """Take pictures in memory, uint8 (N, 3, H, W)."""
    digest = hashlib.sha256(repr(tuple(images.shape)).encode() + images.contiguous().numpy().tobytes())
    return Pictures(name, len(images), lambda rows: images[rows.start : rows.stop], digest.hexdigest())


def open_pictures(
    source: str | Path, *, side: int | None = None, caption_column: str | None = None, filters: Filters | None = None
) -> Pictures:
    """Open a set: guided-diffusion's `.npz` (`arr_0`), or whatever `load_records` reads.

    Args:
        side: pictures are resized to it, the shorter side first; None: they must be of one size.
        filters: column -> value that rows of a table must have.
    Raises: LdmPipeError if it is missing, holds no pictures, or pictures of several sizes.
    """
    path = Path(source)
    if path.suffix == ".npz":
        return _of_npz(path, side)
    records = load_records(source, caption_column=None, filters=filters)
    if caption_column is not None and caption_column in records.column_names:
        records = load_records(source, caption_column=caption_column, filters=filters)
    else:
        caption_column = None
    return of_records(records, path.name, side, captions=caption_column is not None)


def of_records(records: Records, name: str, side: int | None = None, *, captions: bool = True) -> Pictures:
    """Take the pictures of records."""
    sizes = sorted(set(records.sizes))
    if not sizes:
        raise LdmPipeError("there are no pictures", name, "Give a folder or table with pictures.")
    if side is None and len(sizes) > 1:
        shown = ", ".join(f"{width}x{height}" for height, width in sizes[:5])
        fix = "Resize them all, or say to which side (--resolution)."
        raise LdmPipeError(f"pictures of {len(sizes)} sizes ({shown})", name, fix)

    def read(rows: range) -> Tensor:
        found = [records.image(row) for row in rows]
        pictures = [np.array(image if side is None else resize(image, side), dtype=np.uint8) for image in found]
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)

    key = f"{records.image_fingerprint} {side}"
    return Pictures(name, len(records), read, key, list(records.captions) if captions else None)


# -- guided-diffusion's files ------------------------------------------------------------------------------------------


def _of_npz(path: Path, side: int | None) -> Pictures:
    array = open_npz(path, "arr_0")
    if array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8:
        what = f"arr_0 is {array.dtype} of shape {list(array.shape)}"
        raise LdmPipeError(what, str(path), "Pictures are uint8 of shape (N, H, W, 3).")
    if side is not None and array.shape[1:3] != (side, side):
        what = f"pictures of {array.shape[2]}x{array.shape[1]}, {side} is asked for"
        raise LdmPipeError(what, str(path), "Leave --resolution out, or resize them.")

    def read(rows: range) -> Tensor:
        return torch.from_numpy(np.array(array[rows.start : rows.stop])).permute(0, 3, 1, 2)

    state = path.stat()
    return Pictures(path.name, len(array), read, f"{path.resolve()} {state.st_size} {state.st_mtime_ns}")


def npz_names(path: Path) -> list[str]:
    """Return the names of the arrays of an .npz file.

    Raises: LdmPipeError if it is missing or none.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except FileNotFoundError:
        raise LdmPipeError("the file does not exist", str(path)) from None
    except (zipfile.BadZipFile, OSError) as error:
        raise LdmPipeError(f"not a whole .npz file ({error})", str(path), "Fetch it anew.") from None


def open_npz(path: Path, name: str) -> np.ndarray[Any, Any]:
    """Open one array of an .npz file, mapped where it is stored plainly, else read; never a pickle.

    Raises: LdmPipeError if it is missing, damaged, or holds objects.
    """
    if name not in npz_names(path):
        what = f"there is no {name}, only {sorted(npz_names(path))[:10]}"
        raise LdmPipeError(what, str(path), "guided-diffusion's files hold arr_0, or mu, sigma, mu_s and sigma_s.")
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            entry = archive.getinfo(f"{name}.npy")
            if entry.compress_type == zipfile.ZIP_STORED:
                file.seek(entry.header_offset + 26)  # of the entry's own header: lengths of name and extra field
                file.seek(sum(struct.unpack("<HH", file.read(4))), io.SEEK_CUR)
                readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                reader = readers.get(np.lib.format.read_magic(file))
                shape, fortran, kind = reader(file) if reader else ((), True, np.dtype(object))
                if not fortran and not kind.hasobject and 0 not in shape and shape:
                    if file.tell() + int(np.prod(shape)) * kind.itemsize > path.stat().st_size:
                        raise ValueError("it ends too early")
                    return np.memmap(path, kind, "r", file.tell(), shape)
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, struct.error) as error:
        raise LdmPipeError(f"{name} cannot be read ({error})", str(path), "Fetch it anew.") from None


def save_npz(path: Path, images: Tensor) -> None:
    """Write pictures, uint8 (N, 3, H, W), as guided-diffusion does: `arr_0`, (N, H, W, 3)."""
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=images.permute(0, 2, 3, 1).contiguous().numpy())
    atomic_write(path, buffer.getvalue())
