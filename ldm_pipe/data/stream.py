"""Streams: data sets that are only read forward, too large or too far away to index; split by process.

Enters: a name, files, or an `IterableDataset`. Leaves: samples by their position in one process's share, the same after
a restart: which sample stands at a position depends on seed, share and position alone. This file knows no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from ldm_pipe.data.images import check_made, open_image
from ldm_pipe.data.order import batch_part
from ldm_pipe.data.parquet import check_announced
from ldm_pipe.data.rows import DataReport, read_captions
from ldm_pipe.data.sources import find_parquet, hub_roots, inside, load_hub, split_of
from ldm_pipe.data.walk import Problem, caption_lines, walk
from ldm_pipe.pretrained import LdmPipeError

SHUFFLE_BUFFER = 1000
MIN_SEEN = 100  # before this many samples, the share of bad ones says nothing
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")


class StreamOrder:
    """Positions in each process's own share: the sister of `ldm_pipe.data.order.DataOrder` for streams.

    Args:
        batch_size: pictures per optimiser step, over all processes and accumulation steps together.
    """

    def __init__(self, batch_size: int) -> None:
        if batch_size < 1:
            raise LdmPipeError(f"batch size {batch_size}: must be at least 1")
        self.batch_size = batch_size

    def epoch_at(self, step: int) -> float:
        """Return NaN: nobody knows how long a stream is."""
        return math.nan

    def batch_at(
        self,
        step: int,
        *,
        process_index: int = 0,
        num_processes: int = 1,
        micro_step: int = 0,
        num_micro_steps: int = 1,
    ) -> np.ndarray:
        """Return the positions of one process's part of one accumulation step, in its own share."""
        _, size = batch_part(step, self.batch_size, (process_index, num_processes), (micro_step, num_micro_steps))
        return np.arange(size) + (step * num_micro_steps + micro_step) * size


@dataclass(frozen=True)
class Sample:
    """A picture, upright RGB, and its captions."""

    image: Image.Image
    captions: tuple[str, ...]


def open_stream(source: str | Path, split: str = "train", config_name: str | None = None) -> Any:
    """Open parquet files, tar shards or a data set by name for reading forward: a `datasets.IterableDataset`."""
    try:
        import datasets
    except ImportError as error:
        raise LdmPipeError(
            "streaming needs the `datasets` library", str(source), 'pip install "ldm-pipe[train]"'
        ) from error
    path = Path(source).expanduser()
    if not path.exists():
        return load_hub(str(source), config_name, split, streaming=True)
    shards = walk(path)[0] if path.is_dir() else [path]
    parquet = find_parquet(path, shards, split) if path.is_dir() else [path][: path.suffix == ".parquet"]
    for file in parquet:
        check_announced(file, _footer(file))
    tars = [file for file in shards if file.name.endswith(TAR_SUFFIXES)]
    tars = [file for file in tars if file == path or (split_of(file.relative_to(path)) or "train") == split]
    if not parquet and not tars:
        how = "Leave streaming out: pictures in a folder are read in any order anyway."
        raise LdmPipeError(f"neither parquet files nor tar shards for split {split!r} are there", str(path), how)
    kind, files = ("parquet", parquet) if parquet else ("webdataset", tars)
    return datasets.load_dataset(
        kind, data_files={"train": [str(file) for file in files]}, split="train", streaming=True
    )


