"""Every place of a tokenizer's folder where a word can stand that its merges do not make: learnt and special ones.

What enters: a folder and its JSON files. What leaves: the words, their rows in the table of embeddings, and how they
are found in a text. This file knows no vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_pipe.pretrained import LdmPipeError, read_json

LISTS = ("additional_special_tokens", "extra_special_tokens")
NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_FLAGS = ("normalized", "lstrip", "rstrip", "single_word")


@dataclass(frozen=True)
class Word:
    """One word of a file.

    Args:
        row: in the table; None where no file says it: then the next free one, as in transformers.
        normalized: also found in other letter case.
        lstrip, rstrip: takes the space before or after it along.
        single_word: not found inside longer words.
    """

    row: int | None
    normalized: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    @property
    def flags(self) -> dict[str, bool]:
        """Return how it is found, by the names of `tokenizers.AddedToken`."""
        return {name: getattr(self, name) for name in _FLAGS}


def content(token: Any) -> str:
    """Return the text of a token, which some files hold and others describe."""
    return str(token["content"]) if isinstance(token, Mapping) and "content" in token else str(token)


def read_words(root: Path, config: Mapping[str, Any], special: Mapping[str, Any]) -> dict[str, Word]:
    """Read the words of a folder, in the order of their rows.

    In this order, the first that describes a word counts: `tokenizer.json` (all that transformers 5 writes),
    `added_tokens_decoder` and the lists of special tokens in `tokenizer_config.json` and `special_tokens_map.json`,
    `added_tokens.json`.

    Raises: LdmPipeError for files that give a word two rows, or two words one row.
    """
    words: dict[str, Word] = {}
    for where, name, word in _everywhere(root, config, special):
        known = words.get(name)
        if known is None:
            words[name] = word
        elif known.row is None:
            words[name] = Word(word.row, **known.flags)
        elif word.row not in (None, known.row):
            what = f"the word {name!r} has row {word.row} in {where} and row {known.row} in another file"
            raise LdmPipeError(what, str(root), "Fetch or export the folder anew.")
    rows: dict[int, str] = {}
    for name, word in words.items():
        if word.row is not None and rows.setdefault(word.row, name) != name:
            what = f"the words {rows[word.row]!r} and {name!r} have the same row {word.row}"
            raise LdmPipeError(what, str(root), "Fetch or export the folder anew.")
    said = sorted((item for item in words.items() if item[1].row is not None), key=lambda item: item[1].row or 0)
    return dict([*said, *(item for item in words.items() if item[1].row is None)])


def _everywhere(root: Path, config: Mapping[str, Any], special: Mapping[str, Any]) -> Iterator[tuple[str, str, Word]]:
    """Yield (file, name, word) of every place."""
    whole = read_json(root / "tokenizer.json") if (root / "tokenizer.json").is_file() else {}
    listed = whole.get("added_tokens") if isinstance(whole, Mapping) else None
    for token in listed if isinstance(listed, list) else []:
        yield _described("tokenizer.json", token.get("id") if isinstance(token, Mapping) else None, token, root)
    decoder = config.get("added_tokens_decoder")
    for row, token in decoder.items() if isinstance(decoder, Mapping) else ():
        yield _described("tokenizer_config.json", int(row) if str(row).isdecimal() else row, token, root)
    for where, file in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        for key in LISTS:
            value = file.get(key) or []
            for token in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else []:
                yield where, content(token), Word(None, normalized=False)
        for key in NAMED:
            if file.get(key) is not None:
                yield where, content(file[key]), Word(None, normalized=False)
    added = read_json(root / "added_tokens.json") if (root / "added_tokens.json").is_file() else {}
    if not isinstance(added, Mapping):
        raise LdmPipeError("is no table of words", str(root / "added_tokens.json"), "Fetch or export the folder anew.")
    for name, row in added.items():
        yield _described("added_tokens.json", row, {"content": name}, root)


def _described(where: str, row: Any, token: Any, root: Path) -> tuple[str, str, Word]:
    """Read a word that has a row."""
    if type(row) is not int or not 0 <= row < 1 << 31 or not isinstance(token, Mapping) or "content" not in token:
        what = f"{token!r:.80} of row {row!r:.20} is no word"
        raise LdmPipeError(what, str(root / where), "Fetch or export the folder anew.")
    flags = {name: token[name] for name in _FLAGS if isinstance(token.get(name), bool)}
    return where, str(token["content"]), Word(row, **{"normalized": not token.get("special", False), **flags})
