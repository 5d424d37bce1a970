"""Weights split over processes (FSDP2): the module that is trained is a sharded copy, whole tensors go in and out.

What enters: a module and what `accelerate launch` or `accelerate config` set. What leaves: its sharded copy. On a CPU
accelerate itself never shards, so torch's `fully_shard` is called here on every device, with accelerate's settings.
"""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm_pipe.pretrained import LdmPipeError

if TYPE_CHECKING:
    from accelerate import Accelerator


def sharding_wanted() -> bool:
    """Tell whether the launcher asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def shard(module: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Return a sharded copy of a module (Zhao et al. 2023, arXiv:2304.11277), which computes like the module.

    Raises: LdmPipeError for FSDP 1 and for a single process.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise LdmPipeError("FSDP version 1 is not supported", "accelerate config", "Set fsdp_version: 2.")
    if not torch.distributed.is_initialized():
        raise LdmPipeError("FSDP needs several processes", "accelerate launch", "Give --num_processes 2 or more.")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    options = {"mesh": mesh, "reshard_after_forward": plugin.reshard_after_forward}
    net = copy.deepcopy(module)
    plugin.set_auto_wrap_policy(net)
    wraps = fsdp2_prepare_auto_wrap_policy(plugin, net)
    for child in reversed(list(net.modules())[1:]):
        if wraps is not None and wraps(child) and not isinstance(child, FSDPModule):
            fully_shard(child, **options)
    fully_shard(net, **options)
    return net


def autocast(net: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Let a sharded module compute in the run's precision, as accelerate does with those it prepares."""
    if accelerator.mixed_precision == "no":
        return net
    from accelerate.utils import convert_outputs_to_fp32

    forward = net.forward

    def computed(*args: Any, **kwargs: Any) -> Any:
        with accelerator.autocast():
            return forward(*args, **kwargs)

    net.forward = convert_outputs_to_fp32(computed)
    return net


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether this process holds only a part of a tensor."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """Return this process's part, or the tensor itself; both share its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor; for a sharded one, all processes must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def split_like(value: Tensor, model: Tensor) -> Tensor:
    """Split a whole tensor, the same in all processes, as another one of its shape is split."""
    if not is_sharded(model) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = model.device_mesh, model.placements  # type: ignore[attr-defined]
    return distribute_tensor(value.to(model.device), mesh, placements, src_data_rank=None)


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Overwrite a plain or sharded tensor with a whole one."""
    local(target).copy_(local(split_like(value, target)))


def sync_gradients(module: nn.Module, wanted: bool) -> None:
    """Tell a sharded module whether the coming backward pass is the last of its step."""
    module.set_requires_gradient_sync(wanted)  # type: ignore[operator]
