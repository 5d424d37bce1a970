"""The autoencoder task: pictures in, the losses of the autoencoder and of its discriminator out.

What enters: a picture source, networks and an optional perceptual network. What leaves: two `Part`s for the trainer,
and the latent statistics measured after training. It knows no files and no optimiser but for the rows of revived codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoder import (
    Autoencoder,
    AutoencoderLossConfig,
    LogitAverages,
    Quantised,
    VQTraining,
    autoencoder_loss,
    discriminator_loss,
)
from autoencoder.losses import Features
from autoencoder.quantizer import perplexity
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.training.run.config import OptimConfig, StrictModel, TrainConfig
from ldm_pipe.training.run.loop import Logs, Micro, Part, Trainer
from ldm_pipe.training.run.rng import batch_normal, batch_uniform, generator
from ldm_pipe.training.tasks.crops import CropConfig, crop_draws

Pictures = Callable[[list[int]], Tensor]
"""Rows to images (B, 3, H, W) in [-1, 1]."""
Crops = Callable[[list[int], Tensor], Tensor]
"""Rows and draws (B, 3) in [0, 1) to images cropped where the draws say."""
Framed = Callable[[Micro], Tensor]
"""The slice of a step to images, cropped and mirrored as the data config asks."""

REVIVE_EVERY = 10  # steps between two looks for dead codes: each gathers the latents of all processes


class NetworkConfig(StrictModel):
    """Shape of the autoencoder, in diffusers' words (AutoencoderKL, VQModel)."""

    regularisation: Literal["kl", "vq"] = "kl"
    block_out_channels: tuple[int, ...] = Field((32, 64, 128), description="one width per level; n levels: f2^(n - 1)")
    layers_per_block: int = Field(1, ge=1)
    latent_channels: int = Field(4, ge=1)
    norm_num_groups: int = Field(16, ge=1)
    mid_block_add_attention: bool = True


class CodebookConfig(StrictModel):
    """The codebook of a VQ autoencoder, and how it is trained."""

    num_vq_embeddings: int = Field(512, ge=2)
    ema: bool = Field(False, description="moved by averages of its latents; false: by the gradient of its loss")
    decay: float = Field(0.99, ge=0, lt=1, description="of the averages, per step")
    dead_below: float = Field(0.03, ge=0, lt=1, description="codes used less than this part of the mean are revived")
    codebook_weight: float = Field(1.0, gt=0)
    commitment_weight: float = Field(0.25, gt=0, description="beta")
    legacy_commitment: bool = Field(False, description="beta on the codebook's term, as in LDM's code and diffusers")

    @model_validator(mode="after")
    def _consistent(self) -> CodebookConfig:
        if self.ema and self.legacy_commitment:
            raise ValueError("legacy_commitment weighs a term that a codebook moved by averages does not have")
        return self


class ObjectiveConfig(StrictModel):
    """Weights of the objective's parts; see `autoencoder.AutoencoderLossConfig`."""

    reconstruction: Literal["l1", "l2"] = "l1"
    perceptual_weight: float = Field(0.5, ge=0)
    kl_weight: float = Field(1e-6, ge=0, description="per latent in nats, divided by the number of pixel values")
    game: Literal["hinge", "vanilla"] = "hinge"
    adversarial_weight: float = Field(0.5, ge=0)
    adversarial_start: int = Field(1000, ge=0, description="first step with the discriminator")
    r1_weight: float = Field(0.0, ge=0, description="gradient penalty of the discriminator at real pictures")
    lecam_weight: float = Field(
        0.0, ge=0, description="pull of the discriminator's logits to the averages of the other side; the paper: 0.3"
    )
    equivariance: float = Field(
        0.0, ge=0, le=1, description="share of steps in which latents and target are halved in size (EQ-VAE)"
    )


class PreviewTrainConfig(StrictModel):
    """The preview decoder that is fitted after training."""

    width: int = Field(0, ge=0, description="channels of its convolutions; 0: a linear map, fitted in closed form")
    num_steps: int = Field(300, ge=1, description="training steps of the convolutions")


