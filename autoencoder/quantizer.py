"""Vector quantisation: latents to their nearest codebook vectors, with gradients that train both.

Latents enter; codes, their indices and the two losses leave. How a codebook moves without gradients and how dead codes
come back is in codebook.py. Source: VQ-VAE (van den Oord et al. 2017, arXiv:1711.00937, sections 3.1 and 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_DISTANCES = 2**22
"""Distances held at once: 16 MB in float32."""


@dataclass(frozen=True)
class Quantised:
    """Hold latents, and what the codebook has for them.

    Args:
        raw: the encoder's latents, (B, D, h, w).
        codes: the nearest codebook vectors, (B, D, h, w); gradients reach the codebook.
        indices: their numbers, (B, h, w), int64.
    """

    raw: Tensor
    codes: Tensor
    indices: Tensor

    def straight_through(self) -> Tensor:
        """Return the codes, with the gradient of the latents (VQ-VAE, arXiv:1711.00937, section 3.2)."""
        return self.raw + (self.codes - self.raw).detach()

    def commitment(self) -> Tensor:
        """Return mean (raw - sg[codes])^2, which pulls the latents to their codes, a scalar (eq. 3, third term)."""
        return F.mse_loss(self.raw, self.codes.detach())

    def codebook(self) -> Tensor:
        """Return mean (sg[raw] - codes)^2, which pulls the codes to their latents, a scalar (eq. 3, second term)."""
        return F.mse_loss(self.codes, self.raw.detach())


class VectorQuantizer(nn.Module):
    """Map latents to the nearest of `num_codes` vectors; named as in diffusers (`embedding.weight`).

    Args:
        num_codes: K.
        dim: D, channels of the latents.
    """

    def __init__(self, num_codes: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_codes, dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / num_codes, 1.0 / num_codes)

    @property
    def weight(self) -> Tensor:
        """Return the codebook, (K, D)."""
        return self.embedding.weight

    def keep_from_optimiser(self) -> None:
        """Make the codebook a buffer of the same name: no gradient, no weight decay; someone else moves it."""
        weight = self.embedding.weight.detach()
        del self.embedding.weight
        self.embedding.register_buffer("weight", weight)

    def forward(self, raw: Tensor) -> Quantised:
        """Quantise latents (B, D, h, w) in float32."""
        with torch.autocast(raw.device.type, enabled=False):
            raw, weight = raw.float(), self.weight.float()
            vectors = raw.movedim(1, -1)  # (B, h, w, D)
            indices = nearest(vectors.detach().flatten(0, 2), weight.detach()).view(vectors.shape[:3])
            codes = F.embedding(indices, weight).movedim(-1, 1)
        return Quantised(raw, codes, indices)


def nearest(vectors: Tensor, codes: Tensor) -> Tensor:
    """Return the number of the code nearest to each vector (VQ-VAE, arXiv:1711.00937, eq. 1).

    Distances are computed from differences, not from products: a code is then nearest to itself for certain.

    Args:
        vectors: (N, D).
        codes: (K, D).
    Returns: (N,), int64.
    """
    size = max(1, MAX_DISTANCES // len(codes))
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cat([torch.cdist(part, codes, compute_mode=mode).argmin(1) for part in vectors.split(size)])


def perplexity(counts: Tensor) -> Tensor:
    """Return exp(entropy) of how often codes are used: K if all are used alike, 1 if one is used.

    Args:
        counts: (K,), at least 0, not all 0.
    """
    share = counts.double() / counts.double().sum()
    return torch.exp(-torch.special.xlogy(share, share).sum())


def usage(counts: Tensor) -> Tensor:
    """Return the share of codes that are used at all, from counts (K,)."""
    return (counts > 0).double().mean()
