"""Shards: tar and zip files of pictures, and what hostile ones try (fault 43)."""

from __future__ import annotations

import io
import json
import resource
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_pipe.data import archives
from ldm_pipe.data.dataset import load_records
from ldm_pipe.pretrained import LdmPipeError


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, files: dict[str, bytes], *extra: tarfile.TarInfo) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in extra:
            archive.addfile(info)
    return path


def write_zip(path: Path, files: dict[str, bytes], *, compressed: bool = False) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def rows(start: int, stop: int) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for i in range(start, stop):
        files |= {f"a/{i:03d}.png": picture(i), f"a/{i:03d}.txt": f"caption {i}\n".encode()}
    return files


def test_shards_are_the_folder_they_were_packed_from(tmp_path: Path) -> None:
    write_tar(tmp_path / "tars" / "set-train-000.tar", rows(0, 3))
    write_tar(tmp_path / "tars" / "set-train-001.tar", rows(3, 5))
    write_tar(tmp_path / "tars" / "set-val-000.tar", rows(9, 10))
    zipped = write_zip(tmp_path / "all.zip", rows(0, 5), compressed=True)
    for name, data in rows(0, 5).items():
        (tmp_path / "plain").mkdir(exist_ok=True)
        (tmp_path / "plain" / Path(name).name).write_bytes(data)
    plain = load_records(tmp_path / "plain")
    for source in (tmp_path / "tars", zipped):
        records = load_records(source)
        assert records.captions == plain.captions
        assert [records.image(i).tobytes() for i in range(5)] == [plain.image(i).tobytes() for i in range(5)]
    assert load_records(tmp_path / "tars", "validation").captions == ["caption 9"]
    assert load_records(tmp_path / "tars").fingerprint == load_records(zipped).fingerprint


def test_an_archive_among_pictures_is_no_shard(tmp_path: Path) -> None:
    write_zip(tmp_path / "backup.zip", rows(5, 9))
    for name, data in rows(0, 2).items():
        (tmp_path / Path(name).name).write_bytes(data)
    assert load_records(tmp_path).captions == ["caption 0", "caption 1"]


def test_json_members_are_columns_and_may_hold_several_captions(tmp_path: Path) -> None:
    facts = {"text": ["one", "two"], "licence": "ofl"}
    path = write_tar(
        tmp_path / "a.tar", {"x.jpg.png": picture(0), "y.png": picture(1), "y.json": json.dumps(facts).encode()}
    )
    records = load_records(path, max_bad_fraction=1)
    assert records.caption_lists == [["one", "two"]]
    assert records.column("licence") == ["ofl"]
    assert {problem.kind for problem in records.report.problems} == {"missing caption"}


def test_every_kind_of_faulty_row_is_named(tmp_path: Path) -> None:
    files = rows(0, 4) | {
        "alone.png": picture(20), "lost.txt": b"no picture", "bad.png": picture(21), "bad.txt": b"\xff\xfe\xff",
        "list.png": picture(22), "list.json": b"[1]", "torn.png": picture(23)[:40], "torn.txt": b"torn",
    }  # fmt: skip
    records = load_records(write_tar(tmp_path / "a.tar", files), max_bad_fraction=1)
    assert records.captions == [f"caption {i}" for i in range(4)]
    assert records.report.counts == {
        "missing caption": 1, "missing picture": 1, "broken row": 2, "unreadable picture": 1,
    }  # fmt: skip
    report = "\n".join(map(str, records.report.problems))
    for name in ("alone", "lost", "bad", "list", "torn"):
        assert f"a.tar:{name}" in report or f"a.tar/{name}" in report
    with pytest.raises(LdmPipeError, match="max_bad_fraction"):
        load_records(tmp_path / "a.tar")


@pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "a/../../x.png", "C:\\x.png"])
def test_names_that_lead_out_of_an_archive_are_refused(tmp_path: Path, name: str) -> None:
    """Fault 43: nothing is unpacked, and still the whole archive is refused."""
    for path in (
        write_tar(tmp_path / "a.tar", rows(0, 1) | {name: picture(1)}),
        write_zip(tmp_path / "a.zip", rows(0, 1) | {name: picture(1)}),
    ):
        with pytest.raises(LdmPipeError, match="leads out of the folder"):
            load_records(path, max_bad_fraction=1)


def test_links_and_devices_in_an_archive_are_reported_never_followed(tmp_path: Path) -> None:
    """Fault 43."""
    extra = []
    for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)):
        info = tarfile.TarInfo(f"link{number}.png")
        info.type, info.linkname = kind, "/etc/hostname"
        extra.append(info)
    records = load_records(write_tar(tmp_path / "a.tar", rows(0, 4), *extra), max_bad_fraction=1)
    assert len(records) == 4
    assert records.report.counts == {"broken row": 4}
    link = zipfile.ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(write_zip(tmp_path / "a.zip", rows(0, 4)), "a") as archive:
        archive.writestr(link, "/etc/hostname")
    assert load_records(tmp_path / "a.zip", max_bad_fraction=1).report.counts == {"broken row": 1}


def test_a_bomb_in_an_archive_is_reported_unread(tmp_path: Path) -> None:
    """Fault 43: 64 MB of zeros in a zip entry of 64 kB, 10 GB announced by a tar header."""
    path = write_zip(tmp_path / "a.zip", rows(0, 2), compressed=True)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.png", bytes(64 << 20))
    giant = tarfile.TarInfo("giant.png")
    giant.size = 10 << 30
    tar = write_tar(tmp_path / "a.tar", rows(0, 2), giant)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = load_records(path, max_bad_fraction=1).report
    assert "at most 100:1" in str(report.problems[0])
    with pytest.raises(LdmPipeError, match="tar"):  # the file ends long before the entry does
        load_records(tar, max_bad_fraction=1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_too_many_entries_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 43; the limit is a million, lowered here."""
    monkeypatch.setattr(archives, "MAX_ENTRIES", 7)
    with pytest.raises(LdmPipeError, match="more than 7 files"):
        load_records(write_tar(tmp_path / "a.tar", rows(0, 4)))


@pytest.mark.slow
def test_a_million_entries_are_refused_in_bounded_memory(tmp_path: Path) -> None:
    """Fault 43."""
    path = tmp_path / "a.tar"
    block = tarfile.TarInfo("0000000.txt").tobuf()
    with open(path, "wb") as file:
        for _ in range(archives.MAX_ENTRIES // 1000 + 1):
            file.write(block * 1000)
        file.write(bytes(1024))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LdmPipeError, match="more than 1000000 files"):
        load_records(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000


def test_damaged_and_compressed_archives_say_so(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a.tar", rows(0, 3)).read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[:700])
    (tmp_path / "c.zip").write_bytes(b"PK\x03\x04" + bytes(100))
    with tarfile.open(tmp_path / "d.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("x.txt"))
    for name in ("b.tar", "c.zip", "d.tar"):
        with pytest.raises(LdmPipeError, match=rf"{name}.*cannot be read as"):
            load_records(tmp_path / name, max_bad_fraction=1)


def test_a_folder_saved_by_datasets_is_read_by_split(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="save_to_disk is its")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Sequence(datasets.Value("string"))})
    columns = {"image": [{"bytes": picture(i), "path": None} for i in range(3)], "text": [["a", "b"], ["c"], ["d"]]}
    whole = datasets.Dataset.from_dict(columns, features=features)
    whole.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": whole, "test": whole.select([1])}).save_to_disk(str(tmp_path / "two"))
    for folder in ("one", "two"):
        assert load_records(tmp_path / folder).caption_lists == [["a", "b"], ["c"], ["d"]]
    assert load_records(tmp_path / "two", "test").captions == ["c"]
    with pytest.raises(LdmPipeError, match="no split 'validation'"):
        load_records(tmp_path / "two", "validation")
