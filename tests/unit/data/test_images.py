"""Pictures of every mode and every kind of damage become the right colours or one clear error (faults 35 to 40)."""

from __future__ import annotations

import contextlib
import io
import random
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageCms

from ldm_pipe.data.images import make_grid, open_image, open_image_with_notes, resize, to_pil, to_tensor
from ldm_pipe.pretrained import LdmPipeError

CHART = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 64, 200)]


def chart(size: int = 8) -> Image.Image:
    """Return squares of known colours side by side."""
    image = Image.new("RGB", (size * len(CHART), size))
    for number, colour in enumerate(CHART):
        image.paste(colour, (number * size, 0, (number + 1) * size, size))
    return image


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """Write a PNG by hand, for what Pillow does not write."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def difference(a: Image.Image, b: Image.Image) -> int:
    assert (a.mode, a.size) == (b.mode, b.size) == ("RGB", b.size)
    return max(high for _, high in ImageChops.difference(a, b).getextrema())


def test_16_bit_grey_is_scaled_by_257_not_clipped_to_white() -> None:
    """Fault 35; Pillow #5991, #2574."""
    levels = np.arange(256, dtype=np.uint16) * 257
    image = open_image(encode(Image.fromarray(levels.reshape(16, 16))))
    assert (np.asarray(image) == np.arange(256, dtype=np.uint8).reshape(16, 16, 1)).all()
    between = np.array([[0, 128, 129, 257 * 200 + 128, 257 * 200 + 129, 65535]], dtype=np.uint16)
    assert np.asarray(open_image(encode(Image.fromarray(between))))[0, :, 0].tolist() == [0, 0, 1, 200, 201, 255]


def test_16_bit_grey_in_tiff_pgm_and_memory() -> None:
    levels = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    expected = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    assert (np.asarray(open_image(encode(Image.fromarray(levels), "TIFF"))) == expected).all()
    pgm = b"P5 16 16 65535\n" + levels.astype(">u2").tobytes()
    assert (np.asarray(open_image(pgm)) == expected).all()
    assert (np.asarray(open_image(Image.fromarray(levels.astype(np.int32)))) == expected).all()


def test_16_bit_grey_with_a_transparent_value() -> None:
    rows = b"\0" + struct.pack(">HH", 1000, 0)
    trns = struct.pack(">I", 2) + b"tRNS" + struct.pack(">H", 1000)
    data = png(2, 1, 16, 0, rows, trns + struct.pack(">I", zlib.crc32(trns[4:])))
    assert np.asarray(open_image(data, background=(1, 2, 3))).tolist() == [[[1, 2, 3], [0, 0, 0]]]


def test_wide_integers_and_floats_without_known_white_are_refused() -> None:
    with pytest.raises(LdmPipeError, match="65535"):
        open_image(Image.fromarray(np.full((2, 2), 70000, dtype=np.int32)))
    with pytest.raises(LdmPipeError, match=r"\[0, 1\]"):
        open_image(Image.fromarray(np.full((2, 2), 255.0, dtype=np.float32)))
    assert open_image(Image.fromarray(np.full((2, 2), 0.5, dtype=np.float32))).getpixel((0, 0)) == (128, 128, 128)


def test_hidden_colours_under_full_transparency_are_not_shown() -> None:
    """Fault 36: RGBA, LA, palette + tRNS, grey + tRNS, RGB + tRNS."""
    hidden = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert open_image(encode(hidden)).getcolors() == [(16, (255, 255, 255))]
    assert open_image(encode(hidden), background=(10, 20, 30)).getcolors() == [(16, (10, 20, 30))]
    assert open_image(encode(Image.new("LA", (4, 4), (7, 0)))).getcolors() == [(16, (255, 255, 255))]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    assert open_image(encode(palette, transparency=1)).getcolors() == [(16, (255, 255, 255))]
    assert open_image(encode(palette, transparency=b"\xff\x80")).getpixel((0, 0)) == (227, 127, 127)
    for mode, colour in (("L", 9), ("RGB", (9, 8, 7))):
        assert open_image(encode(Image.new(mode, (4, 4), colour), transparency=colour)).getpixel((0, 0)) == (255,) * 3
    assert open_image_with_notes(encode(hidden))[1] == ("mode RGBA", "transparent")


