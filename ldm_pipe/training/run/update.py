"""One optimiser step of one network: its share of gradients, their norm, the step; whole or split over processes.

What enters: a network that was placed, and its optimiser. What leaves: the module that is called in the loss, and for
checkpoints the optimiser's whole state. DeepSpeed's way of the same is in zero.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.training.run import sharding, state
from ldm_pipe.training.run.checkpoint import optimizer_tensors
from ldm_pipe.training.run.zero import ZeroUpdate, zero_stage

if TYPE_CHECKING:
    from accelerate import Accelerator


class Update:
    """Steps of a network that each process holds whole (DDP, or alone) or in part (FSDP2).

    Args:
        name: of the part, for errors.
        net: the network; what requires grad is trained.
        optimizer: over it.
        limit: the gradient's norm is clipped to this; inf: not.
        accelerator: of this run.
    """

    def __init__(
        self, name: str, net: nn.Module, optimizer: torch.optim.Optimizer, limit: float, accelerator: Accelerator
    ) -> None:
        """Prepare the network; `module` is what the loss calls."""
        self.name = name
        self.optimizer, self.limit, self.accelerator = optimizer, limit, accelerator
        self.weights = [p for p in net.parameters() if p.requires_grad]
        self.sharded = sharding.sharding_wanted()
        self.module = sharding.autocast(net, accelerator) if self.sharded else accelerator.prepare(net)

    def share(self, last: bool) -> Any:
        """Return the context of forward and backward pass of one share of a step; processes meet in the last one."""
        if self.sharded:
            sharding.sync_gradients(self.module, last)
        return nullcontext() if last or self.sharded else self.accelerator.no_sync(self.module)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one share of the loss."""
        self.accelerator.backward(loss)

    def step(self) -> tuple[float, bool]:
        """Clip and step, or leave a step out whose gradient is not finite: (norm of the gradient, whether finite).

        Raises: LdmPipeError if the loss reaches none of the weights.
        """
        if all(p.grad is None for p in self.weights):
            raise LdmPipeError(f"no gradient reaches the weights of {self.name}", "loss", "See what it is made of.")
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        norm = self._clip()
        finite = math.isfinite(norm)
        if scaler is not None:
            scaler.step(self.optimizer)
            scaler.update()
        elif finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, finite

    def _clip(self) -> float:
        """Return the norm of the gradient; scale the gradient down where it exceeds the limit."""
        total = nn.utils.get_total_norm([p.grad for p in self.weights if p.grad is not None])
        norm = float(sharding.whole(total))
        if math.isfinite(norm) and norm > self.limit:
            nn.utils.clip_grads_with_norm_(self.weights, self.limit, total)
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """Return the optimiser's state."""
        return optimizer_tensors(self.optimizer)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put a saved state back, after the network's weights.

        Raises: ValueError for a state of another network.
        """
        state.restore_optimizer_state(self.optimizer, tensors)


def make_update(
    name: str, net: nn.Module, optimizer: torch.optim.Optimizer, limit: float, accelerator: Accelerator
) -> Update | ZeroUpdate:
    """Choose by what the launcher asks for."""
    if zero_stage():
        return ZeroUpdate(sharding.autocast(net, accelerator), optimizer, limit)
    return Update(name, net, optimizer, limit, accelerator)
