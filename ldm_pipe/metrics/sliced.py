"""Distance of sets of features along random lines: MIND, a sliced Wasserstein distance.

Feature vectors enter, an estimate leaves. Along a line the best transport is sorting; no covariance is estimated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm_pipe.metrics.estimate import Estimate, by_spread
from ldm_pipe.metrics.moments import check_pair
from ldm_pipe.pretrained import LdmPipeError

NUM_PROJECTIONS = 1000
BLOCK = 100  # projections at once; the interval uses the first block


def directions(num: int, dim: int, seed: int) -> Tensor:
    """Draw directions, alike in all of space: (num, dim), float64, length 1."""
    drawn = torch.randn(num, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn / drawn.norm(dim=1, keepdim=True)


def couple(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Couple the quantiles of n and of m sorted samples: which go together, and with which share of the mass.

    Returns: places among the n, among the m, and shares that sum to 1; n + m - gcd(n, m) of each. For n = m each goes
        with its like.
    """
    ends = torch.unique(torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]))  # in 1 / (n m)
    starts = torch.cat([torch.zeros(1, dtype=ends.dtype), ends[:-1]])
    return starts // m, starts // n, (ends - starts).double() / (n * m)


def sliced_wasserstein_squared(x: Tensor, y: Tensor, lines: Tensor) -> Tensor:
    """Return W_2^2 of two sets along each line, exact also for unequal numbers: (num,).

    W_2^2 = integral_0^1 (F_x^-1(u) - F_y^-1(u))^2 du
    """
    here, there, share = (part.to(x.device) for part in couple(len(x), len(y)))
    found = []
    for part in lines.to(x.device).split(BLOCK):
        along_x, along_y = ((points @ part.T).sort(dim=0).values for points in (x, y))
        found.append(share @ (along_x[here] - along_y[there]).square())
    return torch.cat(found)


def mind(
    x: Tensor, y: Tensor, *, num_projections: int = NUM_PROJECTIONS, num_bootstraps: int = 0, seed: int = 0
) -> Estimate:
    """Return the Monge Inception distance (Berthet et al. 2026, arXiv:2605.06797).

        3 D mean over directions u of W_2^2(u.x, u.y)

    Sets of unequal size are coupled by their quantiles; the paper takes equal ones. Positive for two sets of one kind,
    like the Frechet distance, but much less so.

    Args:
        x, y: features, (N, D) and (M, D); computed in float64.
        num_bootstraps: resampled sets for the 95 % interval, on the first 100 directions.
    """
    check_pair(x, y, "mind")
    if num_projections < 1:
        raise LdmPipeError(f"num_projections is {num_projections}", "mind", "Use a whole number from 1.")
    x, y, scale = x.double(), y.double(), 3.0 * x.shape[1]
    lines = directions(num_projections, x.shape[1], seed)
    value = scale * float(sliced_wasserstein_squared(x, y, lines).mean())
    generator, few = torch.Generator().manual_seed(seed + 1), lines[:BLOCK].to(x.device)
    along = [points @ few.T for points in (x, y)]
    here, there, share = (part.to(x.device) for part in couple(len(x), len(y)))
    draws = []
    for _ in range(num_bootstraps):
        again = [points[torch.randint(len(points), (len(points),), generator=generator)] for points in along]
        first, second = (points.sort(dim=0).values for points in again)
        draws.append(scale * float((share @ (first[here] - second[there]).square()).mean()))
    return by_spread(value, torch.tensor(draws))
