"""The encoders of T5, mT5 and UMT5 as prompt encoders.

What enters: prompts (or token ids). What leaves: a Condition with its mask, which hides the
padding. transformers is imported when a network is built, not before; its decoder never is.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conditioning.condition import Condition
from conditioning.framing import FramedTokenizer
from conditioning.text import READING_KEY, T5, LibraryTokenizer, Reading, check_mask, choose_state, encode_prompts
from ldm_pipe.pretrained import (
    FrozenConfig,
    LdmPipeError,
    atomic_write,
    check_sizes,
    read_json,
    resolve_folder,
    save_tensors,
)

MAX_LENGTH = 512  # T5 was trained on no more
CLASSES = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
_SIZES = {"num_layers": 256, "d_model": 16384, "d_kv": 4096, "num_heads": 256, "d_ff": 1 << 17, "vocab_size": 1 << 22}
_DECODER = ("decoder.", "lm_head.")
_TIED = "encoder.embed_tokens.weight"


class T5TextEncoder(nn.Module):
    """The encoder of a T5 (Raffel et al. 2019, arXiv:1910.10683), mT5 or UMT5, and its tokenizer.

    Args:
        model: `T5EncoderModel`, `MT5EncoderModel` or `UMT5EncoderModel` of transformers.
        tokenizer: needed by `encode` only.
        reading: which states are read; None: as stored in the config, else the last one, with its mask.
    """

    def __init__(
        self, model: nn.Module, tokenizer: FramedTokenizer | None = None, reading: Reading | None = None
    ) -> None:
        """Hold the network; what only a whole tower of CLIP has is refused."""
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        library: Any = model.config
        self.reading = reading or Reading.of(library.to_dict(), T5)
        if self.reading.pooled != "none" or not self.reading.final_norm:
            raise LdmPipeError("T5 has no pooled output, and its states are read after the final norm", "T5TextEncoder")
        fields = {key: value for key, value in library.to_dict().items() if key != READING_KEY}
        fields.update(
            hidden_size=library.d_model,
            vocab_size=library.vocab_size,
            architectures=[type(model).__name__],
            **self.reading.stored(T5),
        )
        self.config = FrozenConfig(fields)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> T5TextEncoder:
        """Build the network from fields of T5Config (MT5Config, UMT5Config), with random weights and no tokenizer.

        Raises: LdmPipeError for another `model_type`, or sizes that no such network has.
        """
        import transformers

        kind = config.get("model_type", "t5")
        if kind not in CLASSES:
            raise LdmPipeError(f"model_type {kind!r} is no T5", "text encoder config", f"Known: {list(CLASSES)}.")
        check_sizes(config, _SIZES, where="text encoder config", required=False)
        library: Any = transformers
        fields = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
        build = getattr(library, CLASSES[kind])
        return cls(build(build.config_class(**fields)).eval())

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        subfolder: str | None = None,
        tokenizer: str | Path | FramedTokenizer | None = None,
        reading: Reading | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        variant: str | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> T5TextEncoder:
        """Load the encoder of a folder, which may hold a decoder too, and its tokenizer.

        Args:
            tokenizer: its folder; None looks beside the component (`tokenizer`) and in it.
            dtype: float16 overflows in T5 and becomes float32, with a warning; bfloat16 is safe.
        Raises: LdmPipeError naming what is missing, unexpected, misshapen or not finite.
        """
        import transformers

        root = resolve_folder(folder, local_files_only=local_files_only, revision=revision)
        root = root / subfolder if subfolder else root
        kind = read_json(root / "config.json").get("model_type")
        if kind not in CLASSES:
            raise LdmPipeError(f"model_type {kind!r} is no T5", str(root / "config.json"), f"Known: {list(CLASSES)}.")
        if dtype == torch.float16:
            warnings.warn("float16 overflows in T5: float32 is used; bfloat16 is safe and as small", stacklevel=2)
            dtype = None
        library: Any = transformers
        try:
            with _no_bar():
                model, info = getattr(library, CLASSES[kind]).from_pretrained(
                    str(root), dtype=dtype or torch.float32, variant=variant, use_safetensors=True,
                    local_files_only=True, output_loading_info=True,
                )  # fmt: skip
        except (OSError, ValueError, RuntimeError) as error:
            raise LdmPipeError(f"transformers cannot load it: {str(error).strip()[:300]}", str(root)) from None
        _check_loaded(model, info, str(root))
        if not isinstance(tokenizer, FramedTokenizer):
            tokenizer = _find_tokenizer(root) if tokenizer is None else LibraryTokenizer.from_pretrained(tokenizer)
        return cls(model.to(device).eval(), tokenizer, reading)

    def save_pretrained(
        self, folder: str | Path, *, variant: str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Write `config.json` and the weights as transformers reads them, each file atomically."""
        library: Any = self.model.config
        config = {**library.to_dict(), **self.reading.stored(T5), "architectures": [type(self.model).__name__]}
        tensors = {
            name: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
            for name, tensor in self.model.state_dict().items()
            if name != _TIED
        }
        suffix = f".{variant}" if variant else ""
        save_tensors(Path(folder) / f"model{suffix}.safetensors", tensors)
        text = json.dumps({**config, "dtype": "float32"}, indent=2, sort_keys=True, default=str)
        atomic_write(Path(folder) / "config.json", text + "\n")

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return next(self.parameters()).device

    @property
    def max_length(self) -> int:
        """Return the length L of every encoded sequence."""
        return self.reading.max_length or (self.tokenizer and self.tokenizer.max_length) or MAX_LENGTH

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """Run the encoder.

        Args:
            ids: token ids, shape (B, L).
            mask: True at tokens that may be attended to, shape (B, L).
        Returns: the embeddings and the output of each layer (B, L, D), and the last one after the final norm.
        """
        output = self.model(ids, attention_mask=None if mask is None else mask.long(), output_hidden_states=True)
        return list(output.hidden_states), output.last_hidden_state

    def encode(self, prompts: Sequence[str], *, clip_skip: int | None = None) -> Condition:
        """Encode prompts for cross-attention; one warning names the parts that did not fit.

        Args:
            clip_skip: layers to leave out at the end; the final norm follows.
        Raises: LdmPipeError for non-strings, a missing tokenizer, or more layers skipped than there are.
        """
        return encode_prompts(self, prompts, clip_skip)

    def encode_ids(self, ids: Tensor, mask: Tensor, *, clip_skip: int | None = None) -> Condition:
        """Encode ready rows of ids, (B, L) each."""
        mask = check_mask(ids, mask).to(self.device)
        hidden, last = self(ids.to(self.device), mask if self.reading.attend_mask else None)
        stack: Any = self.model.encoder
        tokens = choose_state(self.reading, hidden, last, stack.final_layer_norm, clip_skip, "T5TextEncoder")
        return Condition(tokens=tokens, token_mask=mask if self.reading.keep_mask else None)


