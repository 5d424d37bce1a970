"""Settings written into a PNG come back as they were."""

from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm_pipe.drawing.png_info import (
    CHUNK,
    MAX_TEXT,
    PngInfo,
    format_parameters,
    parse_parameters,
    png_bytes,
    read_png_info,
)

TEXT = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=60)
KEY = st.from_regex(r"[A-Za-z][A-Za-z0-9 \-/]{0,10}[A-Za-z0-9]", fullmatch=True)
EXAMPLE = "a cat, sitting: calm\nNegative prompt: blurry\n"
EXAMPLE += "Steps: 20, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 1, Size: 512x512"


def test_customary_form() -> None:
    info = PngInfo(
        "red apple", "ugly", {"Steps": "20", "Sampler": "DDIM", "CFG scale": "7.5", "Seed": "1", "Size": "64x64"}
    )
    expected = "red apple\nNegative prompt: ugly\nSteps: 20, Sampler: DDIM, CFG scale: 7.5, Seed: 1, Size: 64x64"
    assert format_parameters(info) == expected


def test_text_of_a_web_interface_is_read() -> None:
    info = parse_parameters(EXAMPLE + ', Model: "a, b: c", Lora hashes: "x: 1, y: 2"')
    assert (info.prompt, info.negative_prompt) == ("a cat, sitting: calm", "blurry")
    assert info.settings["Model"] == "a, b: c"
    assert info.settings["Sampler"] == "DPM++ 2M"
    assert info.settings["Lora hashes"] == "x: 1, y: 2"


def test_prompt_without_settings_stays_prose() -> None:
    assert parse_parameters("a plain prompt, nothing else") == PngInfo("a plain prompt, nothing else", "", {})


@settings(max_examples=200, deadline=None)
@given(prompt=TEXT, negative=TEXT, values=st.dictionaries(KEY, TEXT, max_size=4))
def test_round_trip(prompt: str, negative: str, values: dict[str, str]) -> None:
    if "Negative prompt:" in prompt + negative:
        return
    info = PngInfo(prompt.strip("\n"), negative.strip(), {"Steps": "3", **{k: v for k, v in values.items() if v}})
    buffer = io.BytesIO(png_bytes(Image.new("RGB", (2, 2)), info))
    back = read_png_info(buffer)
    assert back == info


def test_a_long_prompt_is_capped_and_control_characters_are_dropped() -> None:
    text = format_parameters(PngInfo("\x00\x1b[31m" + "x" * (MAX_TEXT + 50), "", {"Steps": "1"}))
    assert "\x00" not in text
    assert "\x1b" not in text
    assert len(text) < MAX_TEXT + 50


def test_picture_without_settings() -> None:
    buffer = io.BytesIO(png_bytes(Image.new("RGB", (2, 2))))
    assert CHUNK not in Image.open(buffer).info
    assert read_png_info(buffer) is None


@pytest.mark.parametrize("data", [b"", b"no picture", b"\x89PNG\r\n\x1a\n broken"])
def test_no_picture(data: bytes) -> None:
    with pytest.raises((OSError, ValueError, SyntaxError)):
        read_png_info(io.BytesIO(data))
