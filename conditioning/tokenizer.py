"""CLIP's byte-pair tokenizer on the `tokenizers` library.

What enters: prompts and the files vocab.json and merges.txt (or one tokenizer.json). What leaves: token ids of fixed
length, and the part of each prompt that did not fit. This file knows no network.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from conditioning.framing import FramedTokenizer, Pieces
from conditioning.words import Word, content, read_words
from ldm_pipe.pretrained import LdmPipeError, atomic_write, read_json

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
MAX_MERGES_BYTES = 64 * 1024 * 1024
_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class ClipTokenizer(FramedTokenizer):
    """Byte-level BPE of CLIP (Radford et al. 2021, arXiv:2103.00020, sec. 2.4): lower case, words closed by `</w>`.

    Args:
        vocab: token to id, with `<|startoftext|>` and `<|endoftext|>`.
        merges: pairs of tokens, most frequent first.
        max_length: length of every sequence, start and end included; None leaves it to the text encoder.
        pad_token: what fills a short sequence; `<|endoftext|>` in Stable Diffusion 1, `!` in 2.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Iterable[tuple[str, str]],
        *,
        max_length: int | None = 77,
        pad_token: str = END,
    ) -> None:
        """Build the backend; a vocabulary that lacks what it needs is refused."""
        self._base, self.merges = dict(vocab), list(merges)
        self.vocab = dict(self._base)  # and the words that are added
        self.max_length, self.pad_token = max_length, pad_token
        lacking = [token for token in (START, END, pad_token) if token not in self.vocab]
        if lacking:
            raise LdmPipeError(
                f"the vocabulary lacks {lacking}", "tokenizer", "Give the vocab.json of a CLIP tokenizer."
            )
        self.start_id, self.end_id, self.pad_id = self.vocab[START], self.vocab[END], self.vocab[pad_token]
        self.start_ids, self.end_ids = (self.start_id,), (self.end_id,)
        self.added: dict[str, int] = {}
        self.flags: dict[str, dict[str, bool]] = {}  # of added words, how they are found in a text
        self._ids: dict[int, list[int]] = {}  # of an added word, by the number the backend gave it
        try:
            model = models.BPE(self.vocab, self.merges, unk_token=END, end_of_word_suffix=WORD_END, fuse_unk=False)
        except Exception as error:  # noqa: BLE001  # the library raises bare Exception, e.g. for a merge outside the vocabulary
            raise LdmPipeError(
                f"vocab and merges do not fit ({error})", "tokenizer", "Take both from one folder."
            ) from None
        self._backend = _backend(model)
        # As in transformers: special tokens are found in the raw text, before lower-casing.
        self._backend.add_special_tokens(
            [AddedToken(token, normalized=False, special=True) for token in dict.fromkeys((START, END, pad_token))]
        )

    def __len__(self) -> int:
        """Return how many rows the table of embeddings needs: one more than the largest id."""
        return max(self.vocab.values()) + 1

    def pieces(self, text: str) -> Pieces:
        """Cut a text into tokens; an added token stands for all its vectors."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids: list[int] = []
        starts: list[int] = []
        for index, (start, _) in zip(encoding.ids, encoding.offsets, strict=True):
            vectors = self._ids.get(index, [index])
            ids += vectors
            starts += [start] * len(vectors)
        return Pieces(ids, lambda first: text[starts[first] :])

    def add_token(self, name: str, ids: Sequence[int], **flags: bool) -> None:
        """Add a word that stands for vectors of its own (textual inversion, Gal et al. 2022, arXiv:2208.01618).

        Args:
            name: as it is written in prompts, such as "<cat-toy>".
            ids: rows of the text encoder's table; further ones are named `name_1`, `name_2` as in diffusers.
            flags: of `Word`; as in diffusers it is found in any letter case, but for what they say.
        Raises: LdmPipeError for a name that is taken or has a space in it.
        """
        names = [name, *(f"{name}_{number}" for number in range(1, len(ids)))]
        taken = any(word in self.vocab for word in names) or name.lower() in map(str.lower, self.flags)
        if taken or not name or any(char.isspace() for char in name):
            what = f"the token {name!r} is {'taken' if taken else 'empty or has a space in it'}"
            raise LdmPipeError(what, "tokenizer", "Choose another name, such as '<my-thing>'.")
        self._add(name, names, ids, flags)

    def _add(self, name: str, names: Sequence[str], ids: Sequence[int], flags: Mapping[str, bool]) -> None:
        self.added.update(zip(names, ids, strict=True))
        self.vocab.update(self.added)
        self.flags[name] = dict(flags)
        self._backend.add_tokens([AddedToken(name, **{"normalized": True, **flags})])
        self._ids[self._backend.token_to_id(name)] = list(ids)

    def without_words(self) -> ClipTokenizer:
        """Return a tokenizer of the same vocabulary without the words that were added."""
        return ClipTokenizer(self._base, self.merges, max_length=self.max_length, pad_token=self.pad_token)

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids back into text, without start, end and what follows it."""
        names = {index: token for token, index in self.vocab.items()}
        tokens = []
        for index in ids:
            if int(index) == self.end_id:
                break
            if int(index) != self.start_id:
                tokens.append(names[int(index)])
        to_byte = {char: value for value, char in enumerate(byte_symbols())}
        raw = "".join(tokens).replace(WORD_END, " ")
        data = b"".join(bytes([to_byte[char]]) if char in to_byte else char.encode() for char in raw)
        return data.decode("utf-8", errors="replace").strip()

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, subfolder: str | None = None) -> ClipTokenizer:
        """Read a `tokenizer/` folder as diffusers and transformers write it.

        Raises: LdmPipeError naming the file that is missing or unreadable.
        """
        root = Path(folder) / subfolder if subfolder else Path(folder)
        config, special = _table(root / "tokenizer_config.json"), _table(root / "special_tokens_map.json")
        for name, expected in (("bos_token", START), ("eos_token", END)):
            found = content(config.get(name) or special.get(name) or expected)
            if found != expected:
                raise LdmPipeError(f"{name} is {found!r}, CLIP's is {expected!r}", str(root), "Give a CLIP tokenizer.")
        vocab, merges = _read_vocab(root)
        length = config.get("model_max_length")
        usable = isinstance(length, int) and 2 <= length <= 100_000  # transformers writes 1e30 for "no limit"
        pad_token = content(config.get("pad_token") or special.get("pad_token") or END)
        words = read_words(root, config, special)
        pad = words.pop(pad_token, None)
        if pad is not None and pad.row is not None:
            vocab.setdefault(pad_token, pad.row)
        tokenizer = cls(vocab, merges, max_length=length if usable else None, pad_token=pad_token)
        tokenizer._restore({name: word for name, word in words.items() if name not in (START, END)}, str(root))
        return tokenizer

    def _restore(self, words: Mapping[str, Word], where: str) -> None:
        """Add the words of files; `name_1`, `name_2`, ... are further vectors of `name`.

        Raises: LdmPipeError for a word that stands in the row of another token.
        """
        rows = {row: name for name, row in self.vocab.items()}
        done: set[str] = set()
        for name, word in words.items():
            if name in done or not name:
                continue
            own = [name]
            if name not in self.vocab:
                numbered = (f"{name}_{i}" for i in itertools.count(1))
                own += itertools.takewhile(lambda one: one in words and one not in self.vocab, numbered)
            ids = []
            for one in own:
                row = words[one].row
                row = self.vocab.get(one, len(self)) if row is None else row
                if rows.setdefault(row, one) != one or self.vocab.get(one, row) != row:
                    what = f"the word {one!r} has row {row}, and so has {rows[row]!r}, or the vocabulary says another"
                    raise LdmPipeError(what, where, "Fetch or export the folder anew.")
                ids.append(row)
            done.update(own)
            self._add(name, own, ids, word.flags)
        lost = sorted(self._base.keys() - self._reachable() - words.keys())
        if lost:
            what = f"{where}: no merge makes {lost[:10]}, so that prompts spell them in letters, as in transformers"
            warnings.warn(f"{what}; learnt words stand in added_tokens.json or tokenizer.json", stacklevel=3)

    def _reachable(self) -> set[str]:
        """Return the tokens of the vocabulary that a text can be cut into."""
        letters = byte_symbols()
        made = {left + right for left, right in self.merges}
        return {*letters, *(letter + WORD_END for letter in letters), *made, START, END, self.pad_token}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the four files that transformers 4 and 5 both read as a CLIPTokenizer."""
        folder = Path(folder)
        special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": self.pad_token}
        config: dict[str, Any] = {
            **special,
            "add_prefix_space": False,
            "do_lower_case": True,
            "errors": "replace",
            "tokenizer_class": "CLIPTokenizer",
        }
        if self.max_length is not None:
            config["model_max_length"] = self.max_length
        merges = "".join(f"{left} {right}\n" for left, right in self.merges)
        atomic_write(folder / "vocab.json", json.dumps(self._base, ensure_ascii=False))
        if self.added:
            atomic_write(folder / "added_tokens.json", json.dumps(self.added, ensure_ascii=False))
            config["added_tokens_decoder"] = {
                str(row): {"content": name, "special": False, **Word(row, **self.flags.get(name, {})).flags}
                for name, row in self.added.items()
            }
        atomic_write(folder / "merges.txt", "#version: 0.2\n" + merges)
        atomic_write(folder / "special_tokens_map.json", json.dumps(special, indent=2) + "\n")
        atomic_write(folder / "tokenizer_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def byte_symbols() -> list[str]:
    """Return the printable character that stands for each byte 0..255 (GPT-2's table)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    hidden = [value for value in range(256) if value not in shown]
    return [chr(value) if value in shown else chr(256 + hidden.index(value)) for value in range(256)]


def train_bpe(
    captions: Iterable[str], vocab_size: int, *, max_length: int = 77, min_frequency: int = 2
) -> ClipTokenizer:
    """Train a tokenizer in CLIP's layout: 256 bytes, 256 bytes with `</w>`, merges by frequency, start, end.

    All bytes are in the vocabulary, so no text is unknown. Few captions give fewer tokens than asked for.
    Raises: LdmPipeError if vocab_size has no room for the 514 fixed tokens.
    """
    shown = sorted(byte_symbols(), key=lambda char: (ord(char) > 255, ord(char)))
    fixed = [*shown, *(char + WORD_END for char in shown)]
    num_merges = vocab_size - len(fixed) - 2
    if num_merges < 0:
        raise LdmPipeError(f"vocab_size {vocab_size}: at least {len(fixed) + 2} are needed", "train_bpe")
    backend = _backend(models.BPE(end_of_word_suffix=WORD_END))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size + 512,  # the trainer counts its alphabet too; the surplus merges are cut below
        min_frequency=min_frequency,
        end_of_word_suffix=WORD_END,
        initial_alphabet=shown,
        # Numbers the symbols beforehand: the trainer breaks ties by number, and would number them in the order of a
        # hash map, another one in every process.
        special_tokens=fixed,
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]][:num_merges]
    names = dict.fromkeys([*fixed, *(left + right for left, right in merges), START, END])
    return ClipTokenizer({name: index for index, name in enumerate(names)}, merges, max_length=max_length)


