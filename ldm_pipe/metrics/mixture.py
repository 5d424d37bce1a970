"""Distributions whose answers are known: Gaussian mixtures in closed form, at any level x_t = alpha x0 + sigma eps.

Enters: means, standard deviations and weights. Leaves: samples, log densities, scores, the exact E[x0 | x_t] as a
`Denoise`, where the probability flow takes a point, and how far samples lie from the truth. The tests, the benchmark
of the samplers and the tutorial measure against these. This file does not know networks or samplers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ldm_pipe.denoiser import Denoise, Denoised
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule.process import Coefficient

Numbers = Tensor | Sequence[float] | Sequence[Sequence[float]]


class Levels(Protocol):
    """What is needed of a noise law."""

    def alpha_sigma(self, t: Tensor, /) -> tuple[Tensor, Tensor]: ...  # noqa: D102


class GaussianMixture:
    """p(x0) = sum_k weights_k N(means_k, stds_k^2 I) in D dimensions; K = 1 is a single Gaussian.

    A level (alpha, sigma) maps it to the mixture with means alpha means_k and variances alpha^2 stds_k^2 + sigma^2,
    which is where all closed forms come from. Everything is computed in float64 and returned in the dtype of x.

    Attributes:
        means: shape (K, D).
        stds: shape (K,), positive.
        weights: shape (K,), positive; they are normalised.
    """

    def __init__(self, means: Numbers, stds: Numbers, weights: Numbers | None = None) -> None:
        """Describe the components; without weights all are equally frequent."""
        self.means = torch.as_tensor(means, dtype=torch.float64)
        self.stds = torch.as_tensor(stds, dtype=torch.float64)
        raw = torch.ones_like(self.stds) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
        if self.means.ndim != 2 or not self.stds.shape == raw.shape == self.means.shape[:1]:
            raise LdmPipeError(
                f"means {tuple(self.means.shape)}, stds {tuple(self.stds.shape)}, weights {tuple(raw.shape)}",
                where="GaussianMixture",
                how_to_fix="give shapes (K, D), (K,) and (K,)",
            )
        if not bool((self.stds > 0).all() and (raw > 0).all()):
            raise LdmPipeError("stds and weights must be positive", where="GaussianMixture", how_to_fix="drop the rest")
        self.weights = raw / raw.sum()

    @property
    def dim(self) -> int:
        """Return D, the number of dimensions."""
        return self.means.shape[1]

    def mean(self) -> Tensor:
        """Return E[x0], shape (D,)."""
        return self.weights @ self.means

    def covariance(self) -> Tensor:
        """Return Cov[x0], shape (D, D)."""
        spread = (self.weights @ self.stds.square()) * torch.eye(self.dim, dtype=torch.float64)
        centred = self.means - self.mean()
        return spread + centred.T @ (self.weights[:, None] * centred)

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw x0, float64, shape (num_samples, D)."""
        k = torch.multinomial(self.weights, num_samples, replacement=True, generator=generator)
        eps = torch.randn((num_samples, self.dim), generator=generator, dtype=torch.float64)
        return self.means[k] + self.stds[k, None] * eps

    def noised(self, alpha: float, sigma: float) -> GaussianMixture:
        """Return the distribution of x_t = alpha x0 + sigma eps."""
        return GaussianMixture(alpha * self.means, self._stds(alpha, sigma), self.weights)

    def project(self, direction: Tensor) -> GaussianMixture:
        """Return the one-dimensional distribution of the component of x0 along a direction, shape (D,)."""
        unit = direction.double() / direction.double().norm()
        return GaussianMixture((self.means @ unit)[:, None], self.stds, self.weights)

    def log_prob(self, x: Tensor, alpha: Coefficient = 1.0, sigma: Coefficient = 0.0) -> Tensor:
        """Return log p(x_t) at a level, shape (B,).

        Args:
            x: shape (B, *) of D numbers each.
            alpha: scalar or shape (B,).
            sigma: scalar or shape (B,).
        """
        return self._joint(*self._centred(x, alpha, sigma)).logsumexp(1).to(x.dtype)

    def score(self, x: Tensor, alpha: Coefficient = 1.0, sigma: Coefficient = 0.0) -> Tensor:
        """Return the gradient of log p(x_t) by x_t, shape (B, *); arguments as in `log_prob`."""
        centred, variance = self._centred(x, alpha, sigma)
        share = self._joint(centred, variance).softmax(1) / variance  # (B, K)
        return -(share[..., None] * centred).sum(1).reshape(x.shape).to(x.dtype)

    def x0(self, x: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
        """Return E[x0 | x_t], shape (B, *); arguments as in `log_prob`.

            sum_k p(k | x_t) (mean_k + alpha std_k^2 / (alpha^2 std_k^2 + sigma^2) (x_t - alpha mean_k))

        It divides by neither alpha nor sigma, so it is right at pure noise and at clean data.
        """
        centred, variance = self._centred(x, alpha, sigma)
        gain = _column(alpha) * self.stds.square() / variance
        share = self._joint(centred, variance).softmax(1)
        found = (share[..., None] * (self.means + gain[..., None] * centred)).sum(1)
        return found.reshape(x.shape).to(x.dtype)

    def denoiser(self, law: Levels) -> Denoise:
        """Return the perfect denoiser (x_t, t) -> E[x0 | x_t] under a noise law."""

        def denoise(x: Tensor, t: Tensor) -> Denoised:
            return Denoised(self.x0(x, *law.alpha_sigma(t)))

        return denoise

    def cdf(self, x: Tensor) -> Tensor:
        """Return P(x0 <= x), float64, in x's shape; in one dimension."""
        self._one_dimensional()
        z = (x.double()[..., None] - self.means[:, 0]) / self.stds
        return torch.special.ndtr(z) @ self.weights

    def quantile(self, u: Tensor) -> Tensor:
        """Return x with cdf(x) = u in (0, 1), float64, in u's shape; in one dimension, by bisection."""
        self._one_dimensional()
        low = (self.means[:, 0] - 9 * self.stds).min().expand(u.shape)
        high = (self.means[:, 0] + 9 * self.stds).max().expand(u.shape)
        for _ in range(60):  # halves the bracket below the rounding of float64
            middle = (low + high) / 2
            below = self.cdf(middle) < u
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def flow(self, x: Tensor, start: tuple[float, float], end: tuple[float, float]) -> Tensor:
        """Return where the probability flow (Song et al. 2021, arXiv:2011.13456, eq. 13) takes x, exactly.

        The flow keeps the standard score of a Gaussian in any dimension and, since it keeps the order of points, the
        rank of any distribution in one dimension (to within rounding up to 6 standard deviations from the means).

        Args:
            x: states at the start, shape (B, *).
            start: (alpha, sigma) of x.
            end: (alpha, sigma) to go to.

        Returns: the states at the end, shape (B, *).

        Raises: LdmPipeError for several components in several dimensions, which have no closed form.
        """
        if len(self.means) == 1:
            here, there = (self._stds(*level) for level in (start, end))
            moved = end[0] * self.means + there / here * (x.double().flatten(1) - start[0] * self.means)
            return moved.reshape(x.shape).to(x.dtype)
        self._one_dimensional()
        return self.noised(*end).quantile(self.noised(*start).cdf(x)).to(x.dtype)

    def wasserstein(self, samples: Tensor) -> float:
        """Return the Wasserstein-1 distance of samples, shape (n, 1), from this distribution; in one dimension."""
        n = samples.numel()
        ranks = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        return float((samples.double().flatten().sort().values - self.quantile(ranks)).abs().mean())

    def kolmogorov(self, samples: Tensor) -> float:
        """Return the largest difference of the distribution functions of samples, shape (n, 1), and this; in one
        dimension. True samples exceed 1.95 / sqrt(n) once in a thousand times.
        """
        u, n = self.cdf(samples.flatten()).sort().values, samples.numel()
        above = torch.arange(1, n + 1, dtype=torch.float64) / n - u
        return float(torch.maximum(above, 1 / n - above).max())

    def _stds(self, alpha: float, sigma: float) -> Tensor:
        return (alpha**2 * self.stds.square() + sigma**2).sqrt()

    def _centred(self, x: Tensor, alpha: Coefficient, sigma: Coefficient) -> tuple[Tensor, Tensor]:
        """Return x_t - alpha mean_k, shape (B, K, D), and the variances of the components, (B or 1, K)."""
        alpha, sigma = _column(alpha), _column(sigma)
        flat = x.double().flatten(1)[:, None]  # (B, 1, D)
        return flat - alpha[..., None] * self.means, (alpha * self.stds).square() + sigma.square()

    def _joint(self, centred: Tensor, variance: Tensor) -> Tensor:
        """Return log p(k, x_t), shape (B, K)."""
        normal = centred.square().sum(2) / variance + self.dim * (2 * math.pi * variance).log()
        return self.weights.log() - normal / 2

    def _one_dimensional(self) -> None:
        if self.dim != 1:
            raise LdmPipeError(
                f"ranks and quantiles need one dimension, this mixture has {self.dim}", how_to_fix="project() it first"
            )


def _column(coefficient: Coefficient) -> Tensor:
    """Return a scalar or one number per sample as float64, shape (1 or B, 1)."""
    return torch.as_tensor(coefficient, dtype=torch.float64).reshape(-1, 1)
