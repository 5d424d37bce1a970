"""A mask of 0 and 1 in 8 bits, of 32-bit grey or with transparency painted nothing, or everything.

Every kind of mask says the same here: the right half is drawn anew, the left half kept.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_pipe.drawing.pixels import load_maps, load_masks
from ldm_pipe.pretrained import LdmPipeError
from tests.pipelines import tiny

SIDE = 32
HALF = np.zeros((SIDE, SIDE), bool)
HALF[:, SIDE // 2 :] = True


def of(dtype: Any, white: float = 1) -> np.ndarray:
    return (HALF * white).astype(dtype)


def rgba(colour: int, *, outside: int = 0, under: int | None = None) -> Image.Image:
    """Draw the right half in an opaque grey, the left one with an alpha of `outside` over another grey."""
    pixels = np.full((SIDE, SIDE, 4), colour if under is None else under, np.uint8)
    pixels[HALF, :3] = colour
    pixels[..., 3] = np.where(HALF, 255, outside)
    return Image.fromarray(pixels)


def palette(white: int) -> Image.Image:
    image = Image.new("P", (SIDE, SIDE))
    image.putpalette([0, 0, 0, white, white, white])
    image.paste(1, (SIDE // 2, 0, SIDE, SIDE))
    return image


PICTURES: dict[str, Callable[[], Image.Image]] = {
    "1": lambda: Image.fromarray(of(np.uint8, 255)).convert("1"),
    "L of 0 and 255": lambda: Image.fromarray(of(np.uint8, 255)),
    "L of 0 and 1": lambda: Image.fromarray(of(np.uint8)),
    "L, soft": lambda: Image.fromarray(of(np.uint8, 200)),
    "P": lambda: palette(255),
    "P of 0 and 1": lambda: palette(1),
    "RGB": lambda: Image.fromarray(of(np.uint8, 255)).convert("RGB"),
    "RGB of 0 and 1": lambda: Image.fromarray(of(np.uint8)).convert("RGB"),
    "CMYK": lambda: Image.fromarray(of(np.uint8, 255)).convert("RGB").convert("CMYK"),
    "YCbCr": lambda: Image.fromarray(of(np.uint8, 255)).convert("RGB").convert("YCbCr"),
    "HSV": lambda: Image.fromarray(of(np.uint8, 255)).convert("RGB").convert("HSV"),
    "LA": lambda: Image.fromarray(of(np.uint8, 255)).convert("LA"),
    "RGBA, opaque": lambda: rgba(255, outside=255, under=0),
    "RGBA, opaque, of 0 and 1": lambda: rgba(1, outside=255, under=0),
    "RGBA, white strokes on nothing": lambda: rgba(255, under=0),
    "RGBA, white everywhere": lambda: rgba(255),
    "RGBa": lambda: rgba(255).convert("RGBa"),
    "I of 0 and 1": lambda: Image.fromarray(of(np.int32)),
    "I of 0 and 255": lambda: Image.fromarray(of(np.int32, 255)),
    "I of 0 and 65535": lambda: Image.fromarray(of(np.int32, 65535)),
    "I;16 of 0 and 1": lambda: Image.fromarray(of(np.uint16)),
    "I;16 of 0 and 255": lambda: Image.fromarray(of(np.uint16, 255)),
    "I;16 of 0 and 65535": lambda: Image.fromarray(of(np.uint16, 65535)),
    "F of 0 and 1": lambda: Image.fromarray(of(np.float32)),
}
NUMPY = [bool, np.uint8, np.int8, np.uint16, np.int16, np.int32, np.uint32, np.int64, np.uint64, ">u2", ">i4",
         np.float16, np.float32, np.float64, np.longdouble, ">f4"]  # fmt: skip
TORCH = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64, torch.float16,
         torch.bfloat16, torch.float32, torch.float64]  # fmt: skip
ARRAYS: dict[str, Callable[[], Any]] = {
    **{f"array of {np.dtype(kind).str}": (lambda kind=kind: of(kind)) for kind in NUMPY},
    **{
        f"array of {np.dtype(kind).str} to 255": (lambda kind=kind: of(kind, 255))
        for kind in NUMPY
        if np.dtype(kind).kind in "ui" and kind is not np.int8
    },
    "array to 65535": lambda: of(np.uint16, 65535),
    "array (H, W, 1)": lambda: of(np.uint8)[..., None],
    "array (B, H, W, 1)": lambda: of(np.uint8)[None, ..., None],
    "read-only array": lambda: np.broadcast_to(of(np.uint8), (SIDE, SIDE)),
    "reversed array": lambda: of(np.uint8)[::-1],
    **{f"tensor of {kind}": (lambda kind=kind: torch.from_numpy(HALF.copy()).to(kind)) for kind in TORCH},
    "tensor of uint8 to 255": lambda: torch.from_numpy(of(np.uint8, 255)),
    "tensor of int64 to 255": lambda: torch.from_numpy(of(np.int64, 255)),
    "tensor (1, H, W)": lambda: torch.from_numpy(of(np.uint8))[None],
    "tensor (B, 1, H, W)": lambda: torch.from_numpy(of(np.uint8))[None, None],
    "tensor with a gradient": lambda: torch.from_numpy(of(np.float32)).requires_grad_(),
    "list": lambda: [of(np.uint8)],
}
KINDS = {**{f"picture {name}": make for name, make in PICTURES.items()}, **ARRAYS}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("size", [None, (SIDE, SIDE), (2 * SIDE, SIDE)], ids=["own size", "same size", "other size"])
def test_every_kind_of_mask_paints_the_right_half(make: Callable[[], Any], size: tuple[int, int] | None) -> None:
    mask = load_masks(make(), size)
    assert tuple(mask.shape) == (1, 1, *(size or (SIDE, SIDE)))
    assert not mask[..., : SIDE // 2].any(), "the left half is to be kept"
    assert mask[..., SIDE // 2 :].all(), "the right half is to be painted"


@pytest.mark.parametrize("make", PICTURES.values(), ids=PICTURES.keys())
@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_every_kind_of_mask_says_the_same_as_a_file(
    tmp_path: Path, make: Callable[[], Image.Image], ending: str
) -> None:
    image, path = make(), tmp_path / f"mask.{ending}"
    try:
        image.save(path)
    except (OSError, ValueError):
        image.convert("RGBA" if "a" in image.mode else "RGB").save(path)
    mask = load_masks(path)[0, 0].numpy()
    assert (mask == HALF).all()


DRAWN = ["picture L of 0 and 1", "picture I of 0 and 1", "array of |u1", "picture RGBA, white strokes on nothing"]


@pytest.mark.filterwarnings("ignore:1 steps")
@pytest.mark.parametrize("name", DRAWN)
def test_the_picture_is_painted_where_the_mask_says(name: str) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8))
    drawn = tiny()("red apple", image=picture, mask_image=KINDS[name](), seed=0, num_inference_steps=1).images[0]
    changed = (np.asarray(drawn) != np.asarray(picture)).any(-1)
    assert not changed[~HALF].any()
    assert changed[HALF].mean() > 0.9


HOLED = np.random.default_rng(1).integers(40, 200, (SIDE, SIDE, 4), np.uint8)
HOLED[..., 3] = np.where(HALF, 0, 255)
UNCLEAR: dict[str, Any] = {
    "black with a hole": lambda: rgba(0),
    "a picture with a hole": lambda: Image.fromarray(HOLED),
    "transparent everywhere": lambda: Image.new("RGBA", (SIDE, SIDE), (255, 255, 255, 0)),
    "labels 0, 1, 2": lambda: of(np.uint8) + of(np.uint8),
    "label 2 in L": lambda: Image.fromarray(of(np.uint8, 2)),
    "dark grey": lambda: Image.fromarray(of(np.uint8, 100)),
    "dark in 16 bits": lambda: of(np.uint16, 1000),
    "beyond 16 bits": lambda: of(np.int64, 1 << 20),
    "32 bits beyond 16": lambda: Image.fromarray(of(np.int32, 1 << 20)),
    "negative": lambda: of(np.int8, -1),
    "[-1, 1]": lambda: of(np.float32) * 2 - 1,
    "floats to 255": lambda: of(np.float32, 255),
    "F to 255": lambda: Image.fromarray(of(np.float32, 255)),
    "NaN": lambda: np.where(HALF, np.nan, 0.0),
    "soft below one half": lambda: of(np.float32, 0.4),
    "complex": lambda: torch.from_numpy(of(np.complex64)),
    "text": lambda: HALF.astype(str),
    "three channels": lambda: np.zeros((SIDE, SIDE, 3), np.uint8),
    "no pixels": lambda: np.zeros((0, 4), np.uint8),
    "one of two is dark": lambda: [of(np.uint8, 255), of(np.uint8, 100)],
}


@pytest.mark.parametrize("make", UNCLEAR.values(), ids=UNCLEAR.keys())
def test_a_mask_that_would_paint_nothing_or_is_unclear_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(LdmPipeError) as caught:
        load_masks(make())
    assert caught.value.how_to_fix


def test_an_empty_mask_paints_nothing_and_a_full_one_everything() -> None:
    for kind in (np.uint8, np.int64, np.float32, bool):
        assert not load_masks(np.zeros((4, 4), kind)).any()
        assert load_masks(np.ones((4, 4), kind)).all()


MAPS: list[Callable[[], Any]] = [
    lambda: of(np.uint8)[..., None],
    lambda: torch.from_numpy(of(np.uint8))[None],
    lambda: Image.fromarray(of(np.uint8)),
    lambda: Image.fromarray(of(np.int32)),
    lambda: Image.fromarray(of(np.uint16, 255)),
]


@pytest.mark.parametrize("make", MAPS)
def test_a_map_of_0_and_1_is_not_taken_for_black(make: Callable[[], Any]) -> None:
    with pytest.raises(LdmPipeError, match="nearly black"):
        load_maps(make(), 1)
