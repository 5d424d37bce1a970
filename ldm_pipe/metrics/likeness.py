"""Does a model repeat its training drawings, and are its pictures as sharp as its autoencoder allows?

Pictures, reference drawings and an autoencoder enter; numbers leave. This file knows no text and no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from autoencoder import Autoencoder
from autoencoder.losses import Features, perceptual_distance
from ldm_pipe.pretrained import LdmPipeError

COPY = 0.5  # of the usual distance between a drawing and its nearest neighbour


@dataclass(frozen=True)
class Memorisation:
    """Root mean square distances of pixels in [-1, 1], each the median over its pictures.

    Args:
        to_drawing: of a drawn picture to the nearest training drawing.
        between_drawings: of a training drawing to the nearest other one.
        between_seeds: of two pictures drawn from one prompt by two seeds.
        copies: share of the pictures nearer to a drawing than half of `between_drawings`.
    """

    to_drawing: float
    between_drawings: float
    between_seeds: float
    copies: float


def memorisation(pictures: Tensor, other_seed: Tensor, drawings: Tensor) -> Memorisation:
    """Measure how near drawn pictures are to what the model was trained on.

    A model that has learnt its drawings by heart, and one that is asked for what it saw and draws it well, look alike
    here: near to a drawing. Two seeds that differ as little as the picture and its drawing tell the first.

    Args:
        pictures: drawn, in [-1, 1], shape (P, 3, H, W).
        other_seed: the same prompts from another seed, shape (P, 3, H, W).
        drawings: of the training, shape (N, 3, H, W), N at least 2; equal ones count once.
    Raises: LdmPipeError for shapes that do not fit.
    """
    if pictures.shape != other_seed.shape or pictures.shape[1:] != drawings.shape[1:] or not len(pictures):
        what = f"pictures {list(pictures.shape)}, of another seed {list(other_seed.shape)}, of the training"
        raise LdmPipeError(f"{what} {list(drawings.shape)}", "memorisation", "Give pictures of one size.")
    known = torch.unique(drawings.flatten(1).double(), dim=0)
    if len(known) < 2:
        raise LdmPipeError("fewer than two different training drawings", "memorisation", "Give the whole set.")
    drawn = pictures.flatten(1).double()
    root = drawn.shape[1] ** 0.5
    nearest = torch.cdist(drawn, known).amin(dim=1) / root
    apart = torch.cdist(known, known).fill_diagonal_(torch.inf).amin(dim=1) / root
    seeds = (drawn - other_seed.flatten(1).double()).norm(dim=1) / root
    usual = float(apart.median())
    copies = float((nearest < COPY * usual).double().mean())
    return Memorisation(float(nearest.median()), usual, float(seeds.median()), copies)


def fine_detail(images: Tensor) -> Tensor:
    """Return the power of fine detail: waves shorter than four pixels along either axis, constant part left out.

    Args:
        images: shape (B, 3, H, W).
    Returns: mean square of the fine waves of each picture, in squared pixel values, float64, shape (B,).
    """
    height, width = images.shape[-2:]
    power = torch.fft.fft2(images.double(), norm="ortho").abs().square()
    rows, columns = torch.fft.fftfreq(height).abs(), torch.fft.fftfreq(width).abs()
    fine = torch.maximum(rows[:, None], columns[None]) > 0.25  # cycles per pixel
    return (power * fine).mean(dim=(1, 2, 3))


def sharpness(pictures: Tensor, reconstructions: Tensor) -> float:
    """Return the fine detail of pictures over that of the autoencoder's reconstructions: 1 is as sharp as it allows.

    Args:
        pictures: drawn, shape (P, 3, H, W).
        reconstructions: of the drawings asked for, by the model's autoencoder, shape (R, 3, H, W).
    """
    return float(fine_detail(pictures).mean() / fine_detail(reconstructions).mean())


@torch.no_grad()
def report_likeness(
    pictures: Tensor,
    other_seed: Tensor,
    drawings: Tensor,
    rows: Sequence[int],
    autoencoder: Autoencoder,
    features: Features | None = None,
) -> dict[str, float]:
    """Measure memorisation and sharpness of pictures that were drawn for the captions of training drawings.

    Args:
        pictures, other_seed, drawings: as for `memorisation`.
        rows: which of the drawings were asked for, P numbers.
        autoencoder: of the model; its reconstructions of these drawings are what pictures can be at best.
        features: of the perceptual distance to the drawing asked for; None leaves it out.
    Returns: the fields of `Memorisation`, the distance of a reconstruction to the nearest drawing, `sharpness`, and
        with features both perceptual distances; rounded to four places.
    """
    wanted = drawings[list(rows)]
    parts = [autoencoder.decode(autoencoder.encode(part.to(autoencoder.device))) for part in wanted.split(20)]
    rebuilt = torch.cat(parts).clamp(-1, 1).cpu()
    found: dict[str, float] = asdict(memorisation(pictures, other_seed, drawings))
    found["rebuilt_to_drawing"] = memorisation(rebuilt, rebuilt, drawings).to_drawing
    found["sharpness"] = sharpness(pictures, rebuilt)
    if features is not None:
        found["perceptual"] = float(perceptual_distance(features, wanted, pictures).mean())
        found["perceptual_rebuilt"] = float(perceptual_distance(features, wanted, rebuilt).mean())
    return {name: round(value, 4) for name, value in found.items()}
