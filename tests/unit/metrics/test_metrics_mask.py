"""Laws of outlines and their overlap."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ldm_pipe.metrics.mask import filled, mask_iou, measure_masks, outlines


def ring() -> torch.Tensor:
    shape = torch.zeros(1, 9, 9, dtype=torch.bool)
    shape[:, 2:7, 2:7] = True
    shape[:, 4, 4] = False
    return shape


def test_holes_are_filled_and_bays_are_not() -> None:
    closed, bay = ring(), ring()
    bay[:, 4, 5:7] = False  # the hole now opens to the right
    assert filled(closed).sum() == 25
    assert torch.equal(filled(bay), bay)
    assert torch.equal(filled(filled(closed)), filled(closed))


def reachable(wall: torch.Tensor) -> int:
    """Count the pixels that a plain search reaches from outside."""
    free, size = {(int(r), int(c)) for r, c in (~wall[0]).nonzero()}, wall.shape[1]
    ways = [(r, c) for r, c in free if r in (0, size - 1) or c in (0, size - 1)]
    found = set(ways)
    while ways:
        r, c = ways.pop()
        near = {(r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)} & (free - found)
        found |= near
        ways += near
    return len(found)


def test_filling_agrees_with_a_plain_search_on_random_shapes() -> None:
    shapes = torch.rand(20, 12, 12, generator=torch.Generator().manual_seed(0)) < 0.45
    for shape in shapes:
        assert int((~filled(shape[None])).sum()) == reachable(shape[None])


def test_white_inside_a_drawing_belongs_to_it() -> None:
    image = torch.where(ring()[:, None], 0.2, 0.97).expand(-1, 3, -1, -1)
    assert outlines(image).sum() == 25


def test_overlap_of_equal_disjoint_half_and_empty_shapes() -> None:
    one = ring()
    other = ~one
    half = one.clone()
    half[:, :4] = False
    assert mask_iou(one, one).tolist() == [1]
    assert mask_iou(one, other).tolist() == [0]
    assert mask_iou(one, half).item() == pytest.approx(half.sum().item() / one.sum().item())
    assert mask_iou(one & other, one & other).tolist() == [1]


def test_a_model_that_draws_its_map_has_full_overlap_with_any_mask() -> None:
    masks = torch.zeros(3, 1, 8, 8)
    masks[0, :, 1:4, 1:4], masks[1, :, 2:7, 2:7], masks[2, :, 0:2] = 1, 1, 1

    def pipe(prompts: list[str], *, spatial: torch.Tensor | None = None, **call: Any) -> Any:
        shown = torch.zeros(len(prompts), 1, 8, 8) if spatial is None else spatial
        return SimpleNamespace(images=(1 - shown).expand(-1, 3, -1, -1))

    report = measure_masks(pipe, list("abc"), masks, guidance_scale=1.0, num_inference_steps=1, batch_size=2)  # type: ignore[arg-type]
    assert (report.own, report.swapped, report.unasked) == (1, 1, 0)
    assert report.chance < 0.5
    assert torch.equal(report.swapped_images[0, :1], 1 - masks[1])
