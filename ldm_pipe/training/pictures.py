"""Records as training input: filtered, weighted by concept, decoded to tensors once where they fit in memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from ldm_pipe.data.dataset import Records, load_records
from ldm_pipe.data.images import resize, to_tensor
from ldm_pipe.data.order import concept_weights
from ldm_pipe.training.config import DataConfig

MAX_RESIDENT_BYTES = 2 << 30


def open_records(config: DataConfig) -> Records:
    """Read the records a config names, without the rows its `exclude_columns` mark."""
    records = load_records(
        config.train_data_dir,
        image_column=config.image_column,
        caption_column=config.caption_column,
        keywords_column=config.keywords_column,
    )
    if config.exclude_columns:
        records = records.filter(**dict.fromkeys(config.exclude_columns, False))
    if config.max_train_samples is not None:
        records = records.select(range(min(len(records), config.max_train_samples)))
    return records


def drawing_weights(records: Records, config: DataConfig) -> np.ndarray | None:
    """Return 1 / (rows of the same concept) for each row, or None without a concept column."""
    return None if config.concept_column is None else concept_weights(records.column(config.concept_column))


class PictureSource:
    """Map rows to images (B, 3, R, R) in [-1, 1]; pictures are kept as bytes in memory while they fit."""

    def __init__(self, records: Records, resolution: int) -> None:
        """Decode every picture once now if all fit in `MAX_RESIDENT_BYTES`, else at each use on threads."""
        self.records, self.resolution = records, resolution
        self._pool = ThreadPoolExecutor(8)
        resident = len(records) * 3 * resolution * resolution <= MAX_RESIDENT_BYTES
        self._bytes = self._stack(list(range(len(records)))) if resident else None

    def _one(self, row: int) -> Tensor:
        image = to_tensor(resize(self.records.image(row), self.resolution))
        return ((image + 1.0) * 127.5).round().to(torch.uint8)

    def _stack(self, rows: list[int]) -> Tensor:
        return torch.stack(list(self._pool.map(self._one, rows)))

    def __call__(self, rows: list[int]) -> Tensor:
        """Return the images of these rows, float32."""
        pixels = self._bytes[rows] if self._bytes is not None else self._stack(rows)
        return pixels.float() / 127.5 - 1.0

    def batches(self, size: int) -> Iterator[Tensor]:
        """Go once through all pictures in order."""
        for first in range(0, len(self.records), size):
            yield self(list(range(first, min(first + size, len(self.records)))))
