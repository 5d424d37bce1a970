"""Decide where pictures are written, and find out before the work whether they can be.

What enters: what the user typed after -o. What leaves: the path of each picture. This file imports no torch, so that
a wrong path is told at once.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path

MAX_SLUG = 60


class OutputError(ValueError):
    """Say what is wrong with an output path, in the three parts of `LdmPipeError` (which costs the import of torch)."""

    def __init__(self, what: str, where: str = "", how_to_fix: str = "") -> None:
        """Keep the three parts for the command line."""
        self.what, self.where, self.how_to_fix = what, where, how_to_fix
        super().__init__(what, where, how_to_fix)


def slug(prompt: str) -> str:
    """Turn a prompt into a harmless file name: ASCII letters, digits and hyphens, at most 60."""
    plain = unicodedata.normalize("NFKD", prompt[:1000]).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")[:MAX_SLUG].strip("-") or "picture"


def check_folder(folder: Path) -> None:
    """Make an output folder and prove that files can be written there.

    Raises: OutputError if they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".ldm-pipe-"):
            pass
    except OSError as error:
        what = f"cannot write there ({error.strerror or error})"
        raise OutputError(what, str(folder), "Choose another output folder with -o.") from error


def check_space(folder: Path, num_bytes: int) -> None:
    """Raise OutputError if the disk has no room for so many bytes."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OutputError(
            f"{num_bytes} bytes are needed, {free} are free", str(folder), "Free some space, or choose another -o."
        )


def check_file(path: Path, *, overwrite: bool) -> None:
    """Raise OutputError if a file cannot be written, is a folder, or exists and may not be replaced."""
    if path.is_dir():
        raise OutputError("is a folder", str(path), "Give a file name.")
    if path.exists() and not overwrite:
        raise OutputError("the file exists", str(path), "Give another name, or --overwrite.")


@dataclass(frozen=True)
class OutputPlan:
    """Where the pictures of one command go.

    Attributes:
        folder: checked to be writable.
        name: file name without suffix as given with -o; None names each picture by prompt and seed.
        overwrite: whether existing files may be replaced.
    """

    folder: Path
    name: str | None
    suffix: str = ".png"
    overwrite: bool = False

    @classmethod
    def make(
        cls, output: str | None, *, count: int, overwrite: bool, suffixes: tuple[str, ...] = (".png",)
    ) -> OutputPlan:
        """Read -o: a file name, a folder (existing, or ending in a slash), or nothing for the present folder.

        Args:
            suffixes: the kinds of files that can be written.

        Raises: OutputError, before any work, if nothing can be written there.
        """
        if output is None:
            plan = cls(Path(), None, overwrite=overwrite)
        elif output.endswith(("/", "\\")) or Path(output).is_dir():
            plan = cls(Path(output), None, overwrite=overwrite)
        else:
            path = Path(output)
            if path.suffix.lower() not in suffixes:
                kinds = " or ".join(suffix[1:].upper() for suffix in suffixes)
                what = f"pictures are written as {kinds}, not {path.suffix or 'without a suffix'}"
                raise OutputError(what, output, f"Use {path.with_suffix('.png')}, or {output}/ for a folder.")
            plan = cls(path.parent, path.stem, path.suffix, overwrite)
        check_folder(plan.folder)
        if plan.name is not None:
            for i in range(count):
                check_file(plan.path(i, count), overwrite=overwrite)
        return plan

    def path(self, i: int, count: int, *, prompt: str = "", seed: int | None = None) -> Path:
        """Name picture i of `count`; names made from the prompt never replace a file."""
        if self.name is not None:
            return self.folder / (f"{self.name}{self.suffix}" if count == 1 else f"{self.name}-{i + 1}{self.suffix}")
        base = f"{slug(prompt)}-{i if seed is None else seed}"
        path = self.folder / f"{base}{self.suffix}"
        number = 2
        while path.exists() and not self.overwrite:
            path = self.folder / f"{base}-{number}{self.suffix}"
            number += 1
        return path
