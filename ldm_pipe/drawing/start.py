"""Walks of DeepFloyd IF that start from a picture, or paint into one: its size, and the first x_t.

What enters: pictures and masks. What leaves: a size, and what `draw_pictures` begins with. This file knows no prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm_pipe.drawing.draw import Begin
from ldm_pipe.drawing.pixels import load_images
from ldm_pipe.drawing.request.request import Request
from ldm_pipe.drawing.stepping import Restore
from ldm_pipe.schedule.process import q_sample
from ldm_pipe.schedule.steps import Steps


def fit_start(pipe: Any, given: Mapping[str, Any], image: Any) -> dict[str, int]:
    """Return the height and width that a picture to start from is brought to, where the caller names none."""
    if given["height"] is not None or given["width"] is not None:
        return {}
    height, width = fitting(load_images(image).shape[2:], pipe.default_size[0])
    return {"height": height, "width": width}


def fitting(size: Sequence[int], side: int) -> tuple[int, int]:
    """Return the height and width of a picture whose shorter side is brought to `side`, as diffusers' IF does.

    Args:
        size: its height and width.
    Raises: LdmPipeError for a strip so long and thin that it would become more than 50 million pixels.
    """
    from ldm_pipe.data.images import check_made

    height, width = size
    check_made((width, height), (side, side))
    if width >= height:
        return side, max(round(side / 8 * width / height) * 8, 8)
    return max(round(side / 8 * height / width) * 8, 8), side


def begin_from(pipe: Any, request: Request) -> Begin | None:
    """Return what makes the first x_t: the picture, where it is not kept, diffused to the first level.

    After each step the rest is kept again, and without noise, as diffusers does (not as RePaint, arXiv:2201.09865).
    """
    if request.image is None:
        return None
    image = (request.image * 2 - 1).to(pipe.device)
    fresh = None if request.mask is None else request.mask.to(pipe.device) >= 0.5

    def kept(x: Tensor) -> Tensor:
        return x if fresh is None else torch.where(fresh, x, image)

    def begin(eps: Tensor, steps: Steps) -> tuple[Tensor, Restore | None]:
        x = q_sample(image, eps, float(steps.alpha[0]), float(steps.sigma[0]))
        return kept(x), None if fresh is None else lambda _, x: kept(x)

    return begin