def test_half_transparency_is_blended_with_the_background() -> None:
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    assert open_image(half).getpixel((0, 0)) == (127, 127, 127)
    assert open_image(half, background=(0, 0, 0)).getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("PPM", {}), ("WEBP", {"lossless": True}), ("GIF", {})],
)
def test_a_chart_keeps_its_colours_in_every_lossless_format(kind: str, options: dict[str, bool]) -> None:
    """Fault 37."""
    assert difference(open_image(encode(chart(), kind, **options)), chart()) == 0


def test_cmyk_grey_palette_and_bilevel_charts_are_right_within_2() -> None:
    """Fault 37; a CMYK JPEG is stored inverted."""
    jpeg = encode(chart(16).convert("CMYK"), "JPEG", quality=100, subsampling=0)
    assert difference(open_image(jpeg), chart(16)) <= 2
    assert difference(open_image(chart().convert("CMYK")), chart()) <= 2
    assert difference(open_image(encode(chart().convert("P", palette=Image.Palette.ADAPTIVE))), chart()) <= 2
    grey = chart().convert("L")
    assert difference(open_image(encode(grey)), grey.convert("RGB")) == 0
    assert open_image(encode(Image.new("1", (3, 3), 1))).getcolors() == [(9, (255, 255, 255))]


def test_an_embedded_colour_profile_is_applied_and_a_broken_one_ignored() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert difference(open_image(encode(chart(), icc_profile=srgb)), chart()) == 0
    image, notes = open_image_with_notes(encode(chart(), icc_profile=b"not a profile" * 20))
    assert difference(image, chart()) == 0
    assert notes == ("broken colour profile",)
    # the sRGB profile under another name, its red and blue primaries exchanged: colours must follow the profile
    swapped = (
        srgb.replace(b"rXYZ", b"tmpZ").replace(b"bXYZ", b"rXYZ").replace(b"tmpZ", b"bXYZ").replace(b"sRGB", b"swap")
    )
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))
    image, notes = open_image_with_notes(encode(Image.new("RGB", (4, 4), (255, 0, 0)), icc_profile=swapped))
    assert notes == ("colour profile applied",)
    assert difference(image, Image.new("RGB", (4, 4), (0, 0, 255))) <= 2


def test_an_animation_gives_its_first_frame_and_says_so() -> None:
    """Fault 37, whatever frame was shown last."""
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    for kind in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        image, notes = open_image_with_notes(data)
        assert image.getpixel((0, 0)) == (250, 0, 0)
        assert "animated" in notes
        shown = Image.open(io.BytesIO(data))
        shown.seek(1)
        assert open_image(shown).getpixel((0, 0)) == (250, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation: int) -> None:
    """Fault 38; diffusers PR#3465."""
    upright = Image.new("RGB", (16, 32), (255, 255, 255))
    upright.paste((255, 0, 0), (0, 0, 8, 16))
    turned = {
        1: lambda i: i,
        2: lambda i: i.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda i: i.rotate(180),
        4: lambda i: i.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda i: i.transpose(Image.Transpose.TRANSPOSE),
        6: lambda i: i.rotate(90, expand=True),
        7: lambda i: i.transpose(Image.Transpose.TRANSVERSE),
        8: lambda i: i.rotate(-90, expand=True),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert difference(open_image(encode(turned, exif=exif)), upright) == 0
    jpeg = encode(turned, "JPEG", quality=100, subsampling=0, exif=exif)
    assert difference(open_image(jpeg), upright) <= 2


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\1"]
)
def test_broken_exif_does_not_cost_the_picture(exif: bytes) -> None:
    """Fault 38; datasets #7668."""
    image = open_image(encode(chart(16), "JPEG", quality=100, subsampling=0, exif=exif))
    assert difference(image, chart(16)) <= 2


def test_exif_orientation_that_is_not_a_number_is_counted_as_broken() -> None:
    text = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">HHHI4sI", 1, 0x0112, 2, 4, b"up!\0", 0)
    image, notes = open_image_with_notes(encode(chart(), exif=text))
    assert difference(image, chart()) == 0
    assert notes == ("broken EXIF",)


