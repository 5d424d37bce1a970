"""Pictures: files and bytes in, RGB pictures and tensors out, and the way back.

Enters: a path, the bytes of a picture file, or a PIL picture. Leaves: a PIL picture in mode RGB, or a tensor (3, H, W)
in [-1, 1]. This file does not know about data sets, captions or latents.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import (  # noqa: F401
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageDraw,
    ImageFont,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from torch import Tensor

from ldm_pipe.pretrained import LdmPipeError, atomic_write

ImageSource: TypeAlias = "str | Path | bytes | Image.Image"

MAX_PIXELS = 50_000_000  # of a picture as it is read, and as it is made by scaling
MAX_FILE_BYTES = 512 << 20
# A fixed list: Pillow also opens formats that start other programs (EPS) or are seldom tested. Importing a plugin
# registers it: given a list, Pillow looks no further than what is registered. JPEG includes MPO.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
WHITE = (255, 255, 255)

_EXIF_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PLAIN = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014", "''\"\"--")  # typographic quotes and dashes


def open_image(
    source: ImageSource,
    *,
    background: tuple[int, int, int] = WHITE,
    max_pixels: int = MAX_PIXELS,
    name: str = "",
) -> Image.Image:
    """Read one picture as upright 8-bit RGB, or say why it cannot be read.

    Args:
        source: path, bytes of a file, or PIL picture.
        background: colour under transparent pixels.
        max_pixels: larger pictures are refused by their header, before they are decoded.
        name: what errors call a picture that has no path.
    Returns: picture in mode RGB; the first frame of an animation.
    Raises: LdmPipeError naming the picture and the reason.
    """
    return open_image_with_notes(source, background=background, max_pixels=max_pixels, name=name)[0]


def open_image_with_notes(
    source: ImageSource,
    *,
    background: tuple[int, int, int] = WHITE,
    max_pixels: int = MAX_PIXELS,
    name: str = "",
) -> tuple[Image.Image, tuple[str, ...]]:
    """Read one picture like `open_image`; also return what was odd about it.

    The notes are "animated", "mode CMYK", "broken EXIF", "rotated by EXIF", "transparent", and the like.
    """
    where = name or (str(source) if isinstance(source, (str, Path)) else "<picture in memory>")
    if len(background) != 3 or not all(0 <= value <= 255 for value in background):
        raise LdmPipeError(f"background {background!r}: three values from 0 to 255 are needed")
    try:
        image = source if isinstance(source, Image.Image) else _open_header(source, where)
        if image.width * image.height > max_pixels:
            raise LdmPipeError(
                f"picture of {image.width}x{image.height} is larger than {max_pixels} pixels",
                where=where,
                how_to_fix="scale it down, or raise max_pixels",
            )
        return _decode(image, background, where)
    except LdmPipeError:
        raise
    # Damaged files make Pillow's decoders raise almost anything (OSError, SyntaxError, struct.error, zlib.error,
    # KeyError, ...).
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise LdmPipeError(f"cannot read the picture: {reason}", where, "Save or fetch it anew.") from error


def open_lazily(source: str | Path) -> Image.Image:
    """Open a picture file without decoding it, for those who need its mode.

    Raises: LdmPipeError naming the picture and the reason.
    """
    try:
        return _open_header(source, str(source))
    except LdmPipeError:
        raise
    except Exception as error:  # as in open_image_with_notes
        reason = str(error) or type(error).__name__
        raise LdmPipeError(f"cannot read the picture: {reason}", str(source), "Save or fetch it anew.") from error


def _open_header(source: str | Path | bytes, where: str) -> Image.Image:
    """Parse the header only; pixels are decoded later."""
    if isinstance(source, bytes):
        stream, head, size = io.BytesIO(source), source[:64], len(source)
    else:
        data = read_picture_file(Path(source))
        stream, head, size = io.BytesIO(data), data[:64], len(data)
    if size == 0:
        raise LdmPipeError("empty picture file (0 bytes)", where, "Save or fetch it anew.")
    try:
        return Image.open(stream, formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        text = head.isascii() and all(byte >= 32 or byte in b"\t\r\n" for byte in head)
        kind = (
            f"text, not a picture (starts with {head[:24].decode()!r})" if text else "not a picture of a known format"
        )
        raise LdmPipeError(kind, where=where, how_to_fix=f"readable formats: {', '.join(FORMATS)}") from error


def read_picture_file(path: Path) -> bytes:
    """Read a file at once: an open file handle per picture would run out of handles in large folders.

    Raises: LdmPipeError if it is no file, cannot be read, or is larger than `MAX_FILE_BYTES`.
    """
    try:
        if not path.is_file():
            what = "is a folder, not a picture" if path.is_dir() else "file not found"
            raise LdmPipeError(what, str(path), "Check the path.")
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise LdmPipeError(f"picture file of {size} bytes, at most {MAX_FILE_BYTES} are read", str(path))
        return path.read_bytes()
    except OSError as error:
        raise LdmPipeError(f"cannot read the picture: {error.strerror or error}", str(path)) from error


def _decode(image: Image.Image, background: tuple[int, int, int], where: str) -> tuple[Image.Image, tuple[str, ...]]:
    notes = []
    if getattr(image, "is_animated", False) and image.format != "MPO":  # n_frames would go through all of them
        notes.append("animated")
        image.seek(0)
    image.load()
    if image.width == 0 or image.height == 0:
        raise LdmPipeError("picture without pixels", where, "Give another picture.")
    orientation = 1
    try:
        orientation = int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 broken EXIF must not cost a good picture; Pillow raises many kinds here
        notes.append("broken EXIF")
    if image.mode != "RGB":
        notes.append(f"mode {image.mode}")
    rgb = _to_rgb(image, background, notes, where)
    if orientation in _TRANSPOSE:
        notes.append("rotated by EXIF")
        rgb = rgb.transpose(_TRANSPOSE[orientation])
    return rgb, tuple(notes)


def _to_rgb(image: Image.Image, background: tuple[int, int, int], notes: list[str], where: str) -> Image.Image:
    """Convert any mode to 8-bit sRGB, transparent parts on the background."""
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey_to_rgb(image, background, notes, where)
    has_alpha = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    profile = image.info.get("icc_profile")
    if has_alpha:
        notes.append("transparent")
        rgba = image.convert("RGBA")
        if profile and image.mode in ("RGBA", "RGB"):
            colours = _apply_profile(rgba.convert("RGB"), profile, notes)
            colours.putalpha(rgba.getchannel("A"))
            rgba = colours
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (*background, 255)), rgba).convert("RGB")
    if profile and image.mode in ("RGB", "CMYK"):
        return _apply_profile(image, profile, notes)
    return image.convert("RGB")


def _apply_profile(image: Image.Image, profile: bytes, notes: list[str]) -> Image.Image:
    """Convert from an embedded colour profile to sRGB; a broken profile is noted and ignored."""
    try:
        from PIL import ImageCms

        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if image.mode == "RGB" and "srgb" in ImageCms.getProfileDescription(source).lower():
            return image
        target = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
        if converted is not None:
            notes.append("colour profile applied")
            return converted
    except Exception:  # noqa: BLE001 LittleCMS reports damaged profiles by several exception types
        notes.append("broken colour profile")
    return image.convert("RGB")


def _deep_grey_to_rgb(
    image: Image.Image, background: tuple[int, int, int], notes: list[str], where: str
) -> Image.Image:
    """Scale 16-bit grey by 1 / 257 (Pillow's own conversion clips at 255: almost all white)."""
    values, advice = np.asarray(image), "Save it with 8 bits, or with 16."
    if image.mode == "F":
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise LdmPipeError("floating point picture with values outside [0, 1]: its white is unknown", where, advice)
        grey = np.rint(values * 255.0).astype(np.uint8)
    else:
        wide = values.astype(np.int64)
        if wide.min() < 0 or wide.max() > 65535:
            raise LdmPipeError("32-bit picture with values outside 0..65535: its white is unknown", where, advice)
        grey = ((wide + 128) // 257).astype(np.uint8)
    rgb = np.repeat(grey[:, :, None], 3, axis=2)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        notes.append("transparent")
        rgb[values == transparent] = background
    return Image.fromarray(rgb)


def resize(
    image: Image.Image,
    resolution: int | tuple[int, int],
    center_crop: bool = True,
    *,
    crop_at: tuple[float, float] | None = None,
) -> Image.Image:
    """Scale a picture to cover (height, width) and crop the rest, without aliasing.

    A whole reduction factor (128 -> 64) is an exact box average, which keeps the flat areas of drawings flat; anything
    else is Lanczos.

    Args:
        image: RGB picture.
        resolution: side of the square, or (height, width), in pixels.
        center_crop: keep the middle; otherwise `crop_at` says which part is kept.
        crop_at: (x, y) from 0 (left, top) to 1 (right, bottom); the caller draws it, keyed by seed and picture.
    Raises: LdmPipeError for a strip so long and thin that it would become more than `MAX_PIXELS` pixels.
    """
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    if height < 1 or width < 1:
        raise LdmPipeError(f"resolution {height}x{width}: sides must be positive")
    if center_crop == (crop_at is not None):
        raise LdmPipeError("resize needs either center_crop=True or crop_at=(x, y)")
    x_at, y_at = (0.5, 0.5) if crop_at is None else crop_at
    if not (0 <= x_at <= 1 and 0 <= y_at <= 1):
        raise LdmPipeError(f"crop_at {crop_at!r}: both values must be in [0, 1]")
    check_made(image.size, (height, width))
    scaled_width, scaled_height = cover_size(image.size, (height, width))
    if (scaled_width, scaled_height) != image.size:
        factor = image.width // scaled_width
        if factor > 1 and (scaled_width * factor, scaled_height * factor) == image.size:
            image = image.reduce(factor)
        else:
            image = image.resize((scaled_width, scaled_height), Image.Resampling.LANCZOS)
    left = round((scaled_width - width) * x_at)
    top = round((scaled_height - height) * y_at)
    if (left, top, scaled_width, scaled_height) == (0, 0, width, height):
        return image
    return image.crop((left, top, left + width, top + height))


def cover_size(size: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int]:
    """Return the (width, height) of a picture of `size` (width, height) scaled to cover `shape` (height, width)."""
    scale = max(shape[1] / size[0], shape[0] / size[1])
    return max(shape[1], round(size[0] * scale)), max(shape[0], round(size[1] * scale))


def check_made(size: tuple[int, int], shape: tuple[int, int], max_pixels: int = MAX_PIXELS) -> None:
    """Refuse a picture of `size` (width, height) of which scaling it to cover `shape` would make too many pixels.

    Raises: LdmPipeError naming both sizes and the limit.
    """
    width, height = cover_size(size, shape)
    if width * height > max_pixels:
        what = (
            f"picture of {size[0]}x{size[1]}, scaled to cover {shape[1]}x{shape[0]}, would have {width}x{height} "
            f"pixels, at most {max_pixels} are made"
        )
        raise LdmPipeError(what, how_to_fix="Cut it to a less extreme shape, or leave it out.")


def to_tensor(image: Image.Image) -> Tensor:
    """Map 0..255 to [-1, 1]: float32 (3, H, W)."""
    pixels = np.array(image if image.mode == "RGB" else open_image(image), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1.0).permute(2, 0, 1).contiguous()  # (3, H, W)


def to_pil(image: Tensor) -> Image.Image:
    """Map [-1, 1] (values beyond are clipped) to an 8-bit picture; the inverse of `to_tensor`.

    Raises: LdmPipeError on NaN or infinity, instead of a black picture.
    """
    if image.ndim != 3 or image.shape[0] != 3:
        raise LdmPipeError(f"tensor of shape {tuple(image.shape)}: a picture is (3, height, width)")
    pixels = image.detach().to("cpu", torch.float32)
    if not torch.isfinite(pixels).all():
        raise LdmPipeError("the picture holds NaN or infinity", how_to_fix="decode in float32 or bfloat16")
    pixels = ((pixels.clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def save_picture(image: Image.Image, path: Path, *, optimize: bool = False) -> None:
    """Write a PNG whole or not at all; `optimize` takes longer for a smaller file.

    Raises: LdmPipeError naming the path if it cannot be written.
    """
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=optimize)
    atomic_write(path, buffer.getvalue())


def make_grid(
    images: Sequence[Image.Image],
    columns: int,
    labels: Sequence[str] | None = None,
    *,
    padding: int = 4,
    background: tuple[int, int, int] = WHITE,
) -> Image.Image:
    """Lay pictures out row by row, each with its label below; cells have the size of the largest picture."""
    if not images or columns < 1:
        raise LdmPipeError(f"a sheet of {len(images)} pictures in {columns} columns: both must be at least 1")
    if labels is not None and len(labels) != len(images):
        raise LdmPipeError(f"{len(labels)} labels for {len(images)} pictures")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    width = max(image.width for image in images)
    height = max(image.height for image in images)
    font = ImageFont.load_default()
    wrapped = [_wrap(label, font, width) for label in labels] if labels is not None else [[] for _ in images]
    line_height = 12
    text_height = max(len(lines) for lines in wrapped) * line_height + (2 if labels is not None else 0)
    sheet = Image.new(
        "RGB",
        (columns * (width + padding) + padding, rows * (height + text_height + padding) + padding),
        background,
    )
    draw = ImageDraw.Draw(sheet)
    ink = (0, 0, 0) if sum(background) > 382 else (255, 255, 255)
    for index, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        row, column = divmod(index, columns)
        x = padding + column * (width + padding)
        y = padding + row * (height + text_height + padding)
        sheet.paste(image, (x + (width - image.width) // 2, y + (height - image.height) // 2))
        for number, line in enumerate(lines):
            draw.text((x, y + height + 1 + number * line_height), line, fill=ink, font=font)
    return sheet


def _wrap(label: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int, max_lines: int = 3) -> list[str]:
    """Break a label into lines no wider than the picture; what does not fit ends in '..'."""
    lines: list[str] = [""]
    # The default bitmap font of old Pillow builds knows Latin-1 only.
    for word in label.translate(_PLAIN).encode("latin-1", "replace").decode("latin-1").split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > max_lines:
        lines = lines[:max_lines]
        lines[-1] += ".."
    for number, line in enumerate(lines):
        while len(line) > 3 and font.getlength(line) > width:
            line = line[:-3] + ".."
        lines[number] = line
    return lines
