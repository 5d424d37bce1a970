"""The learning rate of a step and the optimiser of a network; counted in optimiser steps, nothing else."""

from __future__ import annotations

import math

import torch
from torch import nn

from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.training.config import OptimConfig
from ldm_pipe.training.sharding import is_sharded


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


def make_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimiser over what is trained; biases and norm weights are not decayed.

    AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) keeps two numbers per weight, in 8 bits (Dettmers et al. 2022,
    arXiv:2110.02861) a quarter of that; Adafactor (Shazeer & Stern 2018, arXiv:1804.04235) keeps row and column means
    over a weight's last two axes, which saves little on convolutions, and reads the learning rate as its largest
    relative step.

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
            return torch.optim.Adafactor(groups, lr=config.learning_rate)
        case "adamw_8bit":
            try:
                from bitsandbytes.optim import AdamW8bit  # pyrefly: ignore[missing-import]
            except ImportError:
                fix = "pip install bitsandbytes, or use adafactor, which needs less memory still"
                raise LdmPipeError("bitsandbytes is not installed", "optim.optimizer", fix) from None
            return AdamW8bit(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon)
