"""Exponential moving average of weights, kept in fp32 whatever the model's dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ldm_pipe.training.run.sharding import local, put


def ema_decay_at(step: int, decay: float) -> float:
    """Warm the decay up: min(decay, (1 + step) / (10 + step)), so that early averages forget the random start.

    Args:
        step: optimiser steps done before this update, >= 0.
        decay: the final decay, in [0, 1).
    """
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """An fp32 shadow of a module's floating-point state; its warm-up is a function of the step: no further state.

    Parameters that are frozen when it is made have none: their average is what they are.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        """Start from the module's present weights."""
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ema_decay {decay}: must be in [0, 1)")
        self.decay = decay
        frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
        moving = {n: t for n, t in module.state_dict().items() if t.is_floating_point() and n not in frozen}
        self.shadow = {name: t.detach().float().clone() for name, t in moving.items()}

    def _live(self, module: nn.Module) -> dict[str, Tensor]:
        tensors = module.state_dict()
        return {name: tensors[name] for name in self.shadow}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move the shadow towards the module: s <- d s + (1 - d) w, d = ema_decay_at(step)."""
        weight = 1.0 - ema_decay_at(step, self.decay)
        live = [local(t).float() for t in self._live(module).values()]
        torch._foreach_lerp_([local(t) for t in self.shadow.values()], live, weight)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the shadow tensors by name."""
        return self.shadow

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take over saved shadow tensors; names must be the same."""
        if tensors.keys() != self.shadow.keys():
            raise ValueError(f"EMA names differ: {sorted(tensors.keys() ^ self.shadow.keys())[:10]}")
        for name, tensor in tensors.items():
            put(self.shadow[name], tensor)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Put the averaged weights into the module for the block, and the trained ones back, whatever happens."""
        live = self._live(module)
        kept = {name: tensor.detach().clone() for name, tensor in live.items()}
        try:
            with torch.no_grad():
                for name, tensor in live.items():
                    tensor.copy_(self.shadow[name])
            yield
        finally:
            with torch.no_grad():
                for name, tensor in live.items():
                    tensor.copy_(kept[name])
