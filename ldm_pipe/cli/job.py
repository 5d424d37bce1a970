"""The folder of a prompts file: a second run goes on with the first one's settings, or is refused.

What enters: the settings of a run and the pictures it is to draw. What leaves: nothing, or one error that names what
differs. This file imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ldm_pipe.cli.paths import OutputError
from ldm_pipe.drawing.png_info import PngInfo, format_parameters, parse_parameters, read_png_info, sampler_label

NOTE = ".ldm-pipe-job.json"
MAX_NOTE = 1_000_000
ADVICE = "Choose another folder with -o, or draw all of them anew with --overwrite."
# What a picture of an earlier version, which left no note, says of an option.
_LABELS = {
    "num_inference_steps": "Steps", "guidance_scale": "CFG scale", "guidance_rescale": "Guidance rescale",
    "sampler": "Sampler", "spacing": "Spacing", "eta": "Eta", "clip_skip": "Clip skip",
}  # fmt: skip


class Planned(Protocol):
    """One prompt and where its pictures go."""

    prompt: str
    negative_prompt: str | None
    paths: tuple[Path, ...]


def refuse_other_settings(folder: Path, settings: Mapping[str, Any], jobs: Sequence[Planned]) -> None:
    """Compare what the pictures in a folder were drawn with with the present settings, and note these where none are.

    Args:
        folder: of the pictures.
        settings: every option that changes a picture, by name; those left to the model are absent.
        jobs: all prompts; pictures that exist are looked at.

    Raises: OutputError naming the settings that differ, or the first picture that was drawn from other words.
    """
    now = json.loads(json.dumps(settings, default=str))
    before = _read_note(folder)
    if before is not None:
        _refuse(folder, _differences(before, now))
    for job in jobs:
        for path in job.paths:
            if path.exists():
                _refuse(path, _of_picture(path, job, {} if before is not None else now))
    if before is None:
        write_note(folder, settings)


def write_note(folder: Path, settings: Mapping[str, Any]) -> None:
    """Note what the pictures in a folder are drawn with."""
    from ldm_pipe.pretrained.files import atomic_write

    atomic_write(folder / NOTE, json.dumps(settings, indent=1, sort_keys=True, default=str) + "\n")


def _read_note(folder: Path) -> dict[str, Any] | None:
    path = folder / NOTE
    try:
        if not path.is_file():
            return None
        value = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size <= MAX_NOTE else None
    except (OSError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise OutputError("is damaged: nobody knows what these pictures were drawn with", str(path), ADVICE)
    return value


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return [f"{name} was {_shown(before.get(name))}, is {_shown(now.get(name))}" for name in names]


def _shown(value: Any) -> str:
    return "left to the model" if value is None else f"{value!r:.100}"


def _of_picture(path: Path, job: Planned, settings: Mapping[str, Any]) -> list[str]:
    """Compare a picture with its prompt, and with the settings that it tells; those that it does not tell pass."""
    try:
        info = read_png_info(path)
    except Exception:  # noqa: BLE001  damaged files make Pillow raise almost anything
        return ["it is no whole picture"]
    if info is None:
        return []
    negative = job.negative_prompt or settings.get("negative_prompt") or info.negative_prompt
    # written and read as the picture's words were: what this loses is no difference
    wanted = parse_parameters(format_parameters(PngInfo(job.prompt, negative, info.settings)))
    found = []
    if info.prompt != wanted.prompt:
        found.append(f"prompt was {_shown(info.prompt)}, is {_shown(job.prompt)}")
    if info.negative_prompt != wanted.negative_prompt:
        found.append(f"negative_prompt was {_shown(info.negative_prompt)}, is {_shown(negative)}")
    for name, label in _LABELS.items():
        told, value = info.settings.get(label), settings.get(name)
        if told is not None and value is not None and not _same(told, value):
            found.append(f"{name} was {told}, is {value}")
    width, _, height = info.settings.get("Size", "").partition("x")
    for name, told in (("width", width), ("height", height)):
        if told and settings.get(name) is not None and not _same(told, settings[name]):
            found.append(f"{name} was {told}, is {settings[name]}")
    return found


def _same(told: str, value: Any) -> bool:
    """Compare the words of a picture with an option: numbers as the picture shows them, six digits."""
    shown = f"{value:g}" if isinstance(value, (int, float)) else str(value)
    return told in (shown, sampler_label(shown), str(value))


def _refuse(where: Path, differences: Sequence[str]) -> None:
    if differences:
        raise OutputError(f"drawn with other settings: {'; '.join(differences)}", str(where), ADVICE)
