"""What nearest neighbours tell of two sets of features: precision, recall, density, coverage, and memorisation.

Feature vectors of a reference and of samples enter; shares with intervals leave. Distances are computed in blocks of
rows, in float64, or as ADM's evaluator does in half precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm_pipe.metrics.estimate import Estimate, of_mean, of_share
from ldm_pipe.metrics.moments import check_pair
from ldm_pipe.pretrained import LdmPipeError

Arithmetic = Literal["exact", "adm"]
BLOCK, ADM_BLOCK = 1024, 10000
EQUAL = 1e-12  # squared distances below this share of the lengths are rounding: the vectors are equal


def exact_squared(x: Tensor, y: Tensor) -> Tensor:
    """Return |x_i - y_j|^2, (N, M), float64; equal vectors are at distance 0, not at a rounding error."""
    x, y = x.double(), y.double()
    lengths = x.square().sum(1)[:, None] + y.square().sum(1)[None]
    squared = lengths - 2 * x @ y.T
    return torch.where(squared <= EQUAL * lengths, 0.0, squared)


def adm_squared(x: Tensor, y: Tensor) -> Tensor:
    """Return |x_i - y_j|^2 as guided-diffusion's evaluator computes it: every term rounded to half precision.

    Where half precision overflows anywhere in a block of 10,000 by 10,000, that block is computed in float32.
    """
    half = _expanded(x.half(), y.half())
    return half.float() if torch.isfinite(half).all() else _expanded(x.float(), y.float())


def _expanded(x: Tensor, y: Tensor) -> Tensor:
    kind = x.dtype
    products = (x.float() @ y.float().T).to(kind)  # summed in float32, as tensor cores and TensorFlow do
    lengths = [part.float().square().to(kind).float().sum(1).to(kind) for part in (x, y)]
    return (lengths[0][:, None] - 2 * products + lengths[1][None]).clamp_min(0)


def _distances(x: Tensor, y: Tensor, arithmetic: Arithmetic) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of rows of the squared distances of x from y."""
    squared: Callable[[Tensor, Tensor], Tensor] = adm_squared if arithmetic == "adm" else exact_squared
    size = ADM_BLOCK if arithmetic == "adm" else BLOCK
    for first in range(0, len(x), size):
        rows = slice(first, first + size)
        yield rows, torch.cat([squared(x[rows], part) for part in y.split(ADM_BLOCK)], dim=1)


def squared_radii(x: Tensor, k: int, arithmetic: Arithmetic = "exact") -> Tensor:
    """Return the squared distance of each vector from its k-th nearest other one, (N,)."""
    found = [block.kthvalue(k + 1, dim=1).values for _, block in _distances(x, x, arithmetic)]
    return torch.cat(found)  # k + 1: the nearest one is the vector itself


@dataclass(frozen=True)
class Manifolds:
    """How two sets lie in each other's balls.

    Attributes:
        precision: share of samples in a ball of the reference (Kynkaanniemi et al. 2019, arXiv:1904.06991, eq. 2).
        recall: share of the reference in a ball of the samples.
        density: balls of the reference around a sample, divided by k (Naeem et al. 2020, arXiv:2002.09797, eq. 3).
        coverage: share of the reference whose own ball holds a sample (eq. 4).
    """

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


def manifolds(reference: Tensor, samples: Tensor, *, k: int = 3, arithmetic: Arithmetic = "exact") -> Manifolds:
    """Measure precision, recall, density and coverage with balls that reach the k-th nearest neighbour.

    A vector on the edge of a ball is inside, as in the first paper. The intervals hold the balls fixed: they tell how
    far the shares would vary with other samples, not with another reference.

    Args:
        reference, samples: (N, D) and (M, D), more than k each.
        arithmetic: "adm" rounds as guided-diffusion's evaluator does.
    """
    check_pair(reference, samples, "precision and recall", least=k + 1)
    if k < 1:
        raise LdmPipeError(f"k is {k}", "precision and recall", "Use a whole number from 1.")
    real, drawn = (squared_radii(x, k, arithmetic) for x in (reference, samples))
    around = torch.zeros(len(samples), dtype=torch.int64, device=samples.device)
    recalled, covered = [], []
    for rows, block in _distances(reference, samples, arithmetic):
        inside = block <= real[rows, None]
        around += inside.sum(0)
        covered.append(inside.any(1))
        recalled.append((block <= drawn[None]).any(1))
    return Manifolds(
        precision=of_share(around > 0),
        recall=of_share(torch.cat(recalled)),
        density=of_mean(around.double() / k),
        coverage=of_share(torch.cat(covered)),
    )


@dataclass(frozen=True)
class Memorisation:
    """How near samples come to single training pictures, against how near those come to each other.

    Attributes:
        nearer: share of samples nearer to a training picture than 95 % of the training pictures are to their nearest
            other one; 0.05 for pictures as new as the training pictures are to each other.
        ratio: median distance of samples from the nearest training picture, over that among training pictures.
        authenticity: share of samples farther from their nearest training picture than that one is from its nearest
            other (Alaa et al. 2022, arXiv:2102.08921, sec. 3.3).
        distances: of each sample from its nearest training picture, (N,).
        nearest: which one that is, (N,).
    """

    nearer: Estimate
    ratio: float
    authenticity: Estimate
    distances: Tensor
    nearest: Tensor


def memorisation(training: Tensor, samples: Tensor) -> Memorisation:
    """Look for training pictures that a model has learnt by heart.

    Training pictures that are equal as vectors are one picture, or a drawing that is there twice would count as learnt.

    Args:
        training, samples: (N, D) and (M, D), in features that tell pictures apart.
    """
    check_pair(training, samples, "memorisation", least=2)
    first, training = _distinct(training)
    if len(training) < 2:
        raise LdmPipeError("all training pictures are equal", "memorisation", "Give at least two different ones.")
    among = squared_radii(training, 1).sqrt()
    found = [block.min(dim=1) for _, block in _distances(samples, training, "exact")]
    distances, nearest = torch.cat([part.values for part in found]).sqrt(), torch.cat([part.indices for part in found])
    limit = torch.quantile(among, 0.05)
    return Memorisation(
        nearer=of_share(distances < limit),
        ratio=float(distances.median() / among.median()),
        authenticity=of_share(distances > among[nearest]),
        distances=distances,
        nearest=first[nearest],
    )


def _distinct(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places where each vector stands first, in order, and the vectors there."""
    _, group = torch.unique(x, dim=0, return_inverse=True)
    first = torch.full((int(group.max()) + 1,), len(x), device=x.device)
    first = first.scatter_reduce(0, group, torch.arange(len(x), device=x.device), "amin").sort().values
    return first, x[first]
