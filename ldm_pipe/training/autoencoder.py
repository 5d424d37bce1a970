"""The autoencoder task: pictures in, the losses of the autoencoder and of its discriminator out.

What enters: a picture source, networks and an optional perceptual network. What leaves: two `Part`s for the trainer,
and the latent statistics measured after training. It knows no files and no optimiser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from autoencoder import AutoencoderKL, AutoencoderLossConfig, autoencoder_loss, discriminator_loss
from autoencoder.losses import Features
from ldm_pipe.training.config import OptimConfig, StrictModel, TrainConfig
from ldm_pipe.training.loop import Logs, Micro, Part
from ldm_pipe.training.rng import batch_normal, batch_uniform

Pictures = Callable[[list[int]], Tensor]
"""Rows to images (B, 3, H, W) in [-1, 1]."""


class NetworkConfig(StrictModel):
    """Shape of the autoencoder, in diffusers' words (AutoencoderKL)."""

    block_out_channels: tuple[int, ...] = (32, 64, 128)
    layers_per_block: int = Field(1, ge=1)
    latent_channels: int = Field(4, ge=1)
    norm_num_groups: int = Field(16, ge=1)
    mid_block_add_attention: bool = True


class ObjectiveConfig(StrictModel):
    """Weights of the objective's parts; see `autoencoder.AutoencoderLossConfig`."""

    reconstruction: Literal["l1", "l2"] = "l1"
    perceptual_weight: float = Field(0.5, ge=0)
    kl_weight: float = Field(1e-6, ge=0, description="per latent in nats, divided by the number of pixel values")
    adversarial_weight: float = Field(0.5, ge=0)
    adversarial_start: int = Field(1000, ge=0, description="first step with the discriminator")


class AutoencoderConfig(TrainConfig):
    """One autoencoder training run."""

    network: NetworkConfig = NetworkConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    perceptual: str | None = Field(
        "runs/emoji/clip/image_tower", description="folder of the perceptual network; null: none"
    )
    discriminator_width: int = Field(32, ge=1)
    discriminator_layers: int = Field(2, ge=1)
    discriminator_optim: OptimConfig = OptimConfig()
    num_validation_images: int = Field(16, ge=1)


def flip_some(image: Tensor, draws: Tensor) -> Tensor:
    """Mirror the pictures whose draw is below one half; draws (B,)."""
    return torch.where((draws < 0.5)[:, None, None, None], image.flip(-1), image)


def autoencoder_parts(
    config: AutoencoderConfig,
    autoencoder: AutoencoderKL,
    discriminator: nn.Module | None,
    pictures: Pictures,
    perceptual: Features | None,
    device: torch.device,
) -> list[Part]:
    """Make the two parts of the game: autoencoder first, then the discriminator on the same reconstructions."""
    objective = AutoencoderLossConfig(
        reconstruction=config.objective.reconstruction,
        perceptual_weight=config.objective.perceptual_weight,
        kl_weight=config.objective.kl_weight,
        adversarial_weight=config.objective.adversarial_weight,
    )
    latent = (autoencoder.latent_channels, *(config.data.resolution // autoencoder.factor,) * 2)

    def generator_loss(micro: Micro) -> tuple[Tensor, Logs]:
        image = pictures(micro.indices)
        if config.data.random_flip:
            image = flip_some(image, batch_uniform(1, config.seed, "flip", micro.step, positions=micro.positions)[:, 0])
        image = image.to(device)
        noise = batch_normal(latent, config.seed, "posterior", micro.step, positions=micro.positions).to(device)
        reconstruction, posterior = parts[0].module(image, noise)
        judge = discriminator if micro.step >= config.objective.adversarial_start else None
        loss, values = autoencoder_loss(
            image, reconstruction, posterior, objective,
            perceptual=perceptual, discriminator=judge, last_layer=autoencoder.last_layer,
        )  # fmt: skip
        micro.memo.update(image=image, reconstruction=reconstruction.detach())
        return loss, {key: float(value) for key, value in values.items() if key != "loss"}

    def judge_loss(micro: Micro) -> tuple[Tensor, Logs]:
        return discriminator_loss(parts[1].module, micro.memo["image"], micro.memo["reconstruction"]), {}

    decay = config.ema_decay if config.use_ema else None
    parts = [Part("autoencoder", autoencoder, generator_loss, config.optim, decay)]
    if discriminator is not None:
        start = config.objective.adversarial_start
        parts.append(Part("discriminator", discriminator, judge_loss, config.discriminator_optim, start_step=start))
    return parts


@torch.no_grad()
def latent_statistics(autoencoder: AutoencoderKL, batches: Iterator[Tensor]) -> tuple[list[float], list[float]]:
    """Measure mean and standard deviation of sampled raw latents per channel, in float64.

    The variance is that of a posterior sample: var(mean) + E[posterior variance] (law of total variance).

    Args:
        batches: images (B, 3, H, W) in [-1, 1].
    Returns: means and standard deviations, one number per latent channel.
    """
    count, total, square, spread = 0, 0.0, 0.0, 0.0
    for image in batches:
        posterior = autoencoder.encode_moments(image.to(autoencoder.device))
        mean = posterior.mean.double()
        count += mean.shape[0] * mean.shape[2] * mean.shape[3]
        total = total + mean.sum((0, 2, 3))
        square = square + mean.square().sum((0, 2, 3))
        spread = spread + posterior.log_var.double().exp().sum((0, 2, 3))
    if count == 0:
        raise ValueError("latent statistics need at least one picture")
    average = torch.as_tensor(total) / count
    variance = torch.as_tensor(square) / count - average.square() + torch.as_tensor(spread) / count
    return average.tolist(), variance.sqrt().tolist()