def _backend(model: models.BPE) -> Tokenizer:
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return backend


def _table(path: Path) -> Mapping[str, Any]:
    """Read a JSON object; a file that is not there is an empty one."""
    value = read_json(path) if path.is_file() else {}
    if not isinstance(value, Mapping):
        raise LdmPipeError("must be a JSON object", str(path), "Fetch or export the folder anew.")
    return value


def _read_vocab(root: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    if (root / "vocab.json").is_file() and (root / "merges.txt").is_file():
        if (root / "merges.txt").stat().st_size > MAX_MERGES_BYTES:
            raise LdmPipeError(f"larger than {MAX_MERGES_BYTES} bytes", str(root / "merges.txt"))
        try:
            lines = (root / "merges.txt").read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise LdmPipeError(f"not UTF-8 ({error})", str(root / "merges.txt")) from None
        vocab: Any = read_json(root / "vocab.json")
        pairs = [pair for line in lines if (pair := line.split()) and not line.startswith("#version")]
    elif (root / "tokenizer.json").is_file():  # all that transformers 5 writes
        model = _table(root / "tokenizer.json").get("model")
        model = model if isinstance(model, Mapping) else {}
        vocab = model.get("vocab", {})
        pairs = [pair.split() if isinstance(pair, str) else pair for pair in model.get("merges", [])]
    else:
        what = "neither vocab.json with merges.txt nor tokenizer.json is there"
        raise LdmPipeError(what, str(root), "Give the `tokenizer` folder of a CLIP model.")
    if not isinstance(vocab, dict) or not set(map(type, vocab.values())) <= {int}:
        raise LdmPipeError("the vocabulary is not a table of token ids", str(root))
    if not set(map(len, pairs)) <= {2}:
        raise LdmPipeError("a merge does not consist of two tokens", str(root))
    return vocab, list(map(tuple, pairs))
