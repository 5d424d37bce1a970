"""Train the autoencoder (first stage) on a captioned or uncaptioned picture set.

    accelerate launch scripts/train_autoencoder.py --config configs/emoji/autoencoder.yaml [--any.value X]

Writes `<output_dir>/vae` (config.json, weights, measured latent scale), checkpoints, TensorBoard and sample grids.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from autoencoder import AutoencoderKL, PatchDiscriminator
from autoencoder.losses import Features
from ldm_pipe.data.images import make_grid, to_pil
from ldm_pipe.training.autoencoder import AutoencoderConfig, autoencoder_parts, latent_statistics
from ldm_pipe.training.config import parse_config, run_script
from ldm_pipe.training.environment import process_device
from ldm_pipe.training.loop import Trainer
from ldm_pipe.training.pictures import PictureSource, drawing_weights, open_records
from ldm_pipe.training.rng import generator


def build_autoencoder(config: AutoencoderConfig) -> AutoencoderKL:
    """Build the network of the config with weights drawn from its seed."""
    levels = len(config.network.block_out_channels)
    shape = config.network.model_dump(mode="json") | {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "sample_size": config.data.resolution,
    }
    with torch.random.fork_rng():
        torch.default_generator.set_state(generator(config.seed, "init", "autoencoder").get_state())
        return AutoencoderKL.from_config(shape)


def load_perceptual(folder: str | None, device: torch.device) -> Features | None:
    """Load the perceptual network; its weights are frozen, gradients pass through it to the picture."""
    if folder is None:
        return None
    from conditioning.contrastive import ImageTower

    tower = ImageTower.from_pretrained(folder, device=device)
    tower.requires_grad_(False)
    return tower.features


@torch.no_grad()
def write_grid(autoencoder: AutoencoderKL, images: Tensor, path: Path, step: int, trainer: Trainer) -> None:
    """Write originals above their reconstructions as one picture, and to TensorBoard."""
    rebuilt, _ = autoencoder(images.to(autoencoder.device))
    both = [*images, *rebuilt.clamp(-1, 1).cpu()]
    sheet = make_grid([to_pil(image) for image in both], columns=len(images))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    if trainer.writer is not None:
        error = (rebuilt.cpu().clamp(-1, 1) - images).div(2).square().mean((1, 2, 3))
        trainer.writer.add_scalar("validation/psnr", float((-10 * error.log10()).mean()), step)


def main(argv: list[str]) -> None:
    """Run one training."""
    config = parse_config(AutoencoderConfig, argv, "Train the autoencoder (first stage).")
    records = open_records(config.data)
    pictures = PictureSource(records, config.data.resolution)
    device = process_device()
    autoencoder = build_autoencoder(config).to(device)
    discriminator = None
    if config.objective.adversarial_weight > 0:
        with torch.random.fork_rng():
            torch.default_generator.set_state(generator(config.seed, "init", "discriminator").get_state())
            discriminator = PatchDiscriminator(width=config.discriminator_width, num_layers=config.discriminator_layers)
            discriminator.to(device)
    perceptual = load_perceptual(config.perceptual, device)
    parts = autoencoder_parts(config, autoencoder, discriminator, pictures, perceptual, device)
    folder = Path(config.output_dir)
    shown = pictures(list(range(0, len(records), max(1, len(records) // config.num_validation_images))))
    shown = shown[: config.num_validation_images]

    def validate(step: int, trainer: Trainer) -> None:
        write_grid(autoencoder, shown, folder / "grids" / f"step-{step:06d}.png", step, trainer)

    def save_result() -> None:
        mean, std = latent_statistics(autoencoder, pictures.batches(64))
        finished = AutoencoderKL.from_config(autoencoder.config)
        finished.load_state_dict(autoencoder.state_dict())
        finished.set_latent_statistics(mean, std)
        finished.fold_latent_shift()  # diffusers' pipelines apply the scale alone
        finished.save_pretrained(folder / "vae")

    trainer = Trainer(
        config, parts, num_items=len(records), weights=drawing_weights(records, config.data),
        fingerprint=records.fingerprint, validate=validate, save_result=save_result,
    )  # fmt: skip
    trainer.fit()


if __name__ == "__main__":
    run_script(main)
