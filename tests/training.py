"""A tiny diffusion training, for the tests of the training machinery: real U-Net, real loss, random data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm_pipe.networks import UNet
from ldm_pipe.training.run.checkpoint import load_checkpoint
from ldm_pipe.training.run.config import build_config
from ldm_pipe.training.run.loop import Logs, Micro, Part, Trainer
from ldm_pipe.training.run.rng import generator
from ldm_pipe.training.tasks.diffusion import DiffusionConfig, DiffusionData, build_importance, diffusion_loss

NUM_ITEMS = 11
UNET = {
    "sample_size": 4,
    "in_channels": 2,
    "out_channels": 2,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
BASE: dict[str, Any] = {
    "max_train_steps": 6,
    "train_batch_size": 4,
    "ema_decay": 0.9,
    "checkpointing_steps": 3,
    "validation_steps": 1000,
    "report_to": "none",
    "num_threads": 1,
    "optim": {"learning_rate": 2.0e-3, "lr_warmup_steps": 2},
}


def make_config(folder: Path, **changes: Any) -> DiffusionConfig:
    """Build the run config; values are replaced at the top level."""
    return build_config(DiffusionConfig, {**BASE, "output_dir": str(folder), **changes}, "test")


def make_data(num: int = NUM_ITEMS) -> DiffusionData:
    """Draw latents and embeddings: 5 texts, the last is the empty prompt."""
    g = torch.Generator().manual_seed(0)
    mean, tokens = torch.randn(num, 2, 4, 4, generator=g), torch.randn(5, 3, 8, generator=g)
    return DiffusionData(mean, torch.full_like(mean, 0.1), tokens, torch.randint(0, 4, (num, 2), generator=g))


def make_unet(seed: int = 0) -> UNet:
    """Build the tiny U-Net with weights drawn from a seed."""
    with torch.random.fork_rng():
        torch.default_generator.set_state(generator(seed, "test").get_state())
        return UNet.from_config(UNET)


def make_trainer(
    config: DiffusionConfig,
    *,
    data: DiffusionData | None = None,
    wrap: Callable[[Callable[[Micro], tuple[Tensor, Logs]]], Callable[[Micro], tuple[Tensor, Logs]]] | None = None,
    **options: Any,
) -> Trainer:
    """Put the trainer together; `wrap` may change the loss function."""
    data = data or make_data()
    part = Part(
        "unet", make_unet(), lambda micro: loss(micro), config.optim, config.ema_decay if config.use_ema else None
    )
    importance = build_importance(config)
    kept = {} if importance is None else {"importance": importance}
    trainer = Trainer(config, [part], **{"num_items": len(data.mean), "fingerprint": "data", "kept": kept, **options})
    sizes: Any = {"global_batch": trainer.global_batch, "device": trainer.accelerator.device}
    loss = diffusion_loss(part.module, data, config.schedule.build(), config, importance=importance, **sizes)
    loss = wrap(loss) if wrap else loss
    return trainer


def run(folder: Path, **changes: Any) -> Trainer:
    """Train to the end of the config."""
    trainer = make_trainer(make_config(folder, **changes))
    trainer.fit()
    return trainer


class Both(nn.Module):
    """A frozen U-Net and what is trained on it, as one network."""

    def __init__(self, unet: nn.Module, added: nn.Module) -> None:
        super().__init__()
        self.unet, self.added = unet, added

    def forward(self, *args: Tensor, **slots: Tensor) -> Tensor:
        return self.unet(*args, **slots)


def whole_state(trainer: Trainer) -> dict[str, Tensor]:
    """Return weights, EMA and optimiser state as one dict of copies."""
    groups = trainer._groups()
    return {f"{group}/{name}": t.detach().clone() for group, tensors in groups.items() for name, t in tensors.items()}


def saved_state(folder: Path) -> dict[str, Tensor]:
    """Return what a checkpoint holds, named as `whole_state` names it."""
    groups, _ = load_checkpoint(folder)
    return {f"{group}/{name}": t for group, tensors in groups.items() for name, t in tensors.items()}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Compare two states bit for bit."""
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, for instance {different[0]}"
