"""On photographs, too: a short training of either kind of autoencoder makes it rebuild parts it never saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from autoencoder import AutoencoderKL, VQModel, VQTraining
from ldm_pipe.data.images import to_tensor
from ldm_pipe.training.autoencoder import AutoencoderConfig, StepLog, autoencoder_parts, follow_codebook
from ldm_pipe.training.config import build_config
from ldm_pipe.training.crops import random_crop
from ldm_pipe.training.loop import Trainer

data = pytest.importorskip("skimage.data", reason="scikit-image brings the photographs")
pytest.importorskip("accelerate")

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")  # files inside the package: nothing is downloaded
RESOLUTION, NUM_STEPS = 32, 150
SHAPE = {
    "block_out_channels": [16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
}


def tiles(held_out: bool) -> Tensor:
    """Cut each photograph into a grid of squares; every fifth is held out."""
    found = []
    for name in PHOTOGRAPHS:
        pixels = getattr(data, name)()
        height, width = pixels.shape[0] // RESOLUTION, pixels.shape[1] // RESOLUTION
        for number in range(height * width):
            row, column = (place * RESOLUTION for place in divmod(number, width))
            if (number % 5 == 0) is held_out:
                found.append(to_tensor(Image.fromarray(pixels[row : row + RESOLUTION, column : column + RESOLUTION])))
    return torch.stack(found)


def train(kind: str, folder: Path, pictures: Tensor) -> tuple[AutoencoderKL | VQModel, Trainer]:
    torch.manual_seed(0)
    autoencoder: Any = AutoencoderKL.from_config(SHAPE) if kind == "kl" else VQModel.from_config(SHAPE)
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_train_steps": NUM_STEPS,
        "train_batch_size": 16,
        "report_to": "none",
        "num_threads": 1,
        "perceptual": None,
        "network": {"regularisation": kind},
        "objective": {"adversarial_weight": 0.0},
        "data": {"resolution": RESOLUTION, "random_flip": True},
        "optim": {"learning_rate": 4e-3, "lr_warmup_steps": 10},
        "ema_decay": 0.9,
        "checkpointing_steps": 1000,
    }
    config = build_config(AutoencoderConfig, values, "test")
    log = StepLog()
    used = log if kind == "vq" else None
    network = VQTraining(autoencoder, ema=False) if kind == "vq" else autoencoder
    parts = autoencoder_parts(config, network, None, lambda rows: pictures[rows], None, torch.device("cpu"), log=used)
    trainer = Trainer(config, parts, num_items=len(pictures), fingerprint="photographs")
    if kind == "vq":
        follow_codebook(trainer, log)
    return autoencoder, trainer


def quality(pictures: Tensor, others: Tensor) -> float:
    """Return the PSNR of all tiles as one picture: a flat tile alone may be without error."""
    return float(-10 * ((pictures - others.clamp(-1, 1)) / 2).double().square().mean().log10())


@torch.no_grad()
def rebuild(autoencoder: AutoencoderKL | VQModel, pictures: Tensor) -> Tensor:
    return torch.cat([autoencoder.decode(autoencoder.encode(part)) for part in pictures.split(64)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_reconstruction_of_unseen_parts_improves(kind: str, tmp_path: Path) -> None:
    seen, unseen = tiles(held_out=False), tiles(held_out=True)
    autoencoder, trainer = train(kind, tmp_path, seen)
    before, after = quality(unseen, rebuild(autoencoder, unseen)), [0.0]
    trainer.fit()
    trainer.with_ema(lambda: after.append(quality(unseen, rebuild(autoencoder, unseen))))
    assert after[-1] > before + 5.0
    if kind == "kl":  # codes take longer
        assert after[-1] > quality(unseen, unseen.mean((2, 3), keepdim=True)), "more than the mean colour of each tile"


def test_photographs_are_cropped_without_borders() -> None:
    photograph = Image.fromarray(data.chelsea())
    cut = random_crop(photograph, 64, 2.0, 0.3, 0.7)
    assert cut.size == (64, 64)
    assert not (np.asarray(cut) == 255).all(2).any()