def test_unreadable_files_name_file_and_reason(tmp_path: Path) -> None:
    """Fault 39."""
    whole = encode(chart(32))
    cases = {
        "empty.png": (b"", "0 bytes"),
        "text.png": (b"just a few words", "text, not a picture"),
        "error.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "DOCTYPE"),
        "short.png": (whole[: len(whole) // 2], "cannot read"),
        "short.jpg": (encode(chart(32), "JPEG")[:-20], "truncated"),
        "noise.webp": (bytes(range(200, 256)) * 4, "known format"),
        "drawing.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    }
    for name, (data, reason) in cases.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(LdmPipeError) as caught:
            open_image(path)
        assert str(path) in str(caught.value)
        assert reason in str(caught.value)
        assert caught.value.how_to_fix, "a user is told what to do"
    with pytest.raises(LdmPipeError, match="not found"):
        open_image(tmp_path / "absent.png")
    with pytest.raises(LdmPipeError, match="folder"):
        open_image(tmp_path)
    with pytest.raises(LdmPipeError, match=r"row 7.*0 bytes"):
        open_image(b"", name="file.parquet:row 7")


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    """Fault 40: 120 megapixels in a few hundred bytes, and memory does not rise."""
    bomb = png(12000, 10000, 8, 2, b"\0" * 100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LdmPipeError, match="larger than 50000000 pixels"):
        open_image(bomb, name="bomb.png")
    with pytest.raises(LdmPipeError, match=r"bomb\.png"):
        open_image(png(30000, 30000, 8, 2, b"\0" * 100), name="bomb.png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    assert open_image(encode(chart()), max_pixels=8 * 48).size == (48, 8)
    with pytest.raises(LdmPipeError, match="larger than 383 pixels"):
        open_image(encode(chart()), max_pixels=383)


def mutants(data: bytes, rng: random.Random, number: int) -> list[bytes]:
    """Cut, overwrite, double and reorder bytes of a file."""
    result = []
    for _ in range(number):
        mutant = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            start = rng.randrange(max(len(mutant), 1))
            end = min(len(mutant), start + rng.choice((1, 2, 8, 64)))
            kind = rng.randrange(4)
            if kind == 0:
                mutant[start:end] = rng.randbytes(end - start)
            elif kind == 1:
                del mutant[start:end]
            elif kind == 2:
                mutant[start:start] = mutant[start:end]
            else:
                del mutant[max(start, 1) :]
        result.append(bytes(mutant))
    return result


def sources() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = chart()
    return {
        "png": encode(image),
        "palette": encode(image.convert("P"), transparency=3),
        "grey16": encode(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8))),
        "jpeg": encode(image, "JPEG", exif=exif),
        "cmyk": encode(image.convert("CMYK"), "JPEG"),
        "gif": encode(image, "GIF", save_all=True, append_images=[image.rotate(180)]),
        "webp": encode(image, "WEBP", exif=exif),
        "tiff": encode(image, "TIFF", compression="tiff_lzw"),
        "bmp": encode(image, "BMP"),
    }


def decode_mutants(kind: str, number: int) -> int:
    """Open mutants of one kind of file; return how many could still be read."""
    assert open_image(sources()[kind]).mode == "RGB"
    readable = 0
    for mutant in mutants(sources()[kind], random.Random(kind), number):
        # any other exception fails the test
        with contextlib.suppress(LdmPipeError):
            image = open_image(mutant, max_pixels=1_000_000, name="mutant")
            assert image.mode == "RGB"
            assert len(image.tobytes()) == 3 * image.width * image.height
            readable += 1
    return readable


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # its notes about damaged TIFF tags
@pytest.mark.parametrize("kind", list(sources()))
def test_mutants_of_files_give_rgb_or_one_error(kind: str) -> None:
    """Fault 39: nothing but a picture or an LdmPipeError comes out."""
    assert decode_mutants(kind, 80) < 80, "the mutants are not all harmless"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", list(sources()))
def test_5000_mutants_give_rgb_or_one_error(kind: str) -> None:
    """Fault 39 at full size: 9 kinds of files, 560 mutants each."""
    assert 0 < decode_mutants(kind, 560) < 560


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe1", b"GIF89a", b"RIFF", b"II*\0", b"P6 "]),
)
def test_random_bytes_give_one_error(body: bytes, head: bytes) -> None:
    with contextlib.suppress(LdmPipeError):
        assert open_image(head + body, max_pixels=10_000).mode == "RGB"


def test_tensor_round_trip_is_exact() -> None:
    levels = np.arange(256 * 3, dtype=np.int64).reshape(16, 16, 3) % 256
    image = Image.fromarray(levels.astype(np.uint8))
    tensor = to_tensor(image)
    assert (tensor.shape, tensor.dtype) == ((3, 16, 16), torch.float32)
    assert (tensor.min(), tensor.max()) == (-1, 1)
    assert to_pil(tensor).tobytes() == image.tobytes()
    assert to_pil(tensor * 3).getextrema() == ((0, 255),) * 3
    assert to_tensor(Image.new("RGB", (2, 3), (255, 0, 0)))[:, 0, 0].tolist() == [1, -1, -1]
    assert to_tensor(Image.new("RGBA", (2, 3), (0, 0, 0, 0))).min() == 1


def test_nan_is_an_error_not_a_black_picture() -> None:
    for bad in (float("nan"), float("inf")):
        with pytest.raises(LdmPipeError, match="NaN"):
            to_pil(torch.full((3, 4, 4), bad))
    with pytest.raises(LdmPipeError, match="shape"):
        to_pil(torch.zeros(1, 3, 4, 4))


def test_halving_is_the_box_average() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)
    small = np.asarray(resize(Image.fromarray(pixels), 64)).astype(float)
    exact = pixels.astype(float).reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(small - exact).max() <= 0.5


