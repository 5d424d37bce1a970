"""Rows: the judgement on every row of a table, before anything is trained.

Enters: a `Table`. Leaves: the rows whose picture can be read and whose caption is there, and a `DataReport` that names
the others with their reason. This file does not know files and formats (sources.py does) nor tensors.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ldm_pipe.data.images import check_made, open_image_with_notes, read_picture_file
from ldm_pipe.data.sources import Table, UnreadablePictureError
from ldm_pipe.data.walk import Problem
from ldm_pipe.pretrained import LdmPipeError


@dataclass
class DataReport:
    """What was read, what was left out and why, what was passed over, and what was odd about pictures that are used."""

    num_rows: int = 0
    num_used: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    skipped: list[Problem] = field(default_factory=list)

    @property
    def counts(self) -> Counter[str]:
        """Count the problems by kind."""
        return Counter(problem.kind for problem in self.problems)

    def __str__(self) -> str:
        """Return a short text for the log."""
        text = f"{self.num_used} of {self.num_rows} rows used"
        if self.problems:
            text += "; left out: " + ", ".join(f"{number} {kind}" for kind, number in sorted(self.counts.items()))
        if self.skipped:
            kinds = Counter(problem.kind for problem in self.skipped)
            text += "; passed over: " + ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
        if self.notes:
            text += "; converted: " + ", ".join(f"{number} {note}" for note, number in sorted(self.notes.items()))
        return text

    def refuse_many(self, max_bad_fraction: float, name: str) -> None:
        """Stop if more than a given part of the rows is left out, naming the first ones."""
        if not self.num_used and not self.problems:
            raise LdmPipeError("no rows are left", name, "Check the filters.")
        if not self.num_used and set(self.counts) <= {"missing caption", "null caption"}:
            how = "Add metadata.jsonl with file_name and text, or a .txt beside each picture, or want no captions."
            raise LdmPipeError(f"none of the {self.num_rows} pictures has a caption", name, how)
        if len(self.problems) / max(self.num_rows, 1) > max_bad_fraction:
            first = "\n  ".join(str(problem) for problem in self.problems[:10])
            raise LdmPipeError(
                f"{len(self.problems)} of {self.num_rows} rows cannot be used ({self}):\n  {first}",
                name,
                f"Mend or remove them, or raise max_bad_fraction (now {max_bad_fraction:g}).",
            )


@dataclass(frozen=True, slots=True)
class Row:
    """One usable row.

    Args:
        number: of the row in its table.
        captions: one or more; ("",) when none are wanted.
        keywords: may be empty.
        name: stable name of the picture: file name, or hash of its bytes.
        stamp: what changes with the picture: hash of its file; for bytes, whose hash is the name, their number.
        size: (height, width) of the upright picture, if it has been decoded.
    """

    number: int
    captions: tuple[str, ...]
    keywords: tuple[str, ...]
    name: str
    stamp: str
    size: tuple[int, int] | None = None


def check_rows(
    table: Table,
    numbers: Sequence[int],
    caption_column: str | None,
    keywords_column: str | None,
    null_captions: str,
    report: DataReport,
) -> list[Row]:
    """Leave out rows without picture or caption, and exact repetitions (same picture and same captions)."""
    rows: list[Row] = []
    seen: set[tuple[str, tuple[str, ...]]] = set()
    for number in numbers:
        where = table.where[number]
        try:
            source = table.images[number]
        except UnreadablePictureError as error:
            report.problems.append(Problem(where, "unreadable picture", error.what))
            continue
        if source is None:
            report.problems.append(Problem(where, "missing picture", "the picture is null"))
            continue
        value = table.columns[caption_column][number] if caption_column else ""
        captions = read_captions(value, where, report)
        if captions is None:
            continue
        if caption_column and not captions and null_captions == "skip":
            report.problems.append(Problem(where, "null caption"))
            continue
        name, stamp = _identity(source, table, number)
        picture = name if isinstance(source, bytes) else str(source.resolve())
        captions = captions or ("",)
        if (picture, captions) in seen:
            report.problems.append(Problem(where, "duplicate", "same picture and same caption as an earlier row"))
            continue
        seen.add((picture, captions))
        words = _keywords(table.columns[keywords_column][number]) if keywords_column else ()
        rows.append(Row(number, captions, words, name, stamp))
    return rows


def read_captions(value: Any, where: str, report: DataReport) -> tuple[str, ...] | None:
    """Return the captions of a cell that are not blank; None for a cell that holds something else."""
    if value is None or isinstance(value, str):
        value = value.removeprefix("\ufeff") if value else ""  # a byte order mark that some program left there
        return (value,) if value.strip() else ()
    if not isinstance(value, (list, tuple)):
        report.problems.append(Problem(where, "broken row", f"the caption is {type(value).__name__}, not text"))
        return None
    wrong = [type(text).__name__ for text in value if text is not None and not isinstance(text, str)]
    if wrong:
        report.problems.append(Problem(where, "broken row", f"one of the captions is {wrong[0]}, not text"))
        return None
    kept = tuple(dict.fromkeys(text for text in value if text and text.strip()))
    if 0 < len(kept) < len(value):
        report.notes["blank or repeated one of several captions"] += 1
    return kept


def _keywords(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return tuple(word.strip() for word in value.split(",") if word.strip())
    return tuple(str(word) for word in value) if value is not None else ()


def _identity(source: Path | bytes, table: Table, number: int) -> tuple[str, str]:
    """Name a picture: hash of its bytes and their number, or file name, whose hash is taken when the file is read."""
    if isinstance(source, bytes):
        return hashlib.blake2b(source, digest_size=16).hexdigest(), str(len(source))
    names = table.columns.get("file_name")
    return str(names[number] if names is not None else source.name), ""


def check_pictures(
    table: Table,
    rows: Sequence[Row],
    report: DataReport,
    *,
    decode: bool,
    background: tuple[int, int, int],
    max_pixels: int,
    shape: tuple[int, int] | None = None,
) -> list[Row]:
    """Read every picture once; return the rows of the readable ones, stamped, and report the others.

    Args:
        decode: also decode them, which gives their sizes; else files are only hashed, and bytes not looked at.
        shape: (height, width) that they will be scaled to cover; None: nobody knows yet.
    """

    def check(row: Row) -> tuple[Row, tuple[str, ...]] | LdmPipeError:
        try:
            source, stamp = table.images[row.number], row.stamp
            if isinstance(source, Path):
                source = read_picture_file(source)
                stamp = hashlib.blake2b(source, digest_size=16).hexdigest()
            if not decode:
                return replace(row, stamp=stamp), ()
            where = table.where[row.number]
            picture, notes = open_image_with_notes(source, background=background, max_pixels=max_pixels, name=where)
            if shape is not None:
                check_made(picture.size, shape)
        except LdmPipeError as error:
            return error
        return replace(row, size=(picture.height, picture.width), stamp=stamp), notes

    wanted = rows if decode else [row for row in rows if not row.stamp]
    checked: dict[int, Row] = {row.number: row for row in rows if not decode and row.stamp}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for row, result in zip(wanted, pool.map(check, wanted), strict=True):
            if isinstance(result, LdmPipeError):
                report.problems.append(Problem(table.where[row.number], "unreadable picture", result.what))
            else:
                checked[row.number] = result[0]
                report.notes.update(result[1])
    return [checked[row.number] for row in rows if row.number in checked]
