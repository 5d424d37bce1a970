"""One training of an autoencoder: pictures, networks, losses and results put together.

What enters: an `AutoencoderConfig`. What leaves: a trainer to `fit()`, and what the finished run writes beside it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from autoencoder import Autoencoder, AutoencoderKL, LogitAverages, Quantised, load_autoencoder
from ldm_pipe.data.images import make_grid, save_picture, to_pil
from ldm_pipe.training.run.environment import process_device
from ldm_pipe.training.run.loop import Trainer
from ldm_pipe.training.tasks.autoencoder import (
    AutoencoderConfig,
    Lecam,
    StepLog,
    autoencoder_parts,
    follow_codebook,
    follow_logits,
    latent_statistics,
)
from ldm_pipe.training.tasks.autoencoder_inputs import (
    Data,
    build_autoencoder,
    build_discriminator,
    load_perceptual,
    open_data,
    wrap_codebook,
)
from ldm_pipe.training.tasks.pictures import tell_left_out
from ldm_pipe.training.tasks.preview import PictureBatches, make_preview


def finish(autoencoder: Autoencoder, pictures: PictureBatches, folder: Path) -> None:
    """Measure the latents over all pictures, and write the autoencoder with its scale."""
    mean, std = latent_statistics(autoencoder, pictures.batches(64))
    finished = type(autoencoder).from_config(autoencoder.config)
    finished.load_state_dict(autoencoder.state_dict())
    finished.set_latent_statistics(mean, std)
    if isinstance(finished, AutoencoderKL):
        finished.fold_latent_shift()  # diffusers' pipelines apply the scale alone
    finished.save_pretrained(folder)


@torch.no_grad()
def write_grid(autoencoder: Autoencoder, images: Tensor, path: Path, trainer: Trainer) -> None:
    """Write originals above their reconstructions as one picture, and show it and its PSNR."""
    rebuilt, _ = autoencoder(images.to(autoencoder.device))
    both = [*images, *rebuilt.clamp(-1, 1).cpu()]
    sheet = make_grid([to_pil(image) for image in both], columns=len(images))
    save_picture(sheet, path)
    trainer.show("reconstructions", path)
    error = (rebuilt.cpu().clamp(-1, 1) - images).div(2).square().mean((1, 2, 3))
    trainer.note({"validation/psnr": float((-10 * error.log10()).mean())})


def make_trainer(config: AutoencoderConfig) -> tuple[Trainer, Data]:
    """Put pictures, networks, losses and results of a run together.

    Raises: LdmPipeError for pictures that cannot be trained on.
    """
    data, device = open_data(config), process_device()
    pictures = data.pictures
    autoencoder = build_autoencoder(config).to(device)
    network = wrap_codebook(config, autoencoder)
    discriminator = build_discriminator(config, device)
    lecam = None
    if discriminator is not None and config.objective.lecam_weight > 0:
        lecam = Lecam(LogitAverages().to(device))
    perceptual = load_perceptual(config.perceptual, device)
    log: StepLog[Quantised] | None = StepLog() if network is not autoencoder else None
    parts = autoencoder_parts(config, network, discriminator, data.source, perceptual, device, log=log, lecam=lecam)
    folder = Path(config.output_dir)
    shown = pictures(list(range(0, data.num, max(1, data.num // config.num_validation_images))))
    shown = shown[: config.num_validation_images]

    def validate(step: int, trainer: Trainer) -> None:
        write_grid(autoencoder, shown, folder / "grids" / f"step-{step:06d}.png", trainer)

    trainer = Trainer(
        config, parts, num_items=data.num, order=data.order, fingerprint=data.fingerprint, validate=validate,
        save_result=lambda: finish(autoencoder, pictures, folder / "vae"),
        kept={} if lecam is None else {"logits": lecam.averages},
    )  # fmt: skip
    if log is not None:
        follow_codebook(trainer, log)
    if lecam is not None:
        follow_logits(trainer, lecam)
    return trainer, data


def write_preview(config: AutoencoderConfig, trainer: Trainer, data: Data) -> None:
    """Fit and write the preview decoder of a run that has reached its last step; list what a stream left out."""
    folder = Path(config.output_dir)
    if trainer.step >= config.max_train_steps:
        finished = load_autoencoder(folder / "vae", device=process_device())
        make_preview(finished, data.pictures, config.preview, config.seed).save_pretrained(folder / "preview")
    if config.data.streaming:  # a set at hand was judged at the start
        tell_left_out(data.report, folder)
