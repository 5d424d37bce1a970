"""Shards: tar and zip files of pictures with captions beside them (the layout of webdataset), read without unpacking.

Enters: archives. Leaves: a `Table` whose pictures are read from their place in the archive when they are asked for, so
that rows can be drawn in any order. Nothing is ever written, and no name in an archive becomes a path.
"""

from __future__ import annotations

import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_pipe.data.images import SUFFIXES
from ldm_pipe.data.sources import MAX_LINE, Lazy, Problem, Table, caption_lines, check_name, split_of
from ldm_pipe.pretrained import LdmPipeError

ARCHIVE_SUFFIXES = (".tar", ".zip")
MAX_ENTRIES = 1_000_000
MAX_ENTRY_BYTES = 256 << 20
MAX_ARCHIVE_BYTES = 1 << 40
MAX_RATIO = 100  # of a zip entry to its compressed form; pictures are compressed already


@dataclass(frozen=True)
class _Entry:
    """One file of an archive."""

    name: str
    size: int
    read: Callable[[], bytes]


def find_archives(folder: Path, split: str) -> list[Path]:
    """Return the shards of one split below a folder, sorted; unmarked ones are for training.

    There are none where pictures lie about: such a folder is one of pictures, an archive in it something else.
    """
    everything = [path for path in folder.rglob("*") if path.name[0] != "."]
    if any(path.suffix.lower() in SUFFIXES for path in everything):
        return []
    files = sorted(path for path in everything if path.suffix in ARCHIVE_SUFFIXES)
    return [path for path in files if (split_of(path.relative_to(folder)) or "train") == split]


def read_archive(path: Path, image_column: str, caption_column: str | None) -> Table:
    """Index one shard: files of one name up to the first dot are one row.

    A picture is the image, a `.txt` its caption or captions, a `.json` further columns.

    Args:
        path: .tar or .zip.
        image_column: what the column of the pictures is called.
        caption_column: what the column of the `.txt` files is called; None: they are not read.
    Raises: LdmPipeError for an archive that is damaged, hides more than it should, or names files outside itself.
    """
    problems: list[Problem] = []
    groups: dict[str, dict[str, _Entry]] = {}
    total = 0
    entries = _tar_entries(path, problems) if path.suffix == ".tar" else _zip_entries(path, problems)
    for number, entry in enumerate(entries, 1):
        total += entry.size
        if number > MAX_ENTRIES or total > MAX_ARCHIVE_BYTES:
            what = f"more than {MAX_ENTRIES} files or {MAX_ARCHIVE_BYTES >> 30} GiB"
            raise LdmPipeError(what, str(path), "Split it into several shards.")
        folder, _, base = entry.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        group = groups.setdefault(f"{folder}/{stem}", {})
        kind = "image" if f".{suffix.lower()}" in SUFFIXES else suffix.lower()
        if kind in group:
            problems.append(Problem(f"{path}:{entry.name}", "duplicate", f"a second .{suffix} of the same row"))
        elif kind in ("image", "txt", "json"):
            group[kind] = entry
    return _table(path, groups, problems, image_column, caption_column)


def _table(
    path: Path,
    groups: dict[str, dict[str, _Entry]],
    problems: list[Problem],
    image_column: str,
    caption_column: str | None,
) -> Table:
    """Put the groups of an archive into rows."""
    images, names, rows = [], [], []
    for key, group in groups.items():
        where = f"{path}:{key.strip('/')}"
        if "image" not in group:
            problems.append(Problem(where, "missing picture", f"only {', '.join(group) or 'other files'}"))
            continue
        try:
            columns: dict[str, Any] = _json_columns(group["json"]) if "json" in group else {}
            if caption_column is not None and "txt" in group:
                columns[caption_column] = caption_lines(_text(group["txt"]))
        except ValueError as error:
            problems.append(Problem(where, "broken row", str(error)[:200]))
            continue
        if caption_column is not None and caption_column not in columns:
            problems.append(Problem(where, "missing caption", f"no .txt, no {caption_column!r} in a .json"))
            continue
        images.append(group["image"])
        names.append(f"{path.name}/{group['image'].name}")
        rows.append(columns)
    known = dict.fromkeys(name for row in rows for name in row)
    pictures = Lazy(len(images), lambda row: images[row].read())
    table: dict[str, Any] = {name: [row.get(name) for row in rows] for name in known}
    if caption_column is not None:
        table.setdefault(caption_column, [])
    return Table(
        pictures, {**table, image_column: pictures, "file_name": names}, [f"{path.parent}/{name}" for name in names],
        image_column, problems,
    )  # fmt: skip


