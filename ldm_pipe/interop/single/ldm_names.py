"""CompVis / sgm names of a network's tensors: pure maps from our (diffusers') key to theirs, made from the config.

What enters: a spec or a config, and the keys of the network. What leaves: {our key: their key}. Tensors are never
looked at; three kinds of them also change their shape (`squeezed`), and ADM joins q, k, v (`adm.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ldm_pipe.networks.spec import UNetSpec
from ldm_pipe.pretrained import LdmPipeError

_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _residual(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{part}": f"{theirs}.{name}" for part, name in _RESIDUAL.items()}


def _resampler(ours: str, theirs: str, kind: str, conv: str) -> dict[str, str]:
    return _residual(ours, theirs) if kind == "residual" else {f"{ours}.conv": f"{theirs}.{conv}"}


def _embedding_modules(spec: UNetSpec) -> dict[str, str]:
    modules = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    if spec.embedding.number_dim or spec.embedding.class_kind == "projection":
        name = "add_embedding" if spec.embedding.number_dim else "class_embedding"
        return {**modules, f"{name}.linear_1": "label_emb.0.0", f"{name}.linear_2": "label_emb.0.2"}
    return {**modules, "class_embedding": "label_emb"}


def unet_modules(spec: UNetSpec) -> dict[str, str]:
    """Return {our module: their module} of a U-Net: theirs is one list of blocks down, one up, numbered through."""
    modules = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2", **_embedding_modules(spec)}
    last, n = len(spec.levels) - 1, 0
    for i, level in enumerate(spec.levels):
        for j in range(level.num_residual):
            n += 1
            modules |= _residual(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{n}.0")
            modules[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{n}.1"
        if i < last:
            n += 1
            ours = f"down_blocks.{i}.downsamplers.0"
            modules |= _resampler(ours, f"input_blocks.{n}.0", level.down_resampling, "op")
    attends = spec.mid.kind in ("transformer", "picture", "joint")
    modules |= _residual("mid_block.resnets.0", "middle_block.0")
    modules |= _residual("mid_block.resnets.1", f"middle_block.{2 if attends else 1}")
    modules["mid_block.attentions.0"] = "middle_block.1"
    n = -1
    for i, level in enumerate(reversed(spec.levels)):
        for j in range(level.num_residual + 1):
            n += 1
            modules |= _residual(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{n}.0")
            modules[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{n}.1"
        if i < last:
            place = f"output_blocks.{n}.{1 if level.up_attention == 'none' else 2}"
            modules |= _resampler(f"up_blocks.{i}.upsamplers.0", place, level.up_resampling, "conv")
    return modules


def vae_modules(num_levels: int, num_blocks: int) -> dict[str, str]:
    """Return {our module: their module} of an autoencoder; theirs counts the decoder's levels from the finest."""
    modules: dict[str, str] = {}
    for half in ("encoder", "decoder"):
        modules[f"{half}.mid_block.resnets.0"] = f"{half}.mid.block_1"
        modules[f"{half}.mid_block.resnets.1"] = f"{half}.mid.block_2"
        for ours, theirs in _VAE_ATTENTION.items():
            modules[f"{half}.mid_block.attentions.0.{ours}"] = f"{half}.mid.attn_1.{theirs}"
        modules[f"{half}.conv_norm_out"] = f"{half}.norm_out"
    for i in range(num_levels):
        k = num_levels - 1 - i
        for j in range(num_blocks):
            modules[f"encoder.down_blocks.{i}.resnets.{j}"] = f"encoder.down.{i}.block.{j}"
        for j in range(num_blocks + 1):
            modules[f"decoder.up_blocks.{i}.resnets.{j}"] = f"decoder.up.{k}.block.{j}"
        modules[f"encoder.down_blocks.{i}.downsamplers.0"] = f"encoder.down.{i}.downsample"
        modules[f"decoder.up_blocks.{i}.upsamplers.0"] = f"decoder.up.{k}.upsample"
    shortcuts = {f"{ours}.conv_shortcut": f"{theirs}.nin_shortcut" for ours, theirs in modules.items()}
    return {**modules, **shortcuts}


def squeezed(key: str) -> bool:
    """Tell whether a tensor of ours is a matrix where theirs is a 1x1 convolution: the autoencoder's attention."""
    return ".mid_block.attentions.0.to_" in key and key.endswith(".weight")


def rename(keys: Iterable[str], modules: Mapping[str, str]) -> dict[str, str]:
    """Rename keys by the longest module name that they start with; a key of no named module keeps its name.

    Raises: LdmPipeError if two keys would get one name.
    """
    names = {}
    for key in keys:
        module = key
        while module and module not in modules:
            module = module.rpartition(".")[0]
        names[key] = modules[module] + key[len(module) :] if module else key
    if len(set(names.values())) != len(names):
        raise LdmPipeError("two tensors would get one name", "original key names", "This network has no such names.")
    return names
