"""The rows a sampler walks down: aligned times and levels.

Enters: vectors that a noise law chose. Leaves: pairs of levels for samplers. This file does not know noise laws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ldm_pipe.pretrained import LdmPipeError


@dataclass(frozen=True)
class Steps:
    """The rows a sampler walks down, from noise to clean; n steps have n + 1 rows, float64 on the CPU.

    A step reads row i and arrives at row i + 1, unless `next_alpha`, `next_sigma` (n each) say otherwise, which
    exists only to repeat what a peer does: diffusers' DDIMScheduler arrives at other times than it evaluates next.

    Attributes:
        t: times of the noise law, shape (n + 1,); the last one is never shown to the network.
        alpha: shape (n + 1,); the last one is 1.
        sigma: shape (n + 1,); the last one is 0.
        init_scale: what unit Gaussian noise is multiplied with to start at row 0.
        levels: the law itself, half_log_snr -> (t, alpha, sigma); see `at`.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    init_scale: float = 1.0
    next_alpha: Tensor | None = None
    next_sigma: Tensor | None = None
    levels: Callable[[float], tuple[float, float, float]] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        assert self.t.shape == self.alpha.shape == self.sigma.shape and self.t.ndim == 1
        assert all(vector.dtype == torch.float64 for vector in (self.t, self.alpha, self.sigma))
        if len(self.t) < 2:
            raise LdmPipeError("no steps to do", where="Steps", how_to_fix="use at least one step")
        if not bool((self.t[1:] < self.t[:-1]).all()):
            raise LdmPipeError(
                f"times must fall from noise to clean without repeats, got {self.t.tolist()}",
                where="Steps",
                how_to_fix="use fewer steps or other times",
            )

    @classmethod
    def down(cls, *rows: Tensor, end: tuple[float, float, float], **known: Any) -> Steps:
        """Return the rows t, alpha and sigma, shape (n,) each, and below them the end.

        Args:
            end: t, alpha and sigma of the last row.
            known: `init_scale` and `levels`.
        """
        return cls(*(torch.cat([row, row.new_tensor([last])]) for row, last in zip(rows, end, strict=True)), **known)

    @property
    def num_steps(self) -> int:
        """Return the number of solver steps, one less than the rows."""
        return len(self.t) - 1

    def pairs(self) -> Iterator[tuple[Tensor, float, float, float, float]]:
        """Yield (t, alpha_t, sigma_t, alpha_s, sigma_s) for each step from level t to the cleaner level s."""
        next_alpha = self.alpha[1:] if self.next_alpha is None else self.next_alpha
        next_sigma = self.sigma[1:] if self.next_sigma is None else self.next_sigma
        levels = (vector.tolist() for vector in (self.alpha[:-1], self.sigma[:-1], next_alpha, next_sigma))
        yield from zip(self.t[:-1], *levels, strict=True)

    def at(self, half_log_snr: float) -> tuple[Tensor, float, float]:
        """Return (t, alpha, sigma) where log(alpha / sigma) is half_log_snr, for solvers that look between the rows.

        Beyond the levels of the law alpha and sigma go on in its frame, as far as that reaches, and t is the law's
        nearest time.

        Raises: LdmPipeError if the steps were built by hand, without `levels`.
        """
        if self.levels is None:
            raise LdmPipeError(
                "these steps do not know the levels between their rows",
                where="Steps",
                how_to_fix="take them from the steps() of a schedule, or give them levels=",
            )
        t, alpha, sigma = self.levels(half_log_snr)
        return torch.tensor(t, dtype=torch.float64), alpha, sigma

    def from_strength(self, strength: float) -> Steps:
        """Keep the last int(num_steps * strength) steps, to start from a diffused picture (SDEdit, arXiv:2108.01073).

        Args:
            strength: in (0, 1]; 1 keeps all steps.

        Returns: the remaining steps; diffuse the picture to their row 0.

        Raises: LdmPipeError if strength is outside (0, 1] or leaves no step.
        """
        if not 0 < strength <= 1:
            raise LdmPipeError(f"strength is {strength}", how_to_fix="use a number above 0 and up to 1")
        kept = int(self.num_steps * strength)  # as diffusers counts
        if kept == 0:
            raise LdmPipeError(
                f"strength {strength} of {self.num_steps} steps leaves nothing to do",
                how_to_fix=f"use {math.ceil(1 / strength)} steps or a strength of {1 / self.num_steps:g} at least",
            )
        return self.from_row(self.num_steps - kept)

    def from_row(self, i: int) -> Steps:
        """Return the rows from the i-th on, for a walk that begins in the middle."""
        return replace(
            self,
            t=self.t[i:],
            alpha=self.alpha[i:],
            sigma=self.sigma[i:],
            next_alpha=None if self.next_alpha is None else self.next_alpha[i:],
            next_sigma=None if self.next_sigma is None else self.next_sigma[i:],
        )
