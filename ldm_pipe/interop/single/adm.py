"""openai's ADM checkpoints (guided-diffusion, `.pt`): into a U-Net folder of ours, and of diffusers where it fits.

What enters: tensors under openai's names. What leaves: a config and tensors under ours. Shapes tell everything but the
heads and the order of q, k, v: those are known of the published models, and asked for otherwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ldm_pipe.interop.pickles.checkpoint import load_checkpoint
from ldm_pipe.interop.single.ldm_names import rename, unet_modules
from ldm_pipe.networks import UNet
from ldm_pipe.networks.config_2d import OWN_CLASS_2D
from ldm_pipe.pretrained import LdmPipeError, atomic_write, check_tensors, save_tensors

QkvOrder = Literal["per_head", "split"]
_ATTENTION = {"norm.": "group_norm.", "proj_out.": "to_out.0."}


@dataclass(frozen=True)
class Heads:
    """What shapes do not tell: heads of one width, or one number of heads at every level, and how q, k, v are joined.

    "per_head": q, k and v of the first head, then of the second, ...; "split": all q, all k, all v
    (`use_new_attention_order`).
    """

    width: int | None = None
    count: int | None = None
    order: QkvOrder = "per_head"


@dataclass(frozen=True)
class Shape:
    """What shapes do tell."""

    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    num_residual: int
    attends: tuple[bool, ...]
    num_classes: int
    time_dim: int
    sinusoid_dim: int
    scale_shift: bool
    residual_resampling: bool


# (channels, residual blocks, levels with attention): heads and noise law of the published models
_Known = tuple[tuple[int, ...], int, tuple[int, ...]]
KNOWN: dict[_Known, tuple[Heads, str]] = {
    ((192, 384, 576, 768), 3, (1, 2, 3)): (Heads(width=64, order="split"), "squaredcos_cap_v2"),  # 64
    ((256, 256, 512, 768, 1024), 2, (2, 3, 4)): (Heads(count=4), "linear"),  # 128
    ((256, 256, 512, 512, 1024, 1024), 2, (3, 4, 5)): (Heads(width=64), "linear"),  # 256, LSUN
    ((128, 256, 256, 512, 512, 1024, 1024), 2, (4, 5, 6)): (Heads(width=64), "linear"),  # 512
    ((192, 192, 384, 384, 768, 768), 2, (3, 4, 5)): (Heads(count=4), "linear"),  # 64 -> 256
    ((192, 192, 384, 384, 768, 768), 2, (4, 5)): (Heads(width=64), "linear"),  # 128 -> 512
}


_SCHEDULER: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "trained_betas": None,
    "prediction_type": "epsilon",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
}


def is_adm(tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether names are those of openai's code."""
    return "input_blocks.0.0.weight" in tensors and "time_embed.0.weight" in tensors


def read_shape(tensors: Mapping[str, Tensor], where: str) -> Shape:
    """Read the architecture off the tensors' shapes.

    Raises: LdmPipeError for classifiers, for networks that resample without weights, and for other networks.
    """
    if "out.2.weight" not in tensors or "output_blocks.0.0.in_layers.2.weight" not in tensors:
        what = "the file has no way up: it is a classifier, or another network"
        raise LdmPipeError(
            what, where, "Diffusion models are read, and classifiers that end in attention over all positions."
        )
    blocks = {int(name.split(".")[1]) for name in tensors if name.startswith("output_blocks.")}
    grown = [
        n
        for n in sorted(blocks)
        for place in (1, 2)
        if any(f"output_blocks.{n}.{place}.{part}.weight" in tensors for part in ("conv", "in_layers.2"))
    ]
    per_level = grown[0] + 1 if grown else len(blocks)
    count = len(blocks) // per_level
    if per_level < 2 or count * per_level != len(blocks) or len(grown) != count - 1:
        what = f"{len(blocks)} blocks on the way up that grow at {grown}"
        raise LdmPipeError(what, where, "Every level must have as many blocks, and resample by weights.")
    firsts = [f"input_blocks.{1 + i * per_level}" for i in range(count)]
    missing = [first for first in firsts if f"{first}.0.in_layers.2.weight" not in tensors]
    if missing:
        raise LdmPipeError(f"no residual blocks at {missing}", where, "This is no ADM network.")
    channels = tuple(tensors[f"{first}.0.in_layers.2.weight"].shape[0] for first in firsts)
    time = tensors["time_embed.0.weight"].shape
    return Shape(
        in_channels=tensors["input_blocks.0.0.weight"].shape[1],
        out_channels=tensors["out.2.weight"].shape[0],
        channels=channels,
        num_residual=per_level - 1,
        attends=tuple(f"{first}.1.qkv.weight" in tensors for first in firsts),
        num_classes=tensors["label_emb.weight"].shape[0] if "label_emb.weight" in tensors else 0,
        time_dim=time[0],
        sinusoid_dim=time[1],
        scale_shift=tensors[f"{firsts[0]}.0.emb_layers.1.weight"].shape[0] == 2 * channels[0],
        residual_resampling=any(re.match(r"output_blocks\.\d+\.[12]\.in_layers", name) for name in tensors),
    )


