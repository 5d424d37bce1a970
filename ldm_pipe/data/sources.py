"""Readers: parquet files, image folders and `datasets` objects become one `Table` of picture sources and columns.

Enters: a path, a hub name or a `datasets.Dataset`. Leaves: a `Table`, nothing decoded yet. This file does not judge
captions or pictures (dataset.py does); it refuses paths that lead out of their folder.
"""

from __future__ import annotations

import bisect
import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ldm_pipe.data.images import SUFFIXES
from ldm_pipe.pretrained import LdmPipeError

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
MAX_LINE = 1_000_000
_NO_CAPTIONS = ("readme", "license", "licence", "notice", "copying", "requirements")  # .txt files of other use
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}


@dataclass(frozen=True)
class Problem:
    """One row or file that is not used, and why."""

    where: str
    kind: str
    detail: str = ""

    def __str__(self) -> str:
        """Return one line for a report."""
        return f"{self.where}: {self.kind}" + (f" ({self.detail})" if self.detail else "")


@dataclass
class Table:
    """Rows of one source. `images[i]` is a Path or the bytes of a picture file (None: there is none)."""

    images: Sequence[Any]
    columns: dict[str, Sequence[Any]]
    where: Sequence[str]
    image_column: str = "image"
    problems: list[Problem] = field(default_factory=list)


class Lazy(Sequence[Any]):
    """A sequence whose items are made when asked for."""

    def __init__(self, length: int, get: Any) -> None:
        self._length, self._get = length, get

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._length:
            raise IndexError(index)
        return self._get(int(index))


class _Chain(Sequence[Any]):
    """Several sequences end to end."""

    def __init__(self, parts: Sequence[Sequence[Any]]) -> None:
        self._parts = parts
        self._ends = [sum(map(len, parts[: number + 1])) for number in range(len(parts))]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        part = bisect.bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]


def check_name(name: object, where: str) -> str:
    """Return a file name read from a table or an archive.

    Raises: LdmPipeError if it is no text, absolute, or has `..`.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise LdmPipeError(f"file name {name!r} is not a path", where=where)
    windows = PureWindowsPath(name)
    absolute = PurePosixPath(name).is_absolute() or bool(windows.drive or windows.root)
    if absolute or ".." in windows.parts:
        raise LdmPipeError(
            f"path {name!r} leads out of the folder", where=where, how_to_fix="use paths below the folder"
        )
    return name


def member_path(root: Path, name: object, where: str) -> Path:
    """Resolve a file name read from a table inside its folder.

    Raises: LdmPipeError if it is absolute, has `..`, or is a link that leads out of the folder.
    """
    path = root / check_name(name, where)
    if not path.resolve().is_relative_to(root.resolve()):
        raise LdmPipeError(f"path {name!r} is a link that leads out of the folder", where=where)
    return path


def split_of(path: Path) -> str | None:
    """Tell the split from a path such as `noto/train.parquet` or `train-00000-of-00001.parquet`, file name first."""
    for part in (path.stem, *reversed(path.parent.parts)):
        words = re.split(r"[-_.\s]+", part.lower())
        for split, names in _SPLIT_NAMES.items():
            if any(word in names for word in words):
                return split
    return None


def find_parquet(folder: Path, split: str) -> list[Path]:
    """Return the parquet files of one split below a folder, sorted."""
    files = sorted(path for path in folder.rglob("*.parquet") if not path.name.startswith("."))
    splits = [split_of(path.relative_to(folder)) for path in files]
    if not any(splits):
        # Nothing is marked: the folder itself may be the split, or all of it is for training.
        return files if split_of(Path(folder.name) / "x") in (None, split) and split == "train" else []
    return [path for path, name in zip(files, splits, strict=True) if name == split]


def read_parquet(path: Path, image_column: str) -> Table:
    """Read one parquet file; pictures are binary columns or structs {bytes, path}."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise LdmPipeError("parquet files need pyarrow", str(path), 'pip install "ldm-pipe[train]"') from error
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise LdmPipeError(f"cannot be read as parquet ({str(error)[:200]})", str(path)) from error
    _need_column(image_column, table.column_names, str(path))
    columns: dict[str, Sequence[Any]] = {}
    for name in table.column_names:
        kind = table.schema.field(name).type
        if pa.types.is_struct(kind) and {kind.field(i).name for i in range(kind.num_fields)} >= {"bytes"}:
            columns[name] = _arrow_pictures(table.column(name), path)
        elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            columns[name] = _arrow_bytes(table.column(name))
        elif name == image_column:
            raise LdmPipeError(f"column {name!r} of type {kind} holds no pictures", str(path))
        else:
            columns[name] = table.column(name).to_pylist()
    images = columns[image_column]
    return Table(images, columns, [f"{path}:row {row}" for row in range(len(images))], image_column)


