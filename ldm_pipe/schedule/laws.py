"""Continuous noise laws: variance preserving, variance exploding, EDM's, rectified flow.

Each is a frozen dataclass with the methods of `schedule.Law`; x_t = alpha x0 + sigma eps in all of them. Reading and
writing diffusers' files is in schedule_config.py and schedule_export.py. This file does not know networks or samplers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule.continuous import Continuous, check_choice, check_law, check_range, checked_times
from ldm_pipe.schedule.discrete import Prediction
from ldm_pipe.schedule.spacing import Grid, Ramp, Spacing, line

_COSINE_START = 0.008 / 1.008 * math.pi / 2  # the angle of the cosine law at t = 0


@dataclass(frozen=True)
class ContinuousVP(Continuous):
    """Variance-preserving laws in continuous time, alpha^2 + sigma^2 = 1, t in [t_min, t_max] of [0, 1].

    linear  d log alpha^2 / dt = -beta(t) = -(beta_min + t (beta_max - beta_min))   (arXiv:2011.13456, eq. 32-33)
    cosine  alpha = cos(pi/2 (t + s) / (1 + s)) / cos(pi/2 s / (1 + s)), s = 0.008  (arXiv:2102.09672, eq. 17)

    Attributes:
        kind: which of them.
        beta_min: beta(0) of the linear law.
        beta_max: beta(1) of the linear law.
        t_min: the cleanest time; a network knows none below.
        t_max: the noisiest time; the cosine law has alpha = 0 at 1, with prediction eps take 0.9946.
        prediction: what a network trained on this law outputs.
        spacing: default choice of times.
        num_train_timesteps: the network is told t times one less, as the discrete law's index.
        noisy_end: see `NoiseSchedule`.
        config: see `NoiseSchedule`.
    """

    kind: Literal["linear", "cosine"] = "linear"
    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0
    prediction: Prediction = "eps"
    spacing: Spacing = "linspace"
    num_train_timesteps: int = 1000
    noisy_end: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_choice(self, "kind", ("linear", "cosine"))
        check_range(self, t_min=(0, self.t_max), t_max=(0, 1), beta_min=(0, self.beta_max), beta_max=(0, math.inf))
        check_law(self)

    @property
    def t_range(self) -> tuple[float, float]:
        """Return t_min and t_max."""
        return self.t_min, self.t_max

    def alpha_sigma(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at times t in [0, 1], float64, each of t's shape and on t's device."""
        time = checked_times(t, 0.0, 1.0)
        if self.kind == "linear":
            integral = time * (self.beta_min + time * (self.beta_max - self.beta_min) / 2)
            return (-integral / 2).exp(), (-torch.expm1(-integral)).sqrt()
        angle, rise = _COSINE_START, time * (math.pi / 2 - _COSINE_START)
        alpha = torch.where(time == 1, 0.0, torch.cos(angle + rise) / math.cos(angle))
        # 1 - alpha^2 as a product: no digits are lost near t = 0
        return alpha, (torch.sin(rise) * torch.sin(2 * angle + rise)).sqrt() / math.cos(angle)

    def t_of(self, half_log_snr: Tensor | float) -> Tensor:
        """Return the time where log(alpha / sigma) is half_log_snr, float64; the nearest end outside t_range."""
        half = torch.as_tensor(half_log_snr, dtype=torch.float64)
        if self.kind == "linear":
            integral = torch.logaddexp(-2 * half, torch.zeros_like(half)).clamp_max(1e300)  # -log alpha^2
            root = (self.beta_min**2 + 2 * integral * (self.beta_max - self.beta_min)).sqrt()
            t = 2 * integral / (self.beta_min + root)
        else:
            # cos(angle) / alpha is 1 / cos of the angle at t, whose tangent is:
            tan = (math.tan(_COSINE_START) ** 2 + (-2 * half).exp() / math.cos(_COSINE_START) ** 2).sqrt()
            t = (tan.atan() - _COSINE_START) / (math.pi / 2 - _COSINE_START)
        return t.clamp(self.t_min, self.t_max)

    def level(self, half_log_snr: float) -> tuple[float, float, float]:
        """Return (t, alpha, sigma) where log(alpha / sigma) is half_log_snr; t stays in t_range."""
        half = torch.tensor([half_log_snr, -half_log_snr], dtype=torch.float64)
        alpha, sigma = (2 * half).sigmoid().sqrt().tolist()
        return float(self.t_of(half_log_snr)), alpha, sigma

    def network_time(self, t: Tensor) -> Tensor:
        """Return t (num_train_timesteps - 1), as in the code of arXiv:2011.13456."""
        return t * (self.num_train_timesteps - 1)

    def _init_scale(self, alpha: float, sigma: float) -> float:
        return 1.0


