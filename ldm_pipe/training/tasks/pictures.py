"""Records as training input: filtered, weighted by concept, framed by shape, decoded or cached as latents."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm_pipe.data.buckets import BucketOrder, Shape, assign_buckets, bucket_shapes
from ldm_pipe.data.cache import LatentCache, Moments
from ldm_pipe.data.dataset import Records, load_records
from ldm_pipe.data.framing import CENTER, frame_picture
from ldm_pipe.data.images import resize, to_tensor
from ldm_pipe.data.order import DataOrder, concept_weights
from ldm_pipe.data.rows import DataReport
from ldm_pipe.data.stream import Stream, open_stream, picture_roots
from ldm_pipe.pretrained import LdmPipeError, atomic_write
from ldm_pipe.training.run.config import DataConfig
from ldm_pipe.training.run.rng import batch_uniform

if TYPE_CHECKING:
    from ldm_pipe.training.run.loop import Micro

MAX_RESIDENT_BYTES = 2 << 30


def refuse_no_data(config: DataConfig) -> None:
    """Raise LdmPipeError where no pictures are named: nobody means to train on whatever lies about."""
    if not config.train_data_dir.strip():
        raise LdmPipeError("no pictures are named", "train_data_dir", "Name a folder or file: --train_data_dir ...")


def open_records(config: DataConfig, output_dir: str | Path | None = None) -> Records:
    """Read the records a config names, without the rows its `exclude_columns` mark.

    Args:
        config: the run's data.
        output_dir: if given, the main process says what was left out, and lists it in `left_out.txt` there.
    """
    refuse_no_data(config)
    records = load_records(
        config.train_data_dir,
        image_column=config.image_column,
        caption_column=config.caption_column,
        keywords_column=config.keywords_column,
        null_captions=config.null_captions,
        check_images=config.check_images,
        max_bad_fraction=config.max_bad_fraction,
        config_name=config.dataset_config_name,
        shape=(config.resolution, config.resolution),
    )
    if output_dir is not None and os.environ.get("RANK", "0") == "0":
        tell_left_out(records.report, Path(output_dir))
    if config.exclude_columns:
        records = records.filter(**dict.fromkeys(config.exclude_columns, False))
    if config.max_train_samples is not None:
        records = records.select(range(min(len(records), config.max_train_samples)))
    return records


def tell_left_out(report: DataReport, folder: Path) -> None:
    """Say how many rows are used and why others are not; name those in `left_out.txt`."""
    lines = [str(report)]
    if missing := [*report.problems, *report.skipped]:
        path = folder / "left_out.txt"
        atomic_write(path, "".join(f"{problem}\n" for problem in missing))
        lines.append(f"left out, listed in {path}, the first ones: {'; '.join(map(str, missing[:3]))}")
    tqdm.write("\n".join(lines), file=sys.stderr)


def drawing_weights(records: Records, config: DataConfig) -> np.ndarray | None:
    """Return 1 / (rows of the same concept) for each row, or None without a concept column."""
    return None if config.concept_column is None else concept_weights(records.column(config.concept_column))


@dataclass(frozen=True)
class ShapePlan:
    """Which picture is trained at which shape.

    Args:
        shapes: (height, width) in pixels.
        buckets: number of its shape for each row, int64 (N,).
    """

    shapes: list[Shape]
    buckets: np.ndarray

    def order(self, seed: int, weights: np.ndarray | None = None) -> Callable[[int], DataOrder | BucketOrder]:
        """Return what makes the order of the run for a given global batch.

        Raises: LdmPipeError for weights together with several shapes.
        """
        if len(self.shapes) == 1:
            return lambda batch_size: DataOrder(len(self.buckets), batch_size, seed, weights)
        if weights is not None:
            what = "rows are weighted by concept and grouped by shape"
            raise LdmPipeError(what, "data", "Use either concept_column or aspect_ratio_buckets.")
        return lambda batch_size: BucketOrder(self.buckets, batch_size, seed)


def plan_shapes(records: Records, config: DataConfig, global_batch: int) -> ShapePlan:
    """Give every picture its shape: the square, or with `aspect_ratio_buckets` the one of its own aspect ratio.

    Args:
        records: the pictures.
        config: resolution and buckets.
        global_batch: buckets with fewer pictures are dissolved.
    """
    if not config.aspect_ratio_buckets:
        return ShapePlan([(config.resolution, config.resolution)], np.zeros(len(records), dtype=np.int64))
    shapes = bucket_shapes(config.resolution, config.bucket_step, config.max_aspect_ratio)
    used, buckets = np.unique(assign_buckets(records.sizes, shapes, global_batch), return_inverse=True)
    return ShapePlan([shapes[number] for number in used], buckets)


@dataclass(frozen=True)
class ImageBatch:
    """Pictures of one shape and what a network is told of them.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        time_ids: original size, crop, target size, int64 (B, 6); see `ldm_pipe.data.framing.Frame`.
        captions: one of the captions of each picture.
    """

    images: Tensor
    time_ids: Tensor
    captions: list[str]


class Ahead:
    """Make the batch of the next step in a thread of its own while the present one is trained on.

    Args:
        make: makes a batch; only ever called by the one thread.
        following: tells which slice the next step will ask for; None: nothing is made ahead.
    """

    def __init__(self, make: Callable[[Micro], ImageBatch], following: Callable[[Micro], Micro] | None) -> None:
        self._make, self._following = make, following
        self._pool = ThreadPoolExecutor(1)
        self._made: dict[tuple[int, int], tuple[list[int], Future[ImageBatch]]] = {}

    def __call__(self, micro: Micro) -> ImageBatch:
        """Return the batch of a slice, and begin with the same slice of the next step."""
        indices, future = self._made.pop((micro.step, micro.positions.start), ([], None))
        if future is None or indices != micro.indices:
            # the first step, a resumed run, or another order: what was made for other steps is not wanted
            self._made = {key: made for key, made in self._made.items() if key[0] == micro.step + 1}
            future = self._pool.submit(self._make, micro)
        batch = future.result()
        if self._following is not None:
            coming = self._following(micro)
            key = (coming.step, coming.positions.start)
            self._made[key] = (coming.indices, self._pool.submit(self._make, coming))
        return batch


class ImageBatches:
    """Map the slice of a step to pictures, cropped, mirrored and captioned anew at each use.

    All draws are keyed by (seed, step, place in the batch): the same in any process, at any number of threads.

    Args:
        records: the pictures.
        plan: their shapes.
        config: crops and mirroring.
        seed: of the draws.
        order: of the run; with it the pictures of the next step are decoded while the present one is trained on.
    """

    def __init__(
        self,
        records: Records,
        plan: ShapePlan,
        config: DataConfig,
        seed: int,
        order: DataOrder | BucketOrder | None = None,
    ) -> None:
        self.records, self.plan, self.config, self.seed, self.order = records, plan, config, seed, order
        self._pool = ThreadPoolExecutor(8)
        self._ahead = Ahead(self._batch, self._following if order is not None else None)

    def __call__(self, micro: Micro) -> ImageBatch:
        """Return the pictures of a slice."""
        return self._ahead(micro)

    def _following(self, micro: Micro) -> Micro:
        """Return the slice at the same places of the next global batch."""
        assert self.order is not None
        rows = self.order.batch_at(micro.step + 1)[micro.positions.start : micro.positions.stop]
        return replace(micro, step=micro.step + 1, indices=rows.tolist(), memo={})

    def _batch(self, micro: Micro) -> ImageBatch:
        shape = self.plan.shapes[int(self.plan.buckets[micro.indices[0]])]
        images = list(self._pool.map(self.records.image, micro.indices))
        captions = [self.records.caption_lists[row] for row in micro.indices]
        return frame_batch(images, captions, shape, micro, self.config, self.seed)


class StreamBatches:
    """Map the slice of a step to pictures of a stream, framed as `ImageBatches` does; all have the square shape.

    Args:
        stream: the share of this process; its order is `StreamOrder`.
        config: crops and mirroring.
        seed: of the draws.
        per_step: pictures that this process takes in a step; with it the next step is read and decoded ahead.
    """

    def __init__(self, stream: Stream, config: DataConfig, seed: int, per_step: int | None = None) -> None:
        self.stream, self.config, self.seed, self.per_step = stream, config, seed, per_step
        self._ahead = Ahead(self._batch, self._following if per_step is not None else None)

    @classmethod
    def open(
        cls,
        config: DataConfig,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
        per_step: int | None = None,
    ) -> StreamBatches:
        """Open what the config names.

        Raises: LdmPipeError for settings that need the whole set at hand.
        """
        wanted = {
            "aspect_ratio_buckets": config.aspect_ratio_buckets, "concept_column": config.concept_column,
            "exclude_columns": config.exclude_columns, "max_train_samples": config.max_train_samples,
            "num_crops": config.num_crops > 1,
        }  # fmt: skip
        if refused := [name for name, value in wanted.items() if value]:
            raise LdmPipeError(f"a stream cannot serve {', '.join(refused)}", "data", "Leave them, or streaming, out.")
        refuse_no_data(config)
        stream = Stream(
            open_stream(config.train_data_dir, config_name=config.dataset_config_name),
            image_column=config.image_column, caption_column=config.caption_column, seed=seed,
            process_index=process_index, num_processes=num_processes, null_captions=config.null_captions,
            max_bad_fraction=config.max_bad_fraction, roots=picture_roots(config.train_data_dir),
            shape=(config.resolution, config.resolution),
        )  # fmt: skip
        return cls(stream, config, seed, per_step)

    def __call__(self, micro: Micro) -> ImageBatch:
        """Return the pictures of a slice; its indices are positions in the share of this process."""
        return self._ahead(micro)

    def _following(self, micro: Micro) -> Micro:
        """Return the same slice of the next step."""
        assert self.per_step is not None
        later = [position + self.per_step for position in micro.indices]
        return replace(micro, step=micro.step + 1, indices=later, memo={})

    def _batch(self, micro: Micro) -> ImageBatch:
        samples = self.stream.take(micro.indices)
        images, captions = [sample.image for sample in samples], [sample.captions for sample in samples]
        shape = (self.config.resolution, self.config.resolution)
        return frame_batch(images, captions, shape, micro, self.config, self.seed)


def frame_batch(
    images: list[Image.Image],
    captions: Sequence[Sequence[str]],
    shape: Shape,
    micro: Micro,
    config: DataConfig,
    seed: int,
) -> ImageBatch:
    """Crop, mirror and caption the pictures of a slice by draws of its step and places."""
    draws = batch_uniform(4, seed, "frame", micro.step, positions=micro.positions).tolist()
    parts, time_ids, chosen = [], [], []
    for image, texts, (x, y, mirror, number) in zip(images, captions, draws, strict=True):
        crop_at = CENTER if config.center_crop else (x, y)
        part, frame = frame_picture(image, shape, crop_at, config.random_flip and mirror < 0.5)
        parts.append(to_tensor(part))
        time_ids.append(frame.time_ids)
        chosen.append(texts[int(number * len(texts))])
    return ImageBatch(torch.stack(parts), torch.tensor(time_ids), chosen)


@dataclass(frozen=True)
class LatentBatch:
    """Cached latents of one shape.

    Args:
        mean, log_var: raw moments, (B, C, h, w).
        time_ids: as in `ImageBatch`.
    """

    mean: Tensor
    log_var: Tensor
    time_ids: Tensor


class LatentBatches:
    """Map the slice of a step to cached latents; which crop, and whether mirrored, is drawn anew at each use."""

    def __init__(self, caches: list[LatentCache], plan: ShapePlan, seed: int) -> None:
        """Take one cache per shape, each of the pictures of that shape in their order."""
        self.caches, self.plan, self.seed = caches, plan, seed
        self._local = np.zeros(len(plan.buckets), dtype=np.int64)  # place of each row in its own cache
        for bucket in range(len(plan.shapes)):
            members = np.flatnonzero(plan.buckets == bucket)
            self._local[members] = np.arange(len(members))

    @classmethod
    def build(
        cls,
        root: str | Path,
        records: Records,
        plan: ShapePlan,
        encode_moments: Callable[[Tensor], Moments],
        config: DataConfig,
        seed: int,
        *,
        autoencoder_hash: str,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        progress: Callable[[int, int], None] | None = None,
    ) -> LatentBatches:
        """Load the latents of every crop and mirror image that the config asks for, or compute them.

        Args:
            root: folder of all caches.
            records: the pictures.
            plan: their shapes.
            encode_moments: maps images (B, 3, H, W) to raw moments.
            config: `center_crop`, `num_crops` and `random_flip`.
            seed: of the crops and of the choice among them.
            autoencoder_hash: `module_hash` of the encoder.
            device: where the encoder is.
            dtype: number type of the stored moments.
            progress: called with (pictures done, all pictures).
        """
        caches, before = [], 0
        for bucket, shape in enumerate(plan.shapes):
            part = records.select(np.flatnonzero(plan.buckets == bucket).tolist())
            shown = None if progress is None else lambda done, _, b=before: progress(b + done, len(records))
            cache = LatentCache.build(
                root, part, encode_moments, autoencoder_hash=autoencoder_hash, resolution=shape,
                flip=config.random_flip, num_crops=config.num_crops, crop_seed=None if config.center_crop else seed,
                device=device, dtype=dtype, progress=shown,
            )  # fmt: skip
            caches.append(cache)
            before += len(part)
        return cls(caches, plan, seed)

    def __call__(self, micro: Micro) -> LatentBatch:
        """Return the latents of a slice."""
        cache = self.caches[int(self.plan.buckets[micro.indices[0]])]
        draws = batch_uniform(1, self.seed, "variant", micro.step, positions=micro.positions)[:, 0]
        variants, rows = (draws * cache.num_variants).long().tolist(), self._local[micro.indices].tolist()
        return LatentBatch(*cache.moments(rows, variants), cache.time_ids(rows, variants))


class PictureSource:
    """Map rows to images (B, 3, R, R) in [-1, 1]; pictures are kept as bytes in memory while they fit."""

    def __init__(self, records: Records, resolution: int) -> None:
        """Decode every picture once now if all fit in `MAX_RESIDENT_BYTES`, else at each use on threads."""
        self.records, self.resolution = records, resolution
        self._pool = ThreadPoolExecutor(8)
        resident = len(records) * 3 * resolution * resolution <= MAX_RESIDENT_BYTES
        self._bytes = self._stack(list(range(len(records)))) if resident else None

    def _one(self, row: int) -> Tensor:
        image = to_tensor(resize(self.records.image(row), self.resolution))
        return ((image + 1.0) * 127.5).round().to(torch.uint8)

    def _stack(self, rows: list[int]) -> Tensor:
        return torch.stack(list(self._pool.map(self._one, rows)))

    def __call__(self, rows: list[int]) -> Tensor:
        """Return the images of these rows, float32."""
        pixels = self._bytes[rows] if self._bytes is not None else self._stack(rows)
        return pixels.float() / 127.5 - 1.0

    def batches(self, size: int) -> Iterator[Tensor]:
        """Go once through all pictures in order."""
        for first in range(0, len(self.records), size):
            yield self(list(range(first, min(first + size, len(self.records)))))
