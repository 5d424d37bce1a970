"""What is wrong with a folder of pictures, told before a training starts.

Enters: a folder or parquet file. Leaves: a `FolderReport`; nothing is changed. This file does not decide what a
training skips (dataset.py does), it only reads through it.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ldm_pipe.data.dataset import load_records
from ldm_pipe.data.images import MAX_PIXELS, open_image_with_notes
from ldm_pipe.data.rows import DataReport
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.printable import printable

_CAPTION_KINDS = ("missing caption", "null caption")


@dataclass
class FolderReport:
    """Findings, each a line that names the picture or row first."""

    num_rows: int = 0
    num_good: int = 0
    bad: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    uncaptioned: list[str] = field(default_factory=list)
    tiny: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    odd_modes: Counter[str] = field(default_factory=Counter)
    num_captions: Counter[int] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)

    @property
    def ok(self) -> bool:
        """Tell whether every row can be used; odd pictures can (they are converted), skipped ones are no rows."""
        return not (self.bad or self.duplicates or self.uncaptioned or self.tiny)

    def __str__(self) -> str:
        """Return the report as text, at most ten lines per finding."""
        lines = [f"{self.num_good} of {self.num_rows} rows are good"]
        for title in ("bad", "duplicates", "uncaptioned", "tiny", "odd", "skipped"):
            found = getattr(self, title)
            if found:
                lines.append(f"{title}: {len(found)}")
                lines += [f"  {line}" for line in found[:10]]
                lines += [f"  ... and {len(found) - 10} more"] if len(found) > 10 else []
        for mode, number in self.odd_modes.most_common():
            lines.append(f"converted: {number} ({mode})")
        if set(self.num_captions) - {1}:
            lines += [f"captions per picture {count}: {number}" for count, number in sorted(self.num_captions.items())]
        for (width, height), number in self.sizes.most_common(5):
            lines.append(f"size {width}x{height}: {number}")
        return "\n".join(lines)


class _Finding(NamedTuple):
    """What one picture turned out to be; `error` is empty for a readable one."""

    error: str
    size: tuple[int, int]
    notes: tuple[str, ...]
    digest: str


def check_folder(
    path: str | Path,
    split: str = "train",
    *,
    image_column: str = "image",
    caption_column: str | None = "text",
    min_side: int = 64,
    max_pixels: int = MAX_PIXELS,
) -> FolderReport:
    """Read every row and picture; report bad, duplicate, uncaptioned, tiny, odd (converted) and skipped ones.

    Skipped are pictures that a training passes over without counting them: in hidden and system folders, of a format
    that is not read, behind links to folders, or in a place that the set is not read from.

    Pictures with the same pixels count as duplicates when their captions are the same too; with other captions they are
    what data sets with several captions per picture have.

    Args:
        path: folder or parquet file; see `load_records`.
        split: which split.
        image_column: column of the pictures.
        caption_column: column of the captions; None: none are wanted.
        min_side: pictures with a shorter side are called tiny.
        max_pixels: larger pictures are bad.
    """
    records = load_records(
        path,
        split,
        image_column=image_column,
        caption_column=caption_column,
        check_images=False,
        max_bad_fraction=1.0,
    )
    report = FolderReport(records.report.num_rows)
    _sort_problems(records.report, report)
    report.skipped = [str(problem) for problem in records.report.skipped]

    def check(index: int) -> _Finding:
        try:
            image, notes = open_image_with_notes(
                records.source(index), max_pixels=max_pixels, name=records.where(index)
            )
        except LdmPipeError as error:
            return _Finding(error.what, (0, 0), (), "")
        return _Finding("", image.size, notes, hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest())

    seen: dict[tuple[str, tuple[str, ...]], str] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for index, found in enumerate(pool.map(check, range(len(records)))):
            where = printable(records.where(index))
            if found.error:
                report.bad.append(f"{where}: {printable(found.error)}")
                continue
            report.sizes[found.size] += 1
            report.num_captions[len(records.caption_lists[index])] += 1
            report.odd_modes.update(found.notes)
            if found.notes:
                report.odd.append(f"{where}: {', '.join(found.notes)}")
            first = seen.setdefault((found.digest, tuple(records.caption_lists[index])), where)
            if first != where:
                report.duplicates.append(f"{where}: same picture and caption as {first}")
            elif min(found.size) < min_side:
                report.tiny.append(f"{where}: {found.size[0]}x{found.size[1]}")
            else:
                report.num_good += 1
    return report


def _sort_problems(found: DataReport, report: FolderReport) -> None:
    for problem in found.problems:
        if problem.kind in _CAPTION_KINDS:
            report.uncaptioned.append(str(problem))
        elif problem.kind == "duplicate":
            report.duplicates.append(str(problem))
        else:
            report.bad.append(str(problem))
