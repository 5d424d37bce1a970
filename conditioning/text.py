"""What all text encoders share: which states are read, how prompts become rows of ids, what is said about cut text.

What enters: an encoder with its tokenizer, prompts. What leaves: a Condition. This file knows no network by name.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from torch import Tensor

from conditioning.condition import Condition
from conditioning.framing import FramedTokenizer, Pieces
from ldm_pipe.pretrained import LdmPipeError

Pooling = Literal["none", "pooled", "projected"]
READING_KEY = "ldm_pipe"  # in config.json; other libraries keep and ignore it
MAX_LENGTH = 4096


@dataclass(frozen=True)
class Reading:
    """Which states of a text transformer make the Condition, and what its mask is for.

    The defaults are Stable Diffusion 1's. It is stored with the encoder, as no other file of a model says it.

    Args:
        skip: layers left out at the end; 1 is the penultimate layer.
        final_norm: whether the final norm follows.
        pooled: what fills `Condition.pooled`.
        attend_mask: hide padding inside the encoder.
        keep_mask: give the mask to the U-Net too.
        max_length: of every sequence; None leaves it to tokenizer and network.
        lower_case: write prompts in lower case, without space around them, before they are tokenized.
    """

    skip: int = 0
    final_norm: bool = True
    pooled: Pooling = "none"
    attend_mask: bool = False
    keep_mask: bool = False
    max_length: int | None = None
    lower_case: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        flags = (self.final_norm, self.attend_mask, self.keep_mask, self.lower_case)
        for name, value, least, most in (("skip", self.skip, 0, 256), ("max_length", self.max_length, 2, MAX_LENGTH)):
            whole = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
            if not whole and not (name == "max_length" and value is None):
                raise LdmPipeError(f"{name} is {value!r}, expected {least} to {most}", "Reading")
        if self.pooled not in get_args(Pooling) or not all(isinstance(flag, bool) for flag in flags):
            raise LdmPipeError(f"pooled is {self.pooled!r}, flags {flags}", "Reading", f"Known: {get_args(Pooling)}.")

    @classmethod
    def of(cls, config: Mapping[str, Any], default: Reading) -> Reading:
        """Read what is stored in a config, or take the default.

        Raises: LdmPipeError for unknown fields or values.
        """
        stored = config.get(READING_KEY)
        if stored is None:
            return default
        known = {field.name for field in fields(cls)}
        if not isinstance(stored, Mapping) or not set(stored) <= known:
            raise LdmPipeError(f"{READING_KEY} is {stored!r:.120}", "text encoder config", f"Known: {sorted(known)}.")
        return cls(**stored)

    def stored(self, default: Reading) -> dict[str, Any]:
        """Return what a config needs beside other libraries' fields: nothing, where the default says it all."""
        return {} if self == default else {READING_KEY: asdict(self)}


SD1 = Reading()
SDXL = Reading(skip=1, final_norm=False)  # first encoder
SDXL_2 = Reading(skip=1, final_norm=False, pooled="projected")  # second encoder
OPENCLIP_SD2 = Reading(skip=1)  # OpenCLIP's whole tower; the CLIPTextModel in SD2's folder lacks the last layer already
KARLO = Reading(pooled="projected", keep_mask=True)
T5 = Reading(attend_mask=True, keep_mask=True)
DEEPFLOYD_IF = Reading(attend_mask=True, max_length=77, lower_case=True)


class PromptEncoder(Protocol):
    """What prompt craft asks of a text encoder, beyond `TextEncoder`."""

    tokenizer: FramedTokenizer | None
    reading: Reading

    @property
    def max_length(self) -> int:
        """Return the length L of a sequence."""
        ...

    def encode_ids(self, ids: Tensor, mask: Tensor, *, clip_skip: int | None = None) -> Condition:
        """Encode ready rows of ids."""
        ...

    def encode(self, prompts: Sequence[str], *, clip_skip: int | None = None) -> Condition:
        """Turn B prompts into a Condition of B rows."""
        ...


def tokenizer_of(encoder: PromptEncoder) -> FramedTokenizer:
    """Return the tokenizer.

    Raises: LdmPipeError if there is none.
    """
    if encoder.tokenizer is None:
        raise LdmPipeError("there is no tokenizer", type(encoder).__name__, "Load with tokenizer=<folder>.")
    return encoder.tokenizer


def ids_digest(encoder: PromptEncoder, texts: Sequence[str]) -> str:
    """Hash what the tokenizer makes of texts: part of a cache's name, as the encoder's weights do not tell it."""
    batch = tokenizer_of(encoder)([prepare(encoder, text) for text in texts], max_length=encoder.max_length)
    return hashlib.sha256(batch.ids.numpy().tobytes() + batch.mask.numpy().tobytes()).hexdigest()


