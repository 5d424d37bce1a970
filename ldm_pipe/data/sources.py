"""Tables of picture sources and columns, and those that the `datasets` library reads.

Enters: a hub name, a saved data set or a `datasets.Dataset`. Leaves: a `Table`, nothing decoded yet. This file does not
judge captions or pictures (rows.py does); it refuses paths that lead out of their folder. Folders of pictures, parquet
files and archives have their own readers beside it.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ldm_pipe.data.walk import Problem
from ldm_pipe.pretrained import LdmPipeError

_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}


@dataclass
class Table:
    """Rows of one source. `images[i]` is a Path or the bytes of a picture file (None: there is none).

    Args:
        problems: rows that are left out, each a fault of the set.
        skipped: pictures that the set is not thought to hold, such as those in hidden folders: named, no fault.
    """

    images: Sequence[Any]
    columns: dict[str, Sequence[Any]]
    where: Sequence[str]
    image_column: str = "image"
    problems: list[Problem] = field(default_factory=list)
    skipped: list[Problem] = field(default_factory=list)


class UnreadablePictureError(LdmPipeError):
    """One picture of a set is damaged where it is stored: its row is left out, the others are used."""


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


def resolved(path: Path) -> Path:
    """Follow the links of a path.

    Raises: LdmPipeError if they go round in a circle.
    """
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # Python before 3.13 raises the latter for a circle
        raise LdmPipeError(f"a link that cannot be followed ({error})", str(path), "Remove the link.") from None


def member_path(root: Path, name: object, where: str) -> Path:
    """Resolve a file name read from a table inside its folder.

    Raises: LdmPipeError if it is absolute, has `..`, or is a link that leads out of the folder.
    """
    path = root / check_name(name, where)
    if not resolved(path).is_relative_to(resolved(root)):
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


def find_parquet(folder: Path, files: Iterable[Path], split: str) -> list[Path]:
    """Return the parquet files of one split among the files of a folder."""
    files = [path for path in files if path.suffix == ".parquet"]
    splits = [split_of(path.relative_to(folder)) for path in files]
    if not any(splits):
        # Nothing is marked: the folder itself may be the split, or all of it is for training.
        return files if split_of(Path(folder.name) / "x") in (None, split) and split == "train" else []
    return [path for path, name in zip(files, splits, strict=True) if name == split]


def need_column(name: str, known: Iterable[str], where: str) -> None:
    """Refuse a column that is not there, naming those that are."""
    known = list(known)
    if name not in known:
        raise LdmPipeError(f"there is no column {name!r}", where, f"The columns are: {', '.join(map(str, known))}.")


def inside(name: str, roots: Sequence[Path], where: str) -> Path:
    """Return the path of a picture that a data set names; a relative one is below the first root.

    Raises: LdmPipeError if it lies in none of the roots: a data set from elsewhere may not name files of this machine.
    """
    path = roots[0] / name
    if not any(resolved(path).is_relative_to(resolved(root)) for root in roots):
        how = "A data set may name pictures inside its own folder only: copy them there, or store their bytes."
        raise LdmPipeError(f"the picture {name!r:.200} lies outside of the data set", where, how)
    return path


def hub_roots() -> tuple[Path, ...]:
    """Return the folders that the hub's libraries put what they fetch into."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    config = datasets.config
    places = (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, config.EXTRACTED_DATASETS_PATH, HF_HUB_CACHE)
    return tuple(Path(place) for place in places)


def read_dataset(dataset: Any, image_column: str, where: str, roots: Sequence[Path] | None = None) -> Table:
    """Wrap a `datasets.Dataset`; pictures stay undecoded, so that ours is the only decoder.

    Args:
        roots: folders that its pictures may lie in; None for one that the caller made, which may name any picture.
    """
    import datasets

    need_column(image_column, dataset.column_names, where)
    pictures = [name for name, kind in dataset.features.items() if isinstance(kind, datasets.Image)]
    if image_column not in pictures:
        raise LdmPipeError(f"column {image_column!r} holds no pictures", where, f"Picture columns: {pictures}.")
    for name in pictures:
        dataset = dataset.cast_column(name, datasets.Image(decode=False))

    def get(row: int, name: str) -> Any:
        value = dataset[row][name]
        if value is None:
            return None
        if value["bytes"] is not None or value["path"] is None:
            return value["bytes"]
        return Path(value["path"]) if roots is None else inside(value["path"], roots, f"{where}:row {row}")

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
        [problem for table in tables for problem in table.skipped],
    )
