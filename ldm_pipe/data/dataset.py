"""Records: the checked, filtered rows that a training uses.

Enters: parquet files, an image folder, a hub name or a `datasets.Dataset`. Leaves: `Records`, in which every row has a
readable picture and (unless none are wanted) a caption; what was left out is listed with its reason. This file does not
know the order in which rows are used, nor tensors.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from PIL import Image

from ldm_pipe.data.images import MAX_PIXELS, WHITE, open_image, open_image_with_notes
from ldm_pipe.data.sources import (
    METADATA_NAMES,
    Problem,
    Table,
    find_parquet,
    join_tables,
    load_hub,
    read_dataset,
    read_folder,
    read_parquet,
    split_of,
)
from ldm_pipe.pretrained import LdmPipeError

DataSource: TypeAlias = "str | Path | Sequence[str | Path] | Any"


@dataclass
class DataReport:
    """What was read, what was left out and why, and what was odd about the pictures that are used."""

    num_rows: int = 0
    num_used: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def counts(self) -> Counter[str]:
        """Count the problems by kind."""
        return Counter(problem.kind for problem in self.problems)

    def __str__(self) -> str:
        """Return a short text for the log."""
        text = f"{self.num_used} of {self.num_rows} rows used"
        if self.problems:
            text += "; left out: " + ", ".join(f"{number} {kind}" for kind, number in sorted(self.counts.items()))
        if self.notes:
            text += "; converted: " + ", ".join(f"{number} {note}" for note, number in sorted(self.notes.items()))
        return text


class Records:
    """Rows with a picture, a caption, keywords and the columns of their table.

    Attributes:
        captions: one text per row ("" when no captions are wanted).
        keywords: one list of texts per row.
        ids: one stable, unique-in-practice name per row: file name, or hash of the picture's bytes.
        report: what was left out when these records were loaded.
    """

    def __init__(
        self,
        table: Table,
        rows: Sequence[int],
        captions: Sequence[str],
        keywords: Sequence[list[str]],
        identities: Sequence[tuple[str, int]],
        report: DataReport,
        background: tuple[int, int, int] = WHITE,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self._table, self._rows, self._identities = table, list(rows), list(identities)
        self.captions, self.keywords, self.report = list(captions), list(keywords), report
        self._background, self._max_pixels = background, max_pixels

    def __len__(self) -> int:
        return len(self._rows)

    def image(self, index: int) -> Image.Image:
        """Decode one picture: upright RGB."""
        row = self._rows[index]
        return open_image(
            self._table.images[row],
            background=self._background,
            max_pixels=self._max_pixels,
            name=self._table.where[row],
        )

    def source(self, index: int) -> Path | bytes:
        """Return the path or the undecoded bytes of one picture."""
        return self._table.images[self._rows[index]]

    def where(self, index: int) -> str:
        """Return the path, or the file and row, of one picture."""
        return self._table.where[self._rows[index]]

    @property
    def ids(self) -> list[str]:
        """Return one name per row: file name, or hash of the picture's bytes."""
        return [name for name, _ in self._identities]

    @property
    def column_names(self) -> list[str]:
        """Return the names that `column` knows."""
        return list(self._table.columns)

    def column(self, name: str) -> list[Any]:
        """Return one column as a plain list (pictures, such as a mask, as bytes or paths)."""
        if name not in self._table.columns:
            raise LdmPipeError(f"there is no column {name!r}", "", f"The columns are: {', '.join(self.column_names)}.")
        values = self._table.columns[name]
        return [values[row] for row in self._rows]

    def filter(self, **equals: Any) -> Records:
        """Keep the rows whose columns have the given values; a list, tuple or set means any of its values."""
        kept: Iterable[int] = range(len(self))
        for name, wanted in equals.items():
            values = self.column(name)
            kept = [index for index in kept if _matches(values[index], wanted)]
        return self.select(list(kept))

    def select(self, indices: Sequence[int]) -> Records:
        """Keep the rows at the given positions, in that order."""
        return Records(
            self._table,
            [self._rows[index] for index in indices],
            [self.captions[index] for index in indices],
            [self.keywords[index] for index in indices],
            [self._identities[index] for index in indices],
            self.report,
            self._background,
            self._max_pixels,
        )

    @property
    def image_fingerprint(self) -> str:
        """Return the sha256 over names and sizes of the pictures, in order: what cached latents depend on."""
        digest = hashlib.sha256(repr(("images", self._background)).encode())
        for name, size in self._identities:
            digest.update(f"{name}\0{size}\n".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    @property
    def fingerprint(self) -> str:
        """Return the sha256 over pictures, captions and keywords: a checkpoint keeps it to notice changed data."""
        digest = hashlib.sha256(self.image_fingerprint.encode())
        for caption, words in zip(self.captions, self.keywords, strict=True):
            digest.update(repr((caption, words)).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def _matches(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, Collection) and not isinstance(wanted, (str, bytes)):
        return value in wanted
    return bool(value == wanted)


def load_records(
    source: DataSource,
    split: str = "train",
    *,
    image_column: str = "image",
    caption_column: str | None = "text",
    keywords_column: str | None = "keywords",
    filters: Mapping[str, Any] | None = None,
    null_captions: Literal["skip", "empty"] = "skip",
    check_images: bool = True,
    max_bad_fraction: float = 0.01,
    background: tuple[int, int, int] = WHITE,
    max_pixels: int = MAX_PIXELS,
    config_name: str | None = None,
) -> Records:
    """Load and check one split.

    Args:
        source: parquet file(s), folder of parquet files, image folder with metadata.jsonl / metadata.csv / .txt files,
            name of a hub data set, or a `datasets.Dataset`.
        split: "train", "validation" or "test"; ignored for single parquet files and `Dataset` objects.
        image_column: column of the pictures.
        caption_column: column of the captions; None: no captions are wanted.
        keywords_column: column of keyword lists (or comma-separated text); the default need not exist.
        filters: column -> value (or list of values) that rows must have.
        null_captions: "skip" leaves rows without caption out and reports them; "empty" uses the empty text.
        check_images: decode every picture once and leave the unreadable ones out.
        max_bad_fraction: stop if more than this part of the rows is left out for a fault.
        background: colour under transparent pixels.
        max_pixels: larger pictures count as unreadable.
        config_name: configuration of a hub data set.
    Raises: LdmPipeError naming what is wrong and where.
    """
    table = _read(source, split, image_column, caption_column, config_name)
    name = str(source) if isinstance(source, (str, Path)) else ""
    caption_column = _known_column(table, caption_column, name)
    if keywords_column == "keywords" and keywords_column not in table.columns:
        keywords_column = None
    keywords_column = _known_column(table, keywords_column, name)
    rows: list[int] = list(range(len(table.images)))
    for column, wanted in (filters or {}).items():
        values = table.columns[_known_column(table, column, name) or column]
        rows = [row for row in rows if _matches(values[row], wanted)]
    report = DataReport(len(rows) + len(table.problems), 0, list(table.problems))
    kept, captions, identities = _check_rows(table, rows, caption_column, null_captions, report)
    if check_images:
        good = _check_pictures(table, kept, background, max_pixels, report)
        kept, captions = [kept[i] for i in good], [captions[i] for i in good]
        identities = [identities[i] for i in good]
    report.num_used = len(kept)
    _stop_if_bad(report, max_bad_fraction, name)
    words = table.columns[keywords_column] if keywords_column else None
    keywords = [_keyword_list(words[row]) if words is not None else [] for row in kept]
    return Records(table, kept, captions, keywords, identities, report, background, max_pixels)


def _read(source: DataSource, split: str, image_column: str, caption_column: str | None, config: str | None) -> Table:
    """Choose the reader by what the source is."""
    if isinstance(source, (list, tuple)):
        if not source:
            raise LdmPipeError("no data files were given")
        return join_tables([_read(part, split, image_column, caption_column, config) for part in source])
    if not isinstance(source, (str, Path)):
        return read_dataset(source, image_column, "dataset")
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".parquet":
            raise LdmPipeError("is not a parquet file", str(path), "Give a parquet file or a folder.")
        return read_parquet(path, image_column)
    if not path.is_dir():
        if (
            path.suffix == ".parquet"
            or path.is_absolute()
            or len(Path(source).parts) > 2
            or str(source).startswith(".")
        ):
            raise LdmPipeError("no such file or folder", str(path))
        return read_dataset(load_hub(str(source), config, split), image_column, str(source))
    if parquet := find_parquet(path, split):
        return join_tables([read_parquet(file, image_column) for file in parquet])
    if any(path.rglob("*.parquet")):
        raise LdmPipeError(f"there are parquet files, but none for split {split!r}", str(path))
    has_splits = [folder for folder in path.iterdir() if folder.is_dir() and split_of(Path(folder.name) / "x")]
    if has_splits and not any((path / metadata).is_file() for metadata in METADATA_NAMES):
        matching = [folder for folder in has_splits if split_of(Path(folder.name) / "x") == split]
        if not matching:
            raise LdmPipeError(
                f"there is no folder for split {split!r}", str(path), f"Found: {[f.name for f in has_splits]}."
            )
        return join_tables([read_folder(folder, image_column, caption_column) for folder in sorted(matching)])
    if split != "train":
        raise LdmPipeError(f"there is no split {split!r}: the folder is not divided", str(path))
    table = read_folder(path, image_column, caption_column)
    if not len(table.images) and not table.problems:
        raise LdmPipeError("the folder holds neither parquet files nor pictures", str(path))
    return table


def _known_column(table: Table, column: str | None, name: str) -> str | None:
    if column is not None and column not in table.columns:
        raise LdmPipeError(f"there is no column {column!r}", name, f"The columns are: {', '.join(table.columns)}.")
    return column


def _check_rows(
    table: Table, rows: Sequence[int], caption_column: str | None, null_captions: str, report: DataReport
) -> tuple[list[int], list[str], list[tuple[str, int]]]:
    """Leave out rows without picture or caption, and exact repetitions (same picture and same caption)."""
    kept, captions, identities = [], [], []
    seen: set[tuple[str, str]] = set()
    for row in rows:
        where = table.where[row]
        source = table.images[row]
        if source is None:
            report.problems.append(Problem(where, "missing picture", "the picture is null"))
            continue
        caption = table.columns[caption_column][row] if caption_column else ""
        if caption is not None and not isinstance(caption, str):
            report.problems.append(Problem(where, "broken row", f"the caption is {type(caption).__name__}, not text"))
            continue
        if caption_column and (caption is None or not caption.strip()):
            if null_captions == "skip":
                report.problems.append(Problem(where, "null caption"))
                continue
            text = ""
        else:
            text = caption or ""
        try:
            identity = _identity(source, table, row)
        except OSError as error:
            report.problems.append(Problem(where, "missing file", error.strerror or str(error)))
            continue
        picture = identity[0] if isinstance(source, bytes) else str(source.resolve())
        if (picture, text) in seen:
            report.problems.append(Problem(where, "duplicate", "same picture and same caption as an earlier row"))
            continue
        seen.add((picture, text))
        kept.append(row)
        captions.append(text)
        identities.append(identity)
    return kept, captions, identities


def _identity(source: Path | bytes, table: Table, row: int) -> tuple[str, int]:
    """Name a picture: file name and size, or hash of its bytes and their number."""
    if isinstance(source, bytes):
        return hashlib.blake2b(source, digest_size=16).hexdigest(), len(source)
    names = table.columns.get("file_name")
    return str(names[row] if names is not None else source.name), source.stat().st_size


def _check_pictures(
    table: Table, rows: Sequence[int], background: tuple[int, int, int], max_pixels: int, report: DataReport
) -> list[int]:
    """Decode every picture; return the positions of the readable ones and report the others."""

    def check(row: int) -> tuple[str, ...] | LdmPipeError:
        try:
            name = table.where[row]
            source = table.images[row]
            return open_image_with_notes(source, background=background, max_pixels=max_pixels, name=name)[1]
        except LdmPipeError as error:
            return error

    good = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for index, result in enumerate(pool.map(check, rows)):
            if isinstance(result, LdmPipeError):
                report.problems.append(Problem(table.where[rows[index]], "unreadable picture", result.what))
            else:
                good.append(index)
                report.notes.update(result)
    return good


def _stop_if_bad(report: DataReport, max_bad_fraction: float, name: str) -> None:
    if not report.num_used and not report.problems:
        raise LdmPipeError("no rows are left", name, "Check the filters.")
    fraction = len(report.problems) / max(report.num_rows, 1)
    if fraction > max_bad_fraction:
        first = "\n  ".join(str(problem) for problem in report.problems[:10])
        raise LdmPipeError(
            f"{len(report.problems)} of {report.num_rows} rows cannot be used ({report}):\n  {first}",
            name,
            f"Mend or remove them, or raise max_bad_fraction (now {max_bad_fraction:g}).",
        )


def _keyword_list(value: Any) -> list[str]:
    if isinstance(value, str):
        return [word.strip() for word in value.split(",") if word.strip()]
    return [str(word) for word in value] if value is not None else []