def prepare(encoder: PromptEncoder, prompt: str) -> str:
    """Write a prompt as the encoder wants it."""
    return prompt.lower().strip() if encoder.reading.lower_case else prompt


def encode_prompts(encoder: PromptEncoder, prompts: Sequence[str], clip_skip: int | None) -> Condition:
    """Tokenize, say what is cut, encode."""
    tokenizer = tokenizer_of(encoder)
    if encoder.reading.lower_case and not isinstance(prompts, str):
        prompts = [prepare(encoder, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    batch = tokenizer(prompts, max_length=encoder.max_length)
    cut = [text for text in batch.truncated if text]
    if cut:
        text = f"the prompt is longer than {encoder.max_length} tokens, this part is cut: {'; '.join(map(repr, cut))}"
        warnings.warn(text, stacklevel=3)
    return encoder.encode_ids(batch.ids, batch.mask, clip_skip=clip_skip)


def check_mask(ids: Tensor, mask: Tensor) -> Tensor:
    """Return the mask of rows of ids.

    Raises: LdmPipeError if it has not one value for each id.
    """
    if ids.ndim != 2 or mask.shape != ids.shape:
        what = f"the token mask is {list(mask.shape)}, the ids are {list(ids.shape)}"
        raise LdmPipeError(what, "text encoder", "Give one value for each id, (B, L) both.")
    return mask


def choose_state(
    reading: Reading,
    hidden: Sequence[Tensor],
    last: Tensor,
    norm: Callable[[Tensor], Tensor],
    clip_skip: int | None,
    where: str,
) -> Tensor:
    """Choose the hidden state that becomes the tokens.

    Args:
        hidden: outputs of all layers before the final norm, the embeddings first.
        last: the last one after the norm, used as it is where nothing is skipped.
        clip_skip: layers to leave out beyond those that the reading does.
    Raises: LdmPipeError if more layers are skipped than there are.
    """
    most = len(hidden) - 1 - reading.skip
    skip = 0 if clip_skip is None else clip_skip
    if isinstance(skip, bool) or not isinstance(skip, int) or not 0 <= skip <= most:
        raise LdmPipeError(f"clip_skip {clip_skip!r}: must be 0 to {most}", where)
    skip += reading.skip
    if not reading.final_norm:
        return hidden[-1 - skip]
    return last if skip == 0 else norm(hidden[-1 - skip])


def refuse_code(folder: Path) -> None:
    """Refuse a folder whose config files name Python code of its own: transformers would offer to run it.

    Raises: LdmPipeError naming the file.
    """
    for name in ("tokenizer_config.json", "config.json", "processor_config.json", "preprocessor_config.json"):
        try:
            config = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue  # whoever reads the file says what is wrong with it
        if isinstance(config, dict) and "auto_map" in config:
            advice = "Code of a model folder is never run. Use a folder of a class that transformers itself knows."
            raise LdmPipeError('"auto_map" asks for Python code of this folder', str(folder / name), advice)


class LibraryTokenizer(FramedTokenizer):
    """A tokenizer of transformers (T5's Unigram, BERT's WordPiece, ...), framed by its own special tokens.

    Args:
        library: a fast tokenizer of transformers.
    """

    def __init__(self, library: Any) -> None:
        """Read start, end and padding off the library."""
        self.library = library
        bare = library("a", add_special_tokens=False).input_ids
        framed = library("a").input_ids
        start = next(i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)
        self.start_ids, self.end_ids = tuple(framed[:start]), tuple(framed[start + len(bare) :])
        self.pad_id = 0 if library.pad_token_id is None else library.pad_token_id
        length = library.model_max_length
        self.max_length = int(length) if 2 <= length <= MAX_LENGTH else None  # 1e30 is "no limit"

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, subfolder: str | None = None) -> LibraryTokenizer:
        """Read a tokenizer folder of transformers; code that lies in it is never run.

        Raises: LdmPipeError if it asks for code of its own, or transformers cannot read it.
        """
        from transformers import AutoTokenizer

        root = Path(folder) / subfolder if subfolder else Path(folder)
        refuse_code(root)
        try:
            return cls(AutoTokenizer.from_pretrained(str(root), local_files_only=True, trust_remote_code=False))
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise LdmPipeError(f"no tokenizer can be read ({reason})", str(root), "Give its folder.") from None

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the folder as transformers does."""
        self.library.save_pretrained(str(folder))

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.library)

    def pieces(self, text: str) -> Pieces:
        """Cut a text into tokens."""
        found = self.library(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return Pieces(found.input_ids, lambda first: text[found.offset_mapping[first][0] :])
