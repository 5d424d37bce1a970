"""One optimiser step of the small CLIP towers, for their contrastive phase and for the one that predicts drawings.

What enters: weights and a loss. What leaves: the weights, moved. This file does not know what the loss compares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm_pipe.pretrained import LdmPipeError


class TowerUpdate:
    """AdamW with warm-up and cosine decay, gradients of norm 1 at most, and the contrastive loss's learnt scale.

    Attributes:
        log_scale: the logarithm of the scale of cosines, kept below log 100 (Radford et al. 2021, arXiv:2103.00020,
            section 2.5).
    """

    def __init__(
        self,
        weights: Sequence[nn.Parameter],
        *,
        learning_rate: float,
        weight_decay: float,
        num_warmup: int,
        num_steps: int,
    ) -> None:
        """Matrices decay; vectors and the scale do not."""
        self.weights, self.learning_rate = weights, learning_rate
        self.num_warmup, self.num_steps = num_warmup, num_steps
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        groups = [
            {"params": [p for p in weights if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [*(p for p in weights if p.ndim <= 1), self.log_scale], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))

    def __call__(self, loss: Tensor, step: int) -> None:
        """Do step number `step`, counted from 0.

        Raises: LdmPipeError for a loss that is not finite.
        """
        if not torch.isfinite(loss):
            raise LdmPipeError(f"the loss is {loss.item()} at step {step}", "training", "Lower the learning rate.")
        rate = min(1.0, (step + 1) / max(self.num_warmup, 1))
        rate *= 0.5 * (1 + math.cos(math.pi * step / self.num_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * rate
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(100))