@dataclass(frozen=True)
class VE(Continuous):
    """The variance-exploding law of NCSN, alpha = 1 (arXiv:1907.05600, section 4.1; arXiv:2011.13456, eq. 30).

        sigma(t) = sigma_min (sigma_max / sigma_min)^t,   t in [0, 1]

    Equal steps in t are the geometric ladder. Beyond its ends the law goes on, as churning samplers need.

    Attributes:
        sigma_min: the cleanest level.
        sigma_max: the noisiest level, about the largest distance between two data points.
        prediction: what a network trained on this law outputs.
        spacing: default choice of times; "linspace" is the ladder.
        told: "index": the network is told t (num_train_timesteps - 1), NCSN's index of the level; "sigma": sigma.
        num_train_timesteps: number of the levels that the index counts.
        sigma_data: standard deviation of the data, for the preconditioning of prediction "edm"; without it, refused.
        noisy_end: see `NoiseSchedule`.
        config: see `NoiseSchedule`.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    prediction: Prediction = "score"
    spacing: Spacing = "linspace"
    told: Literal["index", "sigma"] = "index"
    num_train_timesteps: int = 1000
    sigma_data: float | None = None
    noisy_end: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    t_end = -1.0

    def __post_init__(self) -> None:
        check_choice(self, "told", ("index", "sigma"))
        check_range(self, sigma_min=(0, self.sigma_max), sigma_max=(0, math.inf))
        if self.sigma_data is not None:
            check_range(self, sigma_data=(0, math.inf))
        check_law(self)

    @property
    def t_range(self) -> tuple[float, float]:
        """Return 0 and 1."""
        return 0.0, 1.0

    def alpha_sigma(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at any times t, float64, each of t's shape and on t's device."""
        time = checked_times(t, -9.0, 10.0)
        sigma = self.sigma_min ** (1 - time) * self.sigma_max**time
        return torch.ones_like(sigma), sigma

    def t_of(self, half_log_snr: Tensor | float) -> Tensor:
        """Return the time where log(alpha / sigma) is half_log_snr, float64."""
        half = torch.as_tensor(half_log_snr, dtype=torch.float64)
        return (-half - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)

    def network_time(self, t: Tensor) -> Tensor:
        """Return the index of the level, or sigma."""
        return t * (self.num_train_timesteps - 1) if self.told == "index" else self.sigma(t)


