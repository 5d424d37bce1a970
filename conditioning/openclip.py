"""Any text tower of the open_clip package as a prompt encoder.

What enters: prompts (or token ids). What leaves: a Condition: by default the penultimate layer after the final norm, as
Stable Diffusion 2 reads it. open_clip is imported when a tower is built, not before. This file knows no image tower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from conditioning.condition import Condition
from conditioning.framing import FramedTokenizer, Pieces
from conditioning.text import (
    OPENCLIP_SD2,
    LibraryTokenizer,
    Reading,
    check_mask,
    choose_state,
    encode_prompts,
)
from ldm_pipe.pretrained import (
    FrozenConfig,
    LdmPipeError,
    PretrainedModule,
    atomic_write,
    check_sizes,
    check_tensors,
    load_folder_tensors,
    load_tensors,
    read_json,
    resolve_folder,
)

OWN_CONFIG, THEIR_CONFIG = "config.json", "open_clip_config.json"
_SIZES = {"layers": 256, "width": 16384, "heads": 256, "context_length": 1 << 16, "vocab_size": 1 << 22}
_OTHER_PARTS = ("visual.", "logit_scale", "logit_bias", "text_decoder.", "attn_mask", "text.attn_mask")


class OpenClipTokenizer(FramedTokenizer):
    """open_clip's own byte-pair tokenizer; padded with 0, as every OpenCLIP tower was trained.

    Args:
        library: an `open_clip.SimpleTokenizer`.
    """

    def __init__(self, library: Any) -> None:
        """Read start, end and length off the library."""
        self.library = library
        self.start_ids, self.end_ids, self.pad_id = (library.sot_token_id,), (library.eot_token_id,), 0
        self.max_length = library.context_length

    def __len__(self) -> int:
        """Return the number of tokens."""
        return int(self.library.vocab_size)

    def save_pretrained(self, folder: str | Path) -> None:
        """Say which it is; its files are open_clip's own."""
        atomic_write(Path(folder) / "tokenizer_config.json", '{"tokenizer_class": "OpenClipTokenizer"}\n')

    def pieces(self, text: str) -> Pieces:
        """Cut a text into tokens; the rest is told as the library spells it."""
        ids = self.library.encode(text)
        return Pieces(ids, lambda first: self.library.decode(ids[first:]).strip())


