"""Memorisation and sharpness: extremes that are known by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ldm_pipe.metrics.likeness import fine_detail, memorisation, sharpness
from ldm_pipe.metrics.retrieval import standard_error
from ldm_pipe.pretrained import LdmPipeError


def noise(num: int, seed: int) -> Tensor:
    return torch.rand((num, 3, 16, 16), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_a_model_that_copies_is_found_out() -> None:
    drawings = noise(20, 0)
    found = memorisation(drawings[:5], drawings[:5], drawings)
    assert found.to_drawing == 0 and found.between_seeds == 0 and found.copies == 1
    assert found.between_drawings > 0.5


def test_new_pictures_are_as_far_from_the_drawings_as_these_from_one_another() -> None:
    found = memorisation(noise(20, 1), noise(20, 2), noise(20, 0))
    assert found.copies == 0
    assert found.to_drawing == pytest.approx(found.between_drawings, rel=0.1)
    # two independent uniform numbers on [-1, 1] differ by sqrt(2/3) in the mean square
    assert found.between_seeds == pytest.approx(math.sqrt(2 / 3), rel=0.05)


def test_a_drawing_that_is_there_twice_is_no_neighbour_of_itself() -> None:
    drawings = noise(6, 0)
    once = memorisation(noise(3, 1), noise(3, 2), drawings)
    assert memorisation(noise(3, 1), noise(3, 2), drawings.repeat(2, 1, 1, 1)) == once


@pytest.mark.parametrize(
    ("pictures", "other", "drawings"),
    [
        (noise(2, 0), noise(3, 0), noise(4, 0)),
        (noise(2, 0)[..., :8], noise(2, 0)[..., :8], noise(4, 0)),
        (noise(0, 0), noise(0, 0), noise(4, 0)),
        (noise(2, 0), noise(2, 0), noise(1, 0)),
        (noise(2, 0), noise(2, 0), noise(1, 0).repeat(3, 1, 1, 1)),
    ],
)
def test_what_cannot_be_compared_is_refused(pictures: Tensor, other: Tensor, drawings: Tensor) -> None:
    with pytest.raises(LdmPipeError):
        memorisation(pictures, other, drawings)


@pytest.mark.parametrize("period", [2, 3, 5, 8, 16])
def test_fine_detail_is_the_power_of_short_waves(period: int) -> None:
    """A wave of amplitude 1 has power 1/2 (at the finest frequency, 1); it counts if it is shorter than four pixels."""
    x = torch.arange(240, dtype=torch.float64)
    wave = torch.cos(2 * math.pi * x / period).expand(1, 3, 240, 240)
    power = float(wave.square().mean())
    assert float(fine_detail(wave + 3)) == pytest.approx(power if period < 4 else 0, abs=1e-9)


def test_blur_takes_sharpness_away() -> None:
    sharp = noise(4, 0)
    blurred = torch.nn.functional.avg_pool2d(sharp, 3, stride=1, padding=1)
    assert sharpness(sharp, sharp) == 1
    assert sharpness(blurred, sharp) < 0.2
    assert sharpness(2 * sharp, sharp) == pytest.approx(4)


@pytest.mark.parametrize(
    ("rate", "num", "error"), [(0.5, 100, 0.05), (0.0, 10, 0.0), (1.0, 10, 0.0), (0.9, 400, 0.015)]
)
def test_the_standard_error_is_that_of_a_share(rate: float, num: int, error: float) -> None:
    assert standard_error(rate, num) == pytest.approx(error)
