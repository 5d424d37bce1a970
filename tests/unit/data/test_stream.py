"""Streams: every sample once per pass, split by process, the same after a restart, bad ones replaced and named."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm_pipe.data.stream import Stream, StreamOrder, open_stream
from ldm_pipe.pretrained import LdmPipeError
from tests.unit.data.test_archives import rows, write_tar

datasets = pytest.importorskip("datasets", reason="streams are its")
pq = pytest.importorskip("pyarrow.parquet", reason="parquet tests need pyarrow")
pa = pytest.importorskip("pyarrow", reason="parquet tests need pyarrow")


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number % 256, number // 256, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def number_of(image: Image.Image) -> int:
    red, green, _ = image.getpixel((0, 0))  # type: ignore[misc]
    return red + 256 * green


def write(folder: Path, num: int, shards: int, bad: tuple[int, ...] = ()) -> Path:
    """Write parquet shards whose picture i is coloured by i; the bad ones hold no picture file."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        table = [
            {"image": {"bytes": b"broken" if i in bad else picture(i), "path": None}, "text": f"caption {i}"}
            for i in range(num)
            if i * shards // num == shard
        ]
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        columns = {name: [row[name] for row in table] for name in ("image", "text")}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(folder / f"train-{shard}.parquet"))
    return folder


def numbers(stream: Stream, positions: range) -> list[int]:
    return [number_of(sample.image) for sample in stream.take(positions)]


@pytest.mark.parametrize(("shards", "processes"), [(1, 1), (4, 2), (1, 2)])
def test_every_sample_comes_once_per_pass_over_all_processes(tmp_path: Path, shards: int, processes: int) -> None:
    dataset = open_stream(write(tmp_path, 24, shards))
    seen: Counter[int] = Counter()
    for index in range(processes):
        share = Stream(dataset, process_index=index, num_processes=processes, seed=3)
        first, second = numbers(share, range(24 // processes)), numbers(share, range(24 // processes, 48 // processes))
        assert first != second, "shuffled anew"
        seen.update(first + second)
    assert seen == dict.fromkeys(range(24), 2)


def test_a_position_holds_the_same_sample_after_a_restart(tmp_path: Path) -> None:
    """Fault 7: resumed at any position, in the first pass or a later one."""
    dataset = open_stream(write(tmp_path, 10, 2))
    expected = numbers(Stream(dataset, seed=1), range(35))
    for start in (0, 3, 9, 10, 17, 20, 34):
        assert numbers(Stream(dataset, seed=1), range(start, 35)) == expected[start:]
    again = Stream(dataset, seed=1)
    assert numbers(again, range(20, 25)) + numbers(again, range(5)) == expected[20:25] + expected[:5]
    assert numbers(Stream(dataset, seed=2), range(10)) != expected[:10]


def test_captions_stay_with_their_pictures(tmp_path: Path) -> None:
    for sample in Stream(open_stream(write(tmp_path, 12, 3))).take(range(12)):
        assert sample.captions == (f"caption {number_of(sample.image)}",)


def test_a_bad_sample_is_replaced_by_the_next_good_one_and_named(tmp_path: Path) -> None:
    """Fault 39: positions do not shift, so that a restart finds the same samples."""
    dataset = open_stream(write(tmp_path, 12, 1, bad=(4, 5)))
    stream = Stream(dataset, seed=None, max_bad_fraction=0.1)
    expected = [0, 1, 2, 3, 6, 6, 6, 7, 8, 9, 10, 11]
    assert numbers(stream, range(12)) == expected
    assert stream.report.counts == {"unreadable picture": 3}
    assert "sample 4" in str(stream.report.problems[0])
    assert numbers(Stream(dataset, seed=None, max_bad_fraction=0.1), range(5, 12)) == expected[5:]
    with pytest.raises(LdmPipeError, match="cannot be used"):
        numbers(Stream(dataset, seed=None), range(12))


def test_tar_shards_are_streamed_with_their_text_files(tmp_path: Path) -> None:
    for shard in range(2):
        write_tar(tmp_path / f"set-train-{shard}.tar", rows(3 * shard, 3 * shard + 3))
    found = Stream(open_stream(tmp_path), seed=None).take(range(6))
    assert [sample.captions for sample in found] == [(f"caption {i}",) for i in range(6)]


def test_wrong_columns_and_sources_are_refused(tmp_path: Path) -> None:
    dataset = open_stream(write(tmp_path / "set", 4, 1))
    with pytest.raises(LdmPipeError, match="columns are: image, text"):
        Stream(dataset, caption_column="caption")
    with pytest.raises(LdmPipeError, match="holds no pictures"):
        Stream(dataset, image_column="text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LdmPipeError, match="Leave streaming out"):
        open_stream(tmp_path / "empty")


def test_the_order_of_a_stream_counts_each_process_share() -> None:
    order: Any = StreamOrder(12)
    seen: dict[int, list[int]] = {0: [], 1: []}
    for step in range(4):
        for micro in range(2):
            for index in range(2):
                part = order.batch_at(step, process_index=index, num_processes=2, micro_step=micro, num_micro_steps=2)
                seen[index] += part.tolist()
    assert seen[0] == seen[1] == list(np.arange(24))
    with pytest.raises(LdmPipeError, match="cannot be split"):
        order.batch_at(0, num_processes=5)
