"""Laws of random crops: nothing is drawn anew, nothing is stretched, a drawing keeps its ground."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.training.run.config import DataConfig, build_config
from ldm_pipe.training.tasks.autoencoder import AutoencoderConfig
from ldm_pipe.training.tasks.crops import CropConfig, CropSource, crop_draws, random_crop
from ldm_pipe.training.tasks.pictures import open_records


def ramp(width: int, height: int) -> Image.Image:
    """Red tells the column, green the row."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))


@pytest.mark.parametrize(("x", "y", "corner"), [(0.0, 0.0, (0, 0)), (1.0, 1.0, (168, 68)), (0.5, 0.25, (84, 17))])
def test_a_crop_is_a_part_of_the_picture(x: float, y: float, corner: tuple[int, int]) -> None:
    cut = np.asarray(random_crop(ramp(200, 100), 32, 100 / 32, x, y))
    assert tuple(cut[0, 0, :2]) == corner
    assert tuple(cut[-1, -1, :2]) == (corner[0] + 31, corner[1] + 31)


@pytest.mark.parametrize("size", [(200, 100), (100, 200)])
def test_without_zoom_the_shorter_side_is_whole(size: tuple[int, int]) -> None:
    cut = np.asarray(random_crop(ramp(*size), 100, 1.0, 1.0, 1.0))
    channel = 1 if size[0] > size[1] else 0
    assert (cut[..., channel].min(), cut[..., channel].max()) == (0, 99)


@pytest.mark.parametrize(("x", "y", "at"), [(0.0, 0.0, (0, 0)), (1.0, 0.0, (16, 0)), (0.0, 1.0, (0, 16))])
def test_a_drawing_that_shrinks_lies_on_white(x: float, y: float, at: tuple[int, int]) -> None:
    cut = np.asarray(random_crop(Image.new("RGB", (48, 48), (9, 9, 9)), 64, 0.75, x, y))
    dark = (cut == 9).all(2)
    assert (cut[~dark] == 255).all()
    assert dark.sum() == 48 * 48
    assert dark[at[1] : at[1] + 48, at[0] : at[0] + 48].all()


def test_a_wide_drawing_that_shrinks_is_whole_in_height() -> None:
    cut = np.asarray(random_crop(Image.new("RGB", (96, 48), (9, 9, 9)), 64, 0.75, 0.5, 0.5))
    dark = (cut == 9).all(2)
    assert dark.any(1).sum() == 48
    assert dark.any(0).sum() == 64


def test_an_exact_reduction_keeps_flat_areas_flat() -> None:
    picture = Image.fromarray(np.repeat(np.arange(64, dtype=np.uint8)[None, :, None], 64, 0).repeat(3, 2))
    cut = np.asarray(random_crop(picture.resize((128, 128), Image.Resampling.NEAREST), 64, 1.0, 0.5, 0.5))
    assert np.array_equal(cut, np.asarray(picture))


def test_draws_depend_on_seed_step_and_place_alone() -> None:
    whole = crop_draws(0, 3, range(8))
    assert torch.equal(torch.cat([crop_draws(0, 3, range(3)), crop_draws(0, 3, range(3, 8))]), whole)
    assert not torch.equal(crop_draws(0, 4, range(8)), whole)
    assert not torch.equal(crop_draws(1, 3, range(8)), whole)


def test_pictures_of_any_shape_make_one_batch() -> None:
    class Pictures:
        sizes = ((40, 20), (20, 40), (33, 33))

        def image(self, row: int) -> Image.Image:
            return ramp(*self.sizes[row])

    source: Any = CropSource(Pictures(), 16, CropConfig(random=True, zoom_min=0.8, zoom_max=1.25))  # type: ignore[arg-type]
    draws = crop_draws(0, 0, range(3))
    images = source([0, 1, 2], draws)
    assert images.shape == (3, 3, 16, 16)
    assert torch.equal(source([1], draws[1:2])[0], images[1])


def test_a_folder_of_odd_photographs_needs_no_captions(tmp_path: Path) -> None:
    photograph = ramp(40, 30)
    photograph.convert("CMYK").save(tmp_path / "cmyk.jpg")
    photograph.convert("P").save(tmp_path / "palette.png")
    Image.fromarray(np.full((30, 40), 65535, dtype=np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGBA", (30, 30), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGB", (1, 1), (255, 0, 0)).save(tmp_path / "one.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph.save(tmp_path / "turned.jpg", exif=exif)
    records = open_records(DataConfig(train_data_dir=str(tmp_path), caption_column=None))
    assert len(records) == 6
    assert records.report.notes["mode CMYK"] == 1
    images = CropSource(records, 16, CropConfig(random=True, zoom_max=1.5))(list(range(6)), torch.full((6, 3), 0.5))
    shown = {Path(records.where(row)).name: images[row] for row in range(6)}
    assert float(shown["deep.png"].min()) == float(shown["clear.png"].min()) == 1.0, "white, on white"
    assert shown["one.png"].mean((1, 2)).tolist() == [1.0, -1.0, -1.0]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"crop": {"zoom_max": 2.0}}, "crop.random is false"),
        ({"crop": {"random": True, "zoom_min": 2.0}}, "larger than zoom_max"),
        ({"codebook": {"ema": True}}, "regularisation is 'kl'"),
        ({"network": {"regularisation": "vq"}, "objective": {"kl_weight": 1.0}}, "regularisation is 'vq'"),
        (
            {"network": {"regularisation": "vq"}, "codebook": {"ema": True, "legacy_commitment": True}},
            "legacy_commitment",
        ),
    ],
)
def test_settings_without_effect_are_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(LdmPipeError, match=named):
        build_config(AutoencoderConfig, {"output_dir": "x", **values}, "test")