def known_heads(shape: Shape, where: str) -> tuple[Heads, str]:
    """Return heads and noise law of a published model.

    Raises: LdmPipeError if it is none.
    """
    levels = tuple(i for i, attends in enumerate(shape.attends) if attends)
    found = KNOWN.get((shape.channels, shape.num_residual, levels))
    if found is None:
        what = f"widths {list(shape.channels)} with attention at levels {list(levels)} are of no published model"
        raise LdmPipeError(what, where, "Say the heads (their width or their number) and the order of q, k, v.")
    return found


def write_adm_config(shape: Shape, heads: Heads) -> dict[str, Any]:
    """Write the config: diffusers' UNet2DModel where it can say it all, else a class of ours that diffusers refuses.

    diffusers knows one width of heads, and a sinusoid as wide as the first level; with other numbers its shapes would
    fit and its pictures be wrong.
    """
    resampling = "resnet" if shape.residual_resampling else "conv"
    names = {True: "AttnDownBlock2D", False: "ResnetDownsampleBlock2D" if shape.residual_resampling else "DownBlock2D"}
    down = [names[attends] for attends in shape.attends]
    config: dict[str, Any] = {
        "_class_name": "UNet2DModel",
        "in_channels": shape.in_channels,
        "out_channels": shape.out_channels,
        "block_out_channels": list(shape.channels),
        "layers_per_block": shape.num_residual,
        "down_block_types": down,
        "up_block_types": [name.replace("Downsample", "Upsample").replace("Down", "Up") for name in reversed(down)],
        "downsample_type": resampling,
        "upsample_type": resampling,
        "resnet_time_scale_shift": "scale_shift" if shape.scale_shift else "default",
        "attn_norm_num_groups": 32,
        "attention_head_dim": heads.width,
        "time_embedding_dim": shape.time_dim,
        "num_class_embeds": shape.num_classes or None,
    }
    own: dict[str, Any] = {}
    if heads.count is not None and heads.count != 1:
        own["num_heads"] = heads.count
    if shape.sinusoid_dim != shape.channels[0]:
        own["sinusoid_dim"] = shape.sinusoid_dim
    return {**config, **own, "_class_name": OWN_CLASS_2D} if own else config


