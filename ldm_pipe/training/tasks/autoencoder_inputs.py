"""What an autoencoder's training reads: pictures at hand or streamed, and networks with weights drawn from the seed.

What enters: an `AutoencoderConfig`. What leaves: picture sources and networks. It knows no loss and no trainer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from autoencoder import Autoencoder, AutoencoderKL, PatchDiscriminator, VQModel, VQTraining
from autoencoder.losses import Features
from ldm_pipe.data.rows import DataReport
from ldm_pipe.data.stream import StreamOrder
from ldm_pipe.training.run.loop import Micro
from ldm_pipe.training.run.parts import Order
from ldm_pipe.training.run.rng import generator
from ldm_pipe.training.tasks.autoencoder import AutoencoderConfig, Crops, Framed, Pictures
from ldm_pipe.training.tasks.crops import CropSource
from ldm_pipe.training.tasks.pictures import (
    ImageBatches,
    PictureSource,
    StreamBatches,
    drawing_weights,
    open_records,
    plan_shapes,
)

NUM_FIRST = 256  # pictures of a stream that stand for all of them


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


def load_perceptual(folder: str | None, device: torch.device) -> Features | None:
    """Load the perceptual network; its weights are frozen, gradients pass through it to the picture."""
    if folder is None:
        return None
    from conditioning.contrastive import ImageTower

    tower = ImageTower.from_pretrained(folder, device=device)
    tower.requires_grad_(False)
    return tower.features


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
