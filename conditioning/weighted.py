"""Parsed prompts -> conditions for every step: weights, chunks, branches, switches.

What enters: text encoders and prompts. What leaves: a `PromptSchedule`. Each text is encoded once, whatever the number
of steps. This file knows neither the network nor guidance; prompt.py holds the grammar.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from conditioning.condition import Condition
from conditioning.prompt import Brackets, Break, Line, Span, parse
from conditioning.text import PromptEncoder, prepare, tokenizer_of
from ldm_pipe.pretrained import LdmPipeError

Emphasis = Literal["context", "interpolate", "mean", "scale"]
EMPHASES: tuple[Emphasis, ...] = ("context", "interpolate", "mean", "scale")
MAX_CHUNKS = 32
MIN_MEAN = 1e-3  # of the embeddings' mean size: below, the ratio of two means says nothing

Row = list[tuple[int, float]]  # (token id, weight)


@dataclass(frozen=True)
class Stage:
    """What holds from one step on: K branches of B rows each.

    Args:
        first: step from which it holds.
        weights: of each branch in each picture, shape (K, B); 0 where a picture has fewer branches.
        conditions: one per branch.
    """

    first: int
    weights: Tensor
    conditions: tuple[Condition, ...]

    @property
    def is_plain(self) -> bool:
        """Tell whether there is one branch of weight 1, as guidance always had it."""
        return len(self.conditions) == 1 and bool((self.weights == 1).all())


@dataclass(frozen=True)
class PromptSchedule:
    """The conditions of a call, stage by stage."""

    stages: tuple[Stage, ...]

    def at(self, i: int) -> Stage:
        """Return what holds at step i."""
        return next(stage for stage in reversed(self.stages) if stage.first <= i)

    @property
    def num_tokens(self) -> int:
        """Return the length L of the longest condition."""
        tokens = (condition.tokens for stage in self.stages for condition in stage.conditions)
        return max(0 if value is None else value.shape[1] for value in tokens)

    def map(self, change: Callable[[Condition], Condition]) -> PromptSchedule:
        """Change every condition."""
        stages = (replace(stage, conditions=tuple(map(change, stage.conditions))) for stage in self.stages)
        return PromptSchedule(tuple(stages))


def encode_weighted(
    encoders: Sequence[PromptEncoder],
    prompts: Sequence[str],
    *,
    num_steps: int = 1,
    clip_skip: int | None = None,
    emphasis: Emphasis = "context",
    brackets: Brackets = "error",
    negative: bool = False,
) -> PromptSchedule:
    """Encode prompts written in the grammar of `conditioning.prompt`.

    A prompt that uses none of it, and fits, gets the very embeddings of `encoder.encode`. A longer one is cut into
    chunks that are encoded one by one and laid end to end, each with start and end, as A1111 does; the pooled vector
    is the first chunk's. Prompts of fewer chunks are lengthened with zeros that the mask hides (A1111 lengthens with
    the empty prompt, which makes a picture depend on the others of its batch). Weights are applied as `emphasis` says:

        context      z = z + (w - 1) (z - z'), z' the embeddings of the prompt without the words of weight w
        interpolate  z = e + w (z - e), e the empty prompt's embeddings (ComfyUI)
        mean         z = w z, then z = z mean(z before) / mean(z after) per chunk (A1111, modules/sd_emphasis.py)
        scale        z = w z ("No norm" there)

    The last three change a word's own tokens only, but a text transformer tells the tokens after a word what it read:
    "red" of weight 0 still speaks through "apple" and the padding. The default, "context", takes that back too, at the
    price of one more encoding for each weight; weight 0 is the prompt without the words. "mean" needs a ratio that
    may be anything for encoders that end in a LayerNorm, as means are near 0 there.

    Args:
        encoders: joined along the channels.
        num_steps: of the call that these are for.
        brackets: what to do with one that has no partner, see `parse`.
        negative: refuse AND, which has no meaning in a negative prompt.
    Raises: LdmPipeError as in `parse`, for more than 32 chunks, or a mean too small for emphasis="mean".
    """
    if emphasis not in EMPHASES:
        raise LdmPipeError(f"emphasis is {emphasis!r}", "encode_weighted", f"Known: {', '.join(EMPHASES)}.")
    parsed = [parse(prompt, brackets=brackets) for prompt in prompts]
    if negative and any(len(prompt.branches) > 1 for prompt in parsed):
        advice = "Join texts by commas; in the prompt, a branch with a weight below 0 pushes away: `a AND b :-1`."
        raise LdmPipeError("AND in a negative prompt", "prompt", advice)
    rows = [[prompt.at(i, num_steps) for prompt in parsed] for i in range(num_steps)]
    firsts = [i for i in range(num_steps) if i == 0 or rows[i] != rows[i - 1]]
    lines = dict.fromkeys(line for i in firsts for prompt in rows[i] for _, line in prompt)
    encoded = _encode_lines(encoders, list(lines), clip_skip, emphasis)
    longest = max(0 if value.tokens is None else value.tokens.shape[1] for value in encoded.values())
    encoded = {line: value.pad(longest) for line, value in encoded.items()}
    stages = [_stage(i, rows[i], encoded) for i in firsts]
    return PromptSchedule(tuple(stages))


def _stage(first: int, rows: Sequence[tuple[tuple[float, Line], ...]], encoded: dict[Line, Condition]) -> Stage:
    """Lay the branches of all pictures side by side; a missing one repeats the first with weight 0."""
    num = max(len(row) for row in rows)
    filled = [[*row, *[(0.0, row[0][1])] * (num - len(row))] for row in rows]
    weights = torch.tensor([[row[k][0] for row in filled] for k in range(num)], dtype=torch.float32)
    conditions = tuple(Condition.cat([encoded[row[k][1]] for row in filled]) for k in range(num))
    return Stage(first, weights, conditions)


def _encode_lines(
    encoders: Sequence[PromptEncoder], lines: list[Line], clip_skip: int | None, emphasis: Emphasis
) -> dict[Line, Condition]:
    """Encode every line once; the plain ones together, so that they have the bits of an ordinary call."""
    cut = {line: [_chunks(encoder, line) for encoder in encoders] for line in lines}
    plain = [line for line in lines if _is_plain(line) and all(len(rows) == 1 for rows in cut[line])]
    found: dict[Line, Condition] = {}
    if plain:
        texts = [line[0].text if line and isinstance(line[0], Span) else "" for line in plain]
        joined = reduce(Condition.join, [encoder.encode(texts, clip_skip=clip_skip) for encoder in encoders])
        found = {line: joined.select([index]) for index, line in enumerate(plain)}
    for line in lines:
        if line not in found:
            num = max(map(len, cut[line]))
            parts = [
                _encode_rows(encoder, rows + [[]] * (num - len(rows)), clip_skip, emphasis)
                for encoder, rows in zip(encoders, cut[line], strict=True)
            ]
            found[line] = reduce(Condition.join, parts)
    return found


def _is_plain(line: Line) -> bool:
    return not line or (len(line) == 1 and isinstance(line[0], Span) and line[0].weight == 1)


def _chunks(encoder: PromptEncoder, line: Line) -> list[Row]:
    """Cut a line into rows that fit between start and end."""
    tokenizer = tokenizer_of(encoder)
    room = encoder.max_length - tokenizer.num_special
    rows: list[Row] = [[]]
    for span in line:
        if isinstance(span, Break):
            rows.append([])
            continue
        for index in tokenizer.pieces(prepare(encoder, span.text)).ids:
            if len(rows[-1]) == room:
                rows.append([])
            rows[-1].append((index, span.weight))
    if len(rows) > MAX_CHUNKS:
        what = f"the prompt fills {len(rows)} chunks of {room} tokens"
        raise LdmPipeError(what, "prompt", f"At most {MAX_CHUNKS} are read: shorten it.")
    return rows


def _encode_rows(encoder: PromptEncoder, rows: list[Row], clip_skip: int | None, emphasis: Emphasis) -> Condition:
    """Encode the chunks of one prompt, weigh them, and lay them end to end: one row."""
    condition = _encode_ids(encoder, rows, clip_skip)
    tokens = condition.slots()["tokens"]
    weights = _lay_out(encoder, [[weight for _, weight in row] for row in rows], 1.0)
    if bool((weights != 1).any()):
        if emphasis == "context":
            tokens = _emphasise_in_context(encoder, tokens, rows, clip_skip)
        else:
            at_tokens = weights[:, : tokens.shape[1], None].to(tokens)
            tokens = _emphasise(encoder, tokens, at_tokens, clip_skip, emphasis)
    kept = condition.token_mask
    return Condition(
        tokens=tokens.flatten(0, 1)[None],  # (1, chunks * L, D)
        token_mask=None if kept is None else kept.flatten()[None],
        pooled=None if condition.pooled is None else condition.pooled[:1],
    )


def _lay_out(encoder: PromptEncoder, rows: list[list[float]], elsewhere: float) -> Tensor:
    """Put a number for each token of each chunk where the token stands, (chunks, L)."""
    laid = torch.full((len(rows), encoder.max_length), elsewhere)
    start = len(tokenizer_of(encoder).start_ids)
    for number, row in enumerate(rows):
        laid[number, start : start + len(row)] = torch.tensor(row)
    return laid


def _encode_ids(encoder: PromptEncoder, rows: list[Row], clip_skip: int | None) -> Condition:
    """Encode chunks as they are, without weights."""
    ids, mask = tokenizer_of(encoder).frame([[index for index, _ in row] for row in rows], encoder.max_length)
    return encoder.encode_ids(ids, mask, clip_skip=clip_skip)


def _emphasise_in_context(encoder: PromptEncoder, tokens: Tensor, rows: list[Row], clip_skip: int | None) -> Tensor:
    """Weigh what words change everywhere: the words themselves against nothing, all else against the prompt without.

    Args:
        tokens: of the whole prompt, (chunks, L, D).
    """
    empty = _encode_ids(encoder, [[]], clip_skip).slots()["tokens"]
    found = tokens
    for weight in sorted({weight for row in rows for _, weight in row} - {1.0}):
        shorter = _encode_ids(encoder, [[pair for pair in row if pair[1] != weight] for row in rows], clip_skip)
        gone = _lay_out(encoder, [[float(own == weight) for _, own in row] for row in rows], 0.0) == 1
        gone = gone[:, : tokens.shape[1]].to(tokens.device)
        place = (~gone).cumsum(dim=1) - 1  # of what stays, in the shorter prompt
        without = shorter.slots()["tokens"].gather(1, place.clamp(min=0)[..., None].expand_as(tokens))
        found = found + (weight - 1) * (tokens - torch.where(gone[..., None], empty, without))
    return found


def _emphasise(
    encoder: PromptEncoder, tokens: Tensor, weights: Tensor, clip_skip: int | None, emphasis: Emphasis
) -> Tensor:
    """Apply weights (chunks, L, 1) to tokens (chunks, L, D)."""
    if emphasis == "interpolate":
        empty = _encode_ids(encoder, [[]], clip_skip).slots()["tokens"]
        return torch.where(weights == 1, tokens, empty + weights * (tokens - empty))
    scaled = tokens * weights
    if emphasis == "scale":
        return scaled
    before, after = tokens.mean(dim=(1, 2), keepdim=True), scaled.mean(dim=(1, 2), keepdim=True)
    if bool((after.abs() < MIN_MEAN * scaled.abs().mean()).any()):
        advice = 'This encoder\'s embeddings have no mean to restore: use emphasis="interpolate".'
        raise LdmPipeError('emphasis="mean": the mean of the embeddings is near 0', "encode_weighted", advice)
    return scaled * (before / after)
