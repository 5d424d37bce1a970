"""Laws of what a model takes beside latents and text: maps, depth, labels, and what stands where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conditioning.label import LabelInput
from conditioning.spatial import SpatialInput
from ldm_pipe.pretrained import LdmPipeError


def test_a_mask_becomes_minus_one_and_one_and_its_absence_is_neither() -> None:
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    beside = SpatialInput(1)
    shown = beside.condition(mask, (2, 2))
    assert shown.spatial is not None
    assert shown.spatial.tolist() == [[[[-1, 1], [-1, 1]]]]
    assert not beside.null(shown).slots()["spatial"].any()


def test_the_unconditional_evaluation_keeps_the_depth() -> None:
    beside = SpatialInput(1, "depth")
    shown = beside.condition(torch.rand(2, 1, 16, 16) * 50, (4, 4))
    assert shown.spatial is not None
    assert (shown.spatial.amin(), shown.spatial.amax()) == (-1, 1)
    assert torch.equal(beside.null(shown).slots()["spatial"], shown.spatial)


@pytest.mark.parametrize("beside", [SpatialInput(3), SpatialInput(1, "depth"), SpatialInput(2, method="nearest")])
def test_what_is_stored_is_read_back(beside: SpatialInput) -> None:
    assert SpatialInput.read(beside.stored(), "ldm_pipe.json") == beside


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({}, "holds channels"),
        ({"channels": 1, "colour": 2}, "holds channels"),
        ([1], "holds channels"),
        ({"channels": True}, "channels is True"),
        ({"channels": 0}, "channels is 0"),
        ({"channels": 3, "kind": "depth"}, "depth has 1"),
        ({"channels": 1, "kind": "edges"}, "kind is 'edges'"),
        ({"channels": 1, "method": "lanczos"}, "method 'lanczos'"),
    ],
)
def test_bad_files_are_refused(stored: Any, message: str) -> None:
    with pytest.raises(LdmPipeError, match=message):
        SpatialInput.read(stored, "ldm_pipe.json")


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (torch.rand(1, 2, 8, 8), r"the map is \[1, 2, 8, 8\]"),
        (torch.rand(8, 8), r"the map is \[8, 8\]"),
        (torch.full((1, 1, 8, 8), 255.0), "from 255 to 255"),
        (-torch.ones(1, 1, 8, 8), "from -1 to -1"),
        (torch.full((1, 1, 8, 8), float("nan")), "NaN or infinity"),
    ],
)
def test_bad_maps_are_refused(maps: torch.Tensor, message: str) -> None:
    with pytest.raises(LdmPipeError, match=message):
        SpatialInput(1).condition(maps, (2, 2))


def test_labels_beside_the_text_are_names_numbers_or_none() -> None:
    beside = LabelInput(("apple", "cat"))
    shown = beside.condition(["cat", 0, None, ""])
    assert shown.labels is not None
    assert shown.labels.tolist() == [1, 0, 2, 2]
    assert beside.null(shown).slots()["labels"].tolist() == [2, 2, 2, 2]
    assert LabelInput.read(beside.stored(), "ldm_pipe.json") == beside


@pytest.mark.parametrize(
    ("labels", "message"),
    [(["dog"], "no class 'dog'"), ([3], "label 0 is 3, expected 0 to 1"), ([1.0], "label 0 is 1.0")],
)
def test_labels_that_are_not_known_are_named(labels: list[Any], message: str) -> None:
    with pytest.raises(LdmPipeError, match=message):
        LabelInput(("apple", "cat")).condition(labels)


@pytest.mark.parametrize("stored", ["apple", [], ["apple", "apple"], ["apple", 3], [" "]])
def test_bad_names_of_classes_are_refused(stored: Any) -> None:
    with pytest.raises(LdmPipeError, match="classes"):
        LabelInput.read(stored, "ldm_pipe.json")