def split_qkv(qkv: Tensor, num_heads: int, order: QkvOrder) -> tuple[Tensor, Tensor, Tensor]:
    """Take a joint projection (3 C, ...) apart into q, k and v, (C, ...) each, heads one after the other."""
    rows = qkv.shape[0]
    if order == "per_head":
        parts = qkv.reshape(num_heads, 3, rows // 3 // num_heads, *qkv.shape[1:]).unbind(1)
        q, k, v = (part.reshape(rows // 3, *qkv.shape[1:]) for part in parts)
        return q, k, v
    q, k, v = qkv.clone().chunk(3)
    return q, k, v


def _heads_at(net: UNet, channels: int) -> int:
    """Return the number of heads where features are so wide; it is one wherever they are."""
    counts = {level.channels: level.num_heads for level in net.spec.levels if level.num_heads}
    return {**counts, net.spec.levels[-1].channels: net.spec.mid.num_heads}.get(channels, 1)


def split_joint(rest: dict[str, Tensor], num_heads: Callable[[int], int], order: QkvOrder) -> None:
    """Take every joint projection of an attention apart, in place, into `to_q`, `to_k` and `to_v`.

    Args:
        num_heads: of an attention of so many channels.
    """
    for name in [name for name in rest if name.endswith((".qkv.weight", ".qkv.bias"))]:
        stem, _, kind = name.rpartition(".qkv.")
        qkv = as_linear(rest.pop(name))
        for part, tensor in zip("qkv", split_qkv(qkv, num_heads(qkv.shape[0] // 3), order), strict=True):
            rest[f"{stem}.to_{part}.{kind}"] = tensor


def as_linear(tensor: Tensor) -> Tensor:
    """Return a convolution over one position as the linear layer that it is."""
    return tensor[:, :, 0] if tensor.ndim == 3 else tensor


def place(names: Mapping[str, str], rest: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors to ours; those without a place keep their names, so that a strict check tells.

    Args:
        names: from our names to openai's, attention under ours.
        rest: tensors, joint projections apart.
    """
    ours: dict[str, Tensor] = {}
    for key, name in names.items():
        source, attends = name, ".attentions." in key
        if attends:
            for theirs, mine in _ATTENTION.items():
                source = source.replace("." + mine, "." + theirs)
        if source in rest:
            tensor = rest.pop(source)
            ours[key] = as_linear(tensor) if attends else tensor
    return {**ours, **rest}


def from_adm(tensors: Mapping[str, Tensor], net: UNet, order: QkvOrder) -> dict[str, Tensor]:
    """Rename tensors to those of our U-Net; those without a place keep their names, so that a strict check tells."""
    rest = dict(tensors)
    split_joint(rest, lambda channels: _heads_at(net, channels), order)
    return place(rename(net.state_dict(), unet_modules(net.spec)), rest)


def import_adm(
    source: str | Path,
    target: str | Path,
    *,
    heads: Heads | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> tuple[str, ...]:
    """Turn an ADM checkpoint into `unet/` of a new folder; for a published model, into one that draws.

    Args:
        heads: what shapes do not tell; None: as in the published model of these shapes.
        tensors: those of the source, where it has been read already.
    Returns: notes, in whole sentences.
    Raises: LdmPipeError naming what is missing, unexpected, misshapen or unknown.
    """
    source, target, where = Path(source), Path(target), str(source)
    if target.exists():
        raise LdmPipeError("exists already", str(target), "Give another folder.")
    tensors = load_checkpoint(source) if tensors is None else tensors
    from ldm_pipe.interop.single.adm_classifier import import_adm_classifier, is_classifier

    if is_classifier(tensors):
        return import_adm_classifier(source, target, tensors, head_width=heads.width if heads else None)
    shape = read_shape(tensors, where)
    law = None
    if heads is None:
        heads, law = known_heads(shape, where)
    config = write_adm_config(shape, heads)
    if law is not None:
        config["sample_size"] = 32 * 2 ** shape.attends.index(True)  # it attends from 32 positions a side on
    with torch.device("meta"):
        net = UNet.from_config(config)
    ours = from_adm(tensors, net, heads.order)
    check_tensors(net, ours, where)
    save_tensors(target / "unet" / "diffusion_pytorch_model.safetensors", ours)
    atomic_write(target / "unet" / "config.json", json.dumps(config, indent=2) + "\n")
    notes: list[str] = []
    if law is not None:
        scheduler = {**_SCHEDULER, "beta_schedule": law}
        scheduler["variance_type"] = "learned_range" if shape.out_channels == 2 * 3 else "fixed_small"
        text = json.dumps(scheduler, indent=2)
        atomic_write(target / "scheduler" / "scheduler_config.json", text + "\n")
        _write_index(target, shape, str(config["_class_name"]))
    if config["_class_name"] == OWN_CLASS_2D:
        notes.append("diffusers' UNet2DModel cannot represent this network: it is a folder for ldm_pipe only.")
    return tuple(notes)


def _write_index(target: Path, shape: Shape, unet: str) -> None:
    """Write `model_index.json`: diffusers' pipeline where it draws with the network, else ours."""
    plain = shape.num_classes == 0 and unet == "UNet2DModel"
    name = "DDPMPipeline" if plain else "UnconditionalPipeline"
    index = {
        "_class_name": name if shape.in_channels == 3 else "SuperResolutionPipeline",
        "_diffusers_version": "0.38.0",
        "unet": ["ldm_pipe" if unet == OWN_CLASS_2D else "diffusers", unet],
        "scheduler": ["diffusers", _SCHEDULER["_class_name"]],
    }
    atomic_write(target / "model_index.json", json.dumps(index, indent=2) + "\n")