@dataclass(frozen=True)
class EDM(Continuous):
    """EDM's law: alpha = 1, sigma = t (Karras et al. 2022, arXiv:2206.00364, table 1).

    Attributes:
        sigma_min: the cleanest level.
        sigma_max: the noisiest level.
        sigma_data: standard deviation of the data, for the preconditioning of prediction "edm".
        prediction: what a network trained on this law outputs.
        spacing: default choice of times.
        rho: of the spacing "karras".
        noisy_end: see `NoiseSchedule`.
        config: see `NoiseSchedule`.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    prediction: Prediction = "edm"
    spacing: Spacing = "karras"
    rho: float = 7.0
    noisy_end: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        ends = {"sigma_min": (0, self.sigma_max), "sigma_max": (0, math.inf)}
        check_range(self, **ends, sigma_data=(0, math.inf), rho=(0, math.inf))
        check_law(self)

    @property
    def t_range(self) -> tuple[float, float]:
        """Return sigma_min and sigma_max."""
        return self.sigma_min, self.sigma_max

    def alpha_sigma(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return 1 and t for any t >= 0, float64, each of t's shape and on t's device."""
        sigma = checked_times(t, 0.0, math.inf)
        return torch.ones_like(sigma), sigma

    def t_of(self, half_log_snr: Tensor | float) -> Tensor:
        """Return exp(-half_log_snr), float64."""
        return torch.as_tensor(half_log_snr, dtype=torch.float64).neg().exp()

    def network_time(self, t: Tensor) -> Tensor:
        """Return c_noise = log(sigma) / 4 (arXiv:2206.00364, table 1)."""
        return t.log() / 4

    def _visited(self, num_steps: int, spacing: Spacing | str, grid: Grid, rho: float | None) -> Tensor:
        rho = self.rho if rho is None and spacing == "karras" else rho
        return super()._visited(num_steps, spacing, grid, rho)


def shift_times(t: Tensor, shift: float) -> Tensor:
    """Move times towards the noise: shift t / (1 + (shift - 1) t) (Esser et al. 2024, arXiv:2403.03206, eq. 23).

    That is adding -log(shift) to half_log_snr; the ends stay exactly.
    """
    return t / (t + (1 - t) / shift)


@dataclass(frozen=True)
class ResolutionShift:
    """A shift that grows with the picture, as Flux and some of SD3's pipelines take it.

        mu = the line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift),   shift = exp(mu)

    Attributes:
        base_shift: mu at base_image_seq_len tokens.
        max_shift: mu at max_image_seq_len tokens.
        base_image_seq_len: number of tokens of a small picture.
        max_image_seq_len: number of tokens of a large picture.
        kind: "linear" takes mu itself for the shift.
    """

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    kind: Literal["exponential", "linear"] = "exponential"

    def __post_init__(self) -> None:
        check_choice(self, "kind", ("exponential", "linear"))
        check_range(self, base_shift=(-math.inf, math.inf), max_shift=(-math.inf, math.inf))
        check_range(self, base_image_seq_len=(0, self.max_image_seq_len - 1), max_image_seq_len=(1, math.inf))

    def mu(self, num_tokens: int) -> float:
        """Return mu for a number of latent tokens."""
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return self.base_shift + (num_tokens - self.base_image_seq_len) * slope

    def shift(self, num_tokens: int) -> float:
        """Return the shift for a number of latent tokens."""
        mu = self.mu(num_tokens)
        return mu if self.kind == "linear" else math.exp(mu)


