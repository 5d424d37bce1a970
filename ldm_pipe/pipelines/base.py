"""What every pipeline keeps beside its networks: its noise law, its defaults, and what a callback may look at.

What enters: the parts of a pipeline. What leaves: the same as attributes, and diffusers' names for the state of a call.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from autoencoder import Autoencoder
from conditioning import AnyTextEncoder
from ldm_pipe.drawing.output import Defaults
from ldm_pipe.networks import UNet
from ldm_pipe.pipelines.scheduler import SchedulerConfig, defaults_of, law_of
from ldm_pipe.schedule import Law

if TYPE_CHECKING:
    from ldm_pipe.drawing.pixel_space import PixelSpace


class Call:
    """The state of a pipeline beside its networks."""

    schedule: Law

    def __init__(
        self,
        unet: UNet,
        autoencoder: Autoencoder | PixelSpace,
        text_encoders: Sequence[AnyTextEncoder],
        schedule: Law,
        defaults: Defaults | None,
        name: str,
    ) -> None:
        """Keep the parts."""
        self.unet, self.schedule = unet, schedule
        self.autoencoder = cast(Autoencoder, autoencoder)
        self.text_encoders = tuple(text_encoders)
        self.defaults, self.name = defaults or Defaults(), name
        self._progress: dict[str, Any] = {}
        self._offload: torch.device | None = None
        self._offload_lock = threading.Lock()
        self.given_scheduler: Any = None
        self.begin_call(1.0, 0)

    def __repr__(self) -> str:
        """Show the parts, one a line."""
        pipe: Any = self
        lines = [f"{type(self).__name__} {self.name}".rstrip()]
        for name, part in pipe.components.items():
            millions = sum(weight.numel() for weight in part.parameters()) / 1e6
            lines.append(f"  {name}: {type(part).__name__}, {millions:.1f}M weights, {part.device}, {part.dtype}")
        law, defaults = self.schedule, self.defaults.to_json()
        lines.append(f"  schedule: {type(law).__name__}, prediction {law.prediction}")
        lines.append(f"  defaults: {', '.join(f'{name}={value}' for name, value in defaults.items()) or 'none'}")
        return "\n".join(lines)

    # Which noise law and sampler

    @property
    def scheduler(self) -> Any:
        """Return the scheduler that was set, else something whose `.config` is that of the model, in diffusers' words.

        So `pipe.scheduler = X.from_config(pipe.scheduler.config)` works for any class X of `diffusers.schedulers`.
        """
        return self.given_scheduler or SchedulerConfig.of(self.schedule, self.defaults)

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        """Sample with a scheduler object of diffusers, and take over the noise law of its config."""
        if isinstance(scheduler, SchedulerConfig):  # the model's own, put back
            self.given_scheduler, self.schedule, self.defaults = None, scheduler.law, scheduler.defaults
            return
        self.schedule = law_of(scheduler, self.schedule)
        self.given_scheduler, self.defaults = scheduler, defaults_of(scheduler, self.defaults)

    # What a callback may look at and change

    @property
    def guidance_scale(self) -> float:
        """Return the guidance scale of the call a callback belongs to."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Return the number of steps of the call a callback belongs to."""
        return self._num_timesteps

    @property
    def _interrupt(self) -> bool:
        return self.num_interrupts > 0

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        """Stop the calls under way (from a callback: its own call) after their present step; later calls are free."""
        if value:
            self.num_interrupts += 1

    def begin_call(self, guidance_scale: float, num_timesteps: int) -> None:
        """Set what a callback may look at; called on the copy of the pipeline that one call shows to its callback."""
        self._guidance_scale, self._num_timesteps, self.num_interrupts = guidance_scale, num_timesteps, 0
