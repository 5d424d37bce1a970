"""The learning rate of a step and the optimiser of a network; counted in optimiser steps, nothing else."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.training.run.config import OptimConfig
from ldm_pipe.training.run.sharding import is_sharded


def lr_at(step: int, config: OptimConfig, max_train_steps: int) -> float:
    """Return the learning rate of optimiser step `step` (0-based), whatever the processes or accumulation.

    warm-up: lr (step + 1) / warmup;   then u = (step - warmup) / (max - warmup):
    constant lr,   linear lr (1 - u),   cosine lr (1 + cos(pi u)) / 2
    """
    if step < config.lr_warmup_steps:
        return config.learning_rate * (step + 1) / config.lr_warmup_steps
    u = min(1.0, (step - config.lr_warmup_steps) / max(1, max_train_steps - config.lr_warmup_steps))
    match config.lr_scheduler:
        case "constant":
            return config.learning_rate
        case "linear":
            return config.learning_rate * (1 - u)
        case "cosine":
            return config.learning_rate * 0.5 * (1 + math.cos(math.pi * u))


def warn_of_long_warmup(config: OptimConfig, max_train_steps: int) -> None:
    """Say that a run ends before its learning rate is reached: it learns almost nothing."""
    if config.lr_warmup_steps >= max_train_steps:
        reached = lr_at(max_train_steps - 1, config, max_train_steps)
        what = f"the run of {max_train_steps} steps ends within its warm-up of {config.lr_warmup_steps}"
        more = f"the learning rate only reaches {reached:.2g} of {config.learning_rate:.2g}"
        warnings.warn(f"{what}: {more}. Give fewer lr_warmup_steps, 0 for none, or more steps", stacklevel=3)


class MatrixAdafactor(torch.optim.Adafactor):
    """Adafactor whose factors are those of a matrix for convolutions too: one row per output channel.

    torch's own factors the last two axes of any weight, here the 3x3 of the kernel: two thirds of the weight's numbers
    are then kept, and its norms over three numbers take most of a step (25 of 42 s on one CPU core for the U-Net of
    SD 1.5, batch 1).
    """

    def _init_group(
        self,
        group: dict[str, Any],
        params_with_grad: list[Tensor],
        grads: list[Tensor],
        row_vars: list[Tensor | None],
        col_vars: list[Tensor | None],
        variances: list[Tensor | None],
        state_steps: list[Tensor],
    ) -> bool:
        first, trained = len(params_with_grad), [p for p in group["params"] if p.grad is not None]
        views = {i: p for i, p in enumerate(trained, first) if p.ndim > 2 and p.is_contiguous() and not is_sharded(p)}
        for p in views.values():
            if not self.state[p]:
                row, column = p.new_zeros(len(p), 1), p.new_zeros(1, p[0].numel())
                self.state[p] = {"step": torch.tensor(0.0), "row_var": row, "col_var": column}
            if self.state[p]["row_var"].ndim != 2:
                what = f"Adafactor's numbers for a weight of shape {tuple(p.shape)} are those of an older version"
                raise LdmPipeError(what, "checkpoint", "Resume with that version, or start from its model.")
        mixed = super()._init_group(group, params_with_grad, grads, row_vars, col_vars, variances, state_steps)
        for i, p in views.items():
            params_with_grad[i], grads[i] = p.view(len(p), -1), grads[i].reshape(len(p), -1)
        return mixed


def make_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimiser over what is trained; biases and norm weights are not decayed.

    AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) keeps two numbers per weight, in 8 bits (Dettmers et al. 2022,
    arXiv:2110.02861) a quarter of that; Adafactor (Shazeer & Stern 2018, arXiv:1804.04235) keeps row and column means,
    and reads the learning rate as its largest relative step.

    Raises: LdmPipeError where bitsandbytes is not installed.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.adam_weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    match config.optimizer:
        case "adamw":
            on_cpu = all(p.device.type == "cpu" and not is_sharded(p) for p in trainable)
            how = {"fused": True} if on_cpu else {"foreach": True}  # one pass without copies, five times as fast there
            return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, **how)
        case "adafactor":
            return MatrixAdafactor(groups, lr=config.learning_rate)
        case "adamw_8bit":
            try:
                from bitsandbytes.optim import AdamW8bit  # pyrefly: ignore[missing-import]
            except ImportError:
                fix = "pip install bitsandbytes, or use adafactor, which needs less memory still"
                raise LdmPipeError("bitsandbytes is not installed", "optim.optimizer", fix) from None
            return AdamW8bit(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon)