def _arrow_bytes(column: Any) -> Sequence[Any]:
    return Lazy(len(column), lambda row: column[row].as_py())


def _arrow_pictures(column: Any, path: Path) -> Sequence[Any]:
    def get(row: int) -> Any:
        value = column[row].as_py()
        if value is None or value.get("bytes") is not None:
            return value and value["bytes"]
        name = value.get("path")
        return None if name is None else member_path(path.parent, name, f"{path}:row {row}")

    return Lazy(len(column), get)


def _need_column(name: str, known: Iterable[str], where: str) -> None:
    known = list(known)
    if name not in known:
        raise LdmPipeError(f"there is no column {name!r}", where, f"The columns are: {', '.join(map(str, known))}.")


def read_folder(folder: Path, image_column: str, caption_column: str | None) -> Table:
    """Read an image folder: metadata.jsonl, metadata.csv, or a .txt beside each picture.

    Pictures that no row names are kept when no captions are wanted, else reported.
    """
    files = sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )
    metadata = next((folder / name for name in METADATA_NAMES if (folder / name).is_file()), None)
    if metadata is None:
        return _read_text_files(folder, files, caption_column)
    rows, problems = [], []
    known: dict[str, None] = {}
    for where, row in _metadata_rows(metadata):
        if isinstance(row, str):
            problems.append(Problem(where, "broken row", row))
            continue
        name = row.pop("file_name", row.pop(f"{image_column}_file_name", None))
        if name is None:
            problems.append(Problem(where, "broken row", "no file_name"))
            continue
        path = member_path(folder, name, where)
        known.update(dict.fromkeys(row))
        if path.is_file():
            rows.append((path, where, row))
        else:
            problems.append(Problem(where, "missing file", str(name)))
    named = {path.resolve() for path, _, _ in rows}
    for path in files:
        if path.resolve() in named:
            continue
        member_path(folder, str(path.relative_to(folder)), str(path))
        if caption_column is None:
            rows.append((path, str(path), {}))
        else:
            problems.append(Problem(str(path), "missing caption", f"no row in {metadata.name}"))
    columns = {name: [row.get(name) for _, _, row in rows] for name in known}
    paths = [path for path, _, _ in rows]
    where = [str(path) for path, _, _ in rows]
    file_names = [path.relative_to(folder).as_posix() for path in paths]
    return Table(paths, {**columns, "file_name": file_names}, where, "file_name", problems)


def _metadata_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yield (where, row) for each row; a row that cannot be read is its reason as text."""
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        if path.suffix == ".csv":
            reader = csv.DictReader(file)
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
            return
        for number, line in enumerate(file, 1):
            where = f"{path}:line {number}"
            if not line.strip():
                continue
            if len(line) > MAX_LINE:
                yield where, f"longer than {MAX_LINE} characters"
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                yield where, f"not JSON: {error}"
                continue
            yield where, row if isinstance(row, dict) else "not a JSON object"


def _read_text_files(folder: Path, files: list[Path], caption_column: str | None) -> Table:
    captions: list[str | list[str] | None] = []
    problems: list[Problem] = []
    kept = []
    for path in files:
        member_path(folder, str(path.relative_to(folder)), str(path))
        beside = path.with_suffix(".txt")
        try:
            if beside.is_file() and beside.stat().st_size > MAX_LINE:
                raise ValueError(f"{beside.name} is larger than {MAX_LINE} bytes")
            text = caption_lines(beside.read_text(encoding="utf-8")) if beside.is_file() else None
        except (OSError, ValueError) as error:
            problems.append(Problem(str(path), "broken row", f"caption file: {error}"))
            continue
        if text is None and caption_column is not None:
            problems.append(Problem(str(path), "missing caption", f"no {beside.name}"))
            continue
        kept.append(path)
        captions.append(text)
    if caption_column is not None:
        known = {path.with_suffix("") for path in files}
        lone = [path for path in sorted(folder.rglob("*.txt")) if path.with_suffix("") not in known]
        lone = [path for path in lone if path.stem.lower() not in _NO_CAPTIONS and not path.name.startswith(".")]
        problems += [Problem(str(path), "missing file", "a caption without a picture") for path in lone]
    columns: dict[str, Sequence[Any]] = {"file_name": [path.relative_to(folder).as_posix() for path in kept]}
    if caption_column is not None:
        columns[caption_column] = captions
    return Table(kept, columns, [str(path) for path in kept], "file_name", problems)


def caption_lines(text: str) -> str | list[str]:
    """Read a caption file: a line is a caption, and several lines are several captions of the picture."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines if len(lines) > 1 else "".join(lines)


