"""How far apart two sets of pictures are as a whole: the Frechet distance of their features.

Feature vectors or their moments enter, one number leaves. Whose features they are is the caller's matter and must be
said beside the number: distances under different features cannot be compared, and only Inception's is called FID.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm_pipe.metrics.estimate import Estimate, bootstrap_counts, by_spread
from ldm_pipe.metrics.moments import Moments, check_pair
from ldm_pipe.pretrained import LdmPipeError


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the squared Frechet distance of two Gaussians fitted to features; see `frechet_of_moments`.

    Args:
        a, b: features, (N, D) each, N at least 2; computed in float64.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        what = f"features of shape {list(a.shape)} and {list(b.shape)}"
        raise LdmPipeError(what, "frechet distance", "Give (N, D) twice, with at least two rows each.")
    return frechet_of_moments(Moments.of(a), Moments.of(b))


def frechet_of_moments(a: Moments, b: Moments) -> float:
    """Return the squared Frechet distance of two Gaussians (Heusel et al. 2017, arXiv:1706.08500, eq. 6).

        d^2 = |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))

    With S = A A^T the last trace is the sum of the singular values of A_a^T A_b: no root of a singular matrix is taken,
    so that a covariance of low rank costs no accuracy. Few samples bias the distance upwards: compare sets of the
    same size.
    """
    if a.dim != b.dim:
        what = f"features of width {a.dim} and {b.dim}"
        raise LdmPipeError(what, "frechet distance", "Compute both with the same network.")
    cross = torch.linalg.svdvals(a.root().T @ b.root()).sum() if a.rank and b.rank else torch.zeros(())
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(float(distance), 0.0)


def frechet_estimate(a: Tensor, b: Tensor, *, num_bootstraps: int = 0, seed: int = 0) -> Estimate:
    """Return the Frechet distance of two sets of features with an interval from resampling both.

    The interval is the spread around the value, not the bias, which resampling doubles and which no interval tells.
    """
    check_pair(a, b, "frechet distance")
    value = frechet_of_moments(Moments.of(a), Moments.of(b))
    generator = torch.Generator().manual_seed(seed)
    counts = [bootstrap_counts(len(x), num_bootstraps, generator) for x in (a, b)]
    draws = [
        frechet_of_moments(*(_weighted(x, count[:, i]) for x, count in zip((a, b), counts, strict=True)))
        for i in range(num_bootstraps)
    ]
    return by_spread(value, torch.tensor(draws))


def _weighted(x: Tensor, counts: Tensor) -> Moments:
    total = float(counts.sum())
    x, counts = x.double(), counts.to(x.device)
    mean = counts @ x / total
    centred = (x - mean) * counts.sqrt()[:, None]
    return Moments(mean, centred.T @ centred / (total - 1), int((counts > 0).sum()))
