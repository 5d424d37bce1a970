"""Files of new words (textual inversion, Gal et al. 2022, arXiv:2208.01618) of diffusers and A1111, for SD 1, 2, XL.

What enters: a file and text encoders. What leaves: encoders that know one more word, or a file that diffusers reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conditioning import CLIPTextEncoder
from conditioning.tokenizer import ClipTokenizer
from ldm_pipe.interop.pickles.checkpoint import PICKLES, load_checkpoint, unpickle
from ldm_pipe.pretrained import FrozenConfig, LdmPipeError, load_tensors, save_tensors
from ldm_pipe.pretrained.files import tensor_names

_XL = ("clip_l", "clip_g")
BUNDLED = "bundle_emb."
_NAMELESS = ("emb_params", "*")


def read_vectors(path: str | Path) -> tuple[str | None, list[Tensor]]:
    """Read the name of a word, if the file has one, and its vectors (V, D) for each text encoder.

    Raises: LdmPipeError if the file holds no word.
    """
    path = Path(path)
    return _vectors(unpickle(path) if path.suffix in PICKLES else load_tensors(path), str(path))


def _vectors(content: Any, where: str) -> tuple[str | None, list[Tensor]]:
    """Find the vectors in what a file holds."""
    name = None
    if isinstance(content, Mapping) and isinstance(content.get("string_to_param"), Mapping):
        name, content = content.get("name"), content["string_to_param"]
    if isinstance(content, Tensor):
        content = {"*": content}
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise LdmPipeError("holds no vectors of a word", where, "Give a textual inversion file.")
    if set(content) == set(_XL):
        vectors = [content[key] for key in _XL]
    elif len(content) == 1:
        ((key, value),) = content.items()
        vectors, name = [value], name or (None if key in _NAMELESS else str(key))
    else:
        raise LdmPipeError(f"holds {sorted(map(str, content))[:5]}", where, "One word, or clip_l and clip_g.")
    return name, [x.detach().reshape(-1, x.shape[-1]) for x in vectors]


def load_word(encoders: Sequence[CLIPTextEncoder], path: str | Path, name: str | None = None) -> str:
    """Teach the text encoders of a pipeline a word.

    Args:
        name: as written in prompts; None takes the file's.
    Returns: the name.
    Raises: LdmPipeError if there is no name or it is taken, or a width is of no encoder; then nothing was taught.
    """
    found, vectors = read_vectors(path)
    name = name or found
    if name is None:
        raise LdmPipeError("the file does not name its word", str(path), "Give a name.")
    return teach_word(encoders, name, vectors, str(path))


def teach_word(encoders: Sequence[CLIPTextEncoder], name: str, vectors: Sequence[Tensor], where: str) -> str:
    """Teach text encoders a word by its vectors, (V, D) for each encoder; errors are those of `load_word`."""
    widths = [encoder.config.hidden_size for encoder in encoders]
    if [x.shape[1] for x in vectors] != widths:
        what = f"the vectors are {[x.shape[1] for x in vectors]} wide, the text encoders {widths}"
        raise LdmPipeError(what, where, "The word was learnt for another family of models.")
    if not all(bool(torch.isfinite(x).all()) for x in vectors):
        raise LdmPipeError(f"NaN or infinity in the word {name!r}", where, "Fetch the file anew.")
    _check_free(encoders, name, max(len(x) for x in vectors), where)
    for encoder, values in zip(encoders, vectors, strict=True):
        encoder.add_token(name, values)
    return name


def bundled_words(source: str | Path | Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """Read the words that lie in the file of a LoRA as A1111 bundles them, `bundle_emb.NAME....`, by name.

    Raises: LdmPipeError if one of them holds no vectors.
    """
    where = "LoRA" if isinstance(source, Mapping) else str(source)
    if isinstance(source, Mapping) or Path(source).is_dir():
        tensors = source if isinstance(source, Mapping) else {}
    elif Path(source).suffix in PICKLES:
        tensors = load_checkpoint(source)
    else:
        tensors = load_tensors(source) if any(name.startswith(BUNDLED) for name in tensor_names(source)) else {}
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(BUNDLED):
            name, _, kind = key.removeprefix(BUNDLED).partition(".")
            found.setdefault(name, {})[kind.removeprefix("string_to_param.")] = tensor
    return {name: _vectors(content, f"{where}, {BUNDLED}{name}")[1] for name, content in found.items()}


def save_word(path: str | Path, name: str, vectors: Sequence[Tensor]) -> None:
    """Write a word as diffusers reads it: under its name, or as clip_l and clip_g for two encoders."""
    values = {name: vectors[0]} if len(vectors) == 1 else dict(zip(_XL, vectors, strict=True))
    save_tensors(path, values)


def _check_free(encoders: Sequence[CLIPTextEncoder], name: str, count: int, where: str) -> None:
    """Refuse a word that one of the encoders knows, before any of them learns it."""
    names = [name, *(f"{name}_{i}" for i in range(1, count))]
    for encoder in encoders:
        if encoder.tokenizer is None or any(word in encoder.tokenizer.vocab for word in names):
            raise LdmPipeError(f"the word {name!r} is taken", where, "Load it under another token, or unload it.")


def forget_words(encoder: CLIPTextEncoder, names: Sequence[str] | None = None) -> None:
    """Take words out of a text encoder and its tokenizer; None: all that were added. Other rows keep their bits.

    Raises: LdmPipeError for a name that was not added; then nothing has changed.
    """
    tokenizer = encoder.tokenizer
    if tokenizer is None:
        raise LdmPipeError("the text encoder has no tokenizer", "textual inversion")
    words = _words(tokenizer)
    unknown = sorted(set(names or ()) - set(words))
    if unknown:
        raise LdmPipeError(f"{unknown} were not added", "textual inversion", f"Added were {sorted(words)}.")
    forgotten = [row for name, rows in words.items() if names is None or name in names for row in rows]
    table = encoder.text_model.embeddings.token_embedding.weight.detach()
    size = min(forgotten, default=len(table))  # rows before it stay, whether a word names them or not
    kept = {name: rows for name, rows in words.items() if not set(rows) & set(forgotten)}
    fresh = tokenizer.without_words()
    for name, rows in kept.items():
        if max(rows) < size:
            fresh.add_token(name, rows, **tokenizer.flags.get(name, {}))
    encoder.tokenizer = fresh
    encoder.text_model.embeddings.token_embedding = nn.Embedding.from_pretrained(
        table[:size].clone(), freeze=not encoder.text_model.embeddings.token_embedding.weight.requires_grad
    )
    encoder.config = FrozenConfig({**encoder.config, "vocab_size": size})
    for name, rows in kept.items():
        if max(rows) >= size:
            encoder.add_token(name, table[rows])


def _words(tokenizer: ClipTokenizer) -> dict[str, list[int]]:
    """Return the rows of each added word; those of a further vector are named after it."""
    words: dict[str, list[int]] = {}
    for name, row in tokenizer.added.items():
        stem, _, number = name.rpartition("_")
        if stem in words and number == str(len(words[stem])):
            words[stem].append(row)
        else:
            words[name] = [row]
    return words