class OpenCLIPTextEncoder(PretrainedModule):
    """An OpenCLIP text tower (Cherti et al. 2022, arXiv:2212.07143) and its tokenizer.

    Args:
        config: `embed_dim` and `text_cfg` as in open_clip's model configs, and optionally `quick_gelu`.
        tokenizer: None is the one open_clip has for this config.
        reading: which states are read; None: as stored in the config, else as Stable Diffusion 2 does.
        tower: a tower of this config that open_clip built; None builds one with random weights.
    """

    weights_name = "model"
    class_name = "OpenCLIPTextEncoder"

    def __init__(
        self,
        config: Mapping[str, Any],
        tokenizer: FramedTokenizer | None = None,
        reading: Reading | None = None,
        tower: nn.Module | None = None,
    ) -> None:
        """Take or build the tower.

        Raises: LdmPipeError for a config that open_clip cannot build.
        """
        super().__init__()
        self.reading = reading or Reading.of(config, OPENCLIP_SD2)
        self.text = _build(config) if tower is None else tower
        width = self.text.width if hasattr(self.text, "width") else self.text.config.hidden_size
        kept = {key: value for key, value in config.items() if key in ("embed_dim", "quick_gelu")}
        kept.update(text_cfg=dict(config["text_cfg"]), hidden_size=width, vocab_size=self.text.vocab_size)
        self.config = FrozenConfig({**kept, **self.reading.stored(OPENCLIP_SD2)})
        self.tokenizer = tokenizer or _tokenizer(config["text_cfg"])

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> OpenCLIPTextEncoder:
        """Build a tower with random weights."""
        return cls(config)

    @classmethod
    def from_open_clip(
        cls, model: str, weights: str | Path | None = None, *, reading: Reading | None = None
    ) -> OpenCLIPTextEncoder:
        """Take the text tower of a model that open_clip knows.

        Args:
            model: its name, such as "ViT-H-14".
            weights: a tag ("laion2b_s32b_b79k"; open_clip downloads it), a file of the whole model, None for random.
        Raises: LdmPipeError naming the models that are known, or what open_clip found wrong with the weights.
        """
        import open_clip

        config = open_clip.get_model_config(model)
        if config is None:
            raise LdmPipeError(f"open_clip knows no model {model!r}", how_to_fix=f"Known: {open_clip.list_models()}.")
        if weights is None or Path(weights).suffix == ".safetensors":
            encoder = cls(config, reading=reading)
            if weights is not None:
                encoder._load(load_tensors(weights), str(weights))
            return encoder.eval()
        try:
            whole = open_clip.create_model(model, pretrained=str(weights))
        except (RuntimeError, OSError, ValueError) as error:
            raise LdmPipeError(f"{str(error)[:300]}", f"open_clip {model}", "Name a tag or a file.") from error
        encoder = cls(config, reading=reading)
        encoder._load(whole.state_dict(), f"open_clip {model} {weights}")
        return encoder.eval()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        subfolder: str | None = None,
        tokenizer: FramedTokenizer | None = None,
        reading: Reading | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        variant: str | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> OpenCLIPTextEncoder:
        """Load what `save_pretrained` wrote, or a folder of open_clip's (`open_clip_config.json` and its weights).

        Raises: LdmPipeError naming what is missing, unexpected, misshapen or not finite.
        """
        root = resolve_folder(folder, local_files_only=local_files_only, revision=revision)
        root = root / subfolder if subfolder else root
        theirs = (root / THEIR_CONFIG).is_file()
        config = read_json(root / (THEIR_CONFIG if theirs else OWN_CONFIG))
        config = config.get("model_cfg", config) if theirs else config
        tensors = load_folder_tensors(root, "open_clip_model" if theirs else cls.weights_name, variant)
        encoder = cls(config, tokenizer, reading)
        encoder._load(tensors, str(root))
        return encoder.to(device, dtype or torch.float32).eval()

    @classmethod
    def rename_keys(cls, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keep the text tower of a whole model; older models have it beside the image tower, without a prefix."""
        named = {name: value for name, value in tensors.items() if not name.startswith(_OTHER_PARTS)}
        if any(name.startswith("text.") for name in named):
            return named
        return {f"text.{name}": value for name, value in named.items()}

    def _load(self, tensors: Mapping[str, Tensor], where: str) -> None:
        named = self.rename_keys(dict(tensors))
        check_tensors(self, named, where)
        self.load_state_dict(named, strict=True)

    @property
    def max_length(self) -> int:
        """Return the length L of every encoded sequence."""
        own = self.reading.max_length or self.tokenizer.max_length
        return min(own or self.text.context_length, self.text.context_length)

    def forward(self, ids: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Run the tower.

        Args:
            ids: token ids, shape (B, L).
        Returns: the output of each layer before the final norm (B, L, D), the last one after it, and the projected
            vector (B, P).
        """
        if not hasattr(self.text, "forward_intermediates"):  # a tower that wraps transformers
            return self._forward_library(ids)
        found = self.text.forward_intermediates(ids, output_fmt="NLC")
        hidden = found["text_intermediates"]
        return hidden, self.text.ln_final(hidden[-1]), found["text_features"]

    def _forward_library(self, ids: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        mask = (ids != self.text.config.pad_token_id).long()
        output = self.text.transformer(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        projected = self.text.proj(self.text.pooler(output, mask))
        return list(output.hidden_states[1:]), output.last_hidden_state, projected

    def encode(self, prompts: Sequence[str], *, clip_skip: int | None = None) -> Condition:
        """Encode prompts for cross-attention; one warning names the parts that did not fit.

        Args:
            clip_skip: further layers to leave out at the end.
        Raises: LdmPipeError for non-strings, or more layers skipped than there are.
        """
        return encode_prompts(self, prompts, clip_skip)

    def encode_ids(self, ids: Tensor, mask: Tensor, *, clip_skip: int | None = None) -> Condition:
        """Encode ready rows of ids, (B, L) each; towers that hide padding do it by the ids."""
        mask = check_mask(ids, mask).to(self.device)
        hidden, last, projected = self(ids.to(self.device))
        norm = getattr(self.text, "ln_final", nn.Identity())
        tokens = choose_state(self.reading, [ids, *hidden], last, norm, clip_skip, "OpenCLIPTextEncoder")
        pooled = projected if self.reading.pooled == "projected" else None
        return Condition(tokens=tokens, token_mask=mask if self.reading.keep_mask else None, pooled=pooled)


def _build(config: Mapping[str, Any]) -> nn.Module:
    from open_clip.model import _build_text_tower

    text = config.get("text_cfg")
    if not isinstance(text, Mapping) or not isinstance(config.get("embed_dim"), int):
        raise LdmPipeError("embed_dim and text_cfg are needed", "OpenCLIP config", "Give one of open_clip's configs.")
    check_sizes(text, _SIZES, where="OpenCLIP config", required=False)
    text = {**text, **({"hf_model_pretrained": False} if text.get("hf_model_name") else {})}
    try:
        return cast(nn.Module, _build_text_tower(config["embed_dim"], text, bool(config.get("quick_gelu", False))))
    except (TypeError, ValueError, AssertionError, RuntimeError, OSError) as error:
        raise LdmPipeError(f"open_clip cannot build it: {str(error)[:200]}", "OpenCLIP config") from error


def _tokenizer(text: Mapping[str, Any]) -> FramedTokenizer:
    import open_clip

    length = text.get("context_length", 77)
    if text.get("hf_tokenizer_name"):
        library = LibraryTokenizer(open_clip.tokenizer.HFTokenizer(text["hf_tokenizer_name"], length).tokenizer)
        library.max_length = length
        return library
    return OpenClipTokenizer(open_clip.SimpleTokenizer(context_length=length, **text.get("tokenizer_kwargs") or {}))
