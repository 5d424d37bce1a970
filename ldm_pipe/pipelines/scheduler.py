"""`pipe.scheduler` as diffusers' users know it: something with a `.config`, and any scheduler object in its place.

What enters: a noise law, or a scheduler object. What leaves: its config, or the law its config describes. This file
imports no diffusers.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ldm_pipe import samplers
from ldm_pipe.drawing.output import Defaults
from ldm_pipe.pretrained import FrozenConfig, LdmPipeError
from ldm_pipe.schedule import Law
from ldm_pipe.schedule import read as schedule_config


@dataclass(frozen=True)
class SchedulerConfig:
    """What stands for a scheduler where none was set.

    Attributes:
        config: for `X.from_config`, with any class X of `diffusers.schedulers`.
        law: the noise law it describes.
        defaults: the pipeline's, with its own sampler and spacing.
    """

    config: FrozenConfig
    law: Law
    defaults: Defaults

    @classmethod
    def of(cls, law: Law, defaults: Defaults) -> SchedulerConfig:
        """Describe a law: by the file it was read from, else by the one that would be written for the sampler."""
        written = law.config or law.to_config(*([defaults.sampler] if defaults.sampler else []))
        return cls(FrozenConfig(written), law, defaults)


def law_of(scheduler: Any, known: Law) -> Law:
    """Return the noise law of a scheduler's config; the known one, with a warning, where it cannot be read.

    Raises: LdmPipeError for what is no scheduler object.
    """
    config = getattr(scheduler, "config", None)
    if isinstance(scheduler, type) or not isinstance(config, Mapping) or not hasattr(scheduler, "set_timesteps"):
        shown = scheduler.__name__ if isinstance(scheduler, type) else f"a {type(scheduler).__name__}"
        advice = "use X.from_config(pipe.scheduler.config) with a scheduler class X of diffusers, or call with sampler="
        raise LdmPipeError(f"{shown} is no scheduler object", "pipe.scheduler", advice)
    name = type(scheduler).__name__
    try:
        return schedule_config.read({**config, "_class_name": name})
    except LdmPipeError as error:
        warnings.warn(f"the noise law of {name} is not read ({error.what}): the model's stays", stacklevel=3)
        return known


def defaults_of(scheduler: Any, defaults: Defaults) -> Defaults:
    """Return what a folder should say that is saved while a scheduler is set: our sampler of its kind, its spacing."""
    ours = schedule_config.sampler_name({**scheduler.config, "_class_name": type(scheduler).__name__})
    return replace(defaults, sampler=ours if ours in samplers.NAMES else None, spacing=None)
