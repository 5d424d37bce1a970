"""Distances of sets of features by a kernel: KID and CMMD, unbiased, with bootstrap intervals.

Feature vectors enter, an estimate leaves. They need no covariance, so that few samples make them uncertain but not
wrong: why they stand first in our tables. Kernels are computed in blocks; memory is the features and one block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm_pipe.metrics.estimate import Estimate, between_quantiles, bootstrap_counts
from ldm_pipe.metrics.moments import check_pair, check_vectors
from ldm_pipe.pretrained import LdmPipeError

Kernel = Callable[[Tensor, Tensor], Tensor]
BLOCK = 1024
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0


def polynomial(x: Tensor, y: Tensor) -> Tensor:
    """Return k(x, y) = (x.y / D + 1)^3, (N, M) (Binkowski et al. 2018, arXiv:1801.01401, sec. 4)."""
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def gaussian(sigma: float) -> Kernel:
    """Return the kernel k(x, y) = exp(-|x - y|^2 / (2 sigma^2))."""
    if not sigma > 0:
        raise LdmPipeError(f"sigma is {sigma}", "gaussian kernel", "Give a positive width; are all features equal?")

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        squared = x.square().sum(1)[:, None] - 2 * x @ y.T + y.square().sum(1)[None]
        return torch.exp(squared.clamp_min(0) / (-2 * sigma * sigma))

    return kernel


def median_distance(x: Tensor, most: int = 2000) -> float:
    """Return the median Euclidean distance between samples, the usual width where a paper names none.

    Args:
        most: only the first so many are looked at.
    """
    return float(torch.pdist(check_vectors(x, "median distance", least=2)[:most].double()).median())


def mmd_squared(
    x: Tensor, y: Tensor, kernel: Kernel, *, unbiased: bool = True, num_bootstraps: int = 0, seed: int = 0
) -> Estimate:
    """Estimate the squared maximum mean discrepancy (Gretton et al. 2012, JMLR 13, lemma 6 and eq. 5).

        sum_{i != j} k(x_i, x_j) / (N (N - 1)) + sum_{i != j} k(y_i, y_j) / (M (M - 1)) - 2 mean_ij k(x_i, y_j)

    The bootstrap resamples both sets. A sample drawn twice is not paired with itself, which would be the bias that the
    unbiased form leaves out: sample i weighs w_i, its own pairs w_i^2 k(x_i, x_i) are left out above and below.

    Args:
        x, y: features, (N, D) and (M, D); computed in float64.
        unbiased: False keeps the pairs of a sample with itself (never negative, and 0 for equal sets).
        num_bootstraps: resampled sets for the 95 % interval; 0 for none.
    """
    check_pair(x, y, "maximum mean discrepancy")
    x, y = x.double(), y.double()
    generator = torch.Generator().manual_seed(seed)
    weights = [_with_ones(len(part), num_bootstraps, generator).to(x.device) for part in (x, y)]
    within = [_within(part, w, kernel, unbiased) for part, w in zip((x, y), weights, strict=True)]
    across = torch.zeros(num_bootstraps + 1, dtype=torch.float64, device=x.device)
    for rows in range(0, len(x), BLOCK):
        part = slice(rows, rows + BLOCK)
        across += (weights[0][part] * (kernel(x[part], y) @ weights[1])).sum(0)
    found = (within[0] + within[1] - 2 * across / (len(x) * len(y))).cpu()
    return between_quantiles(float(found[0]), found[1:])


def _with_ones(num: int, num_bootstraps: int, generator: torch.Generator) -> Tensor:
    """Weights of the set as it is, then of the resampled ones: (num, 1 + num_bootstraps)."""
    return torch.cat([torch.ones(num, 1, dtype=torch.float64), bootstrap_counts(num, num_bootstraps, generator)], 1)


def _within(x: Tensor, weights: Tensor, kernel: Kernel, unbiased: bool) -> Tensor:
    total = torch.zeros(weights.shape[1], dtype=torch.float64, device=x.device)
    for rows in range(0, len(x), BLOCK):
        part = slice(rows, rows + BLOCK)
        block, w = kernel(x[part], x), weights[part]
        total += (w * (block @ weights)).sum(0)
        if unbiased:
            own = block[torch.arange(len(block)), torch.arange(rows, rows + len(block))]
            total -= own @ w.square()
    pairs = weights.sum(0).square() - (weights.square().sum(0) if unbiased else 0)
    return total / pairs


def kid(x: Tensor, y: Tensor, *, num_bootstraps: int = 0, seed: int = 0) -> Estimate:
    """Return the kernel Inception distance (Binkowski et al. 2018, arXiv:1801.01401): all samples, no subsets."""
    return mmd_squared(x, y, polynomial, num_bootstraps=num_bootstraps, seed=seed)


def cmmd(
    x: Tensor,
    y: Tensor,
    *,
    sigma: float = CMMD_SIGMA,
    unbiased: bool = True,
    num_bootstraps: int = 0,
    seed: int = 0,
) -> Estimate:
    """Return CMMD, 1000 MMD^2 with a Gaussian kernel (Jayasumana et al. 2024, arXiv:2401.09603, eq. 4).

    The paper's is for CLIP's embeddings of length 1 with sigma = 10; its code keeps the pairs of a sample with itself,
    which `unbiased=False` repeats.
    """
    found = mmd_squared(x, y, gaussian(sigma), unbiased=unbiased, num_bootstraps=num_bootstraps, seed=seed)
    return found.times(CMMD_SCALE)
