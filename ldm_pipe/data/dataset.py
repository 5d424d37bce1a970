"""Records: the checked, filtered rows that a training uses.

Enters: parquet files, shards, an image folder, a hub name or a `datasets.Dataset`. Leaves: `Records`, in which every
row has a readable picture and (unless none are wanted) a caption; what was left out is listed with its reason. This
file does not know the order in which rows are used, nor tensors.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeAlias

from PIL import Image

from ldm_pipe.data.archives import find_archives, read_archive
from ldm_pipe.data.folders import read_folder
from ldm_pipe.data.images import MAX_PIXELS, WHITE, open_image
from ldm_pipe.data.parquet import read_parquet
from ldm_pipe.data.rows import DataReport, Row, check_pictures, check_rows
from ldm_pipe.data.sources import (
    Table,
    find_parquet,
    hub_roots,
    join_tables,
    load_hub,
    load_saved,
    read_dataset,
    split_of,
)
from ldm_pipe.data.walk import ARCHIVE_SUFFIXES, METADATA_NAMES, Problem, is_hidden, is_picture, unused, walk
from ldm_pipe.pretrained import LdmPipeError

SAVED_NAMES = ("dataset_dict.json", "state.json")

DataSource: TypeAlias = "str | Path | Sequence[str | Path] | Any"


class Records:
    """Rows with a picture, a caption, keywords and the columns of their table.

    Args:
        table: what the rows were read from.
        rows: the usable rows.
        report: what was left out when these records were loaded.
        background: colour under transparent pixels.
        max_pixels: larger pictures are not decoded.
    """

    def __init__(
        self,
        table: Table,
        rows: Sequence[Row],
        report: DataReport,
        background: tuple[int, int, int] = WHITE,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self._table, self._rows, self.report = table, list(rows), report
        self._background, self._max_pixels = background, max_pixels
        self.captions = [row.captions[0] for row in self._rows]  # the first of each picture
        self.caption_lists = [list(row.captions) for row in self._rows]
        self.keywords = [list(row.keywords) for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def image(self, index: int) -> Image.Image:
        """Decode one picture: upright RGB."""
        return open_image(
            self.source(index), background=self._background, max_pixels=self._max_pixels, name=self.where(index)
        )

    def source(self, index: int) -> Path | bytes:
        """Return the path or the undecoded bytes of one picture."""
        return self._table.images[self._rows[index].number]

    def where(self, index: int) -> str:
        """Return the path, or the file and row, of one picture."""
        return self._table.where[self._rows[index].number]

    @property
    def ids(self) -> list[str]:
        """Return one name per row: file name, or hash of the picture's bytes."""
        return [row.name for row in self._rows]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Return (height, width) of every upright picture; pictures that were not checked are decoded for it."""

        def measure(index: int) -> tuple[int, int]:
            known = self._rows[index].size
            if known is not None:
                return known
            picture = self.image(index)
            return picture.height, picture.width

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return list(pool.map(measure, range(len(self))))

    @property
    def column_names(self) -> list[str]:
        """Return the names that `column` knows."""
        return list(self._table.columns)

    def column(self, name: str) -> list[Any]:
        """Return one column as a plain list (pictures, such as a mask, as bytes or paths)."""
        if name not in self._table.columns:
            raise LdmPipeError(f"there is no column {name!r}", "", f"The columns are: {', '.join(self.column_names)}.")
        values = self._table.columns[name]
        return [values[row.number] for row in self._rows]

    def filter(self, **equals: Any) -> Records:
        """Keep the rows whose columns have the given values; a list, tuple or set means any of its values."""
        kept: Iterable[int] = range(len(self))
        for name, wanted in equals.items():
            values = self.column(name)
            kept = [index for index in kept if _matches(values[index], wanted)]
        return self.select(list(kept))

    def select(self, indices: Sequence[int]) -> Records:
        """Keep the rows at the given positions, in that order."""
        rows = [self._rows[index] for index in indices]
        return Records(self._table, rows, self.report, self._background, self._max_pixels)

    @property
    def image_fingerprint(self) -> str:
        """Return the sha256 over names and contents of the pictures, in order: what cached latents depend on."""
        digest = hashlib.sha256(repr(("images", self._background)).encode())
        for row in self._rows:
            digest.update(f"{row.name}\0{row.stamp}\n".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    @property
    def fingerprint(self) -> str:
        """Return the sha256 over pictures, captions and keywords: a checkpoint keeps it to notice changed data."""
        digest = hashlib.sha256(self.image_fingerprint.encode())
        for captions, words in zip(self.caption_lists, self.keywords, strict=True):
            shown = captions[0] if len(captions) == 1 else captions
            digest.update(repr((shown, words)).encode("utf-8", "surrogatepass"))
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
    shape: tuple[int, int] | None = None,
) -> Records:
    """Load and check one split.

    Args:
        source: parquet file(s), tar or zip shards with .txt or .json beside each picture, a folder of either, image
            folder with metadata.jsonl / metadata.csv / .txt files, folder of `save_to_disk`, name of a hub data set, or
            a `datasets.Dataset`.
        split: "train", "validation" or "test"; ignored for single parquet files and `Dataset` objects.
        image_column: column of the pictures.
        caption_column: column of the captions, one text or a list of texts per picture; None: none are wanted.
        keywords_column: column of keyword lists (or comma-separated text); the default need not exist.
        filters: column -> value (or list of values) that rows must have.
        null_captions: "skip" leaves rows without caption out and reports them; "empty" uses the empty text.
        check_images: decode every picture once and leave the unreadable ones out.
        max_bad_fraction: stop if more than this part of the rows is left out for a fault.
        background: colour under transparent pixels.
        max_pixels: larger pictures count as unreadable.
        config_name: configuration of a hub data set.
        shape: (height, width) that pictures will be scaled to cover: with `check_images`, those that would become
            larger than `MAX_PIXELS` by it (long, thin strips) are left out.
    Raises: LdmPipeError naming what is wrong and where.
    """
    table = _read(source, split, image_column, caption_column, config_name)
    name = str(source) if isinstance(source, (str, Path)) else ""
    caption_column = _known_column(table, caption_column, name)
    if keywords_column == "keywords" and keywords_column not in table.columns:
        keywords_column = None
    keywords_column = _known_column(table, keywords_column, name)
    numbers: list[int] = list(range(len(table.images)))
    for column, wanted in (filters or {}).items():
        values = table.columns[_known_column(table, column, name) or column]
        numbers = [row for row in numbers if _matches(values[row], wanted)]
    report = DataReport(len(numbers) + len(table.problems), 0, list(table.problems), skipped=list(table.skipped))
    rows = check_rows(table, numbers, caption_column, keywords_column, null_captions, report)
    rows = check_pictures(
        table, rows, report, decode=check_images, background=background, max_pixels=max_pixels, shape=shape
    )
    report.num_used = len(rows)
    report.refuse_many(max_bad_fraction, name)
    return Records(table, rows, report, background, max_pixels)


def _read(source: DataSource, split: str, image_column: str, caption_column: str | None, config: str | None) -> Table:
    """Choose the reader by what the source is."""
    if isinstance(source, (list, tuple)):
        if not source:
            raise LdmPipeError("no data files were given")
        return join_tables([_read(part, split, image_column, caption_column, config) for part in source])
    if not isinstance(source, (str, Path)):
        return read_dataset(source, image_column, "dataset")
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path, split, image_column, caption_column)
    if path.suffix.lower() in ARCHIVE_SUFFIXES and path.is_file():
        return read_archive(path, image_column, caption_column)
    if path.suffix == ".parquet" and path.is_file():
        return read_parquet(path, image_column)
    if path.is_file():
        how = "Give a .parquet file, a .tar or .zip of pictures, or a folder."
        raise LdmPipeError("is not a parquet file, nor a tar or zip", str(path), how)
    known = path.suffix in (".parquet", *ARCHIVE_SUFFIXES)
    if known or path.is_absolute() or len(Path(source).parts) > 2 or str(source).startswith("."):
        raise LdmPipeError("no such file or folder", str(path))
    return read_dataset(load_hub(str(source), config, split), image_column, str(source), hub_roots())


def _read_folder(path: Path, split: str, image_column: str, caption_column: str | None) -> Table:
    """Read a folder of parquet files, of shards, of pictures, or one saved by the `datasets` library."""
    if any((path / name).is_file() for name in SAVED_NAMES):
        return read_dataset(load_saved(path, split), image_column, str(path), (path,))
    files, skipped = walk(path)
    if parquet := find_parquet(path, files, split):
        table = join_tables([read_parquet(file, image_column) for file in parquet])
        table.skipped += [*skipped, *unused(files, "the folder is read as one of parquet files")]
        return table
    if any(file.suffix == ".parquet" for file in files):
        raise LdmPipeError(f"there are parquet files, but none for split {split!r}", str(path))
    if shards := find_archives(path, files, split):
        table = join_tables([read_archive(file, image_column, caption_column) for file in shards])
        others = [file for file in files if file.suffix.lower() not in ARCHIVE_SUFFIXES]
        table.skipped += [*skipped, *unused(others, "compressed shards can only be streamed")]
        return table
    return _read_pictures(path, split, image_column, caption_column, (files, skipped))


def _read_pictures(
    path: Path, split: str, image_column: str, caption_column: str | None, found: tuple[list[Path], list[Problem]]
) -> Table:
    """Read a folder of pictures; where folders in it are named after splits, only what lies in one of these."""
    files, skipped = found
    skipped = skipped + unused([file for file in files if not is_picture(file.name)], "an archive among pictures")
    places = {name.name: split_of(Path(name.name) / "x") for name in path.iterdir() if name.is_dir()}
    places = {name: place for name, place in places.items() if place and not is_hidden(name)}
    if places and not any((path / metadata).is_file() for metadata in METADATA_NAMES):
        matching = sorted(name for name, place in places.items() if place == split)
        if not matching:
            what = f"there is no folder for split {split!r}"
            raise LdmPipeError(what, str(path), f"Found: {sorted(places)}.")
        parts = {name: [file for file in files if file.is_relative_to(path / name)] for name in places}
        outside = sorted(set(files).difference(*parts.values()))
        tables = [read_folder(path / name, parts[name], [], image_column, caption_column) for name in matching]
        table = join_tables(tables)
        table.skipped += [*skipped, *unused(outside, f"outside of the split folders {sorted(places)}")]
        return table
    if split != "train":
        raise LdmPipeError(f"there is no split {split!r}: the folder is not divided", str(path))
    table = read_folder(path, files, skipped, image_column, caption_column)
    if not len(table.images) and not table.problems:
        passed = f" ({len(skipped)} passed over, the first is {skipped[0]})" if skipped else ""
        raise LdmPipeError(f"the folder holds neither parquet files nor pictures{passed}", str(path))
    return table


def _known_column(table: Table, column: str | None, name: str) -> str | None:
    if column is not None and column not in table.columns:
        raise LdmPipeError(f"there is no column {column!r}", name, f"The columns are: {', '.join(table.columns)}.")
    return column