def test_fine_stripes_become_grey_not_moire() -> None:
    stripes = np.zeros((100, 100, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    small = np.asarray(resize(Image.fromarray(stripes), 30)).astype(int)
    assert np.abs(small[:, 3:-3] - 128).max() < 24


def test_resize_covers_and_crops_where_it_is_told() -> None:
    wide = Image.new("RGB", (30, 10), (255, 0, 0))
    wide.paste((0, 255, 0), (10, 0, 20, 10))
    wide.paste((0, 0, 255), (20, 0, 30, 10))
    assert resize(wide, 10).getcolors() == [(100, (0, 255, 0))]
    assert resize(wide, 10, center_crop=False, crop_at=(0, 0)).getcolors() == [(100, (255, 0, 0))]
    assert resize(wide, 10, center_crop=False, crop_at=(1, 1)).getcolors() == [(100, (0, 0, 255))]
    assert resize(wide, (10, 30)).tobytes() == wide.tobytes()
    assert resize(wide, 64).size == (64, 64)
    for options in ({"center_crop": False}, {"crop_at": (0, 0)}, {"center_crop": False, "crop_at": (0, 2)}):
        with pytest.raises(LdmPipeError, match="crop_at"):
            resize(wide, 10, **options)
    with pytest.raises(LdmPipeError, match="positive"):
        resize(wide, 0)


def test_sheet_holds_every_picture_and_its_label() -> None:
    images = [Image.new("RGB", (20, 20), colour) for colour in CHART[:3]]
    sheet = make_grid(images, 2)
    assert sheet.size == (2 * 24 + 4, 2 * 24 + 4)
    assert [sheet.getpixel(at) for at in ((10, 10), (34, 10), (10, 34), (34, 34))] == [*CHART[:3], (255, 255, 255)]
    labelled = make_grid(images, 3, ["a", "two words and more", "\u732b"])
    below = labelled.crop((0, 24, *labelled.size))
    columns = [below.crop((x, 0, x + 24, below.height)).getextrema()[0][0] for x in (2, 26, 50)]
    assert max(columns) < 200, "each label leaves ink below its picture"
    typed, printed = ("the man\u2019s \u201chat\u201d", 'the man\'s "hat"')
    wide = Image.new("RGB", (120, 24))
    assert make_grid([wide], 1, [typed]).tobytes() == make_grid([wide], 1, [printed]).tobytes()
    with pytest.raises(LdmPipeError, match="labels"):
        make_grid(images, 3, ["one"])
    with pytest.raises(LdmPipeError, match="at least 1"):
        make_grid([], 3)
