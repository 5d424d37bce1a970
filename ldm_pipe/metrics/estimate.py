"""A number with its interval: what every metric that can carry one returns.

Enters: a value and how it varies under resampling. Leaves: an `Estimate`. This file knows no metric.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

QUANTILE = 1.959963984540054  # of the standard normal: 95 % lie within


@dataclass(frozen=True)
class Estimate:
    """A value with a 95 % interval; None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None

    def times(self, factor: float) -> Estimate:
        """Change the unit."""
        ends = [None if end is None else factor * end for end in (self.low, self.high)]
        return Estimate(factor * self.value, ends[0], ends[1])


def between_quantiles(value: float, draws: Tensor) -> Estimate:
    """Take the interval that holds the middle 95 % of bootstrap draws (Efron 1979); none without draws."""
    if not len(draws):
        return Estimate(value)
    low, high = torch.quantile(draws.double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(value, low, high)


def by_spread(value: float, draws: Tensor) -> Estimate:
    """Take value +- 1.96 standard deviations of the draws, for statistics that resampling also shifts."""
    if len(draws) < 2:
        return Estimate(value)
    width = QUANTILE * float(draws.double().std())
    return Estimate(value, value - width, value + width)


def of_mean(x: Tensor) -> Estimate:
    """Return a mean of independent values, (N,), with +- 1.96 standard errors."""
    value = float(x.double().mean())
    if len(x) < 2:
        return Estimate(value)
    width = QUANTILE * float(x.double().std()) / math.sqrt(len(x))
    return Estimate(value, value - width, value + width)


def of_share(hits: Tensor) -> Estimate:
    """Return the share of True among booleans, (N,), with Wilson's interval (1927), which is right near 0 and 1."""
    n, share, z = len(hits), float(hits.double().mean()), QUANTILE
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    width = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Estimate(share, max(0.0, centre - width), min(1.0, centre + width))


def bootstrap_counts(num: int, num_bootstraps: int, generator: torch.Generator) -> Tensor:
    """Draw how often each of `num` samples appears in each resampled set: (num, num_bootstraps), columns sum to num."""
    chosen = torch.randint(num, (num_bootstraps, num), generator=generator)
    counts = torch.zeros(num_bootstraps, num, dtype=torch.float64)
    return counts.scatter_add_(1, chosen, torch.ones(1, dtype=torch.float64).expand(num_bootstraps, num)).T