def _text(entry: _Entry) -> str:
    if entry.size > MAX_LINE:
        raise ValueError(f"{entry.name} is larger than {MAX_LINE} bytes")
    return entry.read().decode("utf-8-sig")


def _json_columns(entry: _Entry) -> dict[str, Any]:
    try:
        value = json.loads(_text(entry))
    except RecursionError:
        raise ValueError(f"{entry.name} is nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError(f"{entry.name} is no JSON object")
    return value


def _tar_entries(path: Path, problems: list[Problem]) -> Iterator[_Entry]:
    """Yield the plain files of an uncompressed tar; links, devices and giants are reported, never followed or read."""
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                archive.members = []  # else every header stays in memory
                if member.isdir():
                    continue
                where = f"{path}:{member.name}"
                check_name(member.name, where)
                if not member.isreg() or member.sparse is not None:
                    problems.append(Problem(where, "broken row", "no plain file (a link, device or sparse file)"))
                elif member.size > MAX_ENTRY_BYTES:
                    problems.append(Problem(where, "broken row", f"{member.size} bytes, at most {MAX_ENTRY_BYTES}"))
                else:
                    yield _Entry(member.name, member.size, _slice_reader(path, member.offset_data, member.size))
    except (tarfile.TarError, OSError, ValueError) as error:
        how = "Shards are plain .tar files (unpack .tar.gz once), or .zip."
        raise LdmPipeError(f"cannot be read as tar ({error})", str(path), how) from error


def _slice_reader(path: Path, offset: int, size: int) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise LdmPipeError(f"cannot be read any more ({error.strerror or error})", str(path)) from error

    return read


def _zip_entries(path: Path, problems: list[Problem]) -> Iterator[_Entry]:
    """Yield the files of a zip; those that swell more than 100 times are reported, never unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, OSError, NotImplementedError, UnicodeDecodeError) as error:
        raise LdmPipeError(f"cannot be read as zip ({error})", str(path)) from error
    for info in infos:
        where = f"{path}:{info.filename}"
        check_name(info.filename, where)
        if info.flag_bits & 1:
            problems.append(Problem(where, "broken row", "encrypted"))
        elif (info.external_attr >> 16) & 0o170000 == 0o120000:
            problems.append(Problem(where, "broken row", "no plain file (a link)"))
        elif info.file_size > MAX_ENTRY_BYTES or info.file_size > MAX_RATIO * max(info.compress_size, 1):
            sizes = f"{info.compress_size} bytes that unpack to {info.file_size}"
            problems.append(Problem(where, "broken row", f"{sizes}; at most {MAX_RATIO}:1 and {MAX_ENTRY_BYTES}"))
        else:
            yield _Entry(info.filename, info.file_size, _zip_reader(path, info))


def _zip_reader(path: Path, info: zipfile.ZipInfo) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            with zipfile.ZipFile(path) as archive, archive.open(info) as file:
                return file.read(info.file_size)  # no more than was announced
        except (zipfile.BadZipFile, OSError, NotImplementedError, EOFError) as error:
            raise LdmPipeError(f"{info.filename} cannot be unpacked ({error})", str(path)) from error

    return read
