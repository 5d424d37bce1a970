"""How far apart two sets of pictures are as a whole: the Frechet distance of their features.

Feature vectors enter, one number leaves. Whose features they are is the caller's matter and must be said beside the
number: distances under different features cannot be compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm_pipe.pretrained import LdmPipeError


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the squared Frechet distance of two Gaussians fitted to features (Heusel et al. 2017, arXiv:1706.08500).

        d^2 = |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))        (eq. 6)

    Few samples bias it upwards: compare sets of the same size.

    Args:
        a, b: features, (N, D) each, N at least 2; computed in float64.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        what = f"features of shape {list(a.shape)} and {list(b.shape)}"
        raise LdmPipeError(what, "frechet distance", "Give (N, D) twice, with at least two rows each.")
    (mean_a, cov_a), (mean_b, cov_b) = (_gaussian(x.double()) for x in (a, b))
    # The root of the product has the trace of the root of the symmetric S_a^(1/2) S_b S_a^(1/2).
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(float(distance), 0.0)


def _gaussian(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean(0)
    centred = x - mean
    return mean, centred.T @ centred / (len(x) - 1)
