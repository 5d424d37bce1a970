"""Check how a call samples: which sampler, which rows, how much noise of its own.

What enters: what the caller gave, and the law of the model. What leaves: a `Sampling` that is ready to run, or one
LdmPipeError before any work. This file runs no network and imports no diffusers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm_pipe import samplers
from ldm_pipe.drawing.output import IntDefault, real_number, whole_number
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.samplers.from_diffusers import law_times, sampler_of
from ldm_pipe.schedule import NoiseSchedule
from ldm_pipe.schedule.read import sampler_options
from ldm_pipe.schedule.steps import Steps

if TYPE_CHECKING:
    from ldm_pipe.pipelines.latent import LatentDiffusionPipeline
    from ldm_pipe.schedule import Law

MAX_STEPS = 10_000  # of a continuous law; a discrete one has as many as levels
CUSTOM = "custom"
FIXED = {"timesteps": "times", "sigmas": "levels", "spacing": "spacing", "sampler_options": "options"}


@dataclass(frozen=True)
class Sampling:
    """How one call samples.

    Attributes:
        name: of the sampler, or of the class of a diffusers scheduler.
        run: called as run(denoise, x, steps, noise=, eta=, callback=, **options).
        steps: the rows from pure noise.
        spacing: as asked for; None for the law's own, `CUSTOM` where times were given one by one.
        eta: checked to mean something to the sampler.
        options: the sampler's own.
    """

    name: str
    run: Callable[..., Tensor]
    steps: Steps
    spacing: str | None = None
    eta: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)


def check_sampling(
    pipe: LatentDiffusionPipeline, given: Mapping[str, Any], num_steps: Any, num_tokens: int
) -> Sampling:
    """Settle sampler, rows, eta and options.

    Args:
        num_steps: the model's default already put in for an untouched argument.
        num_tokens: latents per channel; a flow law may shift its times by them.
    Raises: LdmPipeError naming argument, value and range.
    """
    law = at_resolution(pipe.schedule, num_tokens)
    eta = real_number("eta", given["eta"], 0.0, 1.0)
    chosen = given["sampler"] if given["sampler"] is not None else pipe.given_scheduler
    if callable(chosen) and not hasattr(chosen, "set_timesteps"):
        chosen = own_sampler(chosen)
    if chosen is not None and not isinstance(chosen, str | samplers.Sampler):
        return _foreign(chosen, law, given, num_steps, eta)
    named = chosen or pipe.defaults.sampler or "ddim"
    sampler = named if isinstance(named, samplers.Sampler) else samplers.get(named)
    if eta > 0 and not sampler.has_eta:
        raise LdmPipeError(f"eta is {eta:g}, but {sampler.name} has none", how_to_fix='leave it at 0, or use "ddim"')
    options = _check_options(sampler, given["sampler_options"]) or sampler_options(law.config, sampler.name)
    rows: dict[str, Any] = {"grid": sampler.grid, "final": law.final(sampler.name)}
    if given["timesteps"] is not None and given["sigmas"] is not None:
        raise LdmPipeError("both of timesteps and sigmas given", how_to_fix="give one of them")
    for name in ("timesteps", "sigmas"):
        if given[name] is not None and given["spacing"] is not None:
            raise LdmPipeError(f"both of {name} and spacing given", how_to_fix="give one of them")
    if given["timesteps"] is not None:
        steps = law.steps(times=_check_timesteps(law, given["timesteps"]), **rows)
        return Sampling(sampler.name, sampler.function, steps, CUSTOM, eta, options)
    if given["sigmas"] is not None:
        steps = law.steps(sigmas=given["sigmas"], **rows)
        return Sampling(sampler.name, sampler.function, steps, CUSTOM, eta, options)
    spacing = given["spacing"] if given["spacing"] is not None else pipe.defaults.spacing
    if spacing is not None and not isinstance(spacing, str):
        raise LdmPipeError(f"spacing is {spacing!r:.80}", how_to_fix='use a name such as "trailing" or "karras"')
    sections = spacing is not None and spacing[-1:].isdigit()  # which count the steps themselves
    steps = law.steps(None if sections else _check_number(law, num_steps), spacing=spacing, **rows)
    asked = given["num_inference_steps"]
    if sections and not isinstance(asked, IntDefault | None) and asked != steps.num_steps:
        what = f"spacing {spacing!r} has {steps.num_steps} steps, num_inference_steps is {asked!r:.80}"
        raise LdmPipeError(what, how_to_fix="leave num_inference_steps out")
    return Sampling(sampler.name, sampler.function, steps, spacing, eta, options)


def own_sampler(function: Callable[..., Tensor]) -> samplers.Sampler:
    """Take a caller's function for a sampler: (denoise, x, steps, *, noise, eta, callback, **options) -> x0.

    Raises: LdmPipeError if it lacks one of these keywords.
    """
    if isinstance(function, samplers.Sampler):
        return function
    name = getattr(function, "__name__", type(function).__name__)
    known = inspect.signature(function).parameters
    lacking = [word for word in ("noise", "eta", "callback") if word not in known]
    if lacking:
        advice = "a sampler is (denoise, x, steps, *, noise, eta, callback) -> x0, as those of `ldm_pipe.samplers`"
        raise LdmPipeError(f"the sampler {name} takes no {', '.join(lacking)}", how_to_fix=advice)
    return samplers.Sampler(name, function, grid="integer", has_eta=True, always_stochastic=True)


def check_hand_over(law: Law, given: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Check where a call takes latents over from another model, and where it hands them on.

    Returns: the time from which on its steps are taken, all earlier (noisier) ones having been another's, and the time
        to which they are taken; None for the ends. A share s of the way is time round(N - s N) of N, as in diffusers.
    """
    found: list[float | None] = []
    for name in ("denoising_start", "denoising_end"):
        if given[name] is None:
            found.append(None)
            continue
        share = real_number(name, given[name], 0.0, 1.0)
        if share in (0, 1):
            raise LdmPipeError(f"{name} is {share:g}", how_to_fix="use a number between 0 and 1, or leave it out")
        if not isinstance(law, NoiseSchedule):
            raise LdmPipeError(f"{name} with a continuous noise law", how_to_fix="a hand-over needs counted times")
        found.append(float(round(law.num_train_timesteps - share * law.num_train_timesteps)))
    begin, end = found
    if begin is not None and end is not None and begin <= end:
        what = f"denoising_start {given['denoising_start']} is not before denoising_end {given['denoising_end']}"
        raise LdmPipeError(what, how_to_fix="start earlier or end later")
    return begin, end


