"""Keep the settings of a picture in its PNG (or GIF) file, in the text form that web interfaces write and read.

What enters: a prompt and named settings. What leaves: the text of the `parameters` chunk, and back again.
This file knows neither the pipeline nor torch.

    prompt, any number of lines
    Negative prompt: any number of lines
    Steps: 20, Sampler: DDIM, CFG scale: 7.5, Seed: 1, Size: 512x512, Model: "a, quoted value"
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_pipe.sampler_table import SAMPLERS

if TYPE_CHECKING:
    from PIL.Image import Image

CHUNK = "parameters"
MAX_PIXELS = 50_000_000  # a picture is decoded only if its settings may stand behind the pixels
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MAX_TEXT = 20_000  # characters of one prompt kept in a picture; also far above any encoder's context
NEGATIVE = "Negative prompt:"
_SETTING = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


@dataclass(frozen=True)
class PngInfo:
    """What a picture says about how it was drawn."""

    prompt: str = ""
    negative_prompt: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)


def sampler_label(sampler: str) -> str:
    """Return the name web interfaces show for one of our samplers."""
    row = SAMPLERS.get(sampler)
    return (row and row.label) or sampler


def sampler_from_label(label: str) -> str:
    """Return our name of a sampler from the name shown in a picture."""
    return next((name for name, row in SAMPLERS.items() if row.label == label), label)


def _clean(text: str) -> str:
    """Drop control characters and cap the length; line breaks stay."""
    text = "".join(c for c in text.replace("\r\n", "\n").replace("\r", "\n") if c == "\n" or c >= " ")
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "..."


def _quote(value: str) -> str:
    """Quote a value that holds a separator, as the readers of this format expect."""
    return (
        json.dumps(value, ensure_ascii=False) if any(c in value for c in ',:\n"') or value != value.strip() else value
    )


def _unquote(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] == '"':
        try:
            return str(json.loads(value))
        except json.JSONDecodeError:
            return value
    return value.strip()


def format_parameters(info: PngInfo) -> str:
    """Write the text of the `parameters` chunk."""
    lines = [_clean(info.prompt)]
    if info.negative_prompt:
        lines.append(f"{NEGATIVE} {_clean(info.negative_prompt)}")
    if info.settings:
        lines.append(", ".join(f"{key}: {_quote(_clean(str(value)))}" for key, value in info.settings.items()))
    return "\n".join(lines)


def _settings_of(line: str) -> dict[str, str] | None:
    """Read a line of settings; None if it is prose: a line counts when it is nothing but `Key: value` pairs."""
    settings: dict[str, str] = {}
    position = 0
    while position < len(line):
        match = _SETTING.match(line, position)
        if match is None:
            return None
        settings[match[1]] = _unquote(match[2])
        position = match.end()
    return settings if "Steps" in settings or len(settings) >= 3 else None


def parse_parameters(text: str) -> PngInfo:
    """Read the text of a `parameters` chunk, ours or a web interface's."""
    lines = text.strip("\n").split("\n")
    settings = _settings_of(lines[-1]) if lines else None
    if settings is not None:
        lines = lines[:-1]
    start = next((i for i in reversed(range(len(lines))) if lines[i].startswith(NEGATIVE)), None)
    if start is None:
        return PngInfo("\n".join(lines), "", settings or {})
    negative = [lines[start][len(NEGATIVE) :].lstrip(" "), *lines[start + 1 :]]
    return PngInfo("\n".join(lines[:start]), "\n".join(negative), settings or {})


def png_bytes(image: Image, info: PngInfo | None = None) -> bytes:
    """Encode a picture as PNG with its settings inside."""
    from PIL.PngImagePlugin import PngInfo as PillowPngInfo

    chunks = PillowPngInfo()
    if info is not None:
        chunks.add_text(CHUNK, format_parameters(info))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def gif_bytes(images: Sequence[Image], info: PngInfo, fps: float) -> bytes:
    """Encode pictures as an endless GIF with their settings in its comment."""
    buffer = io.BytesIO()
    images[0].save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=list(images[1:]),
        duration=round(1000 / fps),
        loop=0,
        comment=format_parameters(info).encode("utf-8"),
    )
    return buffer.getvalue()


def read_png_info(path: str | Path) -> PngInfo | None:
    """Read the settings out of a picture; None if it holds none.

    Raises: OSError or ValueError if the file is not a picture.
    """
    from PIL import Image

    with Image.open(path, formats=FORMATS) as image:
        if image.format == "PNG" and CHUNK not in image.info:  # text chunks may follow the pixels
            if image.width * image.height > MAX_PIXELS:
                what = f"no settings before the pixels, and {image.width}x{image.height} are more than {MAX_PIXELS}"
                raise ValueError(what)
            image.load()
        text = getattr(image, "text", {}).get(CHUNK) or image.info.get(CHUNK)
        comment = image.info.get("comment")
        if image.format == "GIF" and isinstance(comment, bytes):
            text = comment.decode("utf-8", "replace")
    return parse_parameters(text) if isinstance(text, str) else None
