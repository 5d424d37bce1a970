"""CLIP's vocabulary, which single files leave out: from a folder, or from the list that open_clip installs.

What enters: a folder, or nothing. What leaves: a ClipTokenizer. Nothing is fetched.
"""

from __future__ import annotations

import gzip
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from conditioning.tokenizer import END, START, WORD_END, ClipTokenizer
from ldm_pipe.pretrained import LdmPipeError

NUM_MERGES = 49152 - 256 - 2  # the list holds more than CLIP was trained with
_LIST = "bpe_simple_vocab_16e6.txt.gz"


@dataclass(frozen=True)
class Words:
    """A vocabulary and its merges."""

    vocab: dict[str, int]
    merges: list[tuple[str, str]]


def _byte_letters() -> list[str]:
    """Return a printable letter for every byte, printable bytes first (GPT-2's table, which CLIP took over)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def _installed() -> Words:
    found = importlib.util.find_spec("open_clip")
    path = Path(found.origin).parent / _LIST if found is not None and found.origin else None
    if path is None or not path.is_file():
        fix = "pip install open-clip-torch, or name a folder with CLIP's vocab.json and merges.txt."
        raise LdmPipeError("CLIP's vocabulary is not in the file, and open_clip is not installed", "tokenizer", fix)
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : NUM_MERGES + 1]
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    letters = _byte_letters()
    names = [*letters, *(letter + WORD_END for letter in letters), *(left + right for left, right in merges)]
    return Words({name: i for i, name in enumerate([*names, START, END])}, merges)


def tokenizer_folder(given: str | Path | None, like: str | Path | None) -> Words:
    """Return the words of a given folder, else of the model that a file is like, else those of CLIP.

    Raises: LdmPipeError if there are none.
    """
    if given is None and like is not None:
        given = next((p for p in (Path(like) / "tokenizer", Path(like) / "tokenizer_2") if p.is_dir()), None)
    if given is None:
        return _installed()
    tokenizer = ClipTokenizer.from_pretrained(given)
    return Words(tokenizer.vocab, tokenizer.merges)


def clip_tokenizer(words: Words, pad_token: str) -> ClipTokenizer:
    """Return a tokenizer that pads with `pad_token`, or with the end token where the vocabulary lacks it."""
    return ClipTokenizer(words.vocab, words.merges, pad_token=pad_token if pad_token in words.vocab else END)
