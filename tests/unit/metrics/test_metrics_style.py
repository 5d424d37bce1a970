"""The style classifier: what it looks at, what it may not depend on, and that it is kept and found again."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm_pipe.data.images import to_pil
from ldm_pipe.metrics.style import NUM_FEATURES, STYLES, fit_style, load_or_fit, measure_style, style_features
from ldm_pipe.pretrained import LdmPipeError


def drawings(num: int, flat: bool, seed: int) -> Tensor:
    """Draw a disc of a random colour at a random place: of one colour, or shaded from top to bottom."""
    draw = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    images = torch.ones(num, 3, 32, 32)
    for image in images:
        place, colour = torch.rand(2, generator=draw) - 0.5, torch.rand(3, 1, 1, generator=draw) * 1.5 - 1
        inside = (x - place[0]) ** 2 + (y - place[1]) ** 2 < 0.2
        shade = torch.zeros_like(y) if flat else 0.4 * y
        image.copy_(torch.where(inside, colour + shade, image))
    return images.clamp(-1, 1)


def test_features_are_shares_blind_to_mirroring_and_brightness_only_by_palette() -> None:
    images = drawings(5, False, 0)
    found = style_features(images)
    assert found.shape == (5, NUM_FEATURES)
    assert torch.allclose(found.square().sum(1), torch.full((5,), 9.0)), "one palette, eight histograms of changes"
    assert torch.allclose(style_features(images.flip(-1)), found)
    darker = style_features(images - 0.25)
    assert not torch.allclose(darker[:, :-80], found[:, :-80])
    assert torch.allclose(darker[:, -80:], found[:, -80:], atol=0.05), "changes do not see the palette"


def test_flat_and_shaded_drawings_are_told_apart_on_unseen_ones() -> None:
    classifier = fit_style(drawings(100, False, 1), drawings(100, True, 2))
    measured = measure_style(classifier, drawings(50, False, 3), drawings(50, True, 4))
    assert measured["accuracy"] > 0.9
    assert measured["mean_noto"] < 0.2 < 0.8 < measured["mean_twemoji"]


def test_equal_sets_cannot_be_told_apart() -> None:
    same = drawings(60, True, 5)
    classifier = fit_style(same, same)
    assert torch.allclose(classifier(drawings(20, True, 6)), torch.full((20,), 0.5), atol=1e-4)
    with pytest.raises(LdmPipeError, match="equal numbers"):
        fit_style(same, same[:3])


def test_a_classifier_is_fitted_once_and_kept_with_its_accuracy(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    for style in STYLES:
        for split, num in (("train", 12), ("validation", 4)):
            rows = []
            for i, image in enumerate(drawings(num, style == "twemoji", len(split))):
                buffer = io.BytesIO()
                to_pil(image).save(buffer, "PNG")
                flags = {"is_skin_tone_variant": False, "is_gender_variant": i == 0}
                rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "caption": str(i), **flags})
            path = tmp_path / "data" / style / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pandas.DataFrame(rows).to_parquet(path)
    rebuilt: list[int] = []

    def rebuild(images: Tensor) -> Tensor:
        rebuilt.append(len(images))
        return images * 0.9

    first = load_or_fit(tmp_path / "style", rebuild, tmp_path / "data", 32)
    assert sum(rebuilt) == 2 * (11 + 3), "the variant is left out"
    again = load_or_fit(tmp_path / "style", rebuild, tmp_path / "data", 32)
    assert sum(rebuilt) == 28
    images = drawings(6, True, 9)
    assert torch.equal(first(images), again(images))
    assert (again.config["num_train"], again.config["num_validation"]) == (22, 6)
    assert set(again.config["rebuilt"]) == {"accuracy", "mean_noto", "mean_twemoji"}
    with pytest.raises(LdmPipeError, match="fitted at 32 pixels"):
        load_or_fit(tmp_path / "style", rebuild, tmp_path / "data", 64)
