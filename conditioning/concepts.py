"""Textual inversion files -> new words of text encoders.

What enters: a file of learned vectors, in diffusers' or A1111's layout. What leaves: encoders that know its word.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conditioning.clip import CLIPTextEncoder
from ldm_pipe.pretrained import LdmPipeError, load_tensors

_PER_ENCODER = ("clip_l", "clip_g")  # SDXL files hold one table per encoder
_NAMELESS = ("emb_params", "*")


def load_concept(encoders: Sequence[CLIPTextEncoder], path: str | Path, name: str | None = None) -> str:
    """Teach encoders the word of a textual-inversion file (Gal et al. 2022, arXiv:2208.01618).

    Args:
        encoders: of the pipeline, in its order.
        path: .safetensors, or .pt / .bin (read as weights only).
        name: how it is written in prompts; None: the file's own word, else the file's name in angle brackets.
    Returns: the word.
    Raises: LdmPipeError for a file of another kind, vectors of another width, or a word that is taken.
    """
    path = Path(path)
    tables = _read(path)
    if set(_PER_ENCODER) >= set(tables):
        word = name or f"<{path.stem}>"
        vectors: list[Tensor] = [tables[key] for key in _PER_ENCODER if key in tables]
    elif len(tables) == 1:
        own, table = next(iter(tables.items()))
        word = name or (f"<{path.stem}>" if own in _NAMELESS else own)
        vectors = [table]
    else:
        what = f"{len(tables)} tables: {sorted(tables)[:6]}"
        raise LdmPipeError(what, str(path), "Give a file with one word.")
    if len(vectors) != len(encoders):
        what = f"vectors for {len(vectors)} text encoders, the model has {len(encoders)}"
        raise LdmPipeError(what, str(path), "Use a word that was trained for this model.")
    widths = [(value.shape[-1], encoder.config.hidden_size) for value, encoder in zip(vectors, encoders, strict=True)]
    if any(mine != wanted for mine, wanted in widths):
        what = f"vectors and text encoders are {widths} wide"
        raise LdmPipeError(what, str(path), "Use a word that was trained for this model.")
    for encoder, value in zip(encoders, vectors, strict=True):
        encoder.add_token(word, value)
    return word


def _read(path: Path) -> dict[str, Tensor]:
    """Read the tables of a file by name."""
    if path.suffix == ".safetensors":
        found: Any = load_tensors(path)
    else:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise LdmPipeError("the file does not exist", str(path)) from None
        except Exception as error:  # noqa: BLE001  (a pickle can fail in any way)
            raise LdmPipeError(f"cannot be read as weights ({type(error).__name__})", str(path)) from None
    if isinstance(found, dict) and isinstance(found.get("string_to_param"), dict):
        found = found["string_to_param"]  # A1111's own files
    tables = (
        {key: value for key, value in found.items() if isinstance(value, Tensor)} if isinstance(found, dict) else {}
    )
    if not tables or any(value.ndim not in (1, 2) or not torch.isfinite(value).all() for value in tables.values()):
        raise LdmPipeError("no learned vectors in it", str(path), "Give a textual-inversion file.")
    return {key: value.detach().float() for key, value in tables.items()}
