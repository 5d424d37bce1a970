"""Aspect-ratio buckets: pictures of like shape are trained together, so that little of each is cropped away.

Enters: sizes of pictures, a resolution, a seed. Leaves: shapes, the bucket of each picture, and batches of one shape
each, again as a pure function of (seed, step). This file does not know pictures or tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from ldm_pipe.data.order import batch_part, random_bits
from ldm_pipe.pretrained import LdmPipeError

Shape = tuple[int, int]


def bucket_shapes(resolution: int, step: int = 64, max_ratio: float = 2.0) -> list[Shape]:
    """List the shapes that fill the area of a square best (the rule of NovelAI's aspect ratio bucketing, 2022).

    For every width the greatest height with height x width <= resolution^2, both multiples of `step`; and transposed.

    Args:
        resolution: side of the square, pixels.
        step: sides are multiples of this (the autoencoder's factor, times what the U-Net halves).
        max_ratio: of the longer to the shorter side.
    Returns: (height, width), flattest first; the square is always among them.
    """
    if step < 1 or resolution < step or resolution % step:
        what = f"a resolution of {resolution} is no multiple of the bucket step {step}"
        raise LdmPipeError(what, "aspect-ratio buckets", "Choose another resolution or step.")
    if max_ratio < 1:
        raise LdmPipeError(f"a largest aspect ratio of {max_ratio:g} is below 1", "aspect-ratio buckets")
    found = {(resolution, resolution)}
    for width in range(resolution, int(resolution * max_ratio) + 1, step):
        height = resolution * resolution // width // step * step
        if height and width <= max_ratio * height:
            found |= {(height, width), (width, height)}
    return sorted(found, key=lambda shape: (shape[0] / shape[1], shape))


def assign_buckets(sizes: Sequence[Shape], shapes: Sequence[Shape], min_pictures: int = 1) -> np.ndarray:
    """Give every picture the shape whose aspect ratio is nearest (in the logarithm; of two, the larger shape).

    The bucket with the fewest pictures is dissolved, and its pictures go to their next nearest shape, until every
    bucket that holds any holds `min_pictures`: a batch larger than its bucket would show a picture twice.

    Args:
        sizes: (height, width) of each picture.
        shapes: (height, width) to choose from.
        min_pictures: the global batch size, as a rule.
    Returns: numbers of shapes, int64 (N,).
    """
    if not sizes or not shapes:
        raise LdmPipeError(f"{len(sizes)} pictures in {len(shapes)} shapes: both must be at least 1")
    ratio = np.log([height / width for height, width in sizes])
    offered = np.log([height / width for height, width in shapes])
    far = np.abs(ratio[:, None] - offered[None]) - 1e-9 * np.array([h * w for h, w in shapes]) / 1e9
    while True:
        nearest = far.argmin(axis=1)
        counts = np.bincount(nearest, minlength=len(shapes))
        held = np.flatnonzero(counts)
        smallest = held[counts[held].argmin()]
        if len(held) == 1 or counts[smallest] >= min_pictures:
            return nearest.astype(np.int64)
        far[:, smallest] = np.inf


class BucketOrder:
    """The endless stream of batches of a run, each of one bucket; a sister of `ldm_pipe.data.order.DataOrder`.

    The pictures of a bucket come as one permutation after the other, and its batches run on over the end of a
    permutation: nothing is dropped or padded, every batch is full. Batch number k of a bucket of n pictures belongs to
    the epoch of its first picture, k B // n; within an epoch the batches of all buckets are shuffled.

    Args:
        buckets: number of the bucket of each picture.
        batch_size: pictures per optimiser step, over all processes and accumulation steps together.
        seed: seed of the run.
    """

    def __init__(self, buckets: Sequence[int] | np.ndarray, batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise LdmPipeError(f"batch size {batch_size}: must be at least 1")
        numbers = np.asarray(buckets, dtype=np.int64)
        if not len(numbers):
            raise LdmPipeError("an epoch needs at least one picture")
        self.num_items, self.batch_size, self.seed = len(numbers), batch_size, seed
        self._members = [np.flatnonzero(numbers == bucket) for bucket in np.unique(numbers)]
        self._orders: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._plans: OrderedDict[int, np.ndarray] = OrderedDict()

    def _num_batches(self, epoch: int) -> list[int]:
        """Count the batches of each bucket that begin before an epoch: ceil(epoch n / B)."""
        return [-(-epoch * len(members) // self.batch_size) for members in self._members]

    def first_step(self, epoch: int) -> int:
        """Return the step at which an epoch begins."""
        return sum(self._num_batches(epoch))

    def _epoch_of(self, step: int) -> int:
        """Find the epoch of a step: the largest whose first step is not later."""
        low, high = 0, 1
        while self.first_step(high) <= step:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.first_step(middle) <= step else (low, middle)
        return low

    def _plan(self, epoch: int) -> np.ndarray:
        """Return the batches of an epoch in their order: (bucket, number of the batch in the bucket)."""
        if epoch not in self._plans:
            starts, ends = self._num_batches(epoch), self._num_batches(epoch + 1)
            pairs = [(b, k) for b, (start, end) in enumerate(zip(starts, ends, strict=True)) for k in range(start, end)]
            shuffle = np.argsort(random_bits(len(pairs), self.seed, "buckets", epoch), kind="stable")
            self._plans[epoch] = np.array(pairs, dtype=np.int64)[shuffle]
            while len(self._plans) > 3:
                self._plans.popitem(last=False)
        return self._plans[epoch]

    def _order(self, bucket: int, epoch: int) -> np.ndarray:
        """Return the pictures of one bucket in their order of one epoch; the last few orders are kept."""
        if (bucket, epoch) not in self._orders:
            members = self._members[bucket]
            bits = random_bits(len(members), self.seed, "bucket", bucket, epoch)
            self._orders[bucket, epoch] = members[np.argsort(bits, kind="stable")]
            while len(self._orders) > 4 * len(self._members):
                self._orders.popitem(last=False)
        return self._orders[bucket, epoch]

    def epoch_at(self, step: int) -> float:
        """Return how many epochs lie before this step."""
        epoch = self._epoch_of(step)
        first, last = self.first_step(epoch), self.first_step(epoch + 1)
        return epoch + (step - first) / (last - first)

    def batch_at(
        self,
        step: int,
        *,
        process_index: int = 0,
        num_processes: int = 1,
        micro_step: int = 0,
        num_micro_steps: int = 1,
    ) -> np.ndarray:
        """Return the row indices of one step or of one part of it, as `DataOrder.batch_at`; all are of one bucket."""
        start, size = batch_part(step, self.batch_size, (process_index, num_processes), (micro_step, num_micro_steps))
        epoch = self._epoch_of(step)
        bucket, number = (int(value) for value in self._plan(epoch)[step - self.first_step(epoch)])
        count, position = len(self._members[bucket]), number * self.batch_size + start
        return np.array(
            [self._order(bucket, k // count)[k % count] for k in range(position, position + size)], dtype=np.int64
        )
