"""What the continuous noise laws have in common: steps from even times, from ramps, from numbers one by one.

Enters: a law's alpha_sigma and its inverse. Leaves: `Steps`. The laws themselves are in laws.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule.discrete import Final, Prediction, check_final, check_one_choice
from ldm_pipe.schedule.spacing import Grid, Ramp, Spacing, explicit, line, open_ramp, ramp
from ldm_pipe.schedule.steps import Steps

MAX_STEPS = 100_000


class Continuous:
    """What the continuous laws share: alpha_sigma, t_of, t_range and network_time are each law's own."""

    prediction: Prediction
    spacing: Spacing
    noisy_end: tuple[str, ...]
    config: Mapping[str, Any]
    t_end = 0.0  # the time of clean data, below all others

    @property
    def t_range(self) -> tuple[float, float]:
        """Return the times of the cleanest and of the noisiest level."""
        raise NotImplementedError

    def alpha_sigma(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at times t, float64, each of t's shape and on t's device."""
        raise NotImplementedError

    def t_of(self, half_log_snr: Tensor | float) -> Tensor:
        """Return the time where log(alpha / sigma) is half_log_snr, float64."""
        raise NotImplementedError

    def network_time(self, t: Tensor) -> Tensor:
        """Return what the network is told at t."""
        raise NotImplementedError

    def alpha(self, t: Tensor | float) -> Tensor:
        """Return alpha(t), float64."""
        return self.alpha_sigma(t)[0]

    def sigma(self, t: Tensor | float) -> Tensor:
        """Return sigma(t), float64."""
        return self.alpha_sigma(t)[1]

    def log_snr(self, t: Tensor | float) -> Tensor:
        """Return log(alpha^2 / sigma^2), float64; infinite where one of them is 0."""
        alpha, sigma = self.alpha_sigma(t)
        return 2 * (alpha.log() - sigma.log())

    def level(self, half_log_snr: float) -> tuple[float, float, float]:
        """Return (t, alpha, sigma) where log(alpha / sigma) is half_log_snr."""
        t = self.t_of(half_log_snr)
        alpha, sigma = self.alpha_sigma(t)
        return float(t), float(alpha), float(sigma)

    def final(self, sampler: str) -> Final:
        """Return what the config this was read from ends the steps of a sampler with, for `steps(final=)`."""
        return "first" if sampler in self.noisy_end else "clean"

    def to_config(self, sampler: str = "euler", **settings: Any) -> dict[str, Any]:
        """Write a diffusers scheduler config whose use in diffusers equals ours; see `schedule_export.write`."""
        from ldm_pipe.schedule import write

        return write.write(self, sampler, **settings)

    def steps(
        self,
        num_steps: int | None = None,
        *,
        spacing: Spacing | str | None = None,
        grid: Grid = "integer",
        final: Final = "clean",
        times: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        rho: float | None = None,
    ) -> Steps:
        """Choose the rows a sampler walks down; see `schedule.Law.steps`."""
        check_one_choice(num_steps, times, sigmas, None)
        if times is not None:
            return self._rows(explicit(times, "times", *self.t_range), final)
        if sigmas is not None:
            low, high = self._noise(torch.tensor(self.t_range, dtype=torch.float64), None).tolist()
            return self._rows(self._t_of_noise(explicit(sigmas, "sigmas", low, high), None), final)
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or not 1 <= num_steps <= MAX_STEPS:
            raise LdmPipeError(f"num_steps is {num_steps!r}", how_to_fix=f"use a whole number from 1 to {MAX_STEPS}")
        return self._rows(self._visited(num_steps, self.spacing if spacing is None else spacing, grid, rho), final)

    def _visited(self, num_steps: int, spacing: Spacing | str, grid: Grid, rho: float | None) -> Tensor:
        """Return the times of a number of steps."""
        low, high = self.t_range
        if spacing in get_args(Ramp):
            return self._ramp_times(num_steps, spacing, low, high, rho)
        return line(num_steps, spacing, grid, high, low)

    def _ramp_times(self, num_steps: int, kind: Ramp, low: float, high: float, rho: float | None) -> Tensor:
        """Return times whose noise levels are a ramp."""
        ends = torch.tensor([high, high - 1e-3 * (high - low), low], dtype=torch.float64)
        first, second, last = self._noise(ends, kind).tolist()
        finite = math.isfinite(first)
        noise = ramp(kind, num_steps, first, last, rho) if finite else open_ramp(kind, num_steps, second, last, rho)
        t = self._t_of_noise(noise, kind)
        t[0] = high
        return t

    def _noise(self, t: Tensor, kind: Ramp | None) -> Tensor:
        """Return the noise level that a ramp or a user's sigmas speak of: sigma / alpha."""
        alpha, sigma = self.alpha_sigma(t)
        return sigma / alpha

    def _t_of_noise(self, noise: Tensor, kind: Ramp | None) -> Tensor:
        """Return the times of these noise levels."""
        return self.t_of(-noise.log())

    def _init_scale(self, alpha: float, sigma: float) -> float:
        """Return what unit noise is multiplied with at the first row: its sigma, where no signal could hide it."""
        return sigma

    def _rows(self, t: Tensor, final: Final) -> Steps:
        """Return the steps at these times, and the end."""
        check_final(final)
        cleanest, end = self.t_range[0], (self.t_end, 1.0, 0.0)
        if final == "first":
            end = (cleanest if t[-1] > cleanest else self.t_end, *map(float, self.alpha_sigma(cleanest)))
        alpha, sigma = self.alpha_sigma(t)
        init_scale = self._init_scale(float(alpha[0]), float(sigma[0]))
        return Steps.down(t, alpha, sigma, end=end, init_scale=init_scale, levels=self.level)


def checked_times(t: Tensor | float, low: float, high: float) -> Tensor:
    """Return t as float64 on its device.

    Raises: LdmPipeError if a time on the CPU is out of range; on another device the check would wait for it.
    """
    time = torch.as_tensor(t, dtype=torch.float64)
    if time.device.type == "cpu" and not bool(((time >= low) & (time <= high)).all()):
        raise LdmPipeError(f"t from {time.min():g} to {time.max():g}", how_to_fix=f"times go from {low:g} to {high:g}")
    return time


def check_choice(law: object, name: str, allowed: Sequence[str]) -> None:
    """Refuse a field whose value is not one of the allowed."""
    value = getattr(law, name)
    if value not in allowed:
        where = type(law).__name__
        raise LdmPipeError(f"{name} is {value!r}", where=where, how_to_fix=f"use one of {', '.join(allowed)}")


def check_range(law: object, **ends: tuple[float, float]) -> None:
    """Refuse fields that are no finite numbers, or not above their lower and up to their upper end."""
    for name, (low, high) in ends.items():
        value = getattr(law, name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not (number and low < value <= high):
            advice = f"use a number above {low:g} and up to {high:g}"
            raise LdmPipeError(f"{name} is {value!r}", where=type(law).__name__, how_to_fix=advice)


def check_law(law: Continuous) -> None:
    """Refuse predictions and spacings that mean nothing on a law."""
    where = type(law).__name__
    check_choice(law, "prediction", get_args(Prediction))
    check_choice(law, "spacing", ("trailing", "linspace", *get_args(Ramp)))
    if law.prediction == "mean" or (law.prediction == "edm" and getattr(law, "sigma_data", None) is None):
        advice = 'the posterior mean needs a NoiseSchedule, "edm" the law EDM, or VE with sigma_data'
        raise LdmPipeError(f"prediction {law.prediction!r}", where=where, how_to_fix=advice)
    if law.prediction in ("eps", "score") and float(law.alpha(law.t_range[1])) == 0:
        what = f"prediction {law.prediction} on a law that reaches alpha = 0: at pure noise it says nothing about x0"
        raise LdmPipeError(what, where=where, how_to_fix='use prediction "flow" or "v", or a law that stops before')
