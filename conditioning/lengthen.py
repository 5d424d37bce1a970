"""Let a CLIP text tower read longer sequences than it was trained on, for programs that fix the length.

A tower enters; one with more rows in its position table leaves, which gives the same states at the places it knew.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from conditioning.clip import CLIPTextEncoder
from conditioning.text import tokenizer_of
from ldm_pipe.pretrained import FrozenConfig, LdmPipeError


@torch.no_grad()
def lengthened(encoder: CLIPTextEncoder, length: int) -> CLIPTextEncoder:
    """Return a copy that reads `length` tokens; the new rows of the position table repeat the last one.

    Attention is causal (CLIP, Radford et al. 2021, arXiv:2103.00020, sec. 2.4): no earlier state changes. What a U-Net
    sees does: it attends to more padding, so it has to be trained with the longer tower.

    Args:
        encoder: with its tokenizer.
        length: tokens per sequence, start and end included; more than the encoder reads now.
    Raises: LdmPipeError if the encoder reads as many already.
    """
    old = encoder.text_model.embeddings.position_embedding.weight
    if length <= len(old):
        what = f"the text encoder reads {len(old)} tokens already, {length} are asked for"
        raise LdmPipeError(what, "lengthened", "Ask for more, or use it as it is.")
    longer = copy.deepcopy(encoder)
    table = torch.cat([old, old[-1:].expand(length - len(old), -1)])
    longer.text_model.embeddings.position_embedding = nn.Embedding.from_pretrained(table, freeze=not old.requires_grad)
    longer.config = FrozenConfig({**encoder.config, "max_position_embeddings": length})
    tokenizer_of(longer).max_length = length  # type: ignore[misc]
    return longer
