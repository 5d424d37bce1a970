"""Reading data: sources, splits, columns, fingerprints, and every fault of a table (faults 39, 41, 42, 44, 45)."""

from __future__ import annotations

import io
import json
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
from ldm_pipe.data.sources import split_of
from ldm_pipe.pretrained import LdmPipeError

pa = pytest.importorskip("pyarrow", reason="parquet tests need pyarrow")
pq = pytest.importorskip("pyarrow.parquet", reason="parquet tests need pyarrow")


def picture(number: int = 0, size: int = 4) -> bytes:
    """Return a small PNG, different for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def rows(number: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "image": {"bytes": picture(i), "path": f"{i}.png"},
            "text": f"caption {i}",
            "keywords": ["a", str(i)],
            "concept": f"c{i // 2}",
            "flag": i % 2 == 0,
        }
        for i in range(start, start + number)
    ]


def write_folder(folder: Path, number: int, lines: list[Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(number):
        (folder / f"{i}.png").write_bytes(picture(i))
    lines = [{"file_name": f"{i}.png", "text": f"caption {i}"} for i in range(number)] if lines is None else lines
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_parquet_columns_filters_and_pictures(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "data.parquet", rows(10))
    records = load_records(path)
    assert len(records) == 10
    assert records.captions[3] == "caption 3"
    assert records.keywords[3] == ["a", "3"]
    assert records.column("concept") == [f"c{i // 2}" for i in range(10)]
    assert records.image(3).tobytes() == Image.open(io.BytesIO(picture(3))).tobytes()
    even = records.filter(flag=True, concept=["c1", "c2"])
    assert even.captions == ["caption 2", "caption 4"]
    assert even.image(1).tobytes() == records.image(4).tobytes()
    assert load_records(path, filters={"flag": True, "concept": ["c1", "c2"]}).fingerprint == even.fingerprint
    assert records.select([4, 4, 1]).captions == ["caption 4", "caption 4", "caption 1"]


def test_folder_of_parquet_files_by_split(tmp_path: Path) -> None:
    write_parquet(tmp_path / "noto" / "train.parquet", rows(3))
    write_parquet(tmp_path / "noto" / "validation.parquet", rows(2, 100))
    write_parquet(tmp_path / "twemoji" / "train-00000-of-00001.parquet", rows(3, 50))
    assert len(load_records(tmp_path)) == 6
    assert load_records(tmp_path, "validation").captions == ["caption 100", "caption 101"]
    assert len(load_records(tmp_path / "noto")) == 3
    assert load_records([tmp_path / "noto", tmp_path / "twemoji" / "train-00000-of-00001.parquet"]).column("concept")[
        3:
    ] == [
        "c25",
        "c25",
        "c26",
    ]
    with pytest.raises(LdmPipeError, match="none for split 'test'"):
        load_records(tmp_path, "test")


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train.parquet", "train"),
        ("a/train-00000-of-00002.parquet", "train"),
        ("val/part.parquet", "validation"),
        ("dev.parquet", "validation"),
        ("training_test.parquet", "train"),
        ("constraints.parquet", None),
        ("trains/x.parquet", None),
    ],
)
def test_split_is_read_from_whole_words(path: str, split: str | None) -> None:
    assert split_of(Path(path)) == split


def test_image_folder_with_jsonl_csv_and_text_files_agree(tmp_path: Path) -> None:
    jsonl = write_folder(tmp_path / "jsonl", 3)
    table, beside = write_folder(tmp_path / "csv", 3, []), write_folder(tmp_path / "beside", 3, [])
    (table / "metadata.jsonl").unlink()
    (table / "metadata.csv").write_text("file_name,text\n" + "".join(f"{i}.png,caption {i}\n" for i in range(3)))
    (beside / "metadata.jsonl").unlink()
    for i in range(3):
        (beside / f"{i}.txt").write_text(f"caption {i}\n")
    found = [load_records(folder) for folder in (jsonl, table, beside)]
    assert [records.captions for records in found] == [["caption 0", "caption 1", "caption 2"]] * 3
    assert len({records.fingerprint for records in found}) == 1
    assert found[0].column("file_name") == ["0.png", "1.png", "2.png"]


def test_image_folder_with_split_folders(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", 3)
    write_folder(tmp_path / "test", 2)
    assert (len(load_records(tmp_path)), len(load_records(tmp_path, "test"))) == (3, 2)
    with pytest.raises(LdmPipeError, match="no folder for split 'validation'"):
        load_records(tmp_path, "validation")


def test_datasets_object_is_read_without_its_decoder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="reads a datasets.Dataset")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    columns = {"image": [{"bytes": picture(i), "path": None} for i in range(3)], "text": ["a", "b", "c"]}
    records = load_records(datasets.Dataset.from_dict(columns, features=features))
    assert records.captions == ["a", "b", "c"]
    assert records.image(2).tobytes() == Image.open(io.BytesIO(picture(2))).tobytes()
    path = write_parquet(
        tmp_path / "same.parquet", [{"image": {"bytes": picture(i), "path": None}, "text": "abc"[i]} for i in range(3)]
    )
    assert load_records(path).fingerprint == records.fingerprint


def test_unknown_column_lists_the_known_ones(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "data.parquet", rows(2))
    for options in (
        {"image_column": "img"},
        {"caption_column": "cap"},
        {"keywords_column": "kw"},
        {"filters": {"x": 1}},
    ):
        with pytest.raises(LdmPipeError, match="concept, flag"):
            load_records(path, **options)
    with pytest.raises(LdmPipeError, match="holds no pictures"):
        load_records(path, image_column="text")
    with pytest.raises(LdmPipeError, match="concept, flag"):
        load_records(path).column("style")


def test_sources_that_are_not_there_say_so(tmp_path: Path) -> None:
    with pytest.raises(LdmPipeError, match="no such file or folder"):
        load_records(tmp_path / "absent")
    with pytest.raises(LdmPipeError, match="neither parquet files nor pictures"):
        load_records(tmp_path)
    (tmp_path / "torn.parquet").write_bytes(write_parquet(tmp_path / "x" / "a.parquet", rows(3)).read_bytes()[:-50])
    with pytest.raises(LdmPipeError, match=r"torn\.parquet.*cannot be read as parquet"):
        load_records(tmp_path / "torn.parquet")
    with pytest.raises(LdmPipeError, match="no rows are left"):
        load_records(tmp_path / "x" / "a.parquet", filters={"concept": "none"})


@pytest.mark.parametrize(
    "name", ["../secret.png", "a/../../secret.png", "/etc/passwd", "C:\\x.png", "..\\x.png", "\\\\host\\x", "", 7]
)
def test_a_path_that_leads_out_of_the_folder_is_refused_by_line(tmp_path: Path, name: object) -> None:
    """Fault 41."""
    (tmp_path / "secret.png").write_bytes(picture())
    lines = [{"file_name": "0.png", "text": "a"}, {"file_name": name, "text": "b"}]
    with pytest.raises(LdmPipeError, match="line 2") as caught:
        load_records(write_folder(tmp_path / "set", 1, lines), max_bad_fraction=1)
    assert repr(name) in str(caught.value)


def test_a_link_out_of_the_folder_is_refused_and_one_inside_is_not(tmp_path: Path) -> None:
    """Fault 41: symlinks are resolved."""
    (tmp_path / "secret.png").write_bytes(picture())
    folder = write_folder(
        tmp_path / "set", 1, [{"file_name": "link.png", "text": "a"}, {"file_name": "0.png", "text": "b"}]
    )
    (folder / "link.png").symlink_to(folder / "0.png")
    assert len(load_records(folder)) == 2
    (folder / "link.png").unlink()
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(LdmPipeError, match=r"line 1.*leads out"):
        load_records(folder)
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(LdmPipeError, match=r"link\.png.*leads out"):
        load_records(folder, caption_column=None)
    inside = tmp_path / "alias"
    (folder / "link.png").unlink()
    inside.symlink_to(folder)
    assert len(load_records(inside, caption_column=None)) == 1, "the folder itself may be a link"


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


def test_several_captions_come_from_a_list_column_or_from_lines(tmp_path: Path) -> None:
    table = [
        {"image": {"bytes": picture(0), "path": None}, "text": ["one", None, "two", "one"]},
        {"image": {"bytes": picture(1), "path": None}, "text": ["three"]},
        {"image": {"bytes": picture(2), "path": None}, "text": [None, " "]},
    ]
    records = load_records(write_parquet(tmp_path / "a.parquet", table), max_bad_fraction=1)
    assert records.caption_lists == [["one", "two"], ["three"]]
    assert records.captions == ["one", "three"]
    assert records.report.counts == {"null caption": 1}
    assert records.report.notes == {"blank or repeated one of several captions": 1}
    folder = write_folder(tmp_path / "set", 2, [])
    (folder / "metadata.jsonl").unlink()
    (folder / "0.txt").write_text("one\n\n  two \n", encoding="utf-8")
    (folder / "1.txt").write_text("three\n", encoding="utf-8")
    beside = load_records(folder)
    assert beside.caption_lists == records.caption_lists
    (folder / "0.txt").write_text("one\nzwei\n", encoding="utf-8")
    assert load_records(folder).fingerprint != beside.fingerprint, "any of the captions counts"
    wrong = [{"file_name": "0.png", "text": ["a", 5]}, {"file_name": "1.png", "text": "b"}]
    report = load_records(write_folder(tmp_path / "wrong", 2, wrong), max_bad_fraction=1).report
    assert "one of the captions is int" in str(report.problems[0])


def test_sizes_are_those_of_the_upright_pictures(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    tmp_path.joinpath("set").mkdir()
    Image.new("RGB", (8, 4)).save(tmp_path / "set" / "a.png")
    Image.new("RGB", (8, 4)).save(tmp_path / "set" / "b.png", exif=exif)
    for check_images in (True, False):
        records = load_records(tmp_path / "set", caption_column=None, check_images=check_images)
        assert records.sizes == [(4, 8), (8, 4)]


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


def test_fingerprint_notices_every_change(tmp_path: Path) -> None:
    """Fault 44."""
    folder = write_folder(tmp_path / "set", 4)
    first = load_records(folder)
    assert load_records(folder).fingerprint == first.fingerprint
    assert load_records(folder, check_images=False).fingerprint == first.fingerprint
    changes = {first.fingerprint, first.select([1, 0, 2, 3]).fingerprint, first.select([0, 1, 2]).fingerprint}
    lines = [{"file_name": f"{i}.png", "text": f"caption {i}!"} for i in range(4)]
    renamed = load_records(write_folder(folder, 4, lines))
    assert renamed.image_fingerprint == first.image_fingerprint, "latents stay valid when a caption changes"
    changes.add(renamed.fingerprint)
    (folder / "2.png").write_bytes(picture(2, size=5))
    changed = load_records(folder)
    assert changed.image_fingerprint != first.image_fingerprint
    assert len(changes | {changed.fingerprint}) == 5
    table = rows(3)
    before = load_records(write_parquet(tmp_path / "a.parquet", table)).image_fingerprint
    table[1]["image"]["bytes"] = picture(1)[:-1] + b"\x83"
    after = load_records(write_parquet(tmp_path / "a.parquet", table), check_images=False).image_fingerprint
    assert after != before, "same size, one bit changed"


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
