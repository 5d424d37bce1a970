"""The main colour of a drawing in one English word.

What enters: a picture. What leaves: a word, or None where no colour is the main one. Knows no files.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Upper ends of the hues in degrees; what lies above the last is red again.
_HUES = ((15, "red"), (42, "orange"), (66, "yellow"), (165, "green"), (255, "blue"), (290, "purple"), (335, "pink"))
COLOURS = (*(name for _, name in _HUES), "grey", "black", "brown")
SHARE = 0.5  # of the drawn pixels that have to agree


def main_colour(image: Tensor) -> str | None:
    """Return the colour that at least half of the drawn pixels have; near-white ones count as ground.

    Args:
        image: uint8, shape (3, H, W).
    """
    red, green, blue = rgb = image.double() / 255
    value, low = rgb.amax(dim=0), rgb.amin(dim=0)
    spread = (value - low).clamp(min=1e-9)
    hue = torch.where(
        value == red,
        (green - blue) / spread,
        torch.where(value == green, 2 + (blue - red) / spread, 4 + (red - green) / spread),
    )
    degrees = (60 * hue).remainder(360)
    bounds = torch.tensor([float(end) for end, _ in _HUES], dtype=torch.float64)
    kind = torch.bucketize(degrees, bounds, right=True).remainder(len(_HUES))
    grey = spread < 0.15
    names = torch.where(grey, torch.where(value < 0.3, COLOURS.index("black"), COLOURS.index("grey")), kind)
    dark_warm = (~grey) & (kind <= 1) & (value < 0.65)
    names = torch.where(dark_warm, COLOURS.index("brown"), names)
    counts = torch.bincount(names[low < 0.93], minlength=len(COLOURS))
    best = int(counts.argmax())
    return COLOURS[best] if counts.sum() > 0 and counts[best] >= SHARE * counts.sum() else None
