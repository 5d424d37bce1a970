"""What a checkpoint holds of a run, taken out of networks and optimisers and put back; it knows no files.

Tensors go out whole and come back whole, so a run may go on with another number of processes, sharded or not.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.training.run.checkpoint import restore_optimizer
from ldm_pipe.training.run.config import config_changes
from ldm_pipe.training.run.sharding import put, split_like, whole

Groups = dict[str, dict[str, Tensor]]


def frozen_names(module: nn.Module) -> set[str]:
    """Name the parameters that are not trained."""
    return {name for name, p in module.named_parameters() if not p.requires_grad}


def digest(module: nn.Module, names: Iterable[str]) -> str:
    """Hash some of a module's tensors (BLAKE2b over names, dtypes, shapes and bytes)."""
    summary, tensors = hashlib.blake2b(digest_size=16), module.state_dict()
    for name in sorted(names):
        tensor = whole(tensors[name]).detach().cpu().contiguous()
        summary.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        summary.update(tensor.flatten().view(torch.uint8).numpy())
    return summary.hexdigest()


def module_tensors(module: nn.Module, left_out: set[str]) -> dict[str, Tensor]:
    """Return a module's state without some names."""
    return {name: tensor for name, tensor in module.state_dict().items() if name not in left_out}


def restore_module(module: nn.Module, tensors: Mapping[str, Tensor], left_out: set[str]) -> None:
    """Put saved tensors back.

    Raises: ValueError naming what is missing, unknown or of another shape.
    """
    own = module_tensors(module, left_out)
    for what, names in (("missing", own.keys() - tensors.keys()), ("unknown", tensors.keys() - own.keys())):
        if names:
            raise ValueError(f"{len(names)} {what} tensors, for instance {min(names)}")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(f"{name} is {tuple(tensors[name].shape)}, the network has {tuple(tensor.shape)}")
        put(tensor, tensors[name])


def gather(groups: Mapping[str, Mapping[str, Tensor]], keep: bool) -> Groups:
    """Make all tensors whole; a process that does not keep them takes part in the gathering only."""
    gathered: Groups = {}
    for group, tensors in groups.items():
        gathered[group] = {}
        for name, tensor in tensors.items():
            value = whole(tensor)
            if keep:
                gathered[group][name] = value
    return gathered


def restore_optimizer_state(optimizer: torch.optim.Optimizer, flat: Mapping[str, Tensor]) -> None:
    """Put an optimiser's state back, split as the parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    value: dict[str, Tensor] = {}
    for key, tensor in flat.items():
        index = int(key.split(".", 1)[0])
        if index >= len(parameters):
            raise ValueError(f"state of parameter {index} of {len(parameters)}")
        like = parameters[index]
        value[key] = split_like(tensor, like) if tensor.shape == like.shape else tensor
    restore_optimizer(optimizer, value)


def refuse_other_run(saved: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
    """Compare what a checkpoint says of its run with the present one.

    Args:
        saved, now: {"config", "fingerprint", "global_batch", "frozen"}.
        defaults: of the config, for keys that are younger than the checkpoint.

    Raises: LdmPipeError listing what differs (config, data set, global batch, frozen weights).
    """
    changes = config_changes(saved["config"], now["config"], defaults)
    before, after = saved["config"].get("max_train_steps"), now["config"].get("max_train_steps")
    if isinstance(before, int) and isinstance(after, int) and after > before:  # the same run, going on for longer
        changes = [line for line in changes if not line.startswith(("max_train_steps: ", "num_train_epochs: "))]
        if now["config"].get("optim", {}).get("lr_scheduler", "constant") != "constant":
            what = f"max_train_steps grew from {before} to {after}: the learning rate now falls towards the new end"
            warnings.warn(what, stacklevel=2)
    if changes and not now["config"]["allow_config_change"]:
        what = "the config differs from the checkpoint's: " + "; ".join(changes)
        raise LdmPipeError(what, where, "Use the saved config, or --allow_config_change if you are sure.")
    if saved["fingerprint"] != now["fingerprint"]:
        what = "the data set changed since the checkpoint was written, or what encodes it did"
        raise LdmPipeError(what, where, "Restore the data and the model that the run started from.")
    if saved["global_batch"] != now["global_batch"]:
        what = f"the global batch is {now['global_batch']}, the checkpoint's was {saved['global_batch']}"
        fix = "Choose batch size x accumulation x processes to give the same product."
        raise LdmPipeError(what, where, fix)
    other = [name for name, value in now["frozen"].items() if saved.get("frozen", {}).get(name) != value]
    if other:
        what = f"the frozen weights of {', '.join(other)} are not those the checkpoint was trained on"
        raise LdmPipeError(what, where, "Load the model that the run started from.")


def refuse_half_weights(name: str, module: nn.Module) -> None:
    """Refuse trainable weights that are not fp32: small steps would be lost in rounding."""
    half = [n for n, p in module.named_parameters() if p.requires_grad and p.dtype != torch.float32]
    if half:
        what = f"{len(half)} trainable weights of {name} are not float32, for instance {half[0]}"
        raise LdmPipeError(what, "training", "Load the weights in float32; mixed_precision sets the compute dtype.")


def refuse_nonfinite(groups: Groups, where: str) -> None:
    """Refuse to write NaN or infinity."""
    for group, tensors in groups.items():
        bad = [name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
        if bad:
            what = (
                f"no checkpoint is written: {len(bad)} tensors of {group} hold NaN or infinity, for instance {bad[0]}"
            )
            raise LdmPipeError(what, where, "Lower the learning rate; the last checkpoint is kept.")
