"""Optimiser state, and gradients too, divided among processes by DeepSpeed (ZeRO 1 and 2, arXiv:1910.02054).

What enters: a network, its optimiser and what `accelerate launch` set. What leaves: DeepSpeed's engine, driven step by
step; whole tensors go in and out, so checkpoints are those of any other run. On a CPU accelerate would start each
process alone, so DeepSpeed itself is called here on every device, without any settings but the stage.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ldm_pipe.pretrained import LdmPipeError

STAGES = (1, 2)
MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 50_000_000  # numbers that are reduced at once


def zero_stage() -> int:
    """Return the ZeRO stage that the launcher asks for; 0: none."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return 0
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))


def check_zero(mixed_precision: str) -> None:
    """Refuse what DeepSpeed is asked for and this trainer does not do with it.

    Raises: LdmPipeError naming it and what to use instead.
    """
    stage, where = zero_stage(), "accelerate launch"
    fsdp = "configs/accelerate/fsdp2.yaml splits the weights too, as ZeRO 3 does."
    if stage not in STAGES:
        raise LdmPipeError(f"ZeRO stage {stage} is asked for", where, f"Use stage 1 or 2; {fsdp}")
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        what = "a config file of DeepSpeed is given, but the YAML of the run decides batches, clipping and precision"
        raise LdmPipeError(what, where, "Use configs/accelerate/deepspeed_zero2.yaml.")
    if os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") != "none":
        raise LdmPipeError("optimiser state cannot be put elsewhere", where, "Set offload_optimizer_device: none.")
    if mixed_precision == "fp16":
        raise LdmPipeError("fp16 does not go with DeepSpeed here", "mixed_precision", "Use bf16 or no.")
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise LdmPipeError("ZeRO needs several processes", where, "Give --num_processes 2 or more.")
    try:
        import deepspeed  # noqa: F401  # pyrefly: ignore[missing-import]
    except ImportError:
        raise LdmPipeError("DeepSpeed is not installed", where, f"pip install deepspeed, or: {fsdp}") from None


class ZeroUpdate:
    """Steps of a network whose AdamW keeps its state in parts with the processes; the weights stay whole in each.

    Args:
        net: the network; what requires grad is trained.
        optimizer: AdamW over it, without state; its learning rate may be set at any time.
        limit: the gradient's norm is clipped to this; inf: not.

    Raises: LdmPipeError for another optimiser.
    """

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer, limit: float) -> None:
        """Put network and optimiser into DeepSpeed's hands."""
        import deepspeed  # pyrefly: ignore[missing-import]

        if not isinstance(optimizer, torch.optim.AdamW):
            what = f"{type(optimizer).__name__} keeps no state that ZeRO could divide"
            raise LdmPipeError(what, "optim.optimizer", "Use adamw.")
        self.optimizer = optimizer
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        self.weights: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        self.homes = [i for i, group in enumerate(optimizer.param_groups) for _ in group["params"]]
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0 if limit == float("inf") else limit,
            "zero_optimization": {"stage": zero_stage(), "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        self.module, *_ = deepspeed.initialize(
            model=net, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self.flat = [group["params"][0] for group in optimizer.param_groups]  # of each group, this process's part
        for flat in self.flat:
            optimizer.state[flat] = {"step": torch.tensor(0.0), **{key: torch.zeros_like(flat) for key in MOMENTS}}
        self.module.optimizer._lazy_init_hp_params_optimizer_state()  # after a first step it would miss later groups

    def share(self, last: bool) -> Any:
        """Return the context of forward and backward pass of one share of a step; after the last one it steps."""
        self.module.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one share of the loss."""
        self.module.backward(loss, scale_wrt_gas=False)

    def step(self) -> tuple[float, bool]:
        """Clip and step, or leave a step out whose gradient is not finite: (norm of the gradient, whether finite)."""
        self.module.step()
        norm = self.module.get_global_grad_norm()
        return float(norm), not self.module.optimizer.overflow

    def tensors(self) -> dict[str, Tensor]:
        """Gather the state as `checkpoint.optimizer_tensors` names it; all processes call this."""
        from deepspeed.utils import safe_get_full_optimizer_state  # pyrefly: ignore[missing-import]

        found: dict[str, Tensor] = {}
        for i, (weight, home) in enumerate(zip(self.weights, self.homes, strict=True)):
            found[f"{i}.step"] = self.optimizer.state[self.flat[home]]["step"].clone()
            found |= {f"{i}.{key}": safe_get_full_optimizer_state(weight, key) for key in MOMENTS}
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Divide a saved state among the processes, after the network's weights were put back.

        Raises: ValueError for a state of another network.
        """
        from deepspeed.utils import safe_set_full_optimizer_state  # pyrefly: ignore[missing-import]

        self.module.optimizer.refresh_fp32_params()
        num = len(self.weights)
        if tensors.keys() != {f"{i}.{key}" for i in range(num) for key in ("step", *MOMENTS)}:
            raise ValueError(f"{len(tensors)} tensors of an optimiser's state, for {num} trained weights")
        for i, (weight, home) in enumerate(zip(self.weights, self.homes, strict=True)):
            self.optimizer.state[self.flat[home]]["step"].copy_(tensors[f"{i}.step"])
            for key in MOMENTS:
                value = tensors[f"{i}.{key}"]
                if value.shape != weight.shape:
                    raise ValueError(f"{key} of weight {i} is {tuple(value.shape)}, not {tuple(weight.shape)}")
                safe_set_full_optimizer_state(weight, value.to(weight.device), key)