def read_dataset(dataset: Any, image_column: str, where: str) -> Table:
    """Wrap a `datasets.Dataset`; pictures stay undecoded, so that ours is the only decoder."""
    import datasets

    _need_column(image_column, dataset.column_names, where)
    pictures = [name for name, kind in dataset.features.items() if isinstance(kind, datasets.Image)]
    if image_column not in pictures:
        raise LdmPipeError(f"column {image_column!r} holds no pictures", where, f"Picture columns: {pictures}.")
    for name in pictures:
        dataset = dataset.cast_column(name, datasets.Image(decode=False))

    def get(row: int, name: str) -> Any:
        value = dataset[row][name]
        if value is None:
            return None
        return value["bytes"] if value["bytes"] is not None else Path(value["path"])

    columns: dict[str, Sequence[Any]] = {}
    for name in dataset.column_names:
        if name in pictures:
            columns[name] = Lazy(len(dataset), lambda row, name=name: get(row, name))
        else:
            columns[name] = list(dataset.select_columns(name)[name])
    return Table(columns[image_column], columns, [f"{where}:row {row}" for row in range(len(dataset))], image_column)


def load_hub(name: str, config: str | None, split: str, *, streaming: bool = False) -> Any:
    """Load one split of a hub data set through the `datasets` library, whole or for reading forward."""
    try:
        import datasets
    except ImportError as error:
        raise LdmPipeError(
            "a data set by name needs the `datasets` library", name, 'pip install "ldm-pipe[train]"'
        ) from error
    try:
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # the hub client raises its own, the loader's and the network's errors
        raise LdmPipeError(
            "no such folder here, and the data set could not be loaded from the hub "
            f"({type(error).__name__}: {str(error)[:200]})",
            name,
            "Give the path of a folder or a parquet file, or check the name and the network.",
        ) from error


def load_saved(folder: Path, split: str) -> Any:
    """Load one split of a folder written by `save_to_disk` of the `datasets` library."""
    try:
        import datasets
    except ImportError as error:
        raise LdmPipeError("a saved data set needs `datasets`", str(folder), 'pip install "ldm-pipe[train]"') from error
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library raises its own and pyarrow's errors
        what = f"cannot be read as a saved data set ({type(error).__name__}: {str(error)[:200]})"
        raise LdmPipeError(what, str(folder)) from error
    if not isinstance(found, datasets.DatasetDict):
        return found
    if split not in found:
        raise LdmPipeError(f"there is no split {split!r}", str(folder), f"Found: {list(found)}.")
    return found[split]


def join_tables(tables: Sequence[Table]) -> Table:
    """Put tables end to end; they must have the same columns."""
    first = tables[0]
    if len(tables) == 1:
        return first
    for table in tables[1:]:
        if set(table.columns) != set(first.columns):
            different = sorted(set(table.columns) ^ set(first.columns))
            where = table.where[0] if table.where else ""
            raise LdmPipeError(f"columns {different} are not in all of the files joined", where)
    return Table(
        _Chain([table.images for table in tables]),
        {name: _Chain([table.columns[name] for table in tables]) for name in first.columns},
        [where for table in tables for where in table.where],
        first.image_column,
        [problem for table in tables for problem in table.problems],
    )
