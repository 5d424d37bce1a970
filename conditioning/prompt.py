r"""Prompt craft: one grammar for what users of A1111 and ComfyUI write.

    prompt  = branch { "AND" branch }             pictures that are all of them (Liu et al. 2022, arXiv:2206.01714)
    branch  = part* [ ":" number ]                the number, its weight, only where there is an AND; else text
    part    = text
            | "BREAK"                             what follows starts a new chunk of the context
            | "(" part* ")"                       weight 1.1
            | "(" part* ":" number ")"            that weight
            | "[" part* "]"                       weight 1 / 1.1
            | "[" part* ":" part* ":" when "]"    from the first to the second part at `when`
            | "[" part* ":" when "]"              nothing until `when`, then the part
            | "[" part* { "|" part* } "]"         one after the other, a step each, in turn
    when    = whole number                        after so many steps
            | number with a point, 0.0 to 1.0     after that share of the steps
    text    = any characters; a backslash takes the meaning from one of ( ) [ ] : | and itself

Weights multiply where brackets are nested. AND and BREAK are words in capitals. A colon outside of brackets is text,
and so is one in round brackets before the last. A prompt without any of this stays as it is, to the letter.

What enters: a string. What leaves: a `Prompt`, which tells the weighted texts of each step. This file knows no tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Union

from ldm_pipe.pretrained import LdmPipeError

EMPHASIS = 1.1
MAX_WEIGHT = 100.0
MAX_DEPTH = 50
MAX_BRANCHES = 16
_PAIRS = {"(": ")", "[": "]"}
_LEXEME = re.compile(r"\\[()\[\]:|\\]|[()\[\]:|]|\b(?:AND|BREAK)\b")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)")

Brackets = Literal["error", "literal"]


@dataclass(frozen=True)
class Span:
    """A piece of text with one weight."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class Break:
    """The end of a chunk."""


@dataclass(frozen=True)
class Weighted:
    """Parts whose weights are multiplied by a factor."""

    parts: tuple[Part, ...]
    factor: float


@dataclass(frozen=True)
class Switch:
    """One part until `when`, another from then on; `share`: of the steps, else in steps."""

    before: tuple[Part, ...]
    after: tuple[Part, ...]
    when: float
    share: bool

    def choose(self, i: int, num_steps: int) -> tuple[Part, ...]:
        """Return what holds at step i."""
        return self.before if i < int(self.when * num_steps if self.share else self.when) else self.after


@dataclass(frozen=True)
class Alternate:
    """Parts that take turns."""

    options: tuple[tuple[Part, ...], ...]

    def choose(self, i: int, _: int) -> tuple[Part, ...]:
        """Return what holds at step i."""
        return self.options[i % len(self.options)]


Part = Union[Span, Break, Weighted, Switch, Alternate]  # noqa: UP007  (names are not defined yet)
Line = tuple[Union[Span, Break], ...]  # noqa: UP007


