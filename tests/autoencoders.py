"""Tiny autoencoders and their trainers, for the tests of the autoencoder's training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoencoder import AutoencoderKL, LogitAverages, PatchDiscriminator, VQModel, VQTraining
from ldm_pipe.training.run.config import build_config
from ldm_pipe.training.run.loop import Trainer
from ldm_pipe.training.tasks.autoencoder import (
    AutoencoderConfig,
    Lecam,
    StepLog,
    autoencoder_parts,
    follow_codebook,
    follow_logits,
)

RESOLUTION = 16
SHAPE = {
    "block_out_channels": [4, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 3,
    "norm_num_groups": 2,
    "mid_block_add_attention": False,
}


def make_pictures(num: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(num, 3, 4, 4, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3) * 2 - 1


def make_autoencoder(seed: int = 0) -> AutoencoderKL:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoencoderKL.from_config(SHAPE)


def make_vq(seed: int = 0) -> VQModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VQModel.from_config({**SHAPE, "num_vq_embeddings": 8})


def make_vq_trainer(
    folder: Path, *, ema: bool = True, dead_below: float = 0.03, pictures: Any = None, **changes: Any
) -> Trainer:
    """Train a VQ autoencoder on the same pictures, without a discriminator."""
    codebook = {"num_vq_embeddings": 8, "ema": ema, "dead_below": dead_below, "decay": 0.9}
    values = {
        "output_dir": str(folder),
        "max_train_steps": 13,
        "train_batch_size": 4,
        "checkpointing_steps": 100,
        "report_to": "none",
        "num_threads": 1,
        "perceptual": None,
        "network": {"regularisation": "vq"},
        "codebook": codebook,
        "data": {"resolution": RESOLUTION},
        "optim": {"learning_rate": 1e-3, "lr_warmup_steps": 0},
    }
    config = build_config(AutoencoderConfig, {**values, **changes}, "test")
    rows, log = make_pictures(), StepLog()
    network = VQTraining(make_vq(), ema=ema, decay=0.9, dead_below=dead_below)
    pictures = pictures or rows.__getitem__
    parts = autoencoder_parts(config, network, None, pictures, None, torch.device("cpu"), log=log)
    trainer = Trainer(config, parts, num_items=len(rows), fingerprint="pictures")
    follow_codebook(trainer, log)
    return trainer


def make_trainer(
    folder: Path, start: int = 2, objective: dict[str, float] | None = None, pictures: Any = None, **changes: Any
) -> Trainer:
    values = {
        "output_dir": str(folder),
        "max_train_steps": 5,
        "train_batch_size": 3,
        "checkpointing_steps": 100,
        "report_to": "none",
        "num_threads": 1,
        "perceptual": None,
        "objective": {"adversarial_start": start, **(objective or {})},
        "data": {"resolution": RESOLUTION, "random_flip": True},
        "optim": {"learning_rate": 1e-3, "lr_warmup_steps": 0},
        "discriminator_optim": {"learning_rate": 1e-3, "lr_warmup_steps": 0},
    }
    config = build_config(AutoencoderConfig, {**values, **changes}, "test")
    rows = make_pictures()
    pictures = pictures or rows.__getitem__
    with torch.random.fork_rng():
        torch.manual_seed(1)
        judge = PatchDiscriminator(width=4, num_layers=1)
    lecam = Lecam(LogitAverages(0.5)) if config.objective.lecam_weight > 0 else None
    cpu = torch.device("cpu")
    parts = autoencoder_parts(config, make_autoencoder(), judge, pictures, None, cpu, lecam=lecam)
    kept = {"logits": lecam.averages} if lecam else {}
    trainer = Trainer(config, parts, num_items=len(rows), fingerprint="pictures", kept=kept)
    if lecam:
        follow_logits(trainer, lecam)
    return trainer


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name.split("/")[0] for name in after if name not in before or not torch.equal(before[name], after[name])}
