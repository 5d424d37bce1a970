"""Shards: tar and zip files of pictures with captions beside them (the layout of webdataset), read without unpacking.

Enters: archives. Leaves: a `Table` whose pictures are read from their place in the archive when they are asked for, so
that rows can be drawn in any order. Nothing is ever written, and no name in an archive becomes a path.
"""

from __future__ import annotations

import contextlib
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ldm_pipe.data.sources import Lazy, Table, UnreadablePictureError, check_name, split_of
from ldm_pipe.data.walk import (
    ARCHIVE_SUFFIXES,
    MAX_LINE,
    NO_CAPTIONS,
    Problem,
    caption_lines,
    decode_text,
    is_hidden,
    is_picture,
    passed_over,
)
from ldm_pipe.pretrained import LdmPipeError

MAX_ENTRIES = 1_000_000
MAX_ENTRY_BYTES = 256 << 20
MAX_ARCHIVE_BYTES = 1 << 40
_MAGIC_AT = 257  # where a header says `ustar`
MAX_RATIO = 100  # of a zip entry to its compressed form; pictures are compressed already


@dataclass(frozen=True)
class _Entry:
    """One file of an archive."""

    name: str
    size: int
    read: Callable[[], bytes]


def find_archives(folder: Path, files: Sequence[Path], split: str) -> list[Path]:
    """Return the shards of one split among the files of a folder; unmarked ones are for training.

    There are none where pictures lie about: such a folder is one of pictures, an archive in it something else.
    """
    if any(is_picture(path.name) for path in files):
        return []
    found = [path for path in files if path.suffix.lower() in ARCHIVE_SUFFIXES]
    return [path for path in found if (split_of(path.relative_to(folder)) or "train") == split]


def read_archive(path: Path, image_column: str, caption_column: str | None) -> Table:
    """Index one shard: files of one name up to the last dot are one row, as they are in a folder.

    A picture is the image, a `.txt` its caption or captions, a `.json` further columns. What has the name of a picture
    and a word more (`1.seg.png` beside `1.jpg`), and no caption of its own, belongs to that picture and is no row.

    Args:
        path: .tar or .zip.
        image_column: what the column of the pictures is called.
        caption_column: what the column of the `.txt` files is called; None: they are not read.
    Raises: LdmPipeError for an archive that is damaged, hides more than it should, or names files outside itself.
    """
    problems: list[Problem] = []
    skipped: list[Problem] = []
    groups: dict[str, dict[str, _Entry]] = {}
    total = 0
    entries = _tar_entries(path, problems) if path.suffix.lower() == ".tar" else _zip_entries(path, problems)
    for number, entry in enumerate(entries, 1):
        total += entry.size
        if number > MAX_ENTRIES or total > MAX_ARCHIVE_BYTES:
            what = f"more than {MAX_ENTRIES} files or {MAX_ARCHIVE_BYTES >> 30} GiB"
            raise LdmPipeError(what, str(path), "Split it into several shards.")
        if (problem := passed_over(f"{path}:{entry.name}", entry.name)) is not None:
            skipped.append(problem)
        elif not is_hidden(entry.name):
            _put(entry, groups, problems, path)
    return _table(path, groups, (problems, skipped), image_column, caption_column)


def _put(entry: _Entry, groups: dict[str, dict[str, _Entry]], problems: list[Problem], path: Path) -> None:
    """Put an entry into the group of its name; files of other kinds count for nothing."""
    stem, _, suffix = entry.name.rpartition(".")
    kind = "image" if is_picture(entry.name) else suffix.lower()
    if kind not in ("image", "txt", "json") or (kind == "txt" and stem.rpartition("/")[2].lower() in NO_CAPTIONS):
        return
    group = groups.setdefault(stem, {})
    if kind in group:
        problems.append(Problem(f"{path}:{entry.name}", "duplicate", f"a second .{suffix} of the same row"))
    else:
        group[kind] = entry


def _main_picture(key: str, groups: dict[str, dict[str, _Entry]]) -> str | None:
    """Return the group whose picture this one's files stand beside: the same name with a word or more less."""
    folder, slash, stem = key.rpartition("/")
    while "." in stem:
        stem = stem.rpartition(".")[0]
        if "image" in groups.get(folder + slash + stem, {}):
            return folder + slash + stem
    return None


