"""openai's ADM classifiers (guided-diffusion, `*_classifier.pt`): into a `classifier/` folder of ours.

What enters: tensors under openai's names. What leaves: a config and tensors under ours. Shapes tell everything but the
width of the heads, which is 64 in all published ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_pipe.interop.single.adm import as_linear, place, split_joint, split_qkv
from ldm_pipe.interop.single.ldm_names import rename, unet_modules
from ldm_pipe.networks.classifier import ADMClassifier, Pool
from ldm_pipe.pretrained import LdmPipeError, atomic_write, check_tensors, save_tensors

HEAD_WIDTH = 64
FOLDER = "classifier"
_ENDS: dict[Pool, dict[str, str]] = {
    "attention": {"norm_out": "out.0"},
    "adaptive": {"norm_out": "out.0", "pool.to_out": "out.3"},
    "spatial": {"pool.to_hidden": "out.0", "pool.to_out": "out.2"},
    "spatial_v2": {"pool.to_hidden": "out.0", "pool.norm": "out.1", "pool.to_out": "out.3"},
}
_POOL, _EMBEDDING = "out.2.", "out.2.positional_embedding"


def is_classifier(tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether names are those of openai's classifier: a way down, no way up, and one of its four ends."""
    return "input_blocks.0.0.weight" in tensors and not _has_way_up(tensors) and find_pool(tensors) is not None


def find_pool(tensors: Mapping[str, Tensor]) -> Pool | None:
    """Tell by the last layers how a classifier pools; None if they are of no classifier."""
    shapes = {name: tensors[name].ndim for name in ("out.0.weight", "out.2.weight", "out.3.weight") if name in tensors}
    if _EMBEDDING in tensors:
        return "attention"
    if shapes.get("out.0.weight") == 2:
        return "spatial_v2" if shapes.get("out.3.weight") == 2 else "spatial" if "out.2.weight" in shapes else None
    return "adaptive" if shapes.get("out.3.weight") == 4 else None


def _has_way_up(tensors: Mapping[str, Tensor]) -> bool:
    return any(name.startswith("output_blocks.") for name in tensors)


def read_classifier_config(
    tensors: Mapping[str, Tensor], where: str, *, head_width: int = HEAD_WIDTH
) -> dict[str, Any]:
    """Read the config off the tensors' shapes.

    Raises: LdmPipeError if they are not those of such a network, or fit several.
    """
    count = len({name.split(".")[1] for name in tensors if name.startswith("input_blocks.")}) - 1
    found = [n for n in range(1, count + 1) if (count + 1) % (n + 1) == 0 and _fits(tensors, count, n)]
    if len(found) != 1 or "time_embed.0.weight" not in tensors:
        what = f"{count} blocks on the way down are {len(found)} networks of ADM's kind"
        raise LdmPipeError(what, where, "Every level must have as many residual blocks, and resample by weights.")
    per_level = found[0]
    firsts = range(1, count + 1, per_level + 1)
    channels = [tensors[f"input_blocks.{n}.0.in_layers.2.weight"].shape[0] for n in firsts]
    attends = [f"input_blocks.{n}.1.qkv.weight" in tensors for n in firsts]
    pool = find_pool(tensors)
    assert pool is not None
    shifted = tensors["input_blocks.1.0.emb_layers.1.weight"].shape[0] == 2 * channels[0]
    sinusoid_dim = tensors["time_embed.0.weight"].shape[1]
    return {
        "_class_name": ADMClassifier.class_name,
        **_read_end(tensors, pool, len(channels)),
        "in_channels": tensors["input_blocks.0.0.weight"].shape[1],
        "block_out_channels": channels,
        "layers_per_block": per_level,
        "down_block_types": ["AttnDownBlock2D" if attend else "ResnetDownsampleBlock2D" for attend in attends],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift" if shifted else "default",
        "attn_norm_num_groups": 32,
        "attention_head_dim": head_width,
        "time_embedding_dim": tensors["time_embed.0.weight"].shape[0],
        "sinusoid_dim": 0 if sinusoid_dim == channels[0] else sinusoid_dim,
    }


