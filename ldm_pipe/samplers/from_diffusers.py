"""Any scheduler object of diffusers as a sampler.

Enters: a scheduler, which is a noise law, a choice of times and a solver in one, and the law of the network. Leaves:
the steps it takes, and a sampler that takes them, called like ours. Nothing here imports diffusers: a scheduler is
what has `set_timesteps`, `timesteps` and `step`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm_pipe.denoiser import Denoise, Denoised
from ldm_pipe.noise import Draw, Noise
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.samplers.common import Callback, refuse_eta, report
from ldm_pipe.schedule import Law, Prediction, Steps
from ldm_pipe.schedule.process import Extras, eps_from_x0, from_x0_eps

_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}


class Visit(NamedTuple):
    """One evaluation of the network: the scheduler's time, the law's, and the law's level there."""

    time: Tensor
    t: Tensor
    alpha: float
    sigma: float


@dataclass(frozen=True)
class SchedulerSampler:
    """A diffusers scheduler with its times set, called as our samplers are; made by `sampler_of`.

    Attributes:
        scheduler: a private copy, of which each call takes a copy again: schedulers remember their last steps.
        law: the noise law of the network, which says what its outputs mean.
        steps: the rows it walks down in the law's frame, with `init_scale`.
    """

    scheduler: Any
    law: Law
    steps: Steps

    @property
    def name(self) -> str:
        """Return the scheduler's class name."""
        return type(self.scheduler).__name__

    @property
    def has_eta(self) -> bool:
        """Return whether eta means something."""
        return "eta" in self._step_options

    def needs_noise(self, eta: float) -> bool:
        """Return whether noise must be given: to all that take a generator, as only they know whether they draw."""
        return "generator" in self._step_options or hasattr(self.scheduler, "noise_sampler_seed")

    @property
    def _step_options(self) -> Mapping[str, Any]:
        return inspect.signature(self.scheduler.step).parameters

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
        """Run the scheduler as a pipeline of diffusers does; what it is fed is what the network said.

        Args:
            denoise: maps (x_t, t) to an estimate of x0, same shape as x_t; t is the law's.
            x: the state at row 0 of the steps in the law's frame, shape (B, *).
            steps: `self.steps`, or its last rows to start from a diffused picture.
            noise: see `generators`.
            eta: for schedulers that have one (DDIM, TCD).
            callback: see `samplers.common.Callback`; called once per step, however many evaluations it has.

        Returns: x at the last row, shape (B, *).
        """
        scheduler = copy.deepcopy(self.scheduler)
        groups = _start_at(scheduler, self.law, self.steps.num_steps - steps.num_steps, self.steps.num_steps)
        options = self._options(noise, eta, len(x))
        if hasattr(scheduler, "noise_sampler_seed"):  # DPMSolverSDE draws from trees, or else from the global state
            own = options.pop("generator")
            scheduler.noise_sampler_seed = [
                g.initial_seed() for g in (own if isinstance(own, list) else [own] * len(x))
            ]
        state, shown = _enter(scheduler, x, groups[0][0]), x
        for i, group in enumerate(groups):
            if "order" in self._step_options:  # LMS counts from the first row of all, not from where it began
                options["order"] = min(i + 1, 4)
            following = [*group[1:], groups[i + 1][0] if i + 1 < len(groups) else None]
            for visit, after in zip(group, following, strict=True):
                estimate = denoise(shown, visit.t)
                output = _output(scheduler, estimate, shown, visit)
                state = scheduler.step(output, visit.time, state, **options, return_dict=False)[0]
                shown = state if after is None else _shown(scheduler, state, after)
            changed = report(callback, i, group[0].t, shown, estimate.x0)
            if changed is not shown:
                state, shown = changed if after is None else _enter(scheduler, changed, after), changed
        return shown

    def _options(self, noise: Draw | None, eta: float, count: int) -> dict[str, Any]:
        """Return what the scheduler's step is told besides the states."""
        options: dict[str, Any] = {}
        if self.has_eta:
            options["eta"] = eta
        else:
            refuse_eta(eta, self.name)
        if self.needs_noise(eta):
            options["generator"] = generators(noise, count, self.name)
        return options


def sampler_of(scheduler: Any, law: Law, num_steps: int, **options: Any) -> SchedulerSampler:
    """Turn a scheduler object of diffusers into a sampler and its steps; the object itself is left alone.

    Args:
        scheduler: an instance of any class of `diffusers.schedulers` for continuous data.
        law: the noise law that the network was trained on. The scheduler should hold the same one, as after
            `X.from_config(pipe.scheduler.config)`; its prediction_type may be another.
        num_steps: its num_inference_steps.
        **options: more for its `set_timesteps`, such as mu.

    Raises: LdmPipeError for what is no scheduler, or one whose prediction has no meaning here.
    """
    if isinstance(scheduler, type) or not all(hasattr(scheduler, name) for name in ("set_timesteps", "step", "config")):
        shown = scheduler.__name__ if isinstance(scheduler, type) else f"a {type(scheduler).__name__}"
        raise LdmPipeError(
            f"{shown} is no scheduler object", how_to_fix="use one such as EulerDiscreteScheduler.from_config(...)"
        )
    _prediction(scheduler)
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_steps, **options)
    starts = [group[0] for group in visits(scheduler, law, num_steps)]
    t = torch.stack([start.t for start in starts])
    if bool((t[1:] == t[:-1]).any()):  # diffusers rounds Karras times; rows must fall, and t here only counts them
        t = t - 1e-9 * torch.arange(len(t))
    t = torch.cat([t, t[-1:] - 1])
    alpha = torch.tensor([*(start.alpha for start in starts), 1.0], dtype=torch.float64)
    sigma = torch.tensor([*(start.sigma for start in starts), 0.0], dtype=torch.float64)
    # asked of a copy: it would remember the question as its first step
    scale = float(_shown(copy.deepcopy(scheduler), torch.ones(()), starts[0]))
    scale *= float(getattr(scheduler, "init_noise_sigma", 1.0))
    return SchedulerSampler(scheduler, law, Steps(t, alpha, sigma, init_scale=scale))


