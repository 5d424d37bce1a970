"""Reading data: sources, splits, columns, fingerprints, paths that lead out (faults 41, 44)."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from ldm_pipe.data.dataset import load_records
from ldm_pipe.data.sources import split_of
from ldm_pipe.pretrained import LdmPipeError
from tests.records import picture, rows, write_folder, write_parquet


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
