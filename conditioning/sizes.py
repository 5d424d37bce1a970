"""SDXL's micro-conditioning: the size a picture had, where it was cropped, how large it is to be.

What enters: sizes in pixels. What leaves: Condition.labels, (B, 6). This file knows no pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    if len({len(original), len(crop), len(target)}) != 1 or not original:
        what = f"{len(original)} original sizes, {len(crop)} crops, {len(target)} target sizes"
        raise LdmPipeError(what, "size_condition", "Give one of each per picture.")
    for name, pairs, least in (("original", original, 1), ("crop", crop, 0), ("target", target, 1)):
        for pair in pairs:
            whole = all(isinstance(side, int) and not isinstance(side, bool) for side in pair)
            if len(pair) != 2 or not whole or not all(least <= side <= MAX_PIXELS for side in pair):
                raise LdmPipeError(f"{name} is {pair!r}, expected two whole numbers from {least}", "size_condition")
    rows = [[*a, *b, *c] for a, b, c in zip(original, crop, target, strict=True)]
    return Condition(labels=torch.tensor(rows, dtype=torch.float32))
