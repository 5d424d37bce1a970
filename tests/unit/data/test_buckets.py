"""Aspect-ratio buckets: shapes of equal area, batches of one shape, every picture once per epoch, no state."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from ldm_pipe.data.buckets import BucketOrder, assign_buckets, bucket_shapes
from ldm_pipe.pretrained import LdmPipeError


def test_shapes_have_the_area_of_the_square_and_both_orientations() -> None:
    shapes = bucket_shapes(512, 64, 2.0)
    assert (512, 512) in shapes
    assert {(width, height) for height, width in shapes} == set(shapes)
    for height, width in shapes:
        assert height % 64 == width % 64 == 0
        assert height * width <= 512 * 512
        assert max(height, width) * (min(height, width) + 64) > 512 * 512, "one step more would not fit"
        assert max(height, width) <= 2 * min(height, width)
    assert bucket_shapes(64, 16, 1.0) == [(64, 64)]
    with pytest.raises(LdmPipeError, match="no multiple"):
        bucket_shapes(500, 64)
    with pytest.raises(LdmPipeError, match="below 1"):
        bucket_shapes(512, 64, 0.5)


def test_each_picture_goes_to_the_nearest_ratio_and_small_buckets_are_dissolved() -> None:
    shapes = [(32, 64), (64, 64), (64, 32)]
    sizes = [(100, 200)] * 5 + [(90, 100)] * 9 + [(300, 100)] * 2
    assert assign_buckets(sizes, shapes).tolist() == [0] * 5 + [1] * 9 + [2] * 2
    assert assign_buckets(sizes, shapes, min_pictures=3).tolist() == [0] * 5 + [1] * 11
    assert set(assign_buckets(sizes, shapes, min_pictures=100).tolist()) == {1}
    assert assign_buckets([(64, 64)], [(32, 32), (64, 64)]).tolist() == [1], "of two alike, the larger"


def buckets(rng: random.Random) -> list[int]:
    return [rng.choice((0, 0, 0, 2, 5)) for _ in range(rng.randint(1, 60))]


def test_every_batch_has_one_shape_and_is_full() -> None:
    rng = random.Random(1)
    for _ in range(50):
        numbers, size = buckets(rng), rng.randint(1, 12)
        order = BucketOrder(numbers, size, rng.randrange(1000))
        for step in range(40):
            batch = order.batch_at(step)
            assert len(batch) == size
            assert len({numbers[row] for row in batch}) == 1


def test_every_picture_exactly_once_per_epoch_also_with_buckets() -> None:
    """Fault 7: each bucket's stream is cut into permutations; no picture is ever ahead by more than one epoch."""
    rng = random.Random(2)
    for _ in range(60):
        numbers, size = buckets(rng), rng.randint(1, 12)
        order = BucketOrder(numbers, size, rng.randrange(1000))
        num_epochs = 5
        batches = [order.batch_at(step) for step in range(order.first_step(num_epochs))]
        for bucket in set(numbers):
            members = [row for row, number in enumerate(numbers) if number == bucket]
            seen = Counter(int(row) for batch in batches if numbers[batch[0]] == bucket for row in batch)
            assert set(seen) == set(members)
            surplus = sum(seen.values()) - num_epochs * len(members)
            assert 0 <= surplus < size, "only the last batch runs on into the next epoch"
            whole, rest = divmod(surplus, len(members))
            assert set(seen.values()) <= {num_epochs + whole, num_epochs + whole + (rest > 0)}


def test_a_run_resumed_at_any_step_of_any_bucket_gets_the_batch_of_the_unbroken_run() -> None:
    """Fault 7: 1,000 random (kill step, epoch) pairs, each resumed in a fresh object."""
    rng = random.Random(3)
    for _ in range(100):
        numbers, size, seed = buckets(rng), rng.randint(1, 8), rng.randrange(2**40)
        unbroken = BucketOrder(numbers, size, seed)
        expected = [unbroken.batch_at(step).tolist() for step in range(unbroken.first_step(4) + 1)]
        for kill in rng.choices(range(len(expected)), k=10):
            assert BucketOrder(numbers, size, seed).batch_at(kill).tolist() == expected[kill]


def test_parts_put_together_are_the_global_batch_of_one_shape() -> None:
    """Fault 10."""
    numbers = [0] * 9 + [1] * 7
    order = BucketOrder(numbers, 12, 4)
    for step in range(20):
        parts = [
            order.batch_at(step, process_index=p, num_processes=2, micro_step=m, num_micro_steps=3)
            for m in range(3)
            for p in range(2)
        ]
        assert np.concatenate(parts).tolist() == order.batch_at(step).tolist()
    with pytest.raises(LdmPipeError, match="cannot be split"):
        order.batch_at(0, num_processes=5)


def test_epochs_are_counted_and_shuffled_anew() -> None:
    order = BucketOrder([0] * 8 + [1] * 8, 4, 0)
    assert [order.epoch_at(step) for step in (0, 1, 4, 6, 8)] == [0, 0.25, 1, 1.5, 2]
    plans = {tuple(order.batch_at(4 * epoch).tolist()) for epoch in range(10)}
    assert len(plans) == 10
    with pytest.raises(LdmPipeError, match="step -1"):
        order.batch_at(-1)
    with pytest.raises(LdmPipeError, match="at least one picture"):
        BucketOrder([], 4, 0)
