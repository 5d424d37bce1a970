"""What the loop trains and sees: parts with a loss, slices of a batch, the order of the data. It knows no step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from ldm_pipe.training.run.config import OptimConfig

Logs = dict[str, float]


class Order(Protocol):
    """Which rows make up a batch, as a pure function of the step; `ldm_pipe.data.order.DataOrder` is one."""

    def batch_at(
        self, step: int, *, process_index: int, num_processes: int, micro_step: int, num_micro_steps: int
    ) -> np.ndarray:
        """Return the rows that one process sees in one accumulation step."""
        ...

    def epoch_at(self, step: int) -> float:
        """Return how many epochs lie before a step."""
        ...


@dataclass(frozen=True)
class Micro:
    """One process's slice of one accumulation step of a global batch."""

    step: int
    indices: list[int]  # rows of the data set
    positions: range  # their places in the global batch, which key the noise
    memo: dict[str, Any] = field(default_factory=dict)  # what an earlier part of the same step leaves for a later one


@dataclass
class Part:
    """One network trained by one optimiser. `loss(micro)` returns the mean loss of the slice and values to log."""

    name: str
    module: nn.Module
    loss: Callable[[Micro], tuple[Tensor, Logs]]
    optim: OptimConfig
    ema_decay: float | None = None
    start_step: int = 0  # the part rests before this step
    clip: bool = True
    save_frozen: bool = True  # False: frozen weights stay out of the checkpoints, which keep their digest instead
