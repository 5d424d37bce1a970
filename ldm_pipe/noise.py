"""Gaussian noise that belongs to a picture, not to a batch.

Enters: one seed (or one torch.Generator) per sample. Leaves: noise of which row i is drawn by generator i alone, so
that a picture is the same at any batch size, beside any neighbours and on any device. This file knows nothing else of
ours but errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm_pipe.pretrained import LdmPipeError

Shape = Sequence[int]
Draw = Callable[[Shape], Tensor]  # what samplers take: a `Noise`, or anything that draws


class Noise:
    """A source of unit Gaussian noise with one CPU generator per sample; each call draws the next numbers."""

    def __init__(self, seeds: Sequence[int]) -> None:
        """Start one generator per seed."""
        seeds = list(seeds)
        for seed in seeds:
            if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
                raise LdmPipeError(f"seed is {seed!r}", how_to_fix=f"use whole numbers from 0 to {2**63 - 1}")
        self._generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self._shared = False

    @classmethod
    def from_generators(cls, generators: Sequence[torch.Generator]) -> Noise:
        """Use one generator per sample, from where each stands."""
        noise = cls([])
        noise._generators = list(generators)
        return noise

    @classmethod
    def from_generator(cls, generator: torch.Generator) -> Noise:
        """Draw whole batches from one generator, as diffusers does; row i then depends on the batch size."""
        noise = cls.from_generators([generator])
        noise._shared = True
        return noise

    @property
    def generators(self) -> torch.Generator | list[torch.Generator]:
        """Return the generators, one per sample, or the one that is shared: what diffusers takes as `generator`."""
        return self._generators[0] if self._shared else self._generators

    def __call__(self, shape: Shape) -> Tensor:
        """Draw noise, float32, on the generators' device.

        Args:
            shape: (B, *), B being the number of generators unless one is shared.
        """
        if self._shared:
            generator = self._generators[0]
            return torch.randn(tuple(shape), generator=generator, device=generator.device)
        if len(self._generators) != shape[0]:
            raise LdmPipeError(
                f"noise for {shape[0]} samples from {len(self._generators)} seeds",
                how_to_fix="give one seed per sample",
            )
        rows = [torch.randn((1, *shape[1:]), generator=g, device=g.device) for g in self._generators]
        return torch.cat(rows)  # (B, *)
