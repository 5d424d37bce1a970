"""Fit a preview decoder to a finished autoencoder: the linear map in closed form, its convolutions by a short training.

An autoencoder and its pictures enter; a `PreviewDecoder` leaves. Targets are the pictures themselves: where the
autoencoder errs, the preview need not.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from autoencoder import Autoencoder, PreviewDecoder
from ldm_pipe.training.run.rng import generator
from ldm_pipe.training.tasks.autoencoder import PreviewTrainConfig

BATCH, NUM_BATCHES, LEARNING_RATE = 32, 32, 2e-3


class PictureBatches(Protocol):
    """Pictures of one size."""

    def batches(self, size: int) -> Iterator[Tensor]:
        """Go once through them: images (B, 3, H, W) in [-1, 1]."""


@torch.no_grad()
def latent_pairs(autoencoder: Autoencoder, pictures: PictureBatches) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield normalised latents (B, C, h, w) and their images (B, 3, H, W), for at most 1,024 pictures."""
    for image in islice(pictures.batches(BATCH), NUM_BATCHES):
        image = image.to(autoencoder.device)
        yield autoencoder.encode(image), image


def make_preview(
    autoencoder: Autoencoder, pictures: PictureBatches, config: PreviewTrainConfig, seed: int
) -> PreviewDecoder:
    """Fit the linear map, then train the convolutions, where there are any, to what it leaves (mean absolute error)."""
    pairs = list(latent_pairs(autoencoder, pictures))
    shape = {"latent_channels": autoencoder.latent_channels, "factor": autoencoder.factor, "width": config.width}
    with torch.random.fork_rng():
        torch.default_generator.set_state(generator(seed, "init", "preview").get_state())
        preview = PreviewDecoder.from_config(shape).to(autoencoder.device)
    preview.fit_linear(pairs)
    if config.width == 0:
        return preview
    optimizer = torch.optim.Adam(preview.detail.parameters(), LEARNING_RATE)
    for step in range(config.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - step / config.num_steps)
        z, image = pairs[step % len(pairs)]
        optimizer.zero_grad()
        F.l1_loss(preview.raw(z), image).backward()
        optimizer.step()
    return preview.eval()
