"""Training input: shapes, crops and time ids of each batch, alike from files and from cached latents."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm_pipe.data.dataset import Records, load_records
from ldm_pipe.data.images import cover_size, resize, to_tensor
from ldm_pipe.data.stream import Stream, StreamOrder, open_stream
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.training.run.config import DataConfig
from ldm_pipe.training.run.loop import Micro
from ldm_pipe.training.tasks.pictures import (
    Ahead,
    ImageBatch,
    ImageBatches,
    LatentBatches,
    ShapePlan,
    StreamBatches,
    open_records,
    plan_shapes,
)

NUM = 24


@dataclass
class Moments:
    mean: Tensor
    log_var: Tensor


def encode(images: Tensor) -> Moments:
    """Stand in for an autoencoder: the pixels are the latents."""
    return Moments(images, -images)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures wide, high and square, every third with two captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(NUM):
        height, width = ((20, 50), (40, 20), (30, 32))[i % 3]
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        (folder / f"{i:02d}.png").write_bytes(buffer.getvalue())
        (folder / f"{i:02d}.txt").write_text(f"caption {i}\n" + ("another\n" if i % 3 == 0 else ""))
    return folder


def config(folder: Path, **options: object) -> DataConfig:
    given = {"caption_column": "text", "resolution": 16, "bucket_step": 4, **options}
    return DataConfig(train_data_dir=str(folder), **given)


def micros(plan: ShapePlan, batch: int, num: int, seed: int = 0) -> list[Micro]:
    order = plan.order(seed)(batch)
    return [Micro(step, order.batch_at(step).tolist(), range(batch)) for step in range(num)]


def recut(records: Records, row: int, ids: list[int], shape: tuple[int, int], mirrored: bool) -> Tensor:
    """Cut the part that the time ids name out of the scaled picture."""
    image = records.image(row)
    width, height = cover_size(image.size, shape)
    whole = to_tensor(resize(image, (height, width)))
    whole = whole.flip(-1) if mirrored else whole
    top, left = ids[2:4]
    return whole[:, top : top + shape[0], left : left + shape[1]]


@pytest.mark.parametrize("buckets", [False, True])
def test_time_ids_say_which_part_of_the_picture_was_shown(folder: Path, buckets: bool) -> None:
    settings = config(folder, aspect_ratio_buckets=buckets, center_crop=False, random_flip=True)
    records = open_records(settings)
    plan = plan_shapes(records, settings, 4)
    batches = ImageBatches(records, plan, settings, seed=1)
    mirrors, places, shapes = set(), set(), set()
    for micro in micros(plan, 4, 12):
        found = batches(micro)
        shape = plan.shapes[int(plan.buckets[micro.indices[0]])]
        shapes.add(shape)
        assert found.images.shape == (4, 3, *shape)
        for row, image, ids in zip(micro.indices, found.images, found.time_ids.tolist(), strict=True):
            assert tuple(ids[:2]) == records.sizes[row]
            assert tuple(ids[4:]) == shape
            places.add((ids[2], ids[3]))
            fits = [torch.equal(image, recut(records, row, ids, shape, mirrored)) for mirrored in (False, True)]
            assert any(fits)
            mirrors.add(fits[1])
    assert mirrors == {True, False}
    assert len(places) > 3
    assert len(shapes) == (3 if buckets else 1)


def test_a_batch_is_a_function_of_seed_and_step_however_it_is_split(folder: Path) -> None:
    settings = config(folder, center_crop=False, random_flip=True)
    records = open_records(settings)
    plan = plan_shapes(records, settings, 6)
    (micro,) = micros(plan, 6, 1)
    whole = ImageBatches(records, plan, settings, seed=3)(micro)
    again = ImageBatches(records, plan, settings, seed=3)
    parts = [again(Micro(0, micro.indices[i : i + 2], range(i, i + 2))) for i in (4, 0, 2)]
    assert torch.equal(torch.cat([parts[1].images, parts[2].images, parts[0].images]), whole.images)
    assert parts[1].captions + parts[2].captions + parts[0].captions == whole.captions
    other = ImageBatches(records, plan, settings, seed=4)(micro)
    assert not torch.equal(other.images, whole.images)


def test_batches_made_ahead_are_those_made_on_demand(folder: Path) -> None:
    """Also in two slices of a step, and after a jump to another step."""
    settings = config(folder, center_crop=False, random_flip=True, aspect_ratio_buckets=True)
    records = open_records(settings)
    plan = plan_shapes(records, settings, 6)
    order = plan.order(0)(6)
    plain, ahead = (ImageBatches(records, plan, settings, 3, given) for given in (None, order))
    for step in (0, 1, 2, 7, 8, 0):
        rows = order.batch_at(step).tolist()
        for start in (0, 3):
            micro = Micro(step, rows[start : start + 3], range(start, start + 3))
            assert torch.equal(ahead(micro).images, plain(micro).images)
            assert ahead(micro).captions == plain(micro).captions


def test_each_batch_is_made_once_and_before_it_is_asked_for() -> None:
    made: list[tuple[int, int]] = []

    def make(micro: Micro) -> ImageBatch:
        made.append((micro.step, micro.positions.start))
        return ImageBatch(torch.zeros(1), torch.zeros(1), [])

    ahead = Ahead(make, lambda micro: replace(micro, step=micro.step + 1))
    for step in range(3):
        for start in (0, 4):
            ahead(Micro(step, [1, 2], range(start, start + 2)))
    ahead._pool.shutdown()
    assert made == [(0, 0), (1, 0), (0, 4), (1, 4), (2, 0), (2, 4), (3, 0), (3, 4)]


def test_every_caption_of_a_picture_is_used(folder: Path) -> None:
    settings = config(folder)
    records = open_records(settings)
    assert records.caption_lists[0] == ["caption 0", "another"]
    plan = plan_shapes(records, settings, 1)
    batches = ImageBatches(records, plan, settings, seed=0)
    seen = {batches(Micro(step, [0], range(1))).captions[0] for step in range(20)}
    assert seen == {"caption 0", "another"}


@pytest.mark.parametrize("buckets", [False, True])
def test_cached_latents_are_those_of_the_same_parts(folder: Path, tmp_path: Path, buckets: bool) -> None:
    settings = config(folder, aspect_ratio_buckets=buckets, center_crop=False, random_flip=True, num_crops=3)
    records = open_records(settings)
    plan = plan_shapes(records, settings, 4)
    done: list[int] = []
    options = {"autoencoder_hash": "x", "progress": lambda number, _: done.append(number)}
    batches = LatentBatches.build(tmp_path / "cache", records, plan, encode, settings, 0, **options)
    assert done[-1] == NUM
    seen = set()
    for micro in micros(plan, 4, 20):
        found = batches(micro)
        shape = plan.shapes[int(plan.buckets[micro.indices[0]])]
        assert torch.equal(found.mean, -found.log_var)
        for row, latent, ids in zip(micro.indices, found.mean, found.time_ids.tolist(), strict=True):
            assert any(torch.equal(latent, recut(records, row, ids, shape, mirrored)) for mirrored in (False, True))
            seen.add((row, *ids[2:4]))
    assert len(seen) > 1.5 * NUM, "several crops of each picture are used"
    done.clear()
    again = LatentBatches.build(tmp_path / "cache", records, plan, encode, settings, 0, **options)
    assert not done, "the second run finds the latents"
    micro = micros(plan, 4, 1)[0]
    assert torch.equal(again(micro).mean, batches(micro).mean)


def test_buckets_crop_less_than_the_square(folder: Path) -> None:
    square, shaped = (config(folder, aspect_ratio_buckets=buckets) for buckets in (False, True))
    records = open_records(square)
    kept = []
    for settings in (square, shaped):
        plan = plan_shapes(records, settings, 4)
        shares = []
        for row, size in enumerate(records.sizes):
            height, width = plan.shapes[int(plan.buckets[row])]
            scaled = cover_size((size[1], size[0]), (height, width))
            shares.append(height * width / (scaled[0] * scaled[1]))
        kept.append(np.mean(shares))
    assert kept[0] < 0.7 < 0.8 < kept[1]


def test_a_stream_is_framed_like_records(folder: Path, tmp_path: Path) -> None:
    """The same pictures from tar shards read forward: same crops, same time ids."""
    pytest.importorskip("datasets", reason="streams are its")
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, arcname=path.name)
    settings = config(tmp_path / "train.tar", center_crop=False, random_flip=True)
    stream = Stream(open_stream(settings.train_data_dir), seed=None)
    records = open_records(config(folder))
    images = ImageBatches(records, plan_shapes(records, settings, 4), settings, seed=1)
    for step in range(3):
        micro = Micro(step, StreamOrder(4).batch_at(step).tolist(), range(4))
        streamed, indexed = StreamBatches(stream, settings, seed=1)(micro), images(micro)
        assert torch.equal(streamed.images, indexed.images)
        assert torch.equal(streamed.time_ids, indexed.time_ids)
        assert streamed.captions == indexed.captions
    early = StreamBatches(Stream(open_stream(settings.train_data_dir), seed=None), settings, seed=1, per_step=4)
    for step in (0, 1, 2, 1):
        micro = Micro(step, StreamOrder(4).batch_at(step).tolist(), range(4))
        assert torch.equal(early(micro).images, images(micro).images)
    assert StreamBatches.open(settings, seed=1)(micro).images.shape == (4, 3, 16, 16)
    with pytest.raises(LdmPipeError, match="cannot serve aspect_ratio_buckets, concept_column"):
        StreamBatches.open(config(folder, aspect_ratio_buckets=True, concept_column="c"), 0)


def test_bad_pictures_are_named_counted_and_skipped(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault 39: the run goes on, says how many were left out, and lists them."""
    (folder / "05.png").write_bytes(b"<html>404</html>")
    (folder / "lost.txt").write_text("no picture")
    settings = config(folder, max_bad_fraction=0.1)
    assert len(open_records(settings, tmp_path / "run")) == NUM - 1
    said = capsys.readouterr().err
    assert f"{NUM - 1} of {NUM + 1} rows used; left out: 1 missing file, 1 unreadable picture" in said
    listed = (tmp_path / "run" / "left_out.txt").read_text().splitlines()
    assert len(listed) == 2
    assert any("05.png: unreadable picture (text, not a picture" in line for line in listed)
    with pytest.raises(LdmPipeError, match="max_bad_fraction"):
        open_records(config(folder))


def test_settings_that_mean_nothing_together_are_refused(folder: Path) -> None:
    settings = config(folder, aspect_ratio_buckets=True)
    records = load_records(folder)
    with pytest.raises(LdmPipeError, match="concept_column or aspect_ratio_buckets"):
        plan_shapes(records, settings, 4).order(0, np.ones(NUM))
    with pytest.raises(LdmPipeError, match="no multiple"):
        plan_shapes(records, config(folder, aspect_ratio_buckets=True, bucket_step=5), 4)
