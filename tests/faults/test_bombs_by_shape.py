"""Small files that become large: what is made is limited, not only what lies in the file (fault 40)."""

from __future__ import annotations

import io
import resource
import subprocess
import sys
import zlib
from pathlib import Path
from struct import pack

import pytest
from PIL import Image

from ldm_pipe.cli import main
from ldm_pipe.data.check import check_folder
from ldm_pipe.data.dataset import load_records
from ldm_pipe.data.framing import frame_picture
from ldm_pipe.data.images import MAX_PIXELS, cover_size, open_image, resize
from ldm_pipe.data.stream import Stream, open_stream
from ldm_pipe.drawing.start import fitting
from ldm_pipe.pretrained import LdmPipeError
from tests.records import picture

pa = pytest.importorskip("pyarrow", reason="parquet tests need pyarrow")
pq = pytest.importorskip("pyarrow.parquet", reason="parquet tests need pyarrow")

STRIPS = [(2, 49_000), (49_000, 2), (1, 200_000), (200_000, 1), (3, 16_000_000), (1, 49_999_999), (64, 700_000)]


def png(width: int, height: int) -> bytes:
    """Write a white PNG of any size in little memory."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return pack(">I", len(body)) + kind + body + pack(">I", zlib.crc32(kind + body))

    packer = zlib.compressobj(9)
    row = b"\0" + b"\xff" * ((width + 7) // 8)
    body = b"".join(packer.compress(row * min(1000, height - i)) for i in range(0, height, 1000)) + packer.flush()
    head = pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", STRIPS)
@pytest.mark.parametrize("side", [512, 1024])
def test_a_strip_is_refused_before_it_is_scaled(size: tuple[int, int], side: int) -> None:
    width, height = cover_size(size, (side, side))
    assert width * height > MAX_PIXELS
    strip = Image.new("1", size)
    for make in (
        lambda: resize(strip, side),
        lambda: frame_picture(strip, (side, side)),
        lambda: fitting(size[::-1], side),
    ):
        with pytest.raises(LdmPipeError, match=f"{size[0]}x{size[1]}.* {width}x{height} pixels, at most {MAX_PIXELS}"):
            make()


@pytest.mark.parametrize("size", [(100, 9_000), (9_000, 100), (640, 480)])
def test_a_long_picture_that_stays_within_the_limit_is_scaled(size: tuple[int, int]) -> None:
    assert resize(Image.new("RGB", size), 512).size == (512, 512)


def test_strips_are_left_out_where_the_resolution_is_known(tmp_path: Path) -> None:
    for number, size in enumerate([(2, 49_000), (40_000, 1), (8, 8)]):
        (tmp_path / f"{number}.png").write_bytes(png(*size))
    options = {"caption_column": None, "max_bad_fraction": 1.0}
    records = load_records(tmp_path, shape=(512, 512), **options)
    assert records.ids == ["2.png"]
    assert records.report.counts == {"unreadable picture": 2}
    assert all("are made" in str(problem) for problem in records.report.problems)
    assert len(load_records(tmp_path, shape=(16, 16), **options)) == 3


def test_a_file_of_any_length_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.write(png(4, 4))
        file.truncate(1 << 40)  # sparse
    with pytest.raises(LdmPipeError, match="picture file of 1099511627776 bytes"):
        open_image(path)
    assert check_folder(tmp_path, caption_column=None).bad


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_info_decodes_nothing_large(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(png(12_000, 12_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main(["info", str(tmp_path / "a.png")]) == 2
    assert "12000x12000 are more than 50000000" in capsys.readouterr().err
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def bombs() -> dict[str, object]:
    """Return tables whose files are small and whose rows are not."""
    big, rows = b"x" * 200_000, 20_000
    names = {"image": [picture(0)] * rows}
    return {
        "one value for all rows": pa.table({"image": [big] * rows}),
        "one caption for all rows": pa.table({**names, "text": ["y" * 100_000] * rows}),
        "nulls": pa.table({"image": pa.nulls(40_000_000, pa.binary())}),
        "a list of nulls": pa.table({"image": [picture(0)], "text": [[None] * 20_000_000]}),
        "zeros": pa.table({"image": [bytes(90 << 20)]}),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["one value for all rows", "one caption for all rows", "nulls", "a list of nulls", "zeros"]
)
def test_a_parquet_file_that_unpacks_to_far_more_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(bombs()[kind], path, compression="zstd")
    code = (
        "import resource, sys; from ldm_pipe.data.parquet import read_parquet; from pathlib import Path\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: read_parquet(Path(sys.argv[1]), 'image')\n"
        "except ValueError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    said = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    assert "unpack to" in said
    assert "at most" in said
    assert int(said.split()[-1]) < 600_000, "kilobytes"


@pytest.mark.parametrize("repeated", [True, False])
def test_parquet_by_what_it_becomes(tmp_path: Path, repeated: bool) -> None:
    """The fast form: 4,000 rows of one value of 20 kB are 80 MB; of 4,000 different ones the file is as large."""
    path, data = tmp_path / "a.parquet", picture(0, 82)
    values = [data] * 4000 if repeated else [data + str(i).encode() for i in range(4000)]
    pq.write_table(pa.table({"image": values}), path, compression="none", row_group_size=1000)
    if repeated:
        with pytest.raises(LdmPipeError, match=r"unpack to \d+ or more, at most 67108864 are read"):
            load_records(path, caption_column=None, check_images=False)
    else:
        records = load_records(path, caption_column=None, check_images=False)
        assert [bytes(records.source(i)) for i in (0, 999, 1000, 3999)] == [values[i] for i in (0, 999, 1000, 3999)]


def test_a_stream_refuses_what_a_footer_announces(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="streams need datasets")
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table({"image": pa.nulls(10_000_000, pa.binary())}), tmp_path / "set" / "a.parquet")
    with pytest.raises(LdmPipeError, match="unpack to"):
        open_stream(tmp_path / "set")


def test_a_stream_replaces_strips(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="streams need datasets")
    features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})
    table = [{"image": {"bytes": data, "path": None}, "text": "x"} for data in (png(1, 9000), picture(1), picture(2))]
    dataset = datasets.Dataset.from_list(table, features=features).to_iterable_dataset()
    stream = Stream(dataset, seed=None, max_bad_fraction=1.0, shape=(512, 512))
    buffer = io.BytesIO()
    stream.take([0])[0].image.save(buffer, "PNG")
    assert open_image(buffer.getvalue()).tobytes() == open_image(picture(1)).tobytes()
    assert "are made" in str(stream.report.problems[0])