class AutoencoderConfig(TrainConfig):
    """One autoencoder training run."""

    network: NetworkConfig = NetworkConfig()
    codebook: CodebookConfig = CodebookConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    perceptual: str | None = Field(
        "runs/emoji/clip/image_tower", description="folder of the perceptual network; null: none"
    )
    crop: CropConfig = CropConfig()
    preview: PreviewTrainConfig = PreviewTrainConfig()
    discriminator_width: int = Field(32, ge=1)
    discriminator_layers: int = Field(2, ge=1)
    discriminator_optim: OptimConfig = OptimConfig()
    num_validation_images: int = Field(16, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> AutoencoderConfig:
        if self.network.regularisation == "kl" and self.codebook != CodebookConfig():
            raise ValueError("codebook is set, but network.regularisation is 'kl'")
        if self.data.num_crops > 1:
            raise ValueError("data.num_crops is of cached latents: an autoencoder crops anew in every step")
        if self.crop.random and self.frames_itself:
            what = "leave data.center_crop, data.aspect_ratio_buckets and data.streaming alone"
            raise ValueError(f"crop.random crops already: {what}")
        objective = self.objective
        if objective.adversarial_weight == 0 and (objective.r1_weight or objective.lecam_weight):
            raise ValueError("objective.r1_weight or lecam_weight is set, but adversarial_weight is 0")
        if self.network.regularisation == "vq" and objective.kl_weight != ObjectiveConfig().kl_weight:
            raise ValueError("objective.kl_weight is set, but network.regularisation is 'vq'")
        return self

    @property
    def frames_itself(self) -> bool:
        """Tell whether the data config alone crops and mirrors (`ImageBatches`, `StreamBatches`)."""
        return self.data.aspect_ratio_buckets or not self.data.center_crop or self.data.streaming


def flip_some(image: Tensor, draws: Tensor) -> Tensor:
    """Mirror the pictures whose draw is below one half; draws (B,)."""
    return torch.where((draws < 0.5)[:, None, None, None], image.flip(-1), image)


def loss_config(config: AutoencoderConfig) -> AutoencoderLossConfig:
    """Gather the weights of the objective from the run's config."""
    objective = config.objective
    return AutoencoderLossConfig(
        reconstruction=objective.reconstruction,
        perceptual_weight=objective.perceptual_weight,
        kl_weight=objective.kl_weight,
        codebook_weight=config.codebook.codebook_weight,
        commitment_weight=config.codebook.commitment_weight,
        legacy_commitment=config.codebook.legacy_commitment,
        game=objective.game,
        adversarial_weight=objective.adversarial_weight,
    )


SeenT = TypeVar("SeenT")


@dataclass
class StepLog(Generic[SeenT]):
    """What one step saw: one entry per accumulation step of this process."""

    step: int = -1
    seen: list[SeenT] = field(default_factory=list)

    def add(self, step: int, entry: SeenT) -> None:
        """Keep one entry; what an earlier step left behind (it was skipped) is dropped."""
        if step != self.step:
            self.step, self.seen = step, []
        self.seen.append(entry)


@dataclass
class Lecam:
    """What LeCam's term needs beyond a step: the averages, and the mean logits (2,) of the step at hand."""

    averages: LogitAverages = field(default_factory=LogitAverages)
    log: StepLog[Tensor] = field(default_factory=StepLog)


def autoencoder_parts(
    config: AutoencoderConfig,
    network: Autoencoder | VQTraining,
    discriminator: nn.Module | None,
    pictures: Pictures | Crops | Framed,
    perceptual: Features | None,
    device: torch.device,
    *,
    log: StepLog[Quantised] | None = None,
    lecam: Lecam | None = None,
) -> list[Part]:
    """Make the two parts of the game: autoencoder first, then the discriminator on the same reconstructions.

    Args:
        network: an `AutoencoderKL`, or a `VQModel` in its training wrapper.
        pictures: maps rows to images; where the config asks for crops, rows and draws; where the data config crops and
            mirrors (`frames_itself`), the slice of a step.
        log: receives what a codebook quantised, for `follow_codebook`.
        lecam: receives mean logits, for `follow_logits`, and gives the anchors.
    """
    objective, weights = config.objective, loss_config(config)
    autoencoder = network.autoencoder if isinstance(network, VQTraining) else network

    def generator_loss(micro: Micro) -> tuple[Tensor, Logs]:
        image = take_pictures(config, pictures, micro).to(device)
        shrink = shrink_of(config, micro.step)
        if autoencoder is network:
            latent = (autoencoder.latent_channels, *(side // autoencoder.factor for side in image.shape[2:]))
            noise = batch_normal(latent, config.seed, "posterior", micro.step, positions=micro.positions).to(device)
            reconstruction, between = parts[0].module(image, noise, shrink)
        else:
            reconstruction, between = parts[0].module(image, shrink)
        image = image if shrink == 1 else F.avg_pool2d(image, shrink)
        judge = discriminator if micro.step >= objective.adversarial_start else None
        loss, values = autoencoder_loss(
            image, reconstruction, between, weights,
            perceptual=perceptual, discriminator=judge, last_layer=autoencoder.last_layer,
        )  # fmt: skip
        micro.memo.update(image=image, reconstruction=reconstruction.detach())
        if isinstance(network, VQTraining):
            values["perplexity"] = perplexity(network.count(between)[0])
            values["alive"] = (network.usage > network.dead_below * network.usage.mean()).float().mean()
        if log is not None:
            log.add(micro.step, Quantised(between.raw.detach(), between.codes.detach(), between.indices))
        return loss, {key: float(value) for key, value in values.items() if key != "loss"}

    def judge_loss(micro: Micro) -> tuple[Tensor, Logs]:
        image, reconstruction = micro.memo["image"], micro.memo["reconstruction"]
        loss, values = discriminator_loss(
            parts[1].module, image, reconstruction, objective.game, objective.r1_weight,
            lecam_weight=objective.lecam_weight, anchors=lecam.averages.anchors() if lecam else None,
        )  # fmt: skip
        if lecam is not None:
            lecam.log.add(micro.step, torch.stack([values["real"], values["fake"]]))
        return loss, {key: float(value) for key, value in values.items()}

    decay = config.ema_decay if config.use_ema else None
    parts = [Part("autoencoder", network, generator_loss, config.optim, decay)]
    if discriminator is not None:
        start = objective.adversarial_start
        parts.append(Part("discriminator", discriminator, judge_loss, config.discriminator_optim, start_step=start))
    return parts


def take_pictures(config: AutoencoderConfig, pictures: Any, micro: Micro) -> Tensor:
    """Return the images of a slice, cropped and mirrored at random where the config asks for it."""
    if config.frames_itself:
        return pictures(micro)
    if config.crop.random:
        image = pictures(micro.indices, crop_draws(config.seed, micro.step, micro.positions))
    else:
        image = pictures(micro.indices)
    if not config.data.random_flip:
        return image
    return flip_some(image, batch_uniform(1, config.seed, "flip", micro.step, positions=micro.positions)[:, 0])


def shrink_of(config: AutoencoderConfig, step: int) -> int:
    """Return 2 in the share of steps that train scale equivariance, else 1; the same for the whole batch.

    What decodes from averaged latents shall be the averaged image (EQ-VAE, Kouzelis et al. 2025, arXiv:2502.09509,
    eq. 6, with scaling by one half as the only transformation).
    """
    draw = batch_uniform(1, config.seed, "equivariance", step, positions=range(1))[0, 0]
    return 2 if float(draw) < config.objective.equivariance else 1


def follow_logits(trainer: Trainer, lecam: Lecam) -> None:
    """After each step of the discriminator's optimiser, let the averages of LeCam's term follow; alike everywhere."""

    def after_step(*_: Any) -> None:
        means = torch.stack(lecam.log.seen).mean(0)
        lecam.averages.update(trainer.accelerator.reduce(means, "mean"))  # type: ignore[arg-type]

    trainer.optimizers["discriminator"].register_step_post_hook(after_step)


def follow_codebook(trainer: Trainer, log: StepLog[Quantised]) -> None:
    """After each step of the autoencoder's optimiser, move the codebook and, at intervals, revive its dead codes.

    A step that is skipped for bad numbers moves nothing. All processes see the same counts, latents and draws, and so
    hold the same codebook.
    Raises: LdmPipeError where weights are sharded: a copy would be trained, and this codebook would stand still.
    """
    if trainer.sharded:
        raise LdmPipeError("FSDP cannot train a codebook", "the accelerate config", "Use DDP.")
    training, optimizer = trainer.raw["autoencoder"], trainer.optimizers["autoencoder"]
    assert isinstance(training, VQTraining)
    name = "autoencoder.quantize.embedding.weight"

    def after_step(*_: Any) -> None:
        counts, sums = (torch.stack(parts).sum(0) for parts in zip(*map(training.count, log.seen), strict=True))
        reduce = trainer.accelerator.reduce
        training.update(reduce(counts, "sum"), reduce(sums, "sum"))  # type: ignore[arg-type]
        if training.dead_below == 0 or log.step % REVIVE_EVERY:
            return
        # Into the order of the global batch, which does not depend on the number of processes.
        own = torch.stack([quantised.raw for quantised in log.seen])[None]  # (1, accumulation, B, D, h, w)
        every = trainer.accelerator.gather(own).transpose(0, 1)  # type: ignore[union-attr]
        vectors = every.movedim(-3, -1).flatten(0, -2)
        dead = training.revive(vectors, generator(trainer.config.seed, "revive", log.step))
        weight = training.autoencoder.quantize.weight
        for value in optimizer.state.get(weight, {}).values():  # the moments are of the code that was
            if value.shape == weight.shape:
                value[dead] = 0
        if "autoencoder" in trainer.ema:  # an average of two places is no code
            trainer.ema["autoencoder"].shadow[name][dead] = weight[dead].detach().float()

    optimizer.register_step_post_hook(after_step)


@torch.no_grad()
def latent_statistics(autoencoder: Autoencoder, batches: Iterator[Tensor]) -> tuple[list[float], list[float]]:
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
