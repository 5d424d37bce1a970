"""What every tokenizer has in common: pieces of text in, rows of token ids of one length out.

What enters: prompts and a way to cut them into pieces. What leaves: ids with start, end and padding, and the text that
did not fit. This file knows no vocabulary and no network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ldm_pipe.pretrained import LdmPipeError


@dataclass(frozen=True)
class TokenBatch:
    """Token ids of B prompts.

    Args:
        ids: int64, shape (B, L): start, text, end, padding.
        mask: True at start, text and (first) end, shape (B, L).
        truncated: the end of each prompt that did not fit, "" where all did.
    """

    ids: Tensor
    mask: Tensor
    truncated: list[str]


class Pieces(NamedTuple):
    """The tokens of one text, without start and end; `rest(n)` is the text from token n on."""

    ids: list[int]
    rest: Callable[[int], str]


class FramedTokenizer:
    """Give a tokenizer its frame: start, text, end, padding up to one length.

    Subclasses set the attributes and implement `pieces`.
    """

    start_ids: tuple[int, ...]
    end_ids: tuple[int, ...]
    pad_id: int
    max_length: int | None

    def pieces(self, text: str) -> Pieces:
        """Cut one text into tokens."""
        raise NotImplementedError

    @property
    def num_special(self) -> int:
        """Return how many tokens of a sequence are start and end."""
        return len(self.start_ids) + len(self.end_ids)

    def frame(self, rows: Sequence[Sequence[int]], length: int) -> tuple[Tensor, Tensor]:
        """Put start, end and padding around rows of text ids.

        Returns: ids (B, length) and mask (B, length), True up to the end token.
        """
        framed = [[*self.start_ids, *row, *self.end_ids] for row in rows]
        ids = torch.tensor([row + [self.pad_id] * (length - len(row)) for row in framed], dtype=torch.int64)
        num_used = torch.tensor([len(row) for row in framed])
        return ids, torch.arange(length)[None] < num_used[:, None]

    def __call__(self, prompts: Sequence[str], *, max_length: int | None = None) -> TokenBatch:
        """Tokenize prompts to a common length.

        Args:
            max_length: overrides the tokenizer's own.
        Raises: LdmPipeError for anything but a non-empty sequence of well-formed strings.
        """
        length = max_length or self.max_length
        least = max(self.num_special, 1)
        if length is None or length < least:
            raise LdmPipeError(f"max_length {length}: at least {least} are needed", "tokenizer", "Pass max_length.")
        check_prompts(prompts)
        room = length - self.num_special
        found = [self.pieces(prompt) for prompt in prompts]
        truncated = [pieces.rest(room) if len(pieces.ids) > room else "" for pieces in found]
        return TokenBatch(*self.frame([pieces.ids[:room] for pieces in found], length), truncated)


def check_prompts(prompts: Sequence[str]) -> None:
    """Refuse what is not a non-empty sequence of strings that can be written as UTF-8.

    Raises: LdmPipeError naming the position and the type.
    """
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence) or not prompts:
        what = f"expected a non-empty list of strings, got {type(prompts).__name__}"
        raise LdmPipeError(what, "prompts", 'Write ["a prompt"].')
    for position, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise LdmPipeError(f"number {position} is {type(prompt).__name__}, not a string", "prompts")
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            advice = "Read the text as UTF-8."
            raise LdmPipeError(f"number {position} holds a lone surrogate character", "prompts", advice) from None