@contextlib.contextmanager
def _no_bar() -> Iterator[None]:
    """Keep transformers' bar over the tensors of a file from the screen, and leave its setting as it was."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _check_loaded(model: nn.Module, info: Mapping[str, Any], where: str) -> None:
    """Refuse what transformers lets pass."""
    missing = [name for name in info["missing_keys"] if name != _TIED]
    unexpected = [name for name in info["unexpected_keys"] if not name.startswith(_DECODER)]
    if missing or unexpected or info["mismatched_keys"]:
        what = f"missing {sorted(missing)[:10]}, unexpected {sorted(unexpected)[:10]}, misshapen "
        raise LdmPipeError(what + str(list(info["mismatched_keys"])[:10]), where, "The weights are of another model.")
    bad = [name for name, value in model.named_parameters() if not bool(torch.isfinite(value).all())]
    if bad:
        raise LdmPipeError(f"NaN or infinity in {bad[:10]}", where, "Use an earlier checkpoint.")


def _find_tokenizer(root: Path) -> LibraryTokenizer | None:
    names = (root.name.replace("text_encoder", "tokenizer"), "tokenizer")
    for place in (*(root.parent / name for name in names), root / "tokenizer", root):
        if (place != root and (place / "tokenizer_config.json").is_file()) or (place / "tokenizer.json").is_file():
            return LibraryTokenizer.from_pretrained(place)
    return None
