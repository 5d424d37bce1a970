"""Apply a network to a large map tile by tile, and blend the overlaps so that no seam shows.

A map enters, a map `scale` times its size leaves. What the network computes is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import product

import torch
from torch import Tensor


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Return where tiles begin: evenly spread, all of one size, neighbours sharing at least `overlap`.

    The last tile is as large as the others (a sliver would have group norm statistics of its own, and show).
    """
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def blend_weight(size: int, overlap: int, *, first: bool, last: bool) -> Tensor:
    """Return the weight of each position of a tile along one side, shape (size,).

    Inside it is 1. Over the overlap it rises as 3 u^2 - 2 u^3, which neighbours complete to 1, with a flat start: the
    outer quarter of the overlap, where the tile's zero padding is felt most, is left to the neighbour.
    """
    weight = torch.ones(size)
    distance = torch.arange(size) + 0.5
    rise = ((distance - overlap / 4) / max(overlap / 2, 1)).clamp(0.0, 1.0)
    rise = rise.square() * (3.0 - 2.0 * rise)
    if not first:
        weight = weight * rise
    if not last:
        weight = weight * rise.flip(0)
    return weight


def tiled(
    function: Callable[[Tensor], Tensor], x: Tensor, *, tile: int, overlap: int, scale: Fraction, unit: int = 1
) -> Tensor:
    """Apply a function to overlapping tiles of x and blend the results.

    Args:
        function: maps (B, C, h, w) to (B, D, scale h, scale w).
        x: (B, C, H, W).
        tile: side of a tile, in units.
        overlap: least overlap of neighbours, in units, smaller than the tile.
        scale: size of the output over size of the input; a unit times the scale is whole.
        unit: positions of x that tiles begin at multiples of.
    Returns: (B, D, scale H, scale W), in the dtype of the function's result.
    """
    height, width = (int(side * scale) for side in x.shape[2:])
    tops, lefts = (tile_starts(side // unit, tile, overlap) for side in x.shape[2:])
    out: Tensor | None = None
    total = torch.zeros(height, width, device=x.device)
    for top, left in product(tops, lefts):
        y = function(x[:, :, unit * top : unit * (top + tile), unit * left : unit * (left + tile)])
        ramp = int(overlap * unit * scale)
        rows = blend_weight(y.shape[2], ramp, first=top == tops[0], last=top == tops[-1])
        columns = blend_weight(y.shape[3], ramp, first=left == lefts[0], last=left == lefts[-1])
        weight = (rows[:, None] * columns[None, :]).to(y.device)
        if out is None:
            out = torch.zeros(*y.shape[:2], height, width, dtype=y.dtype, device=y.device)
        y0, x0 = int(top * unit * scale), int(left * unit * scale)
        area = (..., slice(y0, y0 + y.shape[2]), slice(x0, x0 + y.shape[3]))
        out[area] += (y * weight).to(y.dtype)
        total[area] += weight
    assert out is not None
    return (out / total).to(out.dtype)
