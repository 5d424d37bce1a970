"""What an autoencoder loses and what its latents are like: the report after its training.

An autoencoder and batches of images enter; a report and pairs of pictures leave. Perceptual distance and Frechet
distance are measured with features at hand; whose they are is the caller's to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from autoencoder import Autoencoder, VQModel
from autoencoder.losses import Features, perceptual_distance
from autoencoder.quantizer import perplexity, usage
from ldm_pipe.metrics.frechet import frechet_distance
from ldm_pipe.metrics.images import psnr, ssim

NUM_BANDS = 8


@dataclass(frozen=True)
class ReconstructionReport:
    """Means over all pictures of a set; what was not measured is None.

    Args:
        psnr: in dB.
        ssim: at most 1.
        perceptual: LPIPS form, under the features given.
        frechet: between originals and reconstructions, under the embedding given.
        kl: divergence of the posterior from the standard normal, nats per picture (KL only).
        codebook_usage: share of the codes that the set uses (VQ only).
        codebook_perplexity: as many codes, used alike, would be as rich (VQ only).
        latent_mean, latent_std: of the normalised latents, per channel.
        latent_spectrum: share of their variance in bands of spatial frequency, from coarse to fine.
    """

    psnr: float
    ssim: float
    perceptual: float | None
    frechet: float | None
    kl: float | None
    codebook_usage: float | None
    codebook_perplexity: float | None
    latent_mean: list[float]
    latent_std: list[float]
    latent_spectrum: list[float]

    def to_json(self) -> dict[str, Any]:
        """Return what was measured, rounded to five decimal places."""
        return {name: _rounded(value) for name, value in asdict(self).items() if value is not None}

    def cells(self) -> list[str]:
        """Return the scalars in order, as cells of a table; what was not measured is a dash."""
        formats = {"psnr": ".2f", "ssim": ".4f", "perceptual": ".4f", "frechet": ".4f", "kl": ".0f"}
        formats |= {"codebook_usage": ".3f", "codebook_perplexity": ".0f"}
        values = {name: getattr(self, name) for name in formats}
        return ["-" if value is None else format(value, formats[name]) for name, value in values.items()]


def _rounded(value: float | list[float]) -> float | list[float]:
    return [round(v, 5) for v in value] if isinstance(value, list) else round(value, 5)


@torch.no_grad()
def report_reconstruction(
    autoencoder: Autoencoder,
    batches: Iterable[Tensor],
    *,
    features: Features | None = None,
    embed: Callable[[Tensor], Tensor] | None = None,
    num_shown: int = 0,
) -> tuple[ReconstructionReport, list[Tensor]]:
    """Encode to the most likely latents, decode, compare.

    Args:
        batches: images (B, 3, H, W) in [-1, 1].
        features: of the perceptual distance.
        embed: image -> (B, D), for the Frechet distance.
        num_shown: pictures to return.
    Returns: the report, and originals and reconstructions in turn, (3, H, W) each, for a sheet.
    """
    values: dict[str, list[Tensor]] = {}
    vectors: tuple[list[Tensor], list[Tensor]] = ([], [])
    latents, shown = [], []
    is_vq = isinstance(autoencoder, VQModel)
    counts = torch.zeros(autoencoder.num_codes if is_vq else 0, dtype=torch.int64)
    for image in batches:
        on_device = image.to(autoencoder.device)
        z = autoencoder.encode(on_device)
        other = autoencoder.decode(z).clamp(-1, 1).cpu()
        if isinstance(autoencoder, VQModel):
            counts += torch.bincount(autoencoder.quantise(z).indices.flatten().cpu(), minlength=len(counts))
        else:
            values.setdefault("kl", []).append(autoencoder.encode_moments(on_device).kl().cpu())
        values.setdefault("psnr", []).append(psnr(image, other))
        values.setdefault("ssim", []).append(ssim(image, other))
        if features is not None:
            values.setdefault("perceptual", []).append(perceptual_distance(features, image, other))
        if embed is not None:
            for kept, pictures in zip(vectors, (image, other), strict=True):
                kept.append(embed(pictures))
        latents.append(z.cpu())
        for pair in zip(image, other, strict=True):
            shown += pair if len(shown) < 2 * num_shown else ()
    means = {name: float(torch.cat(parts).double().mean()) for name, parts in values.items()}
    z = torch.cat(latents)
    report = ReconstructionReport(
        psnr=means["psnr"],
        ssim=means["ssim"],
        perceptual=means.get("perceptual"),
        frechet=None if embed is None else frechet_distance(*map(torch.cat, vectors)),
        kl=means.get("kl"),
        codebook_usage=float(usage(counts)) if is_vq else None,
        codebook_perplexity=float(perplexity(counts)) if is_vq else None,
        latent_mean=z.double().mean((0, 2, 3)).tolist(),
        latent_std=z.double().std((0, 2, 3), correction=0).tolist(),
        latent_spectrum=latent_spectrum(z).tolist(),
    )
    return report, shown


def latent_spectrum(z: Tensor, num_bands: int = NUM_BANDS) -> Tensor:
    """Return the share of the latents' variance in bands of spatial frequency, from coarse to fine.

    Bands are rings of equal width up to half a cycle per latent, where the corners of the square beyond belong to the
    last; the mean of each map is not counted. Latents of white noise have shares like the rings' areas; the smoother
    the latents, the more lies in the first bands.

    Args:
        z: (B, C, h, w).
    Returns: (num_bands,), float64, sum 1.
    """
    power = torch.fft.fft2(z.double(), norm="ortho").abs().square().mean((0, 1))  # (h, w)
    rows, columns = (torch.fft.fftfreq(size, dtype=torch.float64, device=z.device) for size in z.shape[2:])
    radius = (rows[:, None].square() + columns[None].square()).sqrt()
    power[0, 0] = 0.0
    band = (radius / 0.5 * num_bands).long().clamp_max(num_bands - 1)
    shares = torch.zeros(num_bands, dtype=torch.float64, device=z.device)
    shares.index_add_(0, band.flatten(), power.flatten())
    return shares / shares.sum()
