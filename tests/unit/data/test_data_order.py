"""The data order is a pure function of (seed, step): laws of epochs, resumes, splits and weights (faults A7, A10)."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_pipe.data.order import DataOrder, batch_at, concept_weights, epoch_order
from ldm_pipe.pretrained import LdmPipeError

EXPECTED = [7, 3, 0, 2, 5, 6, 1, 4]


def test_fault_7_every_image_exactly_once_per_epoch_across_a_thousand_resumes() -> None:
    """Fault A7: diffusers' resume missed 10 of 40 and doubled 10."""
    rng = random.Random(0)
    for _ in range(1000):
        num_items, batch_size, seed = rng.randint(1, 60), rng.randint(1, 16), rng.randrange(2**40)
        epoch = rng.randrange(50)
        first = epoch * num_items // batch_size
        last = -(-(epoch + 1) * num_items // batch_size)
        kill = rng.randint(first, last)
        before, after = (DataOrder(num_items, batch_size, seed) for _ in range(2))
        seen = [before.batch_at(step) for step in range(first, kill)]
        seen += [after.batch_at(step) for step in range(kill, last)]
        stream = np.concatenate(seen) if seen else np.empty(0, dtype=np.int64)
        start = epoch * num_items - first * batch_size
        assert sorted(stream[start : start + num_items]) == list(range(num_items))


def test_order_does_not_depend_on_what_was_asked_before() -> None:
    order = DataOrder(37, 8, 5)
    expected = {step: order.batch_at(step).tolist() for step in range(60)}
    rng = random.Random(1)
    for step in rng.choices(range(60), k=200):
        assert order.batch_at(step).tolist() == expected[step]
        assert batch_at(step, 37, 8, 5).tolist() == expected[step]


def test_order_is_the_same_in_another_process_and_version() -> None:
    """Fixed values: a library update must not change the order in the middle of a training."""
    assert epoch_order(8, 7, 2).tolist() == EXPECTED
    code = "from ldm_pipe.data.order import epoch_order; print(epoch_order(8, 7, 2).tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(EXPECTED)


def test_epochs_and_seeds_differ_and_positions_are_uniform() -> None:
    orders = {tuple(epoch_order(20, seed, epoch)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100
    first = Counter(int(epoch_order(5, 3, epoch)[0]) for epoch in range(2000))
    assert set(first) == set(range(5))
    assert max(abs(number - 400) for number in first.values()) < 90, "five standard deviations"


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 100), st.integers(1, 30))
def test_parts_put_together_are_the_global_batch(processes: int, micro: int, part: int, step: int, items: int) -> None:
    """Fault A10: the global batch does not depend on process count or accumulation."""
    order = DataOrder(items, processes * micro * part, 0)
    parts = [
        order.batch_at(step, process_index=p, num_processes=processes, micro_step=m, num_micro_steps=micro)
        for m in range(micro)
        for p in range(processes)
    ]
    assert {len(indices) for indices in parts} == {part}
    assert np.concatenate(parts).tolist() == order.batch_at(step).tolist()


def test_weights_draw_each_row_as_often_as_expected() -> None:
    """Systematic resampling: floor(e) or floor(e) + 1 times in one epoch, e on average."""
    weights = np.array([1.0, 0.0, 0.25, 3.0, 0.5, 0.25])
    expected = weights / weights.sum() * len(weights)
    total = np.zeros(len(weights))
    for epoch in range(1000):
        counts = np.bincount(epoch_order(6, 0, epoch, weights), minlength=6)
        assert counts.sum() == 6
        assert (counts >= np.floor(expected - 1e-9)).all()
        assert (counts <= np.floor(expected + 1e-9) + 1).all()
        total += counts
    assert np.abs(total / 1000 - expected).max() < 0.08
    assert total[1] == 0


def test_concept_weights_draw_every_concept_equally_often() -> None:
    concepts = ["person"] * 60 + ["apple"] + ["car"] * 2 + ["dog"]
    weights = concept_weights(concepts)
    assert weights[60] == 60 * weights[0]
    for epoch in range(20):
        drawn = Counter(concepts[row] for row in epoch_order(len(concepts), 1, epoch, weights))
        assert drawn == {"person": 16, "apple": 16, "car": 16, "dog": 16}


def test_equal_weights_are_a_permutation() -> None:
    for num_items in (1, 7, 100):
        assert sorted(epoch_order(num_items, 2, 1, np.full(num_items, 0.3))) == list(range(num_items))


def test_trailing_rows_of_weight_zero_are_never_drawn() -> None:
    for num_items in (3, 10, 49, 97):
        weights = [0.1] * num_items + [0.0] * 3
        for epoch in range(30):
            assert max(epoch_order(num_items + 3, 0, epoch, weights)) < num_items


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0], [1.0, float("nan"), 1.0], [1.0, float("inf"), 1.0]]
)
def test_wrong_weights_are_refused_before_the_first_step(weights: list[float]) -> None:
    with pytest.raises(LdmPipeError, match="weights"):
        DataOrder(3, 1, 0, weights)


def test_wrong_sizes_and_parts_are_refused() -> None:
    with pytest.raises(LdmPipeError, match="at least one picture"):
        DataOrder(0, 1, 0)
    with pytest.raises(LdmPipeError, match="batch size 0"):
        DataOrder(3, 0, 0)
    with pytest.raises(LdmPipeError, match="cannot be split"):
        DataOrder(3, 3, 0).batch_at(0, num_processes=2)
    with pytest.raises(LdmPipeError, match="does not exist"):
        DataOrder(3, 4, 0).batch_at(0, process_index=2, num_processes=2)
    with pytest.raises(LdmPipeError, match="step -1"):
        DataOrder(3, 4, 0).batch_at(-1)
