"""The main colour of a drawing: plain squares, shares, and what has none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm_pipe.data.colours import COLOURS, main_colour

PLAIN = {
    "red": (220, 30, 30), "orange": (250, 150, 40), "yellow": (250, 210, 40), "green": (60, 160, 60),
    "blue": (40, 110, 220), "purple": (140, 60, 200), "pink": (240, 90, 180), "grey": (150, 150, 155),
    "black": (20, 20, 25), "brown": (120, 70, 30),
}  # fmt: skip


def square(colour: tuple[int, ...], side: int = 20) -> Tensor:
    """A white picture of 32 x 32 with a square in it."""
    image = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    image[:, :side, :side] = torch.tensor(colour, dtype=torch.uint8)[:, None, None]
    return image


@pytest.mark.parametrize("name", PLAIN)
def test_plain_squares_have_their_colour(name: str) -> None:
    assert main_colour(square(PLAIN[name])) == name


def test_every_word_is_tested() -> None:
    assert set(PLAIN) == set(COLOURS)


def test_the_ground_counts_for_nothing_and_a_tie_of_three_for_none() -> None:
    assert main_colour(square(PLAIN["red"], side=2)) == "red"
    assert main_colour(torch.full((3, 8, 8), 255, dtype=torch.uint8)) is None
    image = torch.full((3, 8, 9), 255, dtype=torch.uint8)
    for number, name in enumerate(("red", "green", "blue")):
        image[:, :, 3 * number : 3 * number + 3] = torch.tensor(PLAIN[name], dtype=torch.uint8)[:, None, None]
    assert main_colour(image) is None