def _read_end(tensors: Mapping[str, Tensor], pool: Pool, num_levels: int) -> dict[str, Any]:
    """Read the fields of a classifier's last layers; only attention tells the size of the pictures."""
    match pool:
        case "attention":
            side = math.isqrt(tensors[_EMBEDDING].shape[1] - 1)
            num_classes = tensors[f"{_POOL}c_proj.weight"].shape[0]
            return {"pool": pool, "sample_size": side * 2 ** (num_levels - 1), "num_classes": num_classes}
        case "adaptive":
            return {"pool": pool, "num_classes": tensors["out.3.weight"].shape[0]}
        case _:
            last = tensors["out.2.weight" if pool == "spatial" else "out.3.weight"]
            return {"pool": pool, "num_classes": last.shape[0], "hidden_width": last.shape[1]}


def _fits(tensors: Mapping[str, Tensor], count: int, per_level: int) -> bool:
    """Tell whether so many residual blocks per level explain which blocks change width, and which attend."""
    for start in range(1, count + 1, per_level + 1):
        level = range(start, start + per_level)
        attends = {f"input_blocks.{n}.1.qkv.weight" in tensors for n in level}
        widens = any(f"input_blocks.{n}.0.skip_connection.weight" in tensors for n in level[1:])
        down = f"input_blocks.{start + per_level}"
        shrinks = f"{down}.0.skip_connection.weight" in tensors or f"{down}.1.qkv.weight" in tensors
        if len(attends) > 1 or widens or shrinks:
            return False
    return True


def from_adm_classifier(tensors: Mapping[str, Tensor], net: ADMClassifier) -> dict[str, Tensor]:
    """Rename tensors to ours; those without a place keep their names, so that a strict check tells."""
    rest = dict(tensors)
    split_joint(rest, lambda channels: channels // net.config.attention_head_dim, "per_head")
    for kind in ("weight", "bias"):
        qkv = rest.pop(f"{_POOL}qkv_proj.{kind}", None)
        if qkv is not None:  # this one has all of q before all of k, whatever the others do
            parts = split_qkv(as_linear(qkv), 1, "split")
            rest |= {f"pool.to_{part}.{kind}": value for part, value in zip("qkv", parts, strict=True)}
        out = rest.pop(f"{_POOL}c_proj.{kind}", None)
        if out is not None:
            rest[f"pool.to_out.{kind}"] = as_linear(out)
    if _EMBEDDING in rest:
        rest["pool.positional_embedding"] = rest.pop(_EMBEDDING).T.contiguous()
    modules = {**unet_modules(net.spec), **_ENDS[net.pool_kind]}
    if net.pool_kind == "adaptive" and "out.3.weight" in rest:
        rest["out.3.weight"] = rest["out.3.weight"].flatten(1)  # a convolution of 1 x 1
    return place(rename(net.state_dict(), modules), rest)


def import_adm_classifier(
    source: str | Path, target: str | Path, tensors: Mapping[str, Tensor], *, head_width: int | None = None
) -> tuple[str, ...]:
    """Turn an ADM classifier into `classifier/` of a new folder.

    Args:
        tensors: of the source.
        head_width: of its attention; None: 64, as in all published ones.
    Returns: notes, in whole sentences.
    Raises: LdmPipeError naming what is missing, unexpected, misshapen or unknown.
    """
    target, where = Path(target), str(source)
    if target.exists():
        raise LdmPipeError("exists already", str(target), "Give another folder.")
    config = read_classifier_config(tensors, where, head_width=head_width or HEAD_WIDTH)
    with torch.device("meta"):
        net = ADMClassifier.from_config(config)
    ours = from_adm_classifier(tensors, net)
    check_tensors(net, ours, where)
    save_tensors(target / FOLDER / f"{net.weights_name}.safetensors", ours)
    atomic_write(target / FOLDER / "config.json", json.dumps(config, indent=2) + "\n")
    return (f"a classifier: ADMClassifier.from_pretrained('{target / FOLDER}') guides with it.",)
