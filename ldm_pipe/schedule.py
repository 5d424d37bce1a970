"""Noise laws and the times a sampler visits.

Enters: betas by name and number, or a diffusers scheduler config. Leaves: alpha(t), sigma(t) in float64, and `Steps`,
the aligned rows a sampler walks down. This file does not know networks, samplers or data; reading and writing
diffusers' scheduler files is in schedule_config.py.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ldm_pipe.pretrained import LdmPipeError

Prediction = Literal["eps", "x0", "v", "flow", "score", "mean", "edm"]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
Spacing = Literal["leading", "trailing", "linspace"]
Grid = Literal["integer", "fractional", "multistep"]
Final = Literal["clean", "first"]


@dataclass(frozen=True)
class Steps:
    """The rows a sampler walks down, from noise to clean; n steps have n + 1 rows, float64 on the CPU.

    A step reads row i and arrives at row i + 1, unless `next_alpha`, `next_sigma` (n each) say otherwise, which
    exists only to repeat what a peer does (`NoiseSchedule.steps(arrival="stride")`).

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

    @property
    def num_steps(self) -> int:
        """Return the number of solver steps, one less than the rows."""
        return len(self.t) - 1

    def pairs(self) -> Iterator[tuple[Tensor, float, float, float, float]]:
        """Yield (t, alpha_t, sigma_t, alpha_s, sigma_s) for each step from level t to the cleaner level s."""
        next_alpha = self.alpha[1:] if self.next_alpha is None else self.next_alpha
        next_sigma = self.sigma[1:] if self.next_sigma is None else self.next_sigma
        rows = zip(self.alpha.tolist(), self.sigma.tolist(), next_alpha.tolist(), next_sigma.tolist(), strict=False)
        for t, (alpha_t, sigma_t, alpha_s, sigma_s) in zip(self.t, rows, strict=False):
            yield t, alpha_t, sigma_t, alpha_s, sigma_s

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
        i = self.num_steps - kept
        return replace(
            self,
            t=self.t[i:],
            alpha=self.alpha[i:],
            sigma=self.sigma[i:],
            next_alpha=None if self.next_alpha is None else self.next_alpha[i:],
            next_sigma=None if self.next_sigma is None else self.next_sigma[i:],
        )


def make_betas(kind: BetaSchedule, beta_start: float, beta_end: float, num_train_timesteps: int) -> Tensor:
    """Return the betas of a discrete variance-preserving noise law, float64, shape (num_train_timesteps,).

    linear             beta_t linear in t                   (Ho et al. 2020, arXiv:2006.11239, section 4)
    scaled_linear      sqrt(beta_t) linear in t             (Rombach et al. 2022, arXiv:2112.10752, appendix)
    squaredcos_cap_v2  alpha_bar = cos^2(pi/2 (t/T + 0.008) / 1.008), beta <= 0.999
                       (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17); beta_start and beta_end play no role
    """
    match kind:
        case "linear":
            return torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
        case "scaled_linear":
            root = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64)
            return root.square()
        case "squaredcos_cap_v2":
            u = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
            alpha_bar = torch.cos((u + 0.008) / 1.008 * (math.pi / 2)).square()
            return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp_max(0.999)
    raise LdmPipeError(f"unknown beta_schedule {kind!r}", how_to_fix=f"use one of {', '.join(get_args(BetaSchedule))}")


def zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha_bar) so that it ends at 0 and starts as before (arXiv:2305.08891, algorithm 1)."""
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()


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
        spacing: default choice of times, None if unknown: then `steps` must be told.
        steps_offset: shift of the times of "leading" spacing; Stable Diffusion uses 1.
        zero_terminal_snr: rescale so that the last level is pure noise.
        trained_betas: explicit betas that replace the named law.
        noisy_end: names of the samplers that, by the config this was read from, end at t = 0 and leave its noise in.
        config: the scheduler config this was read from, unknown keys included; empty if built by hand.
    """

    beta_schedule: BetaSchedule = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000
    prediction: Prediction = "eps"
    spacing: Spacing | None = "leading"
    steps_offset: int = 1
    zero_terminal_snr: bool = False
    trained_betas: tuple[float, ...] | None = None
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
                f"prediction {self.prediction} with a zero terminal SNR: noise that is all there is says nothing about x0",
                where="NoiseSchedule",
                how_to_fix='train with prediction="v", or leave zero_terminal_snr (rescale_betas_zero_snr) off',
            )
        object.__setattr__(self, "_edm", ((1 - alpha_bar) / alpha_bar).sqrt())  # sigma / alpha, inf at zero SNR

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read a diffusers scheduler config; see `schedule_config.read`."""
        from ldm_pipe import schedule_config

        return schedule_config.read(config)

    def to_config(self, sampler: str = "ddim", **settings: Any) -> dict[str, Any]:
        """Write a diffusers scheduler config whose use in diffusers equals ours; see `schedule_config.write`."""
        from ldm_pipe import schedule_config

        return schedule_config.write(self, sampler, **settings)

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

    def times(self, num_steps: int, spacing: Spacing, grid: Grid = "integer") -> Tensor:
        """Return the num_steps times a sampler shows to the network, falling, float64 (arXiv:2305.08891, table 2).

        Args:
            num_steps: at least 1.
            spacing: "leading" starts below the last level, "trailing" at it, "linspace" at it and ends at t = 0.
            grid: each family of samplers grew its own variant. "integer": whole times (DDIM, DDPM); "fractional":
                linspace is not rounded (Euler); "multistep": n + 1 whole times of which the last is left out
                (DPM-Solver).
        """
        last = self.num_train_timesteps
        n = num_steps + 1 if grid == "multistep" else num_steps
        i = torch.arange(num_steps, dtype=torch.float64)
        match spacing:
            case "trailing":
                return (last - i * (last / num_steps)).round() - 1
            case "leading":
                return (n - 1 - i) * (last // n) + self.steps_offset
            case "linspace":
                # diffusers' single step is at t = 0; ours is where the noise is
                t = (n - 1 - i) * ((last - 1) / (n - 1)) if n > 1 else i + last
                t = t.clamp_max(last - 1)
                return t if grid == "fractional" else t.round()
        raise LdmPipeError(f"unknown spacing {spacing!r}", how_to_fix=f"use one of {', '.join(get_args(Spacing))}")

    def steps(
        self,
        num_steps: int,
        *,
        spacing: Spacing | None = None,
        grid: Grid = "integer",
        final: Final = "clean",
        arrival: Literal["next", "stride"] = "next",
    ) -> Steps:
        """Choose the rows a sampler walks down.

        Args:
            num_steps: from 1 to num_train_timesteps.
            spacing: see `times`; None is the schedule's own.
            grid: see `times`; `samplers.get(name).grid` is the customary one.
            final: "clean" ends at alpha = 1, sigma = 0; "first" ends at the level t = 0 and leaves its noise in, as
                diffusers does for set_alpha_to_one=false; `final(sampler)` says what the schedule's config asks for.
            arrival: "next": a step ends where the next one starts. "stride": it ends num_train_timesteps // num_steps
                below its start, as diffusers' DDIMScheduler does; with linspace, or where the division leaves a rest,
                the network is then told a time that is not the state's. Only for parity.

        Returns: num_steps + 1 rows.
        """
        spacing = self.spacing if spacing is None else spacing
        last = self.num_train_timesteps
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or not 1 <= num_steps <= last:
            raise LdmPipeError(f"num_steps is {num_steps!r}", how_to_fix=f"use a whole number from 1 to {last}")
        if final not in get_args(Final):
            raise LdmPipeError(f"final is {final!r}", how_to_fix=f"use one of {', '.join(get_args(Final))}")
        if spacing is None:
            raise LdmPipeError(
                "the schedule names no spacing", how_to_fix='state it: spacing="leading", "trailing" or "linspace"'
            )
        t = self.times(num_steps, spacing, grid)
        if t[0] > last - 1 or not bool((t[1:] < t[:-1]).all()):
            raise LdmPipeError(
                f"{num_steps} steps of {spacing} spacing, steps_offset {self.steps_offset}, do not fit {last} levels",
                how_to_fix=f"use at most {last // 2} steps, or trailing spacing",
            )
        end_alpha, end_sigma = torch.ones(1), torch.zeros(1)
        if final == "first":
            end_alpha, end_sigma = self.alpha_sigma(torch.zeros(1))
            if grid == "fractional":  # who walks in EDM's frame stays in it: x / alpha
                end_alpha, end_sigma = torch.ones(1), end_sigma / end_alpha
        if t[0] < (last - 1) / 2:
            warnings.warn(
                f"{num_steps} steps of {spacing} spacing start at t = {t[0]:g} of {last - 1}, which is not noise: "
                "use more steps, or trailing spacing",
                UserWarning,
                stacklevel=2,
            )
        alpha, sigma = self.alpha_sigma(t)
        # who starts at the largest level of EDM's frame draws sigma / alpha * noise there: sigma * noise here
        init_scale = float(sigma[0]) if grid == "fractional" and spacing != "leading" else 1.0
        steps = Steps(
            t=torch.cat([t, t.new_tensor([-1.0])]),
            alpha=torch.cat([alpha, end_alpha.double()]),
            sigma=torch.cat([sigma, end_sigma.double()]),
            init_scale=init_scale,
            levels=self.level,
        )
        if arrival == "next":
            return steps
        landing = t - last // num_steps
        alpha, sigma = self.alpha_sigma(landing.clamp_min(0))
        return replace(
            steps,
            next_alpha=torch.where(landing < 0, steps.alpha[-1], alpha),
            next_sigma=torch.where(landing < 0, steps.sigma[-1], sigma),
        )


def _check_choices(schedule: NoiseSchedule) -> None:
    """Refuse names and numbers that mean nothing, once, at the border."""
    choices = (
        ("beta_schedule", schedule.beta_schedule, get_args(BetaSchedule)),
        ("prediction", schedule.prediction, get_args(Prediction)),
        ("spacing", schedule.spacing, (*get_args(Spacing), None)),
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
