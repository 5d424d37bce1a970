"""Where a picture lies in its training frame: scaled, cropped, mirrored, and the six numbers a network is told of it.

Enters: a picture and a shape. Leaves: the part that is trained on, and its `Frame`. The caller draws crop and mirror.
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from ldm_pipe.data.images import cover_size, resize

CENTER = (0.5, 0.5)


@dataclass(frozen=True)
class Frame:
    """What SDXL calls micro-conditioning (Podell et al. 2023, arXiv:2307.01952, section 2.2).

    Args:
        original_size: (height, width) of the picture as it was read, upright.
        crop_top_left: (top, left) of the part in the scaled picture, in pixels; mirrored pictures are scaled, mirrored,
            then cropped, as in diffusers' training example.
        target_size: (height, width) of the part.
    """

    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    target_size: tuple[int, int]

    @property
    def time_ids(self) -> tuple[int, ...]:
        """Return the six numbers in the order of SDXL's `add_time_ids`: height before width, top before left."""
        return (*self.original_size, *self.crop_top_left, *self.target_size)


def frame_picture(
    image: Image.Image, shape: tuple[int, int], crop_at: tuple[float, float] = CENTER, mirror: bool = False
) -> tuple[Image.Image, Frame]:
    """Scale a picture to cover (height, width), cut that part out, mirror it if asked.

    Args:
        image: RGB picture.
        shape: (height, width) of the result.
        crop_at: (x, y) from 0 (left, top) to 1 (right, bottom), in the picture as it was read.
        mirror: exchange left and right.
    Returns: the part, and its frame.
    """
    height, width = shape
    scaled_width, scaled_height = cover_size(image.size, shape)
    left, top = round((scaled_width - width) * crop_at[0]), round((scaled_height - height) * crop_at[1])
    part = resize(image, shape, center_crop=False, crop_at=crop_at)
    if mirror:
        part, left = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT), scaled_width - width - left
    return part, Frame((image.height, image.width), (top, left), (height, width))
