"""Samplers: pure functions (denoise, x, steps) -> x that read like the algorithm.

They know `Steps`, `Denoise` and `Noise` only. `get(name)` finds one by name, with the grid of times it is customarily
run on. Which there are stands in `ldm_pipe/sampler_table.py`: each name of that table is a function of this package.
"""

# ruff: noqa: F401  (what is offered is the table)
from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ldm_pipe.denoiser import Denoise
from ldm_pipe.noise import Draw, Noise
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.sampler_table import SAMPLERS
from ldm_pipe.samplers.common import Callback
from ldm_pipe.samplers.inversion import ddim_inversion
from ldm_pipe.samplers.names import suggest
from ldm_pipe.schedule import Grid, Steps

if TYPE_CHECKING:  # the loop below, spelt out for type checkers
    from ldm_pipe.samplers.ddim import ddim
    from ldm_pipe.samplers.ddpm import ddpm
    from ldm_pipe.samplers.deis import deis
    from ldm_pipe.samplers.dpm2 import dpm2, dpm2_ancestral
    from ldm_pipe.samplers.dpmpp import dpmpp_2m, dpmpp_3m
    from ldm_pipe.samplers.dpmpp_2s import dpmpp_2s, dpmpp_2s_ancestral
    from ldm_pipe.samplers.dpmpp_sde import dpmpp_2m_sde, dpmpp_3m_sde, dpmpp_sde
    from ldm_pipe.samplers.euler import euler, euler_ancestral
    from ldm_pipe.samplers.heun import edm, heun
    from ldm_pipe.samplers.langevin import annealed_langevin, predictor_corrector
    from ldm_pipe.samplers.lcm import lcm
    from ldm_pipe.samplers.lms import lms
    from ldm_pipe.samplers.plms import plms
    from ldm_pipe.samplers.restart import restart
    from ldm_pipe.samplers.unipc import unipc

NAMES: tuple[str, ...] = tuple(SAMPLERS)
__all__ = ["NAMES", "Callback", "Noise", "Sampler", "ddim_inversion", "get", *NAMES]

for _name, _row in SAMPLERS.items():  # a function takes the place of the file of its name
    globals()[_name] = getattr(importlib.import_module(f"ldm_pipe.samplers.{_row.file}"), _name)

_COMMON = {"noise", "eta", "callback"}  # what every sampler is called with


@dataclass(frozen=True)
class Sampler:
    """A sampler and its customs.

    Attributes:
        name: as in `NAMES`.
        function: the sampler itself; calling this object calls it.
        grid: for `NoiseSchedule.steps`; with it, diffusers' scheduler of the same name visits the same levels.
        has_eta: whether eta means something.
        always_stochastic: whether it needs noise whatever eta is.
        evaluations_per_step: calls of the denoiser per step with the default options; the step to sigma = 0 and one
            from alpha = 0 may need fewer. plms has one more in its first step, restart 12 more where it restarts.
    """

    name: str
    function: Callable[..., Tensor]
    grid: Grid
    has_eta: bool = False
    always_stochastic: bool = False
    evaluations_per_step: int = 1

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        steps: Steps,
        *,
        noise: Draw | None = None,
        eta: float = 0.0,
        callback: Callback | None = None,
        **options: Any,
    ) -> Tensor:
        """Run the sampler; see its own function.

        Raises: LdmPipeError for an eta or another option that the sampler does not take, naming what it takes.
        """
        unknown = [name for name in options if name not in self.options]
        if eta != 0 and not self.has_eta:
            unknown.insert(0, "eta")
        if unknown:
            known = ", ".join((*(["eta"] if self.has_eta else []), *self.options)) or "no options"
            raise LdmPipeError(
                f"the sampler {self.name} has no {' and no '.join(unknown)}", how_to_fix=f"it takes {known}"
            )
        return self.function(denoise, x, steps, noise=noise, eta=eta, callback=callback, **options)

    @property
    def options(self) -> tuple[str, ...]:
        """Return the names of the sampler's own keyword options."""
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in _COMMON)

    def needs_noise(self, eta: float) -> bool:
        """Return whether the function must be given noise."""
        return self.always_stochastic or (self.has_eta and eta > 0)


def get(name: str) -> Sampler:
    """Find a sampler by name.

    Raises: LdmPipeError naming the known samplers and the nearest, if there is none of this name.
    """
    row = SAMPLERS.get(name) if isinstance(name, str) else None
    if row is None:
        meant = suggest(str(name), NAMES)
        hint = f"did you mean {meant!r}? " if meant else ""
        raise LdmPipeError(f"unknown sampler {name!r}", how_to_fix=f"{hint}known: {', '.join(NAMES)}")
    function = getattr(importlib.import_module(f"{__name__}.{row.file}"), name)
    return Sampler(name, function, row.grid, row.has_eta, row.always_stochastic, row.evaluations_per_step)