def generators(noise: Draw | None, count: int, name: str) -> torch.Generator | list[torch.Generator]:
    """Return what diffusers draws noise from: a `Noise`'s own generators, one per sample, so that nothing is shared.

    Any other source is asked once for two numbers per sample, whose bits seed a generator each.
    """
    if noise is None:
        raise LdmPipeError(f"{name} may draw noise, but got none", how_to_fix="pass noise=Noise(seeds)")
    if isinstance(noise, Noise):
        return noise.generators
    bits = noise((count, 2)).detach().float().cpu().contiguous().view(torch.int64).flatten()
    return [torch.Generator("cpu").manual_seed(seed & (2**63 - 1)) for seed in bits.tolist()]


def visits(scheduler: Any, law: Law, num_steps: int) -> list[list[Visit]]:
    """Return what each step evaluates, in order: one level, or as many as the solver has stages."""
    t = law_times(law, scheduler.timesteps)
    alpha, sigma = law.alpha_sigma(t)
    flat = [Visit(*row) for row in zip(scheduler.timesteps, t, alpha.tolist(), sigma.tolist(), strict=True)]
    order = int(getattr(scheduler, "order", 1))
    stages = len(getattr(scheduler, "prk_timesteps", ()))  # PNDM's start: three steps of Runge-Kutta
    first, rest = [flat[i : i + 4] for i in range(0, stages, 4)], flat[stages:]
    extra = len(flat) - num_steps * order
    if not stages and extra > 0:  # PLMS' start: one evaluation more
        first, rest = [flat[: order + extra]], flat[order + extra :]
    return first + [rest[i : i + order] for i in range(0, len(rest), order)]


def _start_at(scheduler: Any, law: Law, skipped: int, num_steps: int) -> list[list[Visit]]:
    """Let the scheduler begin after `skipped` steps, and return the visits that are left."""
    groups = visits(scheduler, law, num_steps)
    if hasattr(scheduler, "set_begin_index"):  # or it looks the first time up, wrongly where times repeat
        scheduler.set_begin_index(sum(len(group) for group in groups[:skipped]))
    left = groups[skipped:]
    if skipped and hasattr(scheduler, "plms_timesteps"):
        if len(scheduler.prk_timesteps):
            raise LdmPipeError(
                f"{type(scheduler).__name__} cannot start in the middle with steps of Runge-Kutta",
                how_to_fix="give it skip_prk_steps=True",
            )
        left[0] = [*left[0], *(left[1] if len(left) > 1 else [])]
    return left


def _output(scheduler: Any, estimate: Denoised, shown: Tensor, visit: Visit) -> Tensor:
    """Return the network's output, in the scheduler's prediction, that stands for an estimate of x0."""
    eps = eps_from_x0(shown, estimate.x0, visit.alpha, visit.sigma)
    extra = Extras(sigma_data=scheduler.config.get("sigma_data"))
    prediction, sign = _prediction(scheduler)
    output = sign * from_x0_eps(prediction, estimate.x0, eps, visit.alpha, visit.sigma, extra)
    if scheduler.config.get("variance_type") == "learned_range" and estimate.var_mix is not None:
        output = torch.cat([output, 2 * estimate.var_mix - 1], dim=1)  # (B, 2 C, *)
    return output


def _prediction(scheduler: Any) -> tuple[Prediction, int]:
    """Return what the scheduler takes for the network's output, and its sign."""
    name, told = type(scheduler).__name__, scheduler.config.get("prediction_type")
    if hasattr(scheduler, "precondition_outputs"):
        return "edm", -1 if told == "v_prediction" else 1
    if told is None and name.startswith("FlowMatch"):
        return "flow", 1
    if told not in _PREDICTIONS:
        raise LdmPipeError(
            f"{name} with prediction_type {told!r} is not understood",
            how_to_fix=f"use a scheduler with one of {', '.join(_PREDICTIONS)}",
        )
    return _PREDICTIONS[told], 1


def law_times(law: Law, told: Tensor) -> Tensor:
    """Return the law's times at which its network is told these (diffusers' timesteps), float64; by bisection."""
    told = told.double()
    if torch.equal(law.network_time(told), told):
        return told
    low, high = (torch.full_like(told, end) for end in law.t_range)
    for _ in range(60):
        middle = (low + high) / 2
        below = law.network_time(middle) < told
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high


def _shown(scheduler: Any, state: Tensor, visit: Visit) -> Tensor:
    """Return a scheduler's state in the law's frame, which most schedulers keep it in.

    Those of EDM's kind keep x_t / alpha, and what they scale for the network is x_t. Where alpha is 1 they scale by
    EDM's c_in, which is the denoiser's business.
    """
    if not hasattr(scheduler, "scale_model_input"):
        return state
    scaled = scheduler.scale_model_input(state, visit.time)
    return state if visit.alpha == 1 else scaled


def _enter(scheduler: Any, x: Tensor, visit: Visit) -> Tensor:
    """Return the scheduler's state for x in the law's frame."""
    scale = float(_shown(scheduler, torch.ones(()), visit))
    return x if scale == 1 else x / scale
