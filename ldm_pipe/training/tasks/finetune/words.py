"""Textual inversion: a new word of the text encoders, the only thing that learns (Gal et al. 2022, arXiv:2208.01618).

What enters: text encoders, the word and what it means at the start. What leaves: a module that holds the vectors and
lets the encoders read them. This file knows no data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from conditioning import CLIPTextEncoder
from conditioning.tokenizer import ClipTokenizer
from ldm_pipe.pretrained import LdmPipeError


class _Vectors(nn.Module):
    """The vectors of a word in one encoder; they stand in for the rows of its table from `first` on."""

    def __init__(self, start: Tensor, first: int) -> None:
        """Take the vectors to begin with, (V, D)."""
        super().__init__()
        self.weight, self.first = nn.Parameter(start.float()), first

    def read(self, table: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Replace what the table says of the word (a forward hook)."""
        rows = args[0] - self.first  # (B, L), from 0 on where the word stands
        learnt = self.weight.to(output.dtype)[rows.clamp_min(0)]
        return torch.where(rows[..., None] >= 0, learnt, output)


class NewWord(nn.Module):
    """Vectors of a word, read by each encoder's table in place of its own rows.

    The table itself stays frozen, so no other word moves.

    Args:
        encoders: CLIP text encoders with their tokenizers.
        name: the word as written in prompts; must be new to all of them.
        initializer: known words; every vector starts at the mean of their tokens.
        num_vectors: vectors per encoder.
    Raises: LdmPipeError for other kinds of encoders, a name that is taken, or an initializer without tokens.
    """

    def __init__(self, encoders: Sequence[Any], name: str, initializer: str, num_vectors: int = 1) -> None:
        """Teach the encoders the word and hang the vectors into their tables."""
        super().__init__()
        self.name, self._encoders = name, tuple(encoders)  # a tuple: they are no part of this module
        starts = [_start(encoder, initializer).repeat(num_vectors, 1) for encoder in encoders]
        self.words = nn.ModuleList()
        for encoder, start in zip(encoders, starts, strict=True):
            word = _Vectors(start, encoder.config.vocab_size)
            encoder.add_token(name, start)
            encoder.requires_grad_(False)
            encoder.text_model.embeddings.token_embedding.register_forward_hook(word.read)
            self.words.append(word)

    @property
    def vectors(self) -> list[Tensor]:
        """Return the vectors for each encoder, (V, D)."""
        return [word.weight.detach() for word in self.words if isinstance(word, _Vectors)]

    @torch.no_grad()
    def write(self) -> None:
        """Copy the vectors into the tables, where a saved encoder keeps them."""
        for encoder, vectors in zip(self._encoders, self.vectors, strict=True):
            encoder.text_model.embeddings.token_embedding.weight[-len(vectors) :] = vectors.to(encoder.dtype)


def _start(encoder: Any, initializer: str) -> Tensor:
    if not isinstance(encoder, CLIPTextEncoder) or not isinstance(encoder.tokenizer, ClipTokenizer):
        what = f"a {type(encoder).__name__} cannot learn a word"
        raise LdmPipeError(what, "textual_inversion", "Models with CLIP text encoders can; use --method lora here.")
    ids = encoder.tokenizer.pieces(initializer).ids
    if not ids:
        raise LdmPipeError(f"initializer_token {initializer!r} has no tokens", "config", "Write a word.")
    return encoder.text_model.embeddings.token_embedding.weight.detach()[ids].mean(0, keepdim=True).clone()
