"""Laws of per-sample noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldm_pipe.noise import Noise
from ldm_pipe.pretrained import LdmPipeError

SHAPE = (4, 8, 8)


def test_a_picture_has_its_noise_at_any_batch_size_and_place() -> None:
    """The picture depends on the batch size or its neighbours (diffusers#612, AUTOMATIC1111#376)."""
    seeds = [7, 1, 99]
    batch = Noise(seeds)
    first, second = batch((3, *SHAPE)), batch((3, *SHAPE))
    for i, seed in enumerate(seeds):
        alone = Noise([seed])
        assert torch.equal(alone((1, *SHAPE))[0], first[i])
        assert torch.equal(alone((1, *SHAPE))[0], second[i])
    assert torch.equal(Noise(seeds[::-1])((3, *SHAPE)), first.flip(0))


def test_draws_differ_and_are_unit_gaussian() -> None:
    source = Noise([0, 1])
    a, b = source((2, 50_000)), source((2, 50_000))
    assert not torch.equal(a, b)
    for row in (*a, *b):
        assert abs(float(row.mean())) < 0.02
        assert float(row.std()) == pytest.approx(1, abs=0.02)


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = Noise([3])((1, 5))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(Noise([3])((1, 5)), first)


def test_generators_go_on_from_where_they_stand() -> None:
    generator = torch.Generator().manual_seed(5)
    torch.randn(1, *SHAPE, generator=generator)
    source = Noise([5])
    source((1, *SHAPE))
    assert torch.equal(Noise.from_generators([generator])((1, *SHAPE)), source((1, *SHAPE)))


def test_one_shared_generator_draws_whole_batches() -> None:
    drawn = Noise.from_generator(torch.Generator().manual_seed(2))((3, *SHAPE))
    assert torch.equal(drawn, torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(2)))


def test_a_seed_per_sample_is_demanded() -> None:
    with pytest.raises(LdmPipeError, match="3 samples from 2 seeds"):
        Noise([1, 2])((3, *SHAPE))


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, "7", True, None])
def test_what_is_no_seed_is_refused(seed: Any) -> None:
    with pytest.raises(LdmPipeError, match="seed"):
        Noise([seed])
