"""Folders of pictures: metadata.jsonl, metadata.csv, or a .txt beside each picture become one `Table`.

Enters: the files of a folder, as `walk` lists them. Leaves: a `Table`, nothing decoded yet; rows and files that cannot
be used are named in it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm_pipe.data.sources import Table, member_path, resolved
from ldm_pipe.data.walk import (
    MAX_LINE,
    METADATA_NAMES,
    NO_CAPTIONS,
    Problem,
    caption_lines,
    decode_text,
    is_picture,
    text_encoding,
)


@dataclass
class _Rows:
    """What is read so far: (picture, where, columns) per row."""

    rows: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    columns: dict[str, None] = field(default_factory=dict)


def read_folder(
    folder: Path, files: Sequence[Path], skipped: list[Problem], image_column: str, caption_column: str | None
) -> Table:
    """Read an image folder.

    A metadata file speaks for all pictures below its folder, wherever it lies; where none does, a .txt beside each
    picture does. Of two that speak for the same pictures the upper one counts. Pictures that no row names are kept when
    no captions are wanted, else reported.

    Args:
        files: below the folder, sorted.
        skipped: what was passed over among them.
    """
    pictures = [path for path in files if is_picture(path.name)]
    found = _Rows()
    metadata = _metadata_files(files)
    for path in metadata:
        _read_metadata(path, image_column, found)
    named = {resolved(path) for path, _ in found.rows}
    rest = [path for path in pictures if resolved(path) not in named]
    for path in rest:
        member_path(folder, str(path.relative_to(folder)), str(path))
        above = next((file for file in metadata if path.is_relative_to(file.parent)), None)
        if above is None:
            _read_beside(path, caption_column, found)
        elif caption_column is None:
            found.rows.append((path, {}))
        else:
            found.problems.append(Problem(str(path), "missing caption", f"no row in {above.name}"))
    if caption_column is not None:
        found.problems += _lone_captions(files, pictures, metadata)
    return _table(folder, found, skipped, None if metadata else caption_column)


def _metadata_files(files: Sequence[Path]) -> list[Path]:
    """Choose the metadata files that count: of one folder the first by `METADATA_NAMES`, and none below another."""
    places: dict[Path, Path] = {}
    for name in METADATA_NAMES:
        for path in files:
            if path.name == name:
                places.setdefault(path.parent, path)
    return [path for place, path in sorted(places.items()) if not any(up in places for up in place.parents)]


def _read_metadata(metadata: Path, image_column: str, found: _Rows) -> None:
    """Read the rows of one metadata file; the pictures are named from its own folder."""
    for where, row in _metadata_rows(metadata):
        if isinstance(row, str):
            found.problems.append(Problem(where, "broken row", row))
            continue
        name = row.pop("file_name", row.pop(f"{image_column}_file_name", None))
        if name is None:
            found.problems.append(Problem(where, "broken row", "no file_name"))
            continue
        path = member_path(metadata.parent, name, where)
        found.columns.update(dict.fromkeys(row))
        if path.is_file():
            found.rows.append((path, row))
        else:
            found.problems.append(Problem(where, "missing file", str(name)))


def _metadata_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yield (where, row) for each row; a row that cannot be read is its reason as text."""
    with open(path, encoding=text_encoding(path), errors="replace", newline="") as file:
        if path.suffix == ".csv":
            yield from _csv_rows(path, file)
            return
        for number, line in enumerate(file, 1):
            where, line = f"{path}:line {number}", line.strip().strip("\ufeff")
            if not line:
                continue
            if len(line) > MAX_LINE:
                yield where, f"longer than {MAX_LINE} characters"
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # also whole numbers of more than 4300 digits
                yield where, f"not JSON: {error}"
                continue
            yield where, row if isinstance(row, dict) else "not a JSON object"


def _csv_rows(path: Path, file: Any) -> Iterator[tuple[str, dict[str, Any] | str]]:
    reader = csv.DictReader(line.replace("\ufeff", "") for line in file)
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield f"{path}:line {reader.line_num}", str(error)
            continue
        if row is None:
            break
        where = f"{path}:line {reader.line_num}"
        # An empty cell is a missing value: CSV cannot say null.
        cells = {name: cell or None for name, cell in row.items() if name is not None}
        yield where, "more cells than columns" if None in row else cells


def _read_beside(path: Path, caption_column: str | None, found: _Rows) -> None:
    """Read the .txt beside a picture."""
    beside = path.with_suffix(".txt")
    try:
        if beside.is_file() and beside.stat().st_size > MAX_LINE:
            raise ValueError(f"{beside.name} is larger than {MAX_LINE} bytes")
        text = caption_lines(decode_text(beside.read_bytes())) if beside.is_file() else None
    except (OSError, ValueError) as error:
        found.problems.append(Problem(str(path), "broken row", f"caption file: {error}"))
        return
    if text is None and caption_column is not None:
        found.problems.append(Problem(str(path), "missing caption", f"no {beside.name}"))
        return
    if caption_column is not None:
        found.columns[caption_column] = None
    found.rows.append((path, {} if caption_column is None else {caption_column: text}))


def _lone_captions(files: Sequence[Path], pictures: Sequence[Path], metadata: Sequence[Path]) -> list[Problem]:
    """Report .txt files without a picture, where captions are such files."""
    known = {path.with_suffix("") for path in pictures}
    lone = [path for path in files if path.suffix == ".txt" and path.with_suffix("") not in known]
    lone = [path for path in lone if path.stem.lower() not in NO_CAPTIONS]
    lone = [path for path in lone if not any(path.is_relative_to(file.parent) for file in metadata)]
    return [Problem(str(path), "missing file", "a caption without a picture") for path in lone]


def _table(folder: Path, found: _Rows, skipped: list[Problem], caption_column: str | None) -> Table:
    """Put the rows into a table; the caption column exists even where there is no row."""
    names = dict.fromkeys((*found.columns, *([caption_column] if caption_column else [])))
    columns: dict[str, Sequence[Any]] = {name: [row.get(name) for _, row in found.rows] for name in names}
    paths = [path for path, _ in found.rows]
    file_names = [path.relative_to(folder).as_posix() for path in paths]
    where = [str(path) for path in paths]
    return Table(paths, {**columns, "file_name": file_names}, where, "file_name", found.problems, skipped)