def _footer(file: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise LdmPipeError(f"cannot be read as parquet ({str(error)[:200]})", str(file)) from error


def picture_roots(source: str | Path) -> tuple[Path, ...]:
    """Return the folders that the pictures of a stream may lie in: its own, or those of what the hub's tools fetch."""
    path = Path(source).expanduser()
    if not path.exists():
        return hub_roots()
    return (path if path.is_dir() else path.parent,)


class Stream:
    """One process's endless share of a stream.

    Shards are dealt out to the processes; where there are fewer shards than processes, samples are. An epoch is one
    pass through the share, shuffled anew in a buffer. A bad sample is replaced by the next good one of the share and
    reported, so that positions never shift. Going back (a resumed run) reads again from the beginning of the epoch,
    without decoding pictures; the length of the share is learnt in the first pass.

    Args:
        dataset: a `datasets.IterableDataset`.
        image_column, caption_column: its columns; a set of tar shards has its own, they are found.
        seed: of the shuffling; None reads in order.
        process_index, num_processes: whose share.
        null_captions: "skip" counts samples without caption as bad, "empty" uses the empty text.
        max_bad_fraction: stop if more of the samples are bad.
        roots: folders that pictures named by a path may lie in; none: such samples are refused.
        shape: (height, width) that pictures will be scaled to cover; those that it would make too large are bad.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        image_column: str = "image",
        caption_column: str | None = "text",
        seed: int | None = 0,
        process_index: int = 0,
        num_processes: int = 1,
        null_captions: Literal["skip", "empty"] = "skip",
        max_bad_fraction: float = 0.01,
        roots: Sequence[Path] = (),
        shape: tuple[int, int] | None = None,
    ) -> None:
        dataset, self._image, self._caption = _columns(dataset, image_column, caption_column)
        self._every = (1, 0)
        if num_processes > 1 and dataset.num_shards >= num_processes:
            dataset = dataset.shard(num_shards=num_processes, index=process_index)
        elif num_processes > 1:
            self._every = (num_processes, process_index)
        self._dataset = dataset if seed is None else dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        self._null_captions, self._max_bad_fraction = null_captions, max_bad_fraction
        self.report, self._roots, self._shape = DataReport(), roots, shape
        self._length: int | None = None
        self._rows: dict[int, Any] = {}  # read ahead
        self._reader, self._next = self._read_epoch(0), 0

    def _read_epoch(self, epoch: int) -> Iterator[Any]:
        self._dataset.set_epoch(epoch)
        step, first = self._every
        return (row for number, row in enumerate(self._dataset) if number % step == first)

    def _row(self, position: int) -> Any:
        """Return the undecoded row at a position, reading as far as needed."""
        if position in self._rows:
            return self._rows[position]
        if self._length is not None:
            epoch, _ = divmod(position, self._length)
            if position < self._next or epoch > self._next // self._length:
                self._reader, self._next = self._read_epoch(epoch), epoch * self._length
        elif position < self._next:
            self._reader, self._next = self._read_epoch(0), 0
        while True:
            row = next(self._reader, None)
            if row is None:
                self._end_epoch()
                return self._row(position)
            self._next += 1
            if self._next == position + 1:
                self._rows[position] = row
                return row

    def _end_epoch(self) -> None:
        """Learn the length of the share at its first end, and begin the next epoch."""
        self._length = self._length or self._next
        if not self._length:
            raise LdmPipeError("the stream holds no samples for this process", "stream", "Use fewer processes.")
        self._reader = self._read_epoch(self._next // self._length)

    def take(self, positions: Sequence[int]) -> list[Sample]:
        """Return the samples at some positions of the share.

        Raises: LdmPipeError naming the first faults, if too many samples are bad.
        """
        samples = []
        for position in positions:
            for known in [known for known in self._rows if known < position]:
                del self._rows[known]
            samples.append(self._good(position))
        return samples

    def _good(self, position: int) -> Sample:
        """Return the first good sample at or after a position."""
        while True:
            self.report.num_rows += 1
            sample = self._sample(self._row(position), f"stream:sample {position}")
            if sample is not None:
                self.report.num_used += 1
                return sample
            bad, seen = len(self.report.problems), max(self.report.num_rows, MIN_SEEN)
            if bad > self._max_bad_fraction * seen:
                self.report.refuse_many(0.0, "stream")
            position += 1

    def _sample(self, row: dict[str, Any], where: str) -> Sample | None:
        """Decode one row, or report why not."""
        value = row[self._image]
        if value is None or (value.get("bytes") is None and value.get("path") is None):
            self.report.problems.append(Problem(where, "missing picture", "the picture is null"))
            return None
        text = row.get(self._caption) if self._caption else ""
        if self._caption == "txt" and isinstance(text, str):
            text = caption_lines(text)
        captions = read_captions(text, where, self.report)
        if captions is None:
            return None
        if self._caption and not captions and self._null_captions == "skip":
            self.report.problems.append(Problem(where, "null caption"))
            return None
        source = value["bytes"]
        if source is None:
            if not self._roots:
                raise LdmPipeError("the sample names a picture instead of holding it", where, "Store its bytes.")
            source = inside(value["path"], self._roots, where)
        try:
            image = open_image(source, name=where)
            if self._shape is not None:
                check_made(image.size, self._shape)
        except LdmPipeError as error:
            self.report.problems.append(Problem(where, "unreadable picture", error.what))
            return None
        return Sample(image, captions or ("",))


def _columns(dataset: Any, image_column: str, caption_column: str | None) -> tuple[Any, str, str | None]:
    """Find the columns and switch the library's decoder off.

    Raises: LdmPipeError listing the columns.
    """
    import datasets

    features = dataset.features or {}
    pictures = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    if "__key__" in features:  # tar shards: columns are suffixes
        image_column = image_column if image_column in pictures else next(iter(pictures), image_column)
        caption_column = "txt" if caption_column is not None and caption_column not in features else caption_column
    for name in (image_column, caption_column):
        if name is not None and name not in features:
            raise LdmPipeError(f"there is no column {name!r}", "stream", f"The columns are: {', '.join(features)}.")
    if image_column not in pictures:
        raise LdmPipeError(f"column {image_column!r} holds no pictures", "stream", f"Picture columns: {pictures}.")
    return dataset.cast_column(image_column, datasets.Image(decode=False)), image_column, caption_column
