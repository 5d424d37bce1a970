"""LDM's own text transformer: trained from scratch together with the U-Net, and the one its text-to-image model brings.

What enters: prompts (or token ids). What leaves: hidden states, or a Condition. This file does not import transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from conditioning.condition import Condition
from conditioning.framing import FramedTokenizer
from conditioning.text import SD1, LibraryTokenizer, Reading, check_mask, choose_state, encode_prompts
from conditioning.tokenizer import ClipTokenizer
from ldm_pipe.pretrained import FrozenConfig, LdmPipeError, PretrainedModule, check_sizes, resolve_folder

_SIZES = {
    "vocab_size": 1 << 22,
    "d_model": 1 << 14,
    "encoder_ffn_dim": 1 << 16,
    "encoder_layers": 256,
    "encoder_attention_heads": 256,
    "head_dim": 1 << 12,
    "max_position_embeddings": 1 << 14,
}
_UNTRAINED = ("to_logits.",)  # of a language model's head that no one reads


class Attention(nn.Module):
    """Multi-head self-attention, every token with every other."""

    def __init__(self, config: FrozenConfig) -> None:
        """Make the four projections; queries, keys and values have no bias."""
        super().__init__()
        width, inner = config.d_model, config.encoder_attention_heads * config.head_dim
        self.num_heads = config.encoder_attention_heads
        self.k_proj, self.v_proj, self.q_proj = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.out_proj = nn.Linear(inner, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Mix tokens; mask (B, 1, 1, L) hides some."""
        q, k, v = (
            rearrange(layer(x), "b l (n d) -> b n l d", n=self.num_heads)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(rearrange(mixed, "b n l d -> b l (n d)"))


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: FrozenConfig) -> None:
        """Make attention and two linear layers with their norms."""
        super().__init__()
        self.self_attn = Attention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = nn.Linear(config.d_model, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Add attention, then the linear layers."""
        x = x + self.dropout(self.self_attn(self.self_attn_layer_norm(x), mask))
        return x + self.dropout(self.fc2(F.gelu(self.fc1(self.final_layer_norm(x)))))


class TransformerTextEncoder(PretrainedModule):
    """The text transformer of latent diffusion (Rombach et al. 2022, arXiv:2112.10752, sec. 4.3.1, tau_theta).

    Keys and config are those of diffusers' LDMBertModel; the language head there (`to_logits`) is left out.

    Args:
        config: `vocab_size`, `d_model`, `encoder_layers`, `encoder_attention_heads`, `head_dim`, `encoder_ffn_dim`,
            `max_position_embeddings`, `dropout`.
        tokenizer: needed by `encode` only; `train_bpe` makes one, LDM's is BERT's.
        reading: which states are read; None: as stored in the config, else the last one, padding seen (as LDM does).
    """

    weights_name = "model"

    def __init__(
        self, config: Mapping[str, Any], tokenizer: FramedTokenizer | None = None, reading: Reading | None = None
    ) -> None:
        """Build the network, normal with deviation 0.02 as BERT."""
        super().__init__()
        self.reading = reading or Reading.of(config, SD1)
        if self.reading.pooled != "none":
            raise LdmPipeError("this transformer has no pooled output", "TransformerTextEncoder", 'Use pooled="none".')
        self.config, self.tokenizer = _checked(config, self.reading), tokenizer
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(self.config.vocab_size, self.config.d_model)
        self.model.embed_positions = nn.Embedding(self.config.max_position_embeddings, self.config.d_model)
        self.model.layers = nn.ModuleList(Layer(self.config) for _ in range(self.config.encoder_layers))
        self.model.layer_norm = nn.LayerNorm(self.config.d_model)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TransformerTextEncoder:
        """Build the network with random weights and no tokenizer."""
        return cls(config)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        subfolder: str | None = None,
        tokenizer: str | Path | FramedTokenizer | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        variant: str | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> TransformerTextEncoder:
        """Load a component folder strictly, and its tokenizer.

        Args:
            tokenizer: its folder; None looks in the folder `tokenizer` beside the component.
        Raises: LdmPipeError naming what is missing, unexpected, misshapen or not finite.
        """
        root = resolve_folder(folder, local_files_only=local_files_only, revision=revision)
        root = root / subfolder if subfolder else root
        encoder = super().from_pretrained(root, dtype=dtype, device=device, variant=variant)
        named = root.name.startswith("text_encoder")  # text_encoder_2 has tokenizer_2; LDM's `bert` has tokenizer
        beside = root.parent / (root.name.replace("text_encoder", "tokenizer") if named else "tokenizer")
        place = tokenizer if tokenizer is not None else beside if beside.is_dir() else None
        encoder.tokenizer = _read_tokenizer(Path(place)) if isinstance(place, (str, Path)) else place
        return encoder

    @classmethod
    def rename_keys(cls, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leave out the language head."""
        return {name: value for name, value in tensors.items() if not name.startswith(_UNTRAINED)}

    @property
    def max_length(self) -> int:
        """Return the length L of every encoded sequence."""
        own = self.reading.max_length or (self.tokenizer.max_length if self.tokenizer else None)
        return min(own or self.config.max_position_embeddings, self.config.max_position_embeddings)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """Run the transformer.

        Args:
            ids: token ids, shape (B, L).
            mask: True at tokens that may be attended to, shape (B, L); None: all.
        Returns: the embeddings and the output of each layer (B, L, D), and the last one after the final norm.
        """
        body: Any = self.model
        shown = None if mask is None else mask.bool()[:, None, None, :]
        hidden = [body.embed_tokens(ids) + body.embed_positions.weight[: ids.shape[1]]]
        for layer in body.layers:
            hidden.append(layer(hidden[-1], shown))
        return hidden, body.layer_norm(hidden[-1])

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
        body: Any = self.model
        tokens = choose_state(self.reading, hidden, last, body.layer_norm, clip_skip, "TransformerTextEncoder")
        return Condition(tokens=tokens, token_mask=mask if self.reading.keep_mask else None)


def _checked(config: Mapping[str, Any], reading: Reading) -> FrozenConfig:
    where = "text encoder config"
    check_sizes(config, _SIZES, where=where)
    dropout = config.get("dropout", 0.0)
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise LdmPipeError(f"dropout is {dropout!r}, expected 0 to below 1", where)
    known = {"model_type": "ldmbert", "architectures": ["LDMBertModel"], "activation_function": "gelu"}
    for name, value in known.items():
        if config.get(name, value) != value:
            raise LdmPipeError(f"{name} is {config[name]!r}, expected {value!r}", where)
    fixed = {**known, "hidden_size": config["d_model"], "dropout": dropout, **reading.stored(SD1)}
    return FrozenConfig({**config, **fixed})


def _read_tokenizer(root: Path) -> FramedTokenizer:
    if (root / "merges.txt").is_file():
        return ClipTokenizer.from_pretrained(root)
    return LibraryTokenizer.from_pretrained(root)
