"""Train a KL and a VQ autoencoder on photographs, cropped and mirrored at random, and measure parts they never saw.

    python benchmarks/photographs.py [--steps 400] [--output FILE]

What enters: the colour photographs inside scikit-image's package; nothing is downloaded. The left three quarters of
each are trained on, the right quarter is cut into squares that are held out. What leaves: a table of PSNR and SSIM of
the held-out squares over the steps, and a sheet of them above their reconstructions.

There is no perceptual network for photographs here and no discriminator: the loss is L1 and the regularisation.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from autoencoder import AutoencoderKL, Quantised, VQModel, VQTraining
from ldm_pipe.data.images import make_grid, to_pil, to_tensor
from ldm_pipe.metrics.images import psnr, ssim
from ldm_pipe.pretrained import atomic_write
from ldm_pipe.training.run.config import build_config
from ldm_pipe.training.run.loop import Trainer
from ldm_pipe.training.tasks.autoencoder import AutoencoderConfig, StepLog, autoencoder_parts, follow_codebook
from ldm_pipe.training.tasks.crops import CropConfig, CropSource

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
RESOLUTION, SQUARE, NUM_SHOWN = 32, 64, 16
Kind = Literal["kl", "vq"]


@dataclass(frozen=True)
class Photographs:
    """Pictures to crop from, in the place of a data set's records."""

    pictures: list[Image.Image]

    def image(self, row: int) -> Image.Image:
        """Return one picture."""
        return self.pictures[row]

    def __len__(self) -> int:
        return len(self.pictures)


def split() -> tuple[Photographs, Tensor]:
    """Return the trained parts of the photographs, and the held-out squares (B, 3, R, R) in [-1, 1], half size."""
    from skimage import data

    seen, unseen = [], []
    for name in PHOTOGRAPHS:
        picture = Image.fromarray(getattr(data, name)())
        border = picture.width * 3 // 4
        seen.append(picture.crop((0, 0, border, picture.height)))
        for left in range(border, picture.width - SQUARE + 1, SQUARE):
            for top in range(0, picture.height - SQUARE + 1, SQUARE):
                square = picture.crop((left, top, left + SQUARE, top + SQUARE))
                unseen.append(to_tensor(square.reduce(SQUARE // RESOLUTION)))
    return Photographs(seen), torch.stack(unseen)


def make_trainer(kind: Kind, folder: Path, pictures: Photographs, **changes: Any) -> Trainer:
    """Set a run up: factor 4, the networks of configs/emoji/autoencoder-kl-f4.yaml and vq-f4.yaml."""
    levels = {"block_out_channels": [16, 32, 64], "norm_num_groups": 8, "mid_block_add_attention": False}
    shape = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    shape |= {**levels, "latent_channels": 4}
    with torch.random.fork_rng():
        torch.default_generator.set_state(torch.Generator().manual_seed(0).get_state())
        codes = {"num_vq_embeddings": 512}
        network = AutoencoderKL.from_config(shape) if kind == "kl" else VQModel.from_config({**shape, **codes})
    values: dict[str, Any] = {
        "output_dir": str(folder), "train_batch_size": 16, "report_to": "none", "num_threads": 1, "perceptual": None,
        "network": {"regularisation": kind, **levels}, "objective": {"adversarial_weight": 0.0}, "ema_decay": 0.95,
        "data": {"resolution": RESOLUTION, "random_flip": True},
        "crop": {"random": True, "zoom_min": 3.0, "zoom_max": 9.0},
        "optim": {"learning_rate": 4e-3, "lr_warmup_steps": 20}, "checkpointing_steps": 100_000,
    }  # fmt: skip
    config = build_config(AutoencoderConfig, {**values, **changes}, "photographs")
    source = CropSource(pictures, RESOLUTION, CropConfig(**config.crop.model_dump()))  # type: ignore[arg-type]
    log: StepLog[Quantised] = StepLog()
    wrapped = VQTraining(network, ema=False) if isinstance(network, VQModel) else network
    used = log if kind == "vq" else None
    parts = autoencoder_parts(config, wrapped, None, source, None, torch.device("cpu"), log=used)
    trainer = Trainer(config, parts, num_items=len(pictures), fingerprint="photographs")
    if kind == "vq":
        follow_codebook(trainer, log)
    return trainer


@torch.no_grad()
def rebuild(trainer: Trainer, squares: Tensor) -> Tensor:
    """Encode and decode with the averaged weights."""
    rebuilt: list[Tensor] = []
    network: Any = trainer.raw["autoencoder"]
    model = network.autoencoder if isinstance(network, VQTraining) else network
    trainer.with_ema(lambda: rebuilt.append(model.decode(model.encode(squares)).clamp(-1, 1)))
    return rebuilt[0]


def quality(squares: Tensor, rebuilt: Tensor) -> tuple[float, float]:
    """Return mean PSNR in dB and mean SSIM."""
    return float(psnr(squares, rebuilt).mean()), float(ssim(squares, rebuilt).mean())


def train(kind: Kind, pictures: Photographs, squares: Tensor, steps: int, every: int) -> tuple[list[str], Tensor]:
    """Train one autoencoder; return rows of the table and the last reconstructions."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(kind, Path(folder), pictures, max_train_steps=steps)
        for module in trainer.raw.values():
            module.train()
        seconds = 0.0
        for step in tqdm(range(steps + 1), desc=kind):
            if step % every == 0 or step == steps:
                likeness, structure = quality(squares, rebuild(trainer, squares))
                rows.append(f"| {kind} | {step} | {likeness:.2f} | {structure:.4f} | {seconds:.0f} |")
            if step < steps:
                began = time.process_time()
                trainer.train_step()
                seconds += time.process_time() - began
        return rows, rebuild(trainer, squares)


def save_sheet(rows: list[Tensor], path: Path) -> None:
    """Write some squares, and their reconstructions below, twice as large."""
    shown: Callable[[Tensor], Tensor] = lambda images: images[:: max(1, len(images) // NUM_SHOWN)][:NUM_SHOWN]  # noqa: E731
    pictures = [to_pil(image) for images in rows for image in shown(images)]
    large = [picture.resize((SQUARE, SQUARE), Image.Resampling.NEAREST) for picture in pictures]
    buffer = io.BytesIO()
    make_grid(large, columns=NUM_SHOWN).save(buffer, format="PNG", optimize=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, buffer.getvalue())


def main(argv: list[str] | None = None) -> None:
    """Train both kinds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of 16 crops (default 400)")
    parser.add_argument("--every", type=int, default=100, help="steps between two measurements (default 100)")
    parser.add_argument("--output", type=Path, help="PNG of held-out squares: originals, kl, vq")
    args = parser.parse_args(argv)
    pictures, squares = split()
    flat = quality(squares, squares.mean((2, 3), keepdim=True).expand_as(squares))
    print(f"{len(squares)} held-out squares; each as its mean colour: {flat[0]:.2f} dB, SSIM {flat[1]:.4f}")
    shown = [squares]
    lines = ["| kind | steps | PSNR, dB | SSIM | CPU seconds of training |", "|---|---|---|---|---|"]
    kinds: tuple[Kind, ...] = ("kl", "vq")
    for kind in kinds:
        rows, rebuilt = train(kind, pictures, squares, args.steps, args.every)
        lines += rows
        shown.append(rebuilt)
    print("\n".join(lines))
    if args.output:
        save_sheet(shown, args.output)


if __name__ == "__main__":
    main()
