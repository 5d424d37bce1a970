"""SDXL's micro-conditioning: the size a picture had, where it was cropped, how large it is to be, or how good.

What enters: sizes in pixels. What leaves: Condition.labels, (B, 6) or (B, 5). This file knows no pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from conditioning.condition import Condition
from ldm_pipe.pretrained import LdmPipeError

Pair = tuple[int, int]
MAX_PIXELS = 1 << 20


def size_condition(original: Sequence[Pair], crop: Sequence[Pair], target: Sequence[Pair]) -> Condition:
    """Tell sizes and crops to the U-Net (Podell et al. 2023, arXiv:2307.01952, sec. 2.2), in diffusers' order.

        labels = (original height, width, crop top, left, target height, width)

    Args:
        original: height and width before resizing, one pair per picture.
        crop: top and left of the crop, in pixels of the resized picture.
        target: height and width to draw.
    Returns: Condition with labels (B, 6).
    Raises: LdmPipeError for pairs that are none, or lists of unequal length.
    """
    _check_lengths(original, crop, target, "target sizes")
    rows = [
        [*check_pair("original", a), *check_pair("crop", b, least=0), *check_pair("target", c)]
        for a, b, c in zip(original, crop, target, strict=True)
    ]
    return Condition(labels=torch.tensor(rows, dtype=torch.float32))


def score_condition(original: Sequence[Pair], crop: Sequence[Pair], score: Sequence[float]) -> Condition:
    """Tell sizes, crops and an aesthetic score to the U-Net, as SDXL's refiner reads them (diffusers' order).

        labels = (original height, width, crop top, left, score)

    Args:
        original, crop: see `size_condition`.
        score: how much people liked the picture, mostly 1 to 10, one per picture.
    Returns: Condition with labels (B, 5).
    Raises: LdmPipeError for pairs that are none, a score that is not finite, or lists of unequal length.
    """
    _check_lengths(original, crop, score, "scores")
    for value in score:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise LdmPipeError(f"score is {value!r:.80}, expected a finite number", "score_condition")
    rows = [
        [*check_pair("original", a), *check_pair("crop", b, least=0), float(c)]
        for a, b, c in zip(original, crop, score, strict=True)
    ]
    return Condition(labels=torch.tensor(rows, dtype=torch.float32))


def check_pair(name: str, pair: Any, *, least: int = 1) -> Pair:
    """Check two whole numbers.

    Raises: LdmPipeError naming the pair and the range.
    """
    sides = list(pair) if isinstance(pair, (list, tuple)) else []
    whole = all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
    if len(sides) != 2 or not whole or not all(least <= side <= MAX_PIXELS for side in sides):
        advice = f"Give two whole numbers from {least} to {MAX_PIXELS}."
        raise LdmPipeError(f"{name} is {pair!r:.80}", "size_condition", advice)
    return sides[0], sides[1]


def _check_lengths(original: Sequence[Any], crop: Sequence[Any], last: Sequence[Any], name: str) -> None:
    if len({len(original), len(crop), len(last)}) != 1 or not original:
        what = f"{len(original)} original sizes, {len(crop)} crops, {len(last)} {name}"
        raise LdmPipeError(what, "size_condition", "Give one of each per picture.")
