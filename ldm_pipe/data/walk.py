"""Which files of a folder or an archive belong to a data set, and what the text files among them say.

Enters: a folder, or names and bytes. Leaves: the files that count, and those passed over with the reason. One rule
holds for folders, archives and streams. This file does not know what becomes of the files.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ldm_pipe.data.images import SUFFIXES
from ldm_pipe.printable import printable

MAX_LINE = 1_000_000
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
ARCHIVE_SUFFIXES = (".tar", ".zip")
# Folders and files that systems, file servers and programs put among a user's own (lower case); beside these, whatever
# begins with a dot: .ipynb_checkpoints, .DS_Store, ._photo.jpg, .git.
SYSTEM_NAMES = frozenset(
    {
        "__macosx", "@eadir", "#recycle", "@recycle", "@recently-snapshot", "$recycle.bin", "lost+found",
        "system volume information", "thumbs.db", "desktop.ini",
    }
)  # fmt: skip
# Pictures that are not read: they would need another library, or a program.
FOREIGN_SUFFIXES = (
    ".avif", ".heic", ".heif", ".jxl", ".jp2", ".j2k", ".svg", ".psd", ".xcf", ".tga", ".ico", ".icns", ".dds", ".exr",
    ".hdr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".eps", ".pcx",
)  # fmt: skip
NO_CAPTIONS = ("readme", "license", "licence", "notice", "copying", "requirements")  # .txt files of other use
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")
_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


@dataclass(frozen=True)
class Problem:
    """One row or file that is not used, and why."""

    where: str
    kind: str
    detail: str = ""

    def __str__(self) -> str:
        """Return one line for a report."""
        return printable(f"{self.where}: {self.kind}" + (f" ({self.detail})" if self.detail else ""))


def is_hidden(name: str) -> bool:
    """Tell whether a path, relative to its data set, is a hidden or system file or lies in such a folder."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return any((part[0] == "." and part != "..") or part.lower() in SYSTEM_NAMES for part in parts)


def is_picture(name: str) -> bool:
    """Tell by its suffix whether a file is a picture that is read."""
    return name.lower().endswith(SUFFIXES)


def passed_over(where: str, name: str) -> Problem | None:
    """Say why a picture of a data set is passed over; None for one that counts, and for what is no picture.

    Args:
        where: what the report calls the file.
        name: its path, relative to the data set.
    """
    foreign = name.lower().endswith(FOREIGN_SUFFIXES)
    if is_hidden(name):
        return Problem(where, "hidden file") if is_picture(name) or foreign else None
    return Problem(where, "unread format", f"readable are {', '.join(SUFFIXES)}") if foreign else None


def walk(folder: Path) -> tuple[list[Path], list[Problem]]:
    """Return the files below a folder that are not hidden, sorted, and what was passed over.

    Links to folders are not followed: they may lead anywhere, and round in circles.
    """
    files: list[Path] = []
    skipped: list[Problem] = []

    def unread(error: OSError) -> None:
        skipped.append(Problem(str(error.filename), "unread folder", error.strerror or str(error)))

    for place, folders, names in os.walk(folder, onerror=unread):
        links = [name for name in folders if os.path.islink(os.path.join(place, name)) and not is_hidden(name)]
        skipped += [Problem(os.path.join(place, name), "linked folder", "it is not followed") for name in links]
        inner = os.path.relpath(place, folder)
        for name in names:
            path = Path(place, name)
            relative = name if inner == "." else f"{inner}/{name}"
            if (problem := passed_over(str(path), relative)) is not None:
                skipped.append(problem)
            elif not is_hidden(relative):
                files.append(path)
    return sorted(files), sorted(skipped, key=lambda problem: problem.where)


def unused(files: Iterable[Path], reason: str) -> list[Problem]:
    """List the pictures and archives among files that are not read because the folder is read in another way."""
    kinds = (*SUFFIXES, *ARCHIVE_SUFFIXES, *_COMPRESSED)
    return [Problem(str(path), "not read", reason) for path in files if path.name.lower().endswith(kinds)]


def decode_text(data: bytes) -> str:
    """Read UTF-8 with or without a byte order mark, or UTF-16 with one; marks never stay in the text.

    Raises: UnicodeDecodeError, a ValueError.
    """
    encoding = next((name for mark, name in _BOMS if data.startswith(mark)), "utf-8")
    return data.decode(encoding).replace("\ufeff", "")  # further marks: files that were put end to end


def text_encoding(path: Path) -> str:
    """Return the encoding of a text file that is read line by line: by its mark, else UTF-8."""
    with open(path, "rb") as file:
        head = file.read(4)
    return next((name for mark, name in _BOMS if head.startswith(mark)), "utf-8")


def caption_lines(text: str) -> str | list[str]:
    """Read a caption file: a line is a caption, and several lines are several captions of the picture."""
    lines = [line.strip() for line in text.replace("\ufeff", "").splitlines() if line.strip()]
    return lines if len(lines) > 1 else "".join(lines)
