"""Text encoders of original single files: CLIP under transformers' names, OpenCLIP under its own.

What enters: named tensors of one text encoder. What leaves: the same under the other names. OpenCLIP joins q, k, v,
stores its projection transposed, and its Stable Diffusion 2 file holds more than the model reads.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_TOP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_PROJECTION = ("text_projection.weight", "text_projection")


def _pairs(num_layers: int) -> dict[str, str]:
    """Return {our key: their key} of all tensors that only change their name."""
    names = dict(_TOP)
    for i in range(num_layers):
        for ours, theirs in _LAYER.items():
            for kind in ("weight", "bias"):
                key = f"text_model.encoder.layers.{i}.{ours}.{kind}"
                names[key] = f"transformer.resblocks.{i}.{theirs}.{kind}"
    return names


def _joined(num_layers: int) -> dict[str, tuple[str, ...]]:
    """Return {their key: our three keys} of the joint projections."""
    joined = {}
    for i in range(num_layers):
        for kind in ("weight", "bias"):
            ours = tuple(f"text_model.encoder.layers.{i}.self_attn.{part}_proj.{kind}" for part in "qkv")
            joined[f"transformer.resblocks.{i}.attn.in_proj_{kind}"] = ours
    return joined


def from_open_clip(
    tensors: Mapping[str, Tensor], num_layers: int, *, projection: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rename OpenCLIP's tensors to those of a CLIPTextModel.

    Args:
        num_layers: how many layers the model reads; Stable Diffusion 2 reads 23 of 24.
        projection: whether it has a `text_projection`.
    Returns: ours, and what they have beyond it under its own name.
    """
    rest = dict(tensors)
    ours = {key: rest.pop(name) for key, name in _pairs(num_layers).items() if name in rest}
    for name, keys in _joined(num_layers).items():
        if name in rest:
            ours.update(zip(keys, rest.pop(name).clone().chunk(3), strict=True))
    if projection and _PROJECTION[1] in rest:
        ours[_PROJECTION[0]] = rest.pop(_PROJECTION[1]).T.contiguous()
    return ours, rest


def to_open_clip(tensors: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Rename a CLIPTextModel's tensors to OpenCLIP's."""
    theirs = {name: tensors[key] for key, name in _pairs(num_layers).items()}
    theirs |= {name: torch.cat([tensors[key] for key in keys]) for name, keys in _joined(num_layers).items()}
    if _PROJECTION[0] in tensors:
        theirs[_PROJECTION[1]] = tensors[_PROJECTION[0]].T.contiguous()
    return theirs
