"""Mean and covariance of feature vectors, streamed: memory D x D whatever the number of pictures.

Feature vectors enter in batches; a `Moments` leaves, which other processes' can be merged with. All in float64: a
covariance is a difference of squares, and its small eigenvalues are what a Frechet distance between good models is made
of.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm_pipe.pretrained import LdmPipeError


def check_vectors(x: Tensor, where: str, *, least: int = 1) -> Tensor:
    """Refuse what is no (N, D), too few, or not finite.

    Raises: LdmPipeError saying which.
    """
    if x.ndim != 2 or not x.shape[1]:
        raise LdmPipeError(f"features of shape {list(x.shape)}", where, "Give (N, D).")
    if len(x) < least:
        raise LdmPipeError(f"{len(x)} samples, at least {least} are needed", where, "Draw or give more pictures.")
    bad = (~torch.isfinite(x)).any(dim=1).nonzero().flatten()
    if len(bad):
        what = (
            f"the features of {len(bad)} of {len(x)} pictures hold NaN or infinity, first those of number {int(bad[0])}"
        )
        raise LdmPipeError(what, where, "Look at that picture, or compute the features in float32.")
    return x


def check_pair(a: Tensor, b: Tensor, where: str, *, least: int = 2) -> None:
    """Refuse two sets that are not of one width, too few, or not finite."""
    for x in (a, b):
        check_vectors(x, where, least=least)
    if a.shape[1] != b.shape[1]:
        what = f"features of width {a.shape[1]} and {b.shape[1]}"
        raise LdmPipeError(what, where, "Compute both with the same network.")


@dataclass(frozen=True)
class Moments:
    """A Gaussian fitted to features.

    Attributes:
        mean, covariance: (D,) and (D, D), float64; the covariance divides by N - 1.
        num: N; None where a file does not tell.
    """

    mean: Tensor
    covariance: Tensor
    num: int | None = None
    _root: list[Tensor] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the shapes.

        Raises: LdmPipeError if they do not belong together or hold NaN.
        """
        width = self.mean.numel()
        if self.mean.ndim != 1 or tuple(self.covariance.shape) != (width, width):
            what = f"mean and covariance of shapes {list(self.mean.shape)} and {list(self.covariance.shape)}"
            raise LdmPipeError(what, "statistics", "Give (D,) and (D, D).")
        if not (torch.isfinite(self.mean).all() and torch.isfinite(self.covariance).all()):
            raise LdmPipeError("mean or covariance hold NaN or infinity", "statistics", "Compute them anew.")

    @classmethod
    def of(cls, batches: Tensor | Iterable[Tensor]) -> Moments:
        """Fit to features, (N, D), or to batches of them.

        Raises: LdmPipeError for fewer than two samples, or NaN.
        """
        total = MomentSum()
        for batch in [batches] if isinstance(batches, Tensor) else batches:
            total.add(batch)
        return total.moments()

    @property
    def dim(self) -> int:
        """Return D."""
        return len(self.mean)

    @property
    def rank(self) -> int:
        """Return the rank of the covariance: at most N - 1."""
        return self.root().shape[1]

    def root(self) -> Tensor:
        """Return A with A A^T = covariance, shape (D, rank): eigenvectors of what is above rounding, computed once."""
        if not self._root:
            values, vectors = torch.linalg.eigh((self.covariance + self.covariance.T) / 2)
            kept = values > max(float(values[-1]), 0.0) * self.dim * torch.finfo(torch.float64).eps
            if self.num is not None:  # rounding cannot raise the rank above N - 1
                kept[: max(0, self.dim - (self.num - 1))] = False
            self._root.append(vectors[:, kept] * values[kept].sqrt())
        return self._root[0]

    def told(self) -> str:
        """Say what the covariance carries: 'N = 200, rank 199 of 2048'."""
        num = "unknown" if self.num is None else str(self.num)
        return f"N = {num}, rank {self.rank} of {self.dim}"


class MomentSum:
    """Add batches, in any order and over any number of processes.

    Means and scatters are joined after Chan, Golub & LeVeque 1983 (doi:10.1080/00031305.1983.10483115, eq. 2.1):

        S = S_a + S_b + (m_b - m_a)(m_b - m_a)^T N_a N_b / (N_a + N_b)
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self.num, self.mean, self.scatter = 0, torch.zeros(0), torch.zeros(0)

    def add(self, x: Tensor) -> None:
        """Add features, (B, D)."""
        x = check_vectors(x, "moments").double()
        mean = x.mean(0)
        centred = x - mean
        self._join(len(x), mean, centred.T @ centred)

    def merge(self, other: MomentSum) -> None:
        """Add what another one has seen."""
        if other.num:
            self._join(other.num, other.mean, other.scatter)

    def _join(self, num: int, mean: Tensor, scatter: Tensor) -> None:
        if not self.num:
            self.num, self.mean, self.scatter = num, mean.clone(), scatter.clone()
            return
        if len(mean) != len(self.mean):
            what = f"features of width {len(mean)} after those of width {len(self.mean)}"
            raise LdmPipeError(what, "moments", "Compute all with the same network.")
        total, difference = self.num + num, mean - self.mean
        self.scatter += scatter
        self.scatter.addr_(difference, difference, alpha=self.num * num / total)
        self.mean = self.mean + difference * (num / total)
        self.num = total

    def moments(self) -> Moments:
        """Return the Gaussian.

        Raises: LdmPipeError for fewer than two samples.
        """
        if self.num < 2:
            raise LdmPipeError(f"{self.num} samples, at least 2 are needed", "moments", "Draw or give more pictures.")
        return Moments(self.mean, self.scatter / (self.num - 1), self.num)
