"""Train the autoencoder (first stage) on a captioned or uncaptioned picture set.

    accelerate launch scripts/train_autoencoder.py --config configs/emoji/autoencoder.yaml [--any.value X]

Writes `<output_dir>/vae` (config.json, weights, measured latent scale), checkpoints, TensorBoard, sample grids and, at
the end, `<output_dir>/preview`, a decoder for pictures that are still being drawn. `scripts/evaluate.py autoencoder`
measures the result.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autoencoder import (
    Autoencoder,
    AutoencoderKL,
    LogitAverages,
    PatchDiscriminator,
    Quantised,
    VQModel,
    VQTraining,
    load_autoencoder,
)
from autoencoder.losses import Features
from ldm_pipe.data.images import make_grid, to_pil
from ldm_pipe.data.rows import DataReport
from ldm_pipe.data.stream import StreamOrder
from ldm_pipe.training.run.config import parse_config, run_script
from ldm_pipe.training.run.environment import process_device
from ldm_pipe.training.run.loop import Micro, Trainer
from ldm_pipe.training.run.parts import Order
from ldm_pipe.training.run.rng import generator
from ldm_pipe.training.tasks.autoencoder import (
    AutoencoderConfig,
    Crops,
    Framed,
    Lecam,
    Pictures,
    StepLog,
    autoencoder_parts,
    follow_codebook,
    follow_logits,
    latent_statistics,
)
from ldm_pipe.training.tasks.crops import CropSource
from ldm_pipe.training.tasks.pictures import (
    ImageBatches,
    PictureSource,
    StreamBatches,
    drawing_weights,
    open_records,
    plan_shapes,
    tell_left_out,
)
from ldm_pipe.training.tasks.preview import PictureBatches, make_preview

NUM_FIRST = 256


def build_autoencoder(config: AutoencoderConfig) -> Autoencoder:
    """Build the network of the config with weights drawn from its seed."""
    levels = len(config.network.block_out_channels)
    shape = config.network.model_dump(mode="json", exclude={"regularisation"}) | {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "sample_size": config.data.resolution,
    }
    with torch.random.fork_rng():
        torch.default_generator.set_state(generator(config.seed, "init", "autoencoder").get_state())
        if config.network.regularisation == "kl":
            return AutoencoderKL.from_config(shape)
        return VQModel.from_config(shape | {"num_vq_embeddings": config.codebook.num_vq_embeddings})


def wrap_codebook(config: AutoencoderConfig, autoencoder: Autoencoder) -> AutoencoderKL | VQTraining:
    """Put a VQ autoencoder into its training wrapper; a KL autoencoder needs none."""
    if isinstance(autoencoder, AutoencoderKL):
        return autoencoder
    codebook = config.codebook
    return VQTraining(autoencoder, ema=codebook.ema, decay=codebook.decay, dead_below=codebook.dead_below)


def build_discriminator(config: AutoencoderConfig, device: torch.device) -> PatchDiscriminator | None:
    """Build the discriminator of the config with weights drawn from its seed, or None where it has no weight."""
    if config.objective.adversarial_weight == 0:
        return None
    with torch.random.fork_rng():
        torch.default_generator.set_state(generator(config.seed, "init", "discriminator").get_state())
        return PatchDiscriminator(width=config.discriminator_width, num_layers=config.discriminator_layers).to(device)


def finish(autoencoder: Autoencoder, pictures: PictureBatches, folder: Path) -> None:
    """Measure the latents over all pictures, and write the autoencoder with its scale."""
    mean, std = latent_statistics(autoencoder, pictures.batches(64))
    finished = type(autoencoder).from_config(autoencoder.config)
    finished.load_state_dict(autoencoder.state_dict())
    finished.set_latent_statistics(mean, std)
    if isinstance(finished, AutoencoderKL):
        finished.fold_latent_shift()  # diffusers' pipelines apply the scale alone
    finished.save_pretrained(folder)


def load_perceptual(folder: str | None, device: torch.device) -> Features | None:
    """Load the perceptual network; its weights are frozen, gradients pass through it to the picture."""
    if folder is None:
        return None
    from conditioning.contrastive import ImageTower

    tower = ImageTower.from_pretrained(folder, device=device)
    tower.requires_grad_(False)
    return tower.features


@torch.no_grad()
def write_grid(autoencoder: Autoencoder, images: Tensor, path: Path, trainer: Trainer) -> None:
    """Write originals above their reconstructions as one picture, and show it and its PSNR."""
    rebuilt, _ = autoencoder(images.to(autoencoder.device))
    both = [*images, *rebuilt.clamp(-1, 1).cpu()]
    sheet = make_grid([to_pil(image) for image in both], columns=len(images))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    trainer.show("reconstructions", path)
    error = (rebuilt.cpu().clamp(-1, 1) - images).div(2).square().mean((1, 2, 3))
    trainer.note({"validation/psnr": float((-10 * error.log10()).mean())})


class FirstPictures:
    """The first pictures of a stream, in the place of the whole set: for grids, latent statistics and the preview."""

    def __init__(self, stream: StreamBatches) -> None:
        """Read them; they are kept as bytes."""
        rows = range(NUM_FIRST)
        self._bytes = ((stream(Micro(0, list(rows), rows)).images + 1.0) * 127.5).round().to(torch.uint8)

    def __len__(self) -> int:
        return len(self._bytes)

    def __call__(self, rows: list[int]) -> Tensor:
        """Return the images of these rows, float32."""
        return self._bytes[rows].float() / 127.5 - 1.0

    def batches(self, size: int) -> Iterator[Tensor]:
        """Go once through them."""
        return (part.float() / 127.5 - 1.0 for part in self._bytes.split(size))


@dataclass(frozen=True)
class Data:
    """What a run knows of its pictures.

    Args:
        source: gives those of a step, see `ldm_pipe.training.tasks.autoencoder.take_pictures`.
        pictures: all of them, or a stream's first.
        num: of `pictures`.
        order: makes the order of the run.
        fingerprint: a resumed run must have the same.
        report: what was left out.
    """

    source: Pictures | Crops | Framed
    pictures: PictureSource | FirstPictures
    num: int
    order: Callable[[int], Order]
    fingerprint: str
    report: DataReport


def open_data(config: AutoencoderConfig) -> Data:
    """Open what the config names."""
    data, world = config.data, int(os.environ.get("WORLD_SIZE", "1"))
    if data.streaming:
        stream = StreamBatches.open(data, config.seed, int(os.environ.get("RANK", "0")), world)
        first, name = FirstPictures(stream), f"stream {data.train_data_dir} {data.dataset_config_name}"
        return Data(lambda m: stream(m).images, first, len(first), StreamOrder, name, stream.stream.report)
    records = open_records(data, config.output_dir)
    pictures = PictureSource(records, data.resolution)
    plan = plan_shapes(records, data, config.train_batch_size * config.gradient_accumulation_steps * world)
    order = plan.order(config.seed, drawing_weights(records, data))
    source: Pictures | Crops | Framed = pictures
    if config.frames_itself:
        batches = ImageBatches(records, plan, data, config.seed)
        source = lambda micro: batches(micro).images  # noqa: E731
    elif config.crop.random:
        source = CropSource(records, data.resolution, config.crop)
    return Data(source, pictures, len(records), order, records.fingerprint, records.report)


def main(argv: list[str]) -> None:
    """Run one training."""
    config = parse_config(AutoencoderConfig, argv, "Train the autoencoder (first stage).")
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
    trainer.fit()
    if trainer.is_main:
        if trainer.step >= config.max_train_steps:
            finished = load_autoencoder(folder / "vae", device=device)
            make_preview(finished, pictures, config.preview, config.seed).save_pretrained(folder / "preview")
        print(data.report)
        if config.data.streaming:  # a set at hand was judged at the start
            tell_left_out(data.report, folder)


if __name__ == "__main__":
    run_script(main)