@dataclass(frozen=True)
class Branch:
    """One of the prompts that AND joins."""

    parts: tuple[Part, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Prompt:
    """A parsed prompt."""

    branches: tuple[Branch, ...]

    def at(self, i: int, num_steps: int) -> tuple[tuple[float, Line], ...]:
        """Return weight and spans of each branch at step i; neighbours of equal weight are one span."""
        return tuple((branch.weight, _merged(_flat(branch.parts, 1.0, i, num_steps))) for branch in self.branches)


class _Lexeme(NamedTuple):
    kind: str  # "text", or the sign or word itself
    text: str
    at: int


def parse(text: str, *, brackets: Brackets = "error") -> Prompt:
    r"""Parse one prompt.

    Args:
        brackets: "error" refuses a bracket without its partner, "literal" takes it as text.
    Raises: LdmPipeError with the position (from 0) of a lone bracket, a weight or a `when` that is no number, an AND in
        brackets, or too deep a nesting.
    """
    lexemes = _balance(text, _lexemes(text), brackets)
    groups: list[list[_Lexeme]] = [[]]
    depth = 0
    for lexeme in lexemes:
        depth += (lexeme.kind in _PAIRS) - (lexeme.kind in _PAIRS.values())
        if depth > MAX_DEPTH:
            raise _error(text, lexeme.at, f"brackets nested deeper than {MAX_DEPTH}", "Write fewer of them.")
        if lexeme.kind == "AND" and depth:
            raise _error(text, lexeme.at, "AND inside of brackets", "Write it outside, or in small letters as a word.")
        if lexeme.kind == "AND":
            groups.append([])
        else:
            groups[-1].append(lexeme)
    if len(groups) > MAX_BRANCHES:
        raise LdmPipeError(f"{len(groups)} prompts joined by AND", "prompt", f"At most {MAX_BRANCHES} are drawn.")
    if len(groups) == 1:
        return Prompt((Branch(tuple(_parts(text, groups[0]))),))
    return Prompt(tuple(_branch(text, group) for group in groups))


def _error(text: str, at: int, what: str, advice: str) -> LdmPipeError:
    around = text[max(at - 15, 0) : at + 15]
    return LdmPipeError(f"{what} at position {at}, in {around!r}", "prompt", advice)


def _lexemes(text: str) -> list[_Lexeme]:
    """Cut into signs, words with a meaning, and text between them; escapes are resolved here."""
    found: list[_Lexeme] = []
    last = 0
    for match in _LEXEME.finditer(text):
        if match.start() > last:
            found.append(_Lexeme("text", text[last : match.start()], last))
        sign = match.group()
        found.append(_Lexeme("text" if sign[0] == "\\" else sign, sign[-1] if sign[0] == "\\" else sign, match.start()))
        last = match.end()
    if last < len(text):
        found.append(_Lexeme("text", text[last:], last))
    return found


def _balance(text: str, lexemes: list[_Lexeme], brackets: Brackets) -> list[_Lexeme]:
    """Find the brackets without a partner: refuse them, or make them text."""
    opened: list[int] = []
    lone: list[int] = []
    for index, lexeme in enumerate(lexemes):
        if lexeme.kind in _PAIRS:
            opened.append(index)
        elif lexeme.kind in _PAIRS.values():
            if opened and _PAIRS[lexemes[opened[-1]].kind] == lexeme.kind:
                opened.pop()
            else:
                lone.append(index)
    lone = sorted(lone + opened)
    if lone and brackets == "error":
        first = lexemes[lone[0]]
        advice = f"Close it, or write \\{first.text} for the sign itself; brackets='literal' takes lone ones as text."
        raise _error(text, first.at, f"{first.text!r} has no partner", advice)
    for index in lone:
        lexemes[index] = lexemes[index]._replace(kind="text")
    return lexemes


def _split(lexemes: list[_Lexeme], sign: str) -> list[list[_Lexeme]]:
    """Split at a sign that stands outside of inner brackets."""
    parts: list[list[_Lexeme]] = [[]]
    depth = 0
    for lexeme in lexemes:
        depth += (lexeme.kind in _PAIRS) - (lexeme.kind in _PAIRS.values())
        if lexeme.kind == sign and depth == 0:
            parts.append([])
        else:
            parts[-1].append(lexeme)
    return parts


def _number(text: str, lexemes: list[_Lexeme], at: int, what: str) -> tuple[float, str]:
    """Read a number of sane size."""
    found = "".join(lexeme.text for lexeme in lexemes).strip()
    if not _NUMBER.fullmatch(found) or not math.isfinite(float(found)) or abs(float(found)) > MAX_WEIGHT * 100:
        raise _error(text, at, f"{what} {found!r:.40} is no number", "Write \\: for a colon that is text.")
    return float(found), found


def _weight(text: str, lexemes: list[_Lexeme], at: int) -> float:
    weight = _number(text, lexemes, at, "the weight")[0]
    if abs(weight) > MAX_WEIGHT:
        raise _error(text, at, f"the weight {weight:g} is too large", f"Use -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}.")
    return weight


def _branch(text: str, lexemes: list[_Lexeme]) -> Branch:
    """Read one side of an AND; the space around it is not text."""
    pieces = _split(lexemes, ":")
    weight = 1.0
    if len(pieces) > 1 and _NUMBER.fullmatch("".join(lexeme.text for lexeme in pieces[-1]).strip()):
        weight = _weight(text, pieces[-1], pieces[-1][0].at)
        lexemes = lexemes[: len(lexemes) - len(pieces[-1]) - 1]
    parts = list(_parts(text, lexemes))
    if parts and isinstance(parts[0], Span):
        parts[0] = Span(parts[0].text.lstrip())
    if parts and isinstance(parts[-1], Span):
        parts[-1] = Span(parts[-1].text.rstrip())
    return Branch(tuple(parts), weight)


def _parts(text: str, lexemes: list[_Lexeme]) -> Iterator[Part]:
    """Read parts; signs that mean nothing here are text."""
    index = 0
    while index < len(lexemes):
        lexeme = lexemes[index]
        if lexeme.kind in _PAIRS:
            end, depth = index, 0
            while True:
                depth += (lexemes[end].kind in _PAIRS) - (lexemes[end].kind in _PAIRS.values())
                if depth == 0:
                    break
                end += 1
            inner = lexemes[index + 1 : end]
            yield _round(text, inner) if lexeme.kind == "(" else _square(text, inner, lexeme.at)
            index = end
        else:
            yield Break() if lexeme.kind == "BREAK" else Span(lexeme.text)
        index += 1


def _round(text: str, lexemes: list[_Lexeme]) -> Part:
    pieces = _split(lexemes, ":")
    if len(pieces) == 1:
        return Weighted(tuple(_parts(text, lexemes)), EMPHASIS)
    colon = len(lexemes) - len(pieces[-1]) - 1
    weight = _weight(text, pieces[-1], lexemes[colon].at)
    return Weighted(tuple(_parts(text, lexemes[:colon])), weight)


def _square(text: str, lexemes: list[_Lexeme], at: int) -> Part:
    options = _split(lexemes, "|")
    if len(options) > 1:
        return Alternate(tuple(tuple(_parts(text, option)) for option in options))
    pieces = _split(lexemes, ":")
    if len(pieces) == 1:
        return Weighted(tuple(_parts(text, lexemes)), 1 / EMPHASIS)
    if len(pieces) > 3:
        raise _error(
            text, at, f"{len(pieces) - 1} colons in square brackets", "Write [from:to:when], and \\: for text."
        )
    when, written = _number(text, pieces[-1], at, "the time of the switch")
    share = "." in written
    if when < 0 or (share and when > 1):
        advice = "Write 0.0 to 1.0 for a share of the steps, a whole number for steps."
        raise _error(text, at, f"the time of the switch is {written}", advice)
    before = pieces[0] if len(pieces) == 3 else []
    return Switch(tuple(_parts(text, before)), tuple(_parts(text, pieces[-2])), when, share)


def _flat(parts: Sequence[Part], factor: float, i: int, num_steps: int) -> Iterator[Span | Break]:
    """Walk through the parts that hold at step i."""
    for part in parts:
        match part:
            case Span(content, weight):
                yield Span(content, weight * factor)
            case Break():
                yield part
            case Weighted(inner, own):
                yield from _flat(inner, factor * own, i, num_steps)
            case Switch() | Alternate():
                yield from _flat(part.choose(i, num_steps), factor, i, num_steps)


def _merged(spans: Iterator[Span | Break]) -> Line:
    line: list[Span | Break] = []
    for span in spans:
        last = line[-1] if line else None
        if isinstance(span, Span) and isinstance(last, Span) and last.weight == span.weight:
            line[-1] = Span(last.text + span.text, span.weight)
        elif isinstance(span, Break) or span.text:
            line.append(span)
    return tuple(line)
