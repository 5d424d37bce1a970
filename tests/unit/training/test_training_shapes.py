"""The real trainer on batches of several shapes from cached latents: resumed in the middle of an epoch, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("accelerate")

from ldm_pipe.data.dataset import load_records
from ldm_pipe.training.run.loop import Micro, Trainer
from ldm_pipe.training.tasks.diffusion import DiffusionData
from ldm_pipe.training.tasks.pictures import LatentBatches, plan_shapes
from tests.training import assert_same_bits, make_config, make_data, make_trainer, whole_state
from tests.unit.training.test_training_pictures import Moments, folder  # noqa: F401 (a fixture)


def halve(images: Tensor) -> Moments:
    """Stand in for an autoencoder of factor 2 with two channels."""
    small = torch.nn.functional.avg_pool2d(images, 2)[:, :2]
    return Moments(small, torch.full_like(small, -4.0))


def build(run: Path, pictures: Path, seen: list[int], **changes: Any) -> Trainer:
    """Put a trainer on pictures of three shapes, each with three crops and their mirror images."""
    data = {
        "train_data_dir": str(pictures), "caption_column": "text", "resolution": 16, "bucket_step": 4,
        "aspect_ratio_buckets": True, "center_crop": False, "num_crops": 3, "random_flip": True,
    }  # fmt: skip
    config = make_config(run, data=data, max_train_steps=9, checkpointing_steps=1000, **changes)
    records = load_records(pictures)
    plan = plan_shapes(records, config.data, 4)
    latents = LatentBatches.build(run / "cache", records, plan, halve, config.data, config.seed, autoencoder_hash="x")

    def moments(micro: Micro) -> tuple[Tensor, Tensor]:
        batch = latents(micro)
        seen.extend(micro.indices)
        return batch.mean, torch.exp(0.5 * batch.log_var)

    texts = make_data(len(records))
    read = DiffusionData(texts.mean, texts.std, tokens=texts.tokens, caption_rows=texts.caption_rows, moments=moments)
    return make_trainer(config, data=read, num_items=len(records), order=plan.order(config.seed))


@pytest.mark.parametrize("stop_at", [1, 4, 7])  # 24 pictures in batches of 4: an epoch is 6 steps
def test_fault_7_buckets_and_crops_resume_in_mid_epoch_bit_for_bit(tmp_path: Path, folder: Path, stop_at: int) -> None:  # noqa: F811
    all_rows: list[int] = []
    unbroken = build(tmp_path / "a", folder, all_rows)
    unbroken.fit()
    rows: list[int] = []
    broken = build(tmp_path / "b", folder, rows)
    for _ in range(stop_at):
        broken.train_step()
    broken.save()
    resumed = build(tmp_path / "b", folder, rows, resume_from_checkpoint="latest")
    resumed.fit()
    assert_same_bits(whole_state(resumed), whole_state(unbroken))
    assert rows == all_rows
    assert sorted(rows[:24]) == list(range(24)), "every picture once in the first epoch"