def at_resolution(law: Law, num_tokens: int) -> Law:
    """Return the law for a picture of so many latents: some flow laws shift their times by it."""
    if getattr(law, "resolution", None) is None:
        return law
    return law.at_resolution(num_tokens)  # type: ignore[attr-defined]


def _foreign(scheduler: Any, law: Law, given: Mapping[str, Any], num_steps: Any, eta: float) -> Sampling:
    """Settle a scheduler object of diffusers, which brings its own times and options."""
    for name, what in FIXED.items():
        if given[name] is not None:
            advice = f"{what} of a diffusers scheduler belong into its config; or name a sampler of `ldm_pipe.samplers`"
            raise LdmPipeError(f"{name} beside the scheduler object {type(scheduler).__name__}", how_to_fix=advice)
    try:
        sampler = sampler_of(scheduler, law, _check_number(law, num_steps))
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        if isinstance(error, LdmPipeError):
            raise
        what = f"{type(scheduler).__name__} refuses its times: {error}"
        raise LdmPipeError(what, how_to_fix="change num_inference_steps or the scheduler's config") from error
    if eta > 0 and not sampler.has_eta:
        raise LdmPipeError(f"eta is {eta:g}, but {sampler.name} has none", how_to_fix="leave it at 0")
    return Sampling(sampler.name, sampler, sampler.steps, eta=eta)


def _check_number(law: Law, num_steps: Any) -> int:
    limit = law.num_train_timesteps if isinstance(law, NoiseSchedule) else MAX_STEPS
    return whole_number("num_inference_steps", num_steps, 1, limit)


def _check_options(sampler: samplers.Sampler, options: Any) -> Mapping[str, Any]:
    """Check that the sampler knows its options; their values are checked by the sampler."""
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise LdmPipeError(f"sampler_options is {options!r:.80}", how_to_fix='give a mapping such as {"order": 3}')
    unknown = [str(name) for name in options if name not in sampler.options]
    if unknown:
        known = f"it takes {', '.join(sampler.options)}" if sampler.options else "it takes none"
        raise LdmPipeError(f"the sampler {sampler.name} has no option {', '.join(unknown):.80}", how_to_fix=known)
    return dict(options)


def _check_timesteps(law: Law, timesteps: Any) -> Tensor:
    """Read times as the network is told them (diffusers' timesteps): falling, in the law's range."""
    low, high = (float(law.network_time(torch.tensor(end, dtype=torch.float64))) for end in law.t_range)
    advice = f"give a falling list of times from {high:g} to {low:g}"
    if isinstance(timesteps, Tensor):
        timesteps = timesteps.tolist()
    if not isinstance(timesteps, (list, tuple)) or not timesteps:
        raise LdmPipeError(f"timesteps is {timesteps!r:.80}", how_to_fix=advice)
    times = [real_number(f"timesteps[{i}]", t, low, high) for i, t in enumerate(timesteps)]
    if any(later >= earlier for earlier, later in pairwise(times)):
        raise LdmPipeError("timesteps do not fall", how_to_fix=advice)
    return law_times(law, torch.tensor(times, dtype=torch.float64))
