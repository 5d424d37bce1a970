"""Random crops of the pictures of a training set: parts of photographs, drawings moved about on their ground.

Records, rows and draws enter; images leave. The draws come from outside, keyed by seed, step and place in the batch.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from ldm_pipe.data.dataset import Records
from ldm_pipe.data.images import WHITE, to_tensor
from ldm_pipe.training.run.config import StrictModel
from ldm_pipe.training.run.rng import batch_uniform


class CropConfig(StrictModel):
    """How pictures are cropped anew each time they are used."""

    random: bool = Field(False, description="crop at random; false: the middle")
    zoom_min: float = Field(1.0, gt=0, description="below 1 the picture shrinks on a white ground (drawings)")
    zoom_max: float = Field(1.0, gt=0, description="above 1 a part of the picture is enlarged (photographs)")

    @model_validator(mode="after")
    def _consistent(self) -> CropConfig:
        if self.zoom_min > self.zoom_max:
            raise ValueError(f"zoom_min {self.zoom_min} is larger than zoom_max {self.zoom_max}")
        if not self.random and (self.zoom_min, self.zoom_max) != (1.0, 1.0):
            raise ValueError("a zoom is set, but crop.random is false")
        return self


def crop_draws(seed: int, step: int, positions: range) -> Tensor:
    """Draw zoom, x and y of each picture of a slice: (B, 3) in [0, 1)."""
    return batch_uniform(3, seed, "crop", step, positions=positions)


def random_crop(image: Image.Image, resolution: int, zoom: float, x: float, y: float) -> Image.Image:
    """Cut a square whose side is the picture's shorter side / zoom, and scale it to the resolution.

    Args:
        image: RGB picture.
        zoom: below 1 the square is larger than the picture, which then lies on white.
        x, y: from 0 (left, top) to 1 (right, bottom): where the square lies, or the picture in it.
    """
    side = max(1, round(min(image.size) / zoom))
    left, top = round((image.width - side) * x), round((image.height - side) * y)
    if min(image.size) < side:
        ground = Image.new("RGB", (max(side, image.width), max(side, image.height)), WHITE)
        at = max(-left, 0), max(-top, 0)
        ground.paste(image, at)
        image, left, top = ground, left + at[0], top + at[1]
    cut = image.crop((left, top, left + side, top + side))
    if side == resolution:
        return cut
    if side % resolution == 0:  # an exact average keeps the flat areas of drawings flat
        return cut.reduce(side // resolution)
    return cut.resize((resolution, resolution), Image.Resampling.LANCZOS)


class CropSource:
    """Map rows and draws to images (B, 3, R, R) in [-1, 1]; pictures are decoded at each use, on threads."""

    def __init__(self, records: Records, resolution: int, config: CropConfig) -> None:
        self.records, self.resolution, self.config = records, resolution, config
        self._pool = ThreadPoolExecutor(8)

    def _one(self, row: int, draws: list[float]) -> Tensor:
        least, most = self.config.zoom_min, self.config.zoom_max
        zoom = least * (most / least) ** draws[0]  # a factor of 2 is as likely either way
        return to_tensor(random_crop(self.records.image(row), self.resolution, zoom, draws[1], draws[2]))

    def __call__(self, rows: list[int], draws: Tensor) -> Tensor:
        """Return the images of these rows, float32."""
        return torch.stack(list(self._pool.map(self._one, rows, draws.tolist())))
