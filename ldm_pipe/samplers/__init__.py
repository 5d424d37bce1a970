"""Samplers: pure functions (denoise, x, steps) -> x that read like the algorithm.

They know `Steps`, `Denoise` and `Noise` only. `get(name)` finds one by name, with the grid of times it is customarily
run on.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from ldm_pipe.denoiser import Denoise
from ldm_pipe.noise import Draw, Noise
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.samplers.common import Callback
from ldm_pipe.samplers.ddim import ddim
from ldm_pipe.samplers.ddpm import ddpm
from ldm_pipe.samplers.dpmpp import dpmpp_2m
from ldm_pipe.samplers.euler import euler
from ldm_pipe.schedule import Grid, Steps

__all__ = ["NAMES", "Callback", "Noise", "Sampler", "ddim", "ddpm", "dpmpp_2m", "euler", "get"]

Name = Literal["ddpm", "ddim", "euler", "dpmpp_2m"]
NAMES: tuple[str, ...] = get_args(Name)


@dataclass(frozen=True)
class Sampler:
    """A sampler and its customs.

    Attributes:
        name: as in `NAMES`.
        function: the sampler itself; calling this object calls it.
        grid: for `NoiseSchedule.steps`; with it, diffusers' scheduler of the same name visits the same levels.
        has_eta: whether eta means something.
        always_stochastic: whether it needs noise whatever eta is.
    """

    name: str
    function: Callable[..., Tensor]
    grid: Grid
    has_eta: bool = False
    always_stochastic: bool = False

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        steps: Steps,
        *,
        noise: Draw | None = None,
        eta: float = 0.0,
        callback: Callback | None = None,
    ) -> Tensor:
        """Run the sampler; see its own function."""
        return self.function(denoise, x, steps, noise=noise, eta=eta, callback=callback)

    def needs_noise(self, eta: float) -> bool:
        """Return whether the function must be given noise."""
        return self.always_stochastic or (self.has_eta and eta > 0)


def get(name: str) -> Sampler:
    """Find a sampler by name.

    Raises: LdmPipeError naming the known samplers and the nearest, if there is none of this name.
    """
    match name:
        case "ddpm":
            return Sampler(name, ddpm, "integer", always_stochastic=True)
        case "ddim":
            return Sampler(name, ddim, "integer", has_eta=True)
        case "euler":
            return Sampler(name, euler, "fractional")
        case "dpmpp_2m":
            return Sampler(name, dpmpp_2m, "multistep")
    nearest = difflib.get_close_matches(str(name).lower(), NAMES, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise LdmPipeError(f"unknown sampler {name!r}", how_to_fix=f"{hint}known: {', '.join(NAMES)}")
