"""Data order: which pictures make up batch number `step`, as a pure function of the seed.

Enters: number of pictures, seed, optional weights, step. Leaves: row indices. There is no state to save: a run that
resumes at a step gets exactly the batch that an unbroken run would have had. This file does not know pictures or
tensors.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence

import numpy as np

from ldm_pipe.pretrained import LdmPipeError


def random_bits(count: int, *keys: int | str) -> np.ndarray:
    """Return uint64 values that depend on the keys alone.

    The raw output of Philox is fixed for good, unlike the distributions of numpy's Generator (NEP 19).
    """
    digest = hashlib.blake2b("/".join(map(str, keys)).encode(), digest_size=16).digest()
    return np.random.Philox(key=np.frombuffer(digest, dtype="<u8").astype(np.uint64)).random_raw(count)


def epoch_order(
    num_items: int, seed: int, epoch: int, weights: Sequence[float] | np.ndarray | None = None
) -> np.ndarray:
    """Return the `num_items` row indices of one epoch in their order.

    Without weights: a permutation. With weights: a draw with replacement by systematic resampling (Kitagawa 1996), so
    that row i comes floor(e) or floor(e) + 1 times, e = num_items w_i / sum(w), and e times on average; rows of one
    group that stand together are drawn as evenly as if they were one row. Then shuffled.

    Args:
        num_items: number of rows.
        seed: seed of the run.
        epoch: 0, 1, ...
        weights: one positive or zero weight per row.
    Returns: int64 indices, shape (num_items,).
    """
    if num_items < 1:
        raise LdmPipeError("an epoch needs at least one picture")
    if epoch < 0:
        raise LdmPipeError(f"epoch {epoch}: must be 0 or more")
    bits = random_bits(num_items + 1, seed, "order", epoch)
    shuffle = np.argsort(bits[1:], kind="stable")
    if weights is None:
        return shuffle.astype(np.int64)
    mass = np.asarray(weights, dtype=np.float64)
    if mass.shape != (num_items,):
        raise LdmPipeError(f"{mass.shape} weights for {num_items} pictures")
    if not np.isfinite(mass).all() or (mass < 0).any() or mass.sum() <= 0:
        raise LdmPipeError("weights must be finite, not negative, and not all zero")
    edges = np.cumsum(mass) / mass.sum() * num_items
    edges[-1] = num_items
    edges[np.flatnonzero(mass)[-1] :] = num_items  # rounding must not hand a draw to trailing rows of weight 0
    start = float(bits[0] >> np.uint64(11)) * 2.0**-53  # [0, 1)
    chosen = np.searchsorted(edges, start + np.arange(num_items), side="right")
    return chosen[shuffle].astype(np.int64)


def concept_weights(concepts: Sequence[Hashable]) -> np.ndarray:
    """Return 1 / (number of rows of the same concept): every concept is drawn equally often."""
    counts = Counter(concepts)
    return np.array([1.0 / counts[concept] for concept in concepts])


def batch_part(step: int, batch_size: int, process: tuple[int, int], micro: tuple[int, int]) -> tuple[int, int]:
    """Return where one process's part of one accumulation step begins in the global batch, and its size.

    Args:
        step: step of the run, only checked.
        batch_size: size of the global batch.
        process: index and number of processes.
        micro: index and number of accumulation steps.
    Raises: LdmPipeError if the part does not exist or the batch cannot be split evenly.
    """
    (process_index, num_processes), (micro_step, num_micro_steps) = process, micro
    if step < 0:
        raise LdmPipeError(f"step {step}: must be 0 or more")
    if not (0 <= process_index < num_processes and 0 <= micro_step < num_micro_steps):
        raise LdmPipeError(
            f"part ({micro_step}, {process_index}) of ({num_micro_steps}, {num_processes}) does not exist"
        )
    if batch_size % (num_processes * num_micro_steps):
        raise LdmPipeError(
            f"batch of {batch_size} cannot be split over {num_processes} processes x {num_micro_steps} steps",
            how_to_fix="choose a batch size that is a multiple of both together",
        )
    size = batch_size // (num_processes * num_micro_steps)
    return (micro_step * num_processes + process_index) * size, size


class DataOrder:
    """The endless stream of row indices of a run, cut into global batches.

    Sample number k of the run is row `k % num_items` of epoch `k // num_items`; batches run on over the end of an
    epoch, so nothing is dropped or padded. A global batch does not depend on how it is split over processes or
    accumulation.

    Args:
        num_items: number of rows.
        batch_size: pictures per optimiser step, over all processes and accumulation steps together.
        seed: seed of the run.
        weights: see `epoch_order`.
    """

    def __init__(
        self, num_items: int, batch_size: int, seed: int, weights: Sequence[float] | np.ndarray | None = None
    ) -> None:
        if batch_size < 1:
            raise LdmPipeError(f"batch size {batch_size}: must be at least 1")
        self.num_items = num_items
        self.batch_size = batch_size
        self.seed = seed
        self.weights = None if weights is None else np.asarray(weights, dtype=np.float64)
        self._epochs: OrderedDict[int, np.ndarray] = OrderedDict()
        self._epoch(0)  # refuses wrong weights before the first step

    def _epoch(self, epoch: int) -> np.ndarray:
        """Return one epoch's order; the last few are kept."""
        if epoch not in self._epochs:
            self._epochs[epoch] = epoch_order(self.num_items, self.seed, epoch, self.weights)
            while len(self._epochs) > 3:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def epoch_at(self, step: int) -> float:
        """Return how many epochs lie before this step."""
        return step * self.batch_size / self.num_items

    def batch_at(
        self,
        step: int,
        *,
        process_index: int = 0,
        num_processes: int = 1,
        micro_step: int = 0,
        num_micro_steps: int = 1,
    ) -> np.ndarray:
        """Return the row indices of one step, or the part of them that one process sees in one accumulation step.

        The parts, in the order (micro_step, process_index), put end to end, are the global batch.
        """
        start, part_size = batch_part(
            step, self.batch_size, (process_index, num_processes), (micro_step, num_micro_steps)
        )
        first = step * self.batch_size + start
        chunks = []
        position, end = first, first + part_size
        while position < end:
            epoch, offset = divmod(position, self.num_items)
            chunk = self._epoch(epoch)[offset : offset + end - position]
            chunks.append(chunk)
            position += len(chunk)
        return np.concatenate(chunks)


def batch_at(
    step: int,
    num_items: int,
    batch_size: int,
    seed: int,
    *,
    weights: Sequence[float] | np.ndarray | None = None,
    process_index: int = 0,
    num_processes: int = 1,
) -> np.ndarray:
    """Return the row indices of one step for one process; `DataOrder` also keeps the epoch's order between calls."""
    order = DataOrder(num_items, batch_size, seed, weights)
    return order.batch_at(step, process_index=process_index, num_processes=num_processes)
