"""Laws of concept retrieval."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_pipe.metrics.retrieval import chosen_by_hash, concept_ranks, hit_rate, thumbnails


def drawings(num: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(num, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_perfect_pictures_are_always_first() -> None:
    vectors, names = drawings(50), [f"c{i // 2}" for i in range(50)]
    ranks = concept_ranks(vectors, names, vectors, names)
    assert ranks.tolist() == [0] * 50
    assert (hit_rate(ranks, 1), hit_rate(ranks, 5)) == (1.0, 1.0)


def test_random_pictures_hit_one_time_in_n() -> None:
    num, tries = 20, 4000
    ranks = concept_ranks(drawings(tries, 1), [i % num for i in range(tries)], drawings(num), list(range(num)))
    for first in (1, 5):
        # each concept is asked for equally often, so the average is exactly first / num; 4 sigma of the draw
        bound = 4 * math.sqrt(first / num / tries)
        assert abs(hit_rate(ranks, first) - first / num) < bound


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(12)))
def test_the_order_of_drawings_and_pictures_does_not_matter(order: list[int]) -> None:
    references, names = drawings(12), [f"c{i % 7}" for i in range(12)]
    pictures = drawings(12, 3)
    ranks = concept_ranks(pictures, names, references, names)
    shuffled = concept_ranks(pictures, names, references[order], [names[i] for i in order])
    assert shuffled.tolist() == ranks.tolist()
    shuffled = concept_ranks(pictures[order], [names[i] for i in order], references, names)
    assert shuffled.tolist() == [ranks[i].item() for i in order]


def test_any_drawing_of_the_concept_counts_and_each_wrong_drawing_takes_a_place() -> None:
    references = torch.tensor([[0.0], [1.0], [2.0], [9.0]])
    names = ["apple", "pear", "pear", "apple"]
    assert concept_ranks(torch.tensor([[2.1]]), ["pear"], references, names).tolist() == [0]
    assert concept_ranks(torch.tensor([[2.1]]), ["apple"], references, names).tolist() == [2]
    assert concept_ranks(torch.tensor([[8.0]]), ["apple"], references, names).tolist() == [0]


def test_ties_count_against_the_picture() -> None:
    references = torch.tensor([[-1.0], [1.0]])
    assert concept_ranks(torch.tensor([[0.0]]), ["a"], references, ["a", "b"]).tolist() == [1]


def test_equal_drawings_are_one_drawing_of_several_concepts() -> None:
    references = torch.tensor([[0.0], [0.0], [0.0], [1.0]])
    names = ["a", "b", "c", "d"]
    assert concept_ranks(torch.tensor([[0.0]] * 3), ["a", "b", "c"], references, names).tolist() == [0, 0, 0]
    assert concept_ranks(torch.tensor([[0.0]]), ["d"], references, names).tolist() == [1]  # not 3


def test_a_concept_without_drawing_and_a_nan_are_refused() -> None:
    with pytest.raises(ValueError, match="quince"):
        concept_ranks(torch.zeros(1, 2), ["quince"], torch.zeros(1, 2), ["apple"])
    with pytest.raises(ValueError, match="NaN"):
        concept_ranks(torch.full((1, 2), float("nan")), ["apple"], torch.zeros(1, 2), ["apple"])
    with pytest.raises(ValueError, match="as many"):
        concept_ranks(torch.zeros(2, 2), ["apple"], torch.zeros(1, 2), ["apple"])


def test_thumbnails_are_box_averages_at_any_resolution() -> None:
    small = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for factor in (1, 2, 4):
        large = small.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
        torch.testing.assert_close(thumbnails(large), small.double().flatten(1))
    image = torch.rand(1, 3, 32, 32)
    assert thumbnails(image)[0, 0].item() == pytest.approx(image[0, 0, :2, :2].mean().item())
    with pytest.raises(ValueError, match="multiples of 16"):
        thumbnails(torch.zeros(1, 3, 24, 32))


def test_the_choice_by_hash_follows_the_ids_alone() -> None:
    ids = [f"{i:x}" for i in range(300)]
    chosen = [ids[i] for i in chosen_by_hash(ids, 40)]
    assert [ids[::-1][i] for i in chosen_by_hash(ids[::-1], 40)] == chosen
    assert chosen_by_hash(ids, 16) == chosen_by_hash(ids, 40)[:16]
    limit = hashlib.sha256(chosen[-1].encode()).hexdigest()
    assert sum(hashlib.sha256(name.encode()).hexdigest() <= limit for name in ids) == 40
