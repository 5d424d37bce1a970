"""The discrete noise law, and the rows a sampler visits.

Enters: betas by name and number, or a diffusers scheduler config. Leaves: alpha(t), sigma(t) in float64, and `Steps`,
the aligned rows a sampler walks down. Continuous laws are in laws.py, choices of times in spacing.py, diffusers'
scheduler files in schedule_config.py and schedule_export.py. This file does not know networks, samplers or data.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule.betas import BetaSchedule, make_betas, zero_terminal_snr
from ldm_pipe.schedule.spacing import Even, Grid, Ramp, Spacing, explicit, open_ramp, ramp, respace, whole_times
from ldm_pipe.schedule.steps import Steps

Prediction = Literal["eps", "x0", "v", "flow", "score", "mean", "edm"]
Final = Literal["clean", "first"]


class Law(Protocol):
    """A noise law: how much signal and noise there is at each time, and which times a sampler visits.

    `NoiseSchedule` is the discrete one; the continuous ones are in laws.py. Times grow with the noise.
    """

    @property
    def prediction(self) -> Prediction: ...  # noqa: D102
    @property
    def spacing(self) -> Spacing | None: ...  # noqa: D102
    @property
    def config(self) -> Mapping[str, Any]: ...  # noqa: D102
    @property
    def t_range(self) -> tuple[float, float]: ...  # noqa: D102
    def alpha_sigma(self, t: Tensor | float) -> tuple[Tensor, Tensor]: ...  # noqa: D102
    def alpha(self, t: Tensor | float) -> Tensor: ...  # noqa: D102
    def sigma(self, t: Tensor | float) -> Tensor: ...  # noqa: D102
    def log_snr(self, t: Tensor | float) -> Tensor: ...  # noqa: D102
    def t_of(self, half_log_snr: Tensor | float) -> Tensor: ...  # noqa: D102
    def network_time(self, t: Tensor) -> Tensor: ...  # noqa: D102
    def final(self, sampler: str) -> Final: ...  # noqa: D102
    def to_config(self, sampler: str = ..., **settings: Any) -> dict[str, Any]: ...  # noqa: D102

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
        """Choose the rows a sampler walks down, by exactly one of num_steps, times, sigmas and sections.

        Args:
            num_steps: at least 1; a discrete law has num_train_timesteps at most.
            spacing: even times ("leading" starts below the noisiest, "trailing" at it, "linspace" at it and ends at
                the cleanest), a ramp of `spacing.ramp`, or on a discrete law sections like "ddim25" or "10,15,20",
                which count the steps themselves; None is the law's own.
            grid: each family of samplers grew its own variant of even times; `samplers.get(name).grid` is the
                customary one. "integer": whole times (DDIM, DDPM); "fractional": linspace is not rounded (Euler);
                "multistep": n + 1 whole times of which the last is left out (DPM-Solver).
            final: "clean" ends at alpha = 1, sigma = 0; "first" ends at the cleanest level and leaves its noise in;
                `final(sampler)` says what the config asks for that the law was read from.
            times: falling times one by one, in t_range.
            sigmas: falling noise levels one by one, without the 0 at the end: sigma / alpha, on `Flow` sigma itself.
            rho: of the ramps "karras" and "polynomial"; None is customary.

        Returns: one row more than steps; the last is (alpha 1, sigma 0) unless final is "first".

        Raises: LdmPipeError for what does not fit the law, repeats or does not fall.
        """
        ...


@dataclass(frozen=True)
class NoiseSchedule:
    """A discrete variance-preserving noise law: alpha^2 = alpha_bar = prod (1 - beta), sigma^2 = 1 - alpha_bar.

    Times are 0 .. num_train_timesteps - 1, and t = 0 is already a little noisy. Fractional times interpolate sigma /
    alpha linearly (as Euler samplers of EDM's frame expect); at a zero terminal SNR, where it is infinite, its
    inverse.

    Attributes:
        beta_schedule: name of the law; see `make_betas`.
        beta_start: first beta.
        beta_end: last beta.
        num_train_timesteps: number of noise levels.
        prediction: what a network trained on this law outputs.
        spacing: default choice of even times, None if unknown: then `steps` must be told.
        steps_offset: shift of the times of "leading" spacing; Stable Diffusion uses 1.
        zero_terminal_snr: rescale so that the last level is pure noise.
        trained_betas: explicit betas that replace the named law.
        ramp: noise levels over the range of the even times, which replace these; None for none.
        noisy_end: names of the samplers that, by the config this was read from, end at t = 0 and leave its noise in.
        config: the scheduler config this was read from, unknown keys included; empty if built by hand.
    """

    beta_schedule: BetaSchedule = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000
    prediction: Prediction = "eps"
    spacing: Even | None = "leading"
    steps_offset: int = 1
    zero_terminal_snr: bool = False
    trained_betas: tuple[float, ...] | None = None
    ramp: Ramp | None = None
    noisy_end: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    _edm: Tensor = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_choices(self)
        if self.trained_betas is not None:
            betas = torch.tensor(self.trained_betas, dtype=torch.float64)
        else:
            betas = make_betas(self.beta_schedule, self.beta_start, self.beta_end, self.num_train_timesteps)
        if not bool(((betas > 0) & (betas <= 1)).all()):
            raise LdmPipeError(
                f"betas reach from {betas.min():g} to {betas.max():g}",
                where="NoiseSchedule",
                how_to_fix="every beta must be above 0 and at most 1; customary ends are 0.00085 and 0.012",
            )
        alpha_bar = (1 - betas).cumprod(0)
        if self.zero_terminal_snr:
            alpha_bar = zero_terminal_snr(alpha_bar)
        if self.prediction in ("eps", "score") and alpha_bar[-1] == 0:
            raise LdmPipeError(
                f"prediction {self.prediction} with a zero terminal SNR: at pure noise it says nothing about x0",
                where="NoiseSchedule",
                how_to_fix='train with prediction="v", or leave zero_terminal_snr (rescale_betas_zero_snr) off',
            )
        object.__setattr__(self, "_edm", ((1 - alpha_bar) / alpha_bar).sqrt())  # sigma / alpha, inf at zero SNR

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read a diffusers scheduler config of a discrete law; `schedule_config.read` takes the others too."""
        from ldm_pipe.schedule import read as schedule_config

        law = schedule_config.read(config)
        if not isinstance(law, NoiseSchedule):
            found, advice = f"a {type(law).__name__} law of continuous times", "read it with schedule_config.read"
            raise LdmPipeError(found, where="NoiseSchedule.from_config", how_to_fix=advice)
        return law

    def to_config(self, sampler: str = "ddim", **settings: Any) -> dict[str, Any]:
        """Write a diffusers scheduler config whose use in diffusers equals ours; see `schedule_export.write`."""
        from ldm_pipe.schedule import write

        return write.write(self, sampler, **settings)

    def final(self, sampler: str) -> Final:
        """Return what the config this was read from ends the steps of a sampler with, for `steps(final=)`."""
        return "first" if sampler in self.noisy_end else "clean"

    def alpha_sigma(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at times t, float64, each of t's shape and on t's device.

        Args:
            t: in [0, num_train_timesteps - 1], may be fractional, any shape.
        """
        time = torch.as_tensor(t, dtype=torch.float64)
        last = self.num_train_timesteps - 1
        # on another device the check would wait for it
        if time.device.type == "cpu" and not bool(((time >= 0) & (time <= last)).all()):
            raise LdmPipeError(f"t from {time.min():g} to {time.max():g}", how_to_fix=f"times go from 0 to {last}")
        table = self._edm.to(time.device)
        low = time.floor().clamp(0, max(last - 1, 0)).long()
        below, above = table[low], table[(low + 1).clamp(max=last)]
        weight = time - low
        line = below + weight * (above - below)
        edm = torch.where(above.isinf(), below / (1 - weight), line)
        # each is exact at its end: 1 / sqrt(1 + inf) = 0
        return (1 + edm.square()).rsqrt(), (1 + edm.square().reciprocal()).rsqrt()

    def alpha(self, t: Tensor | float) -> Tensor:
        """Return alpha(t), float64."""
        return self.alpha_sigma(t)[0]

    def sigma(self, t: Tensor | float) -> Tensor:
        """Return sigma(t), float64."""
        return self.alpha_sigma(t)[1]

    def log_snr(self, t: Tensor | float) -> Tensor:
        """Return log(alpha^2 / sigma^2), float64; minus infinity at a zero terminal SNR."""
        alpha, sigma = self.alpha_sigma(t)
        return 2 * (alpha.log() - sigma.log())

    def t_of(self, half_log_snr: Tensor | float) -> Tensor:
        """Return the time where log(alpha / sigma) is half_log_snr, float64; the nearest end beyond the levels."""
        edm = torch.as_tensor(half_log_snr, dtype=torch.float64).neg().exp()
        table = self._edm.to(edm.device)
        low = (torch.searchsorted(table, edm.contiguous(), right=True) - 1).clamp(0, self.num_train_timesteps - 2)
        below, above = table[low], table[low + 1]
        weight = torch.where(above.isinf(), 1 - below / edm, (edm - below) / (above - below))
        return low + weight.clamp(0, 1)

    def level(self, half_log_snr: float) -> tuple[float, float, float]:
        """Return (t, alpha, sigma) where log(alpha / sigma) is half_log_snr; variance-preserving beyond the levels."""
        alpha, sigma = (1 / math.sqrt(1 + math.exp(min(-2 * h, 700))) for h in (half_log_snr, -half_log_snr))
        return float(self.t_of(half_log_snr)), alpha, sigma

    @property
    def t_range(self) -> tuple[float, float]:
        """Return the times of the cleanest and of the noisiest level."""
        return 0.0, float(self.num_train_timesteps - 1)

    def network_time(self, t: Tensor) -> Tensor:
        """Return what the network is told at t: t itself."""
        return t

    def times(self, num_steps: int, spacing: Spacing, grid: Grid = "integer", rho: float | None = None) -> Tensor:
        """Return the num_steps times a sampler shows to the network, falling, float64; see `Law.steps`."""
        if spacing in get_args(Ramp):
            return self._ramp_times(num_steps, spacing, 0.0, self.num_train_timesteps - 1.0, rho)
        return whole_times(num_steps, spacing, grid, self.num_train_timesteps, self.steps_offset)

    def _ramp_times(self, num_steps: int, kind: Ramp, low: float, high: float, rho: float | None) -> Tensor:
        """Return times whose sigma / alpha are a ramp; they are fractional, so that none is repeated."""
        first, second, last = (
            float(sigma / alpha) for alpha, sigma in map(self.alpha_sigma, (high, max(high - 1, 0), low))
        )
        finite = math.isfinite(first)
        edm = ramp(kind, num_steps, first, last, rho) if finite else open_ramp(kind, num_steps, second, last, rho)
        t = self.t_of(-edm.log())
        t[0] = high
        return t

    def _visited(self, num_steps: int, spacing: Spacing | str | None, grid: Grid, rho: float | None) -> Tensor:
        """Return the times of a number of steps, checked."""
        levels = self.num_train_timesteps
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or not 1 <= num_steps <= levels:
            raise LdmPipeError(f"num_steps is {num_steps!r}", how_to_fix=f"use a whole number from 1 to {levels}")
        even = self.spacing if spacing is None else spacing
        if even is None:
            raise LdmPipeError(
                "the schedule names no spacing", how_to_fix='state it: spacing="leading", "trailing" or "linspace"'
            )
        t = self.times(num_steps, even, grid, rho)
        if t[0] > levels - 1 or not bool((t[1:] < t[:-1]).all()):
            raise LdmPipeError(
                f"{num_steps} steps of {even} spacing, steps_offset {self.steps_offset}, do not fit {levels} levels",
                how_to_fix=f"use at most {levels // 2} steps, or trailing spacing",
            )
        if t[0] < (levels - 1) / 2:
            warnings.warn(
                f"{num_steps} steps of {even} spacing start at t = {t[0]:g} of {levels - 1}, which is not noise: "
                "use more steps, or trailing spacing",
                UserWarning,
                stacklevel=3,
            )
        if spacing is None and self.ramp is not None:  # multistep solvers ramp over all levels, others over their rows
            low, high = (float(t[-1]), float(t[0])) if grid == "fractional" else self.t_range
            return self._ramp_times(num_steps, self.ramp, low, high, rho)
        return t

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
        """Choose the rows a sampler walks down; see `Law.steps`.

        Args:
            num_steps, spacing, grid, final, times, sigmas, rho: see `Law.steps`; final is "first" where a file of
                diffusers says set_alpha_to_one=false.
        """
        check_final(final)
        sections = spacing if spacing is not None and spacing not in get_args(Spacing) else None
        check_one_choice(num_steps, times, sigmas, sections)
        first, last = self.t_range
        if sections is not None:
            t = respace(sections, self.num_train_timesteps)
        elif times is not None:
            t = explicit(times, "times", first, last)
        elif sigmas is not None:
            t = self.t_of(-explicit(sigmas, "sigmas", float(self._edm[0]), float(self._edm[-1])).log())
        else:
            t = self._visited(num_steps, spacing, grid, rho)
        end = (-1.0, 1.0, 0.0)
        if final == "first":
            alpha_0, sigma_0 = map(float, self.alpha_sigma(0.0))
            in_edm = grid == "fractional"  # who walks in EDM's frame stays in it: x / alpha
            # solvers with two evaluations ask the network at the end, too
            end = (0.0 if t[-1] > 0 else -1.0, *((1.0, sigma_0 / alpha_0) if in_edm else (alpha_0, sigma_0)))
        alpha, sigma = self.alpha_sigma(t)
        # who starts at the largest level of EDM's frame draws sigma / alpha * noise there: sigma * noise here
        leading = (self.spacing if spacing is None else spacing) == "leading"
        init_scale = float(sigma[0]) if grid == "fractional" and not leading else 1.0
        return Steps.down(t, alpha, sigma, end=end, init_scale=init_scale, levels=self.level)


def check_final(final: str) -> None:
    """Refuse an end of the steps that is not known."""
    if final not in get_args(Final):
        raise LdmPipeError(f"final is {final!r}", how_to_fix=f"use one of {', '.join(get_args(Final))}")


def check_one_choice(num_steps: int | None, times: Any, sigmas: Any, sections: str | None) -> None:
    """Refuse none or two of the ways to name the rows.

    Raises: LdmPipeError.
    """
    given = {"num_steps": num_steps, "times": times, "sigmas": sigmas, f"spacing={sections!r}": sections}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        what = f"the steps are named by {' and '.join(named)}" if named else "num_steps is None"
        raise LdmPipeError(what, how_to_fix="give one of num_steps, times, sigmas and sections like 'ddim25'")


def _check_choices(schedule: NoiseSchedule) -> None:
    """Refuse names and numbers that mean nothing, once, at the border."""
    choices = (
        ("beta_schedule", schedule.beta_schedule, get_args(BetaSchedule)),
        ("prediction", schedule.prediction, get_args(Prediction)),
        ("spacing", schedule.spacing, (*get_args(Even), None)),
        ("ramp", schedule.ramp, (*get_args(Ramp), None)),
    )
    for name, value, allowed in choices:
        if value not in allowed:
            known = ", ".join(str(choice) for choice in allowed)
            raise LdmPipeError(f"{name} is {value!r}", where="NoiseSchedule", how_to_fix=f"use one of {known}")
    for name, value in (("beta_start", schedule.beta_start), ("beta_end", schedule.beta_end)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise LdmPipeError(f"{name} is {value!r}", where="NoiseSchedule", how_to_fix="use a number between 0 and 1")
    num = schedule.num_train_timesteps
    if isinstance(num, bool) or not isinstance(num, int) or not 2 <= num <= 1_000_000:
        raise LdmPipeError(f"num_train_timesteps is {num!r}", how_to_fix="use a whole number from 2 to 1000000")
    if schedule.trained_betas is not None and len(schedule.trained_betas) != num:
        raise LdmPipeError(
            f"{len(schedule.trained_betas)} trained_betas for {num} levels", how_to_fix="give one beta per level"
        )
    if (
        isinstance(schedule.steps_offset, bool)
        or not isinstance(schedule.steps_offset, int)
        or schedule.steps_offset < 0
    ):
        raise LdmPipeError(f"steps_offset is {schedule.steps_offset!r}", how_to_fix="use 0 or 1")
