"""Data that is not as it should be: every bad row is counted, named and left out (faults 39, 42, 45)."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm_pipe.data.check import check_folder
from ldm_pipe.data.dataset import load_records
from ldm_pipe.pretrained import LdmPipeError
from tests.records import picture, rows, write_folder, write_parquet


def test_missing_null_doubled_and_absent_rows_are_each_counted(tmp_path: Path) -> None:
    """Fault 42: datasets drops, passes None on, doubles, or stops."""
    lines: list[Any] = [{"file_name": f"{i}.png", "text": f"caption {i}"} for i in range(1, 8)]
    lines[1]["text"] = None
    lines[2]["text"] = "  "
    lines += [dict(lines[0]), {"file_name": "absent.png", "text": "x"}, "{not json", '"text"', {"text": "no name"}]
    lines += [{"file_name": "5.png", "text": 5}, {"file_name": "6.png", "text": "another caption of 6"}]
    folder = write_folder(tmp_path / "set", 8, lines)
    records = load_records(folder, max_bad_fraction=1)
    assert records.report.counts == {
        "missing caption": 1,
        "null caption": 2,
        "duplicate": 1,
        "missing file": 1,
        "broken row": 4,
    }
    assert records.captions == ["caption 1", "caption 4", "caption 5", "caption 6", "caption 7", "another caption of 6"]
    report = "\n".join(map(str, records.report.problems))
    for where in ("0.png: missing caption", "line 9: missing file (absent.png)", "line 10: broken row (not JSON"):
        assert where in report
    with_empty = load_records(folder, max_bad_fraction=1, null_captions="empty")
    assert with_empty.captions.count("") == 2
    with pytest.raises(LdmPipeError, match=r"(?s)9 of 15 rows cannot be used.*max_bad_fraction"):
        load_records(folder, max_bad_fraction=0.5)
    assert len(load_records(write_folder(tmp_path / "plain", 8, lines[:1]), caption_column=None)) == 8


def test_pictures_without_captions_and_captions_without_pictures_are_told_apart(tmp_path: Path) -> None:
    """Fault 42, in a folder of .txt files."""
    folder = write_folder(tmp_path / "set", 3, [])
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(LdmPipeError, match=r"none of the 3 pictures has a caption.*metadata\.jsonl"):
        load_records(folder, max_bad_fraction=1)
    assert len(load_records(folder, caption_column=None)) == 3
    for name in ("0", "2", "lost", "README"):
        (folder / f"{name}.txt").write_text(name)
    records = load_records(folder, max_bad_fraction=1)
    assert records.captions == ["0", "2"]
    assert records.report.counts == {"missing caption": 1, "missing file": 1}
    assert any("lost.txt: missing file (a caption without" in str(problem) for problem in records.report.problems)


def test_same_picture_under_other_captions_is_kept(tmp_path: Path) -> None:
    table = [
        {"image": {"bytes": picture(1), "path": None}, "text": text}
        for text in ("flag of France", "flag of St. Martin")
    ]
    assert len(load_records(write_parquet(tmp_path / "a.parquet", table))) == 2
    assert load_records(
        write_parquet(tmp_path / "b.parquet", [*table, table[0]]), max_bad_fraction=1
    ).report.counts == {"duplicate": 1}


def test_same_names_in_two_folders_are_not_duplicates(tmp_path: Path) -> None:
    lines = [{"file_name": "0.png", "text": "a"}]
    folders = [write_folder(tmp_path / name, 1, lines) for name in ("one", "two")]
    assert load_records(folders).captions == ["a", "a"]
    assert load_records([folders[0], folders[0]], max_bad_fraction=1).report.counts == {"duplicate": 1}


def bad_rows(number: int) -> list[tuple[dict[str, Any], str]]:
    """Return rows with the 14 kinds of faults in turn, and the reason that each must be reported with."""

    def png_header(width: int, height: int) -> bytes:
        body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        data = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
        return b"\x89PNG\r\n\x1a\n" + data + struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))

    def wide(kind: type) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.full((2, 2), 70000, dtype=kind)).save(buffer, "TIFF")
        return buffer.getvalue()

    def jpeg() -> bytes:
        buffer = io.BytesIO()
        Image.open(io.BytesIO(picture(1, 64))).save(buffer, "JPEG")
        return buffer.getvalue()

    whole = picture(0, 32)
    broken_check_sum = bytearray(whole)
    broken_check_sum[30] ^= 255
    kinds: list[tuple[Any, Any, str]] = [
        (b"", "x", "0 bytes"),
        (b"hello there", "x", "text, not a picture"),
        (b"<html><body>404</body></html>", "x", "starts with '<html>"),
        (bytes(range(128, 256)), "x", "known format"),
        (whole[:20], "x", "unreadable picture"),
        (whole[: len(whole) // 2], "x", "unreadable picture"),
        (jpeg()[:-100], "x", "truncated"),
        (bytes(broken_check_sum), "x", "unreadable picture"),
        (png_header(12000, 10000), "x", "larger than"),
        (png_header(30000, 30000), "x", "unreadable picture"),
        (wide(np.int32), "x", "65535"),
        (wide(np.float32), "x", "[0, 1]"),
        (None, "x", "missing picture"),
        (whole, None, "null caption"),
    ]
    result = []
    for i in range(number):
        data, text, reason = kinds[i % len(kinds)]
        unique = None if data is None else data + (b" " * i if reason.startswith("text") else b"")
        image = None if unique is None else {"bytes": unique, "path": None}
        result.append(({"image": image, "text": text and f"bad {i}"}, reason))
    return result


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("num", "num_bad"), [(1400, 14), pytest.param(10_000, 100, marks=pytest.mark.slow)])
def test_one_percent_bad_of_14_kinds_is_used_and_reported_to_the_row(tmp_path: Path, num: int, num_bad: int) -> None:
    """Fault 45: 1 % bad rows, none of them a crash, each with its reason; one more bad row stops it."""
    table: list[dict[str, Any]] = [
        {"image": {"bytes": picture(i), "path": None}, "text": f"good {i}"} for i in range(num - num_bad)
    ]
    rng = random.Random(0)
    reasons = {}
    for position, (row, reason) in zip(sorted(rng.sample(range(num), num_bad)), bad_rows(num_bad), strict=True):
        table.insert(position, row)
        reasons[position] = reason
    path = write_parquet(tmp_path / "data.parquet", table)
    records = load_records(path)
    assert (len(records), records.report.num_rows) == (num - num_bad, num)
    assert sorted(records.captions) == sorted(f"good {i}" for i in range(num - num_bad))
    found = {int(problem.where.rpartition("row ")[2]): str(problem) for problem in records.report.problems}
    assert set(found) == set(reasons)
    for position, reason in reasons.items():
        assert reason in found[position]
    assert records.fingerprint == load_records(path).fingerprint
    write_parquet(path, [*table, bad_rows(1)[0][0]])
    with pytest.raises(LdmPipeError, match=f"{num_bad + 1} of {num + 1} rows"):
        load_records(path)


def test_picture_that_breaks_later_names_its_row(tmp_path: Path) -> None:
    table = rows(2)
    table[1]["image"]["bytes"] = b"broken"
    records = load_records(write_parquet(tmp_path / "a.parquet", table), check_images=False)
    with pytest.raises(LdmPipeError, match=r"a\.parquet:row 1"):
        records.image(1)


def test_check_folder_tells_what_is_wrong_and_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.png").write_bytes(picture(i, 80))
        (folder / f"{i}.txt").write_text(f"caption {i}")
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "copy.txt").write_text("caption 0")
    Image.new("CMYK", (80, 80)).save(folder / "odd.jpg")
    (folder / "odd.txt").write_text("odd mode")
    (folder / "small.png").write_bytes(picture(9, 8))
    (folder / "small.txt").write_text("tiny")
    (folder / "alone.png").write_bytes(picture(10, 80))
    (folder / "broken.png").write_bytes(picture(11, 80)[:99])
    (folder / "broken.txt").write_text("broken")
    before = Counter(path.read_bytes() for path in folder.iterdir())
    report = check_folder(folder)
    assert (report.num_rows, report.num_good, report.ok) == (9, 5, False)
    for title, name in (("bad", "broken"), ("duplicates", "copy"), ("uncaptioned", "alone"), ("tiny", "small")):
        (line,) = getattr(report, title)
        assert f"{name}.png" in line or title == "duplicates"
    assert report.odd_modes == {"mode CMYK": 1}
    assert [line.rpartition("/")[2] for line in report.odd] == ["odd.jpg: mode CMYK"]
    assert report.num_captions == {1: 7}
    assert report.sizes == {(80, 80): 6, (8, 8): 1}
    assert "5 of 9 rows are good" in str(report)
    assert Counter(path.read_bytes() for path in folder.iterdir()) == before