@dataclass(frozen=True)
class Flow(Continuous):
    """Rectified flow: alpha = 1 - t, sigma = t (Liu et al. 2022, arXiv:2209.03003, eq. 1), t in [0, 1].

    Even times are shifted, see `shift_times`. Ramps and explicit sigmas speak of sigma = t itself, but for "log_snr".

    Attributes:
        prediction: what a network trained on this law outputs.
        spacing: default choice of times.
        shift: of the even times; 1 is none.
        resolution: how the shift grows with the picture; the steps are then those of `at_resolution(num_tokens)`.
        ends: the first and last of the linspace times before the shift; None is (1, the shifted 1 /
            num_train_timesteps), as diffusers' FlowMatchEuler has it (unshifted where the resolution decides).
        terminal: stretch the shifted times so that the last of them is this one; None for not.
        num_train_timesteps: the network is told t times this.
        noisy_end: see `NoiseSchedule`.
        config: see `NoiseSchedule`.
    """

    prediction: Prediction = "flow"
    spacing: Spacing = "linspace"
    shift: float = 1.0
    resolution: ResolutionShift | None = None
    ends: tuple[float, float] | None = None
    terminal: float | None = None
    num_train_timesteps: int = 1000
    noisy_end: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_range(self, shift=(0, math.inf), num_train_timesteps=(1, 1_000_000))
        if self.terminal is not None:
            check_range(self, terminal=(0, 0.999))
        if self.ends is not None and not 0 <= self.ends[1] < self.ends[0] <= 1:
            raise LdmPipeError(f"ends are {self.ends}", where="Flow", how_to_fix="use two falling times from 1 to 0")
        check_law(self)

    @property
    def t_range(self) -> tuple[float, float]:
        """Return 0 and 1."""
        return 0.0, 1.0

    def alpha_sigma(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return 1 - t and t for t in [0, 1], float64, each of t's shape and on t's device."""
        sigma = checked_times(t, 0.0, 1.0)
        return 1 - sigma, sigma

    def t_of(self, half_log_snr: Tensor | float) -> Tensor:
        """Return the time where log(alpha / sigma) is half_log_snr, float64."""
        return torch.as_tensor(half_log_snr, dtype=torch.float64).neg().sigmoid()

    def level(self, half_log_snr: float) -> tuple[float, float, float]:
        """Return (t, alpha, sigma) where log(alpha / sigma) is half_log_snr."""
        half = torch.tensor([half_log_snr, -half_log_snr], dtype=torch.float64)
        alpha, sigma = half.sigmoid().tolist()
        return sigma, alpha, sigma

    def network_time(self, t: Tensor) -> Tensor:
        """Return t num_train_timesteps."""
        return t * self.num_train_timesteps

    def at_resolution(self, num_tokens: int) -> Flow:
        """Return this law with the shift fixed for a number of latent tokens.

        Raises: LdmPipeError if the shift of this law does not depend on them.
        """
        if self.resolution is None:
            advice = f"it is {self.shift:g} at every size; give resolution=ResolutionShift()"
            raise LdmPipeError("this law's shift does not depend on the picture", where="Flow", how_to_fix=advice)
        return replace(self, shift=self.resolution.shift(num_tokens), resolution=None, ends=self.line_ends)

    @property
    def line_ends(self) -> tuple[float, float]:
        """Return the first and last linspace times before the shift."""
        if self.ends is not None:
            return self.ends
        last = torch.tensor(1 / self.num_train_timesteps, dtype=torch.float64)
        return 1.0, float(last if self.resolution else shift_times(last, self.shift))

    def _visited(self, num_steps: int, spacing: Spacing | str, grid: Grid, rho: float | None) -> Tensor:
        if self.resolution is not None:
            advice = "take the steps of law.at_resolution(number of latent tokens)"
            raise LdmPipeError("the shift of this law depends on the picture", where="Flow", how_to_fix=advice)
        first, last = self.line_ends
        if spacing in get_args(Ramp):
            high, low = self._shifted(torch.tensor([first, last], dtype=torch.float64)).tolist()
            return self._ramp_times(num_steps, spacing, low, high, rho)
        return self._shifted(line(num_steps, spacing, grid, first, last))

    def _shifted(self, t: Tensor) -> Tensor:
        """Shift times and stretch them to the terminal one."""
        t = shift_times(t, self.shift)
        if self.terminal is None or len(t) == 1:
            return t
        return 1 - (1 - t) * ((1 - self.terminal) / (1 - t[-1]))

    def _noise(self, t: Tensor, kind: Ramp | None) -> Tensor:
        return super()._noise(t, kind) if kind == "log_snr" else t

    def _t_of_noise(self, noise: Tensor, kind: Ramp | None) -> Tensor:
        return super()._t_of_noise(noise, kind) if kind == "log_snr" else noise

    def _init_scale(self, alpha: float, sigma: float) -> float:
        return 1.0