def _table(
    path: Path,
    groups: dict[str, dict[str, _Entry]],
    faults: tuple[list[Problem], list[Problem]],
    image_column: str,
    caption_column: str | None,
) -> Table:
    """Put the groups of an archive into rows."""
    images, names, rows = [], [], []
    problems, skipped = faults
    for key, group in groups.items():
        where = f"{path}:{key.strip('/')}"
        main = _main_picture(key, groups) if set(group) != {"image", "txt"} else None
        if "image" not in group:
            if main is None:
                problems.append(Problem(where, "missing picture", f"only {', '.join(group)}"))
            continue
        if main is not None and set(group) == {"image"}:
            skipped.append(Problem(f"{path}:{group['image'].name}", "second picture", f"it belongs to {main}"))
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
        image_column, problems, skipped,
    )  # fmt: skip


def _text(entry: _Entry) -> str:
    if entry.size > MAX_LINE:
        raise ValueError(f"{entry.name} is larger than {MAX_LINE} bytes")
    return decode_text(entry.read())


def _json_columns(entry: _Entry) -> dict[str, Any]:
    try:
        value = json.loads(_text(entry))
    except RecursionError:
        raise ValueError(f"{entry.name} is nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError(f"{entry.name} is no JSON object")
    return value


def _tar_entries(path: Path, problems: list[Problem]) -> Iterator[_Entry]:
    """Yield the plain files of an uncompressed tar; links, devices and giants are reported, never followed or read.

    Python's reader takes a damaged header for the end. Here the next good one is looked for, and the gap is reported.
    """
    how = "Shards are plain .tar files (unpack .tar.gz once), or .zip."
    try:
        with open(path, "rb") as file:
            start: int | None = 0
            while start is not None:
                file.seek(start)
                with tarfile.open(fileobj=file, mode="r:") as archive:
                    for member in archive:
                        archive.members = []  # else every header stays in memory
                        if (entry := _tar_entry(path, member, problems)) is not None:
                            yield entry
                    end = archive.offset
                start = _next_header(file, end)
                if start is not None or _is_damaged(file, end):
                    problems.append(Problem(f"{path}:byte {end}", "broken row", "a damaged header, its file is lost"))
    except (tarfile.TarError, OSError, ValueError) as error:
        if isinstance(error, LdmPipeError):
            raise
        raise LdmPipeError(f"cannot be read as tar ({error})", str(path), how) from error


def _tar_entry(path: Path, member: tarfile.TarInfo, problems: list[Problem]) -> _Entry | None:
    """Return a member if it is a plain file of sane size; report it if it is something else than a folder."""
    if member.isdir():
        return None
    where = f"{path}:{member.name}"
    check_name(member.name, where)
    if not member.isreg() or member.sparse is not None:
        problems.append(Problem(where, "broken row", "no plain file (a link, device or sparse file)"))
    elif member.size > MAX_ENTRY_BYTES:
        problems.append(Problem(where, "broken row", f"{member.size} bytes, at most {MAX_ENTRY_BYTES}"))
    else:
        return _Entry(member.name, member.size, _slice_reader(path, member.offset_data, member.size))
    return None


def _is_damaged(file: BinaryIO, offset: int) -> bool:
    """Tell whether a block where the reader stopped is something else than the zeros of the end."""
    file.seek(offset)
    return any(file.read(tarfile.BLOCKSIZE))


def _next_header(file: BinaryIO, offset: int) -> int | None:
    """Look for the next good header after a damaged one; None at the end of the archive, and where none follows."""
    if not _is_damaged(file, offset):
        return None
    position = offset + tarfile.BLOCKSIZE
    while True:
        file.seek(position)
        piece = file.read(1 << 20)
        if len(piece) < tarfile.BLOCKSIZE:
            return None
        at = piece.find(b"ustar")
        while at >= 0:
            block = at - _MAGIC_AT
            if block >= 0 and block % tarfile.BLOCKSIZE == 0:
                with contextlib.suppress(tarfile.HeaderError):
                    tarfile.TarInfo.frombuf(piece[block : block + tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
                    return position + block
            at = piece.find(b"ustar", at + 1)
        position += 1 << 20


def _slice_reader(path: Path, offset: int, size: int) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                data = file.read(size)
            if len(data) < size:
                raise UnreadablePictureError(f"cut off after {len(data)} of {size} bytes", str(path))
            return data
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
        # Damaged streams make the decompressors raise zlib.error, LZMAError, struct.error, EOFError, ...
        except Exception as error:
            what = f"{info.filename} cannot be unpacked ({str(error) or type(error).__name__})"
            raise UnreadablePictureError(what, str(path)) from error

    return read
