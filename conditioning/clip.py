"""CLIP's text transformer, with the keys and the config of transformers' CLIPTextModel, and its prompt encoder.

What enters: prompts (or token ids). What leaves: hidden states, pooled and projected vectors, or a Condition. This file
does not import transformers and does not know what the U-Net does with the tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from conditioning.condition import Condition
from conditioning.text import READING_KEY, SD1, Reading, check_mask, choose_state, encode_prompts, tokenizer_of
from conditioning.tokenizer import ClipTokenizer
from ldm_pipe.pretrained import FrozenConfig, LdmPipeError, PretrainedModule, check_sizes, resolve_folder

_SIZES = {
    "vocab_size": 1 << 22,
    "hidden_size": 1 << 14,
    "intermediate_size": 1 << 16,
    "num_hidden_layers": 256,
    "num_attention_heads": 256,
    "max_position_embeddings": 1 << 14,
}
EMBEDDINGS = "text_model.embeddings.token_embedding.weight"
_DEFAULTS = {"layer_norm_eps": 1e-5, "eos_token_id": 49407, "projection_dim": 512}


def quick_gelu(x: Tensor) -> Tensor:
    """Approximate GELU by x sigmoid(1.702 x) (Hendrycks & Gimpel 2016, arXiv:1606.08415, sec. 2)."""
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


@dataclass(frozen=True)
class ClipOutput:
    """What the text transformer knows of B sequences.

    Args:
        last: last hidden state after the final norm, shape (B, L, D).
        hidden: embeddings and the output of each layer before the final norm, num_hidden_layers + 1 of (B, L, D).
        pooled: `last` at the end token, shape (B, D).
        projected: pooled in the space shared with images, shape (B, projection_dim), or None.
    """

    last: Tensor
    hidden: list[Tensor]
    pooled: Tensor
    projected: Tensor | None


class ClipEmbeddings(nn.Module):
    """Sum of token and position embeddings."""

    def __init__(self, config: FrozenConfig) -> None:
        """Make both tables."""
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        """Embed ids."""
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]  # (B, L, D)


class ClipAttention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: FrozenConfig) -> None:
        """Make the four projections."""
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(width, width),
            nn.Linear(width, width),
            nn.Linear(width, width),
        )
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Mix tokens with those before them; mask (B, 1, L, L) replaces the plain causal one."""
        q, k, v = (
            rearrange(layer(x), "b l (n d) -> b n l d", n=self.num_heads)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out_proj(rearrange(mixed, "b n l d -> b l (n d)"))


class ClipMLP(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, config: FrozenConfig) -> None:
        """Make both layers."""
        super().__init__()
        self.activation = _ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token."""
        return self.fc2(self.activation(self.fc1(x)))


class ClipLayer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: FrozenConfig) -> None:
        """Make attention and MLP with their norms."""
        super().__init__()
        self.self_attn = ClipAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ClipMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Add attention, then MLP."""
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class ClipTransformer(nn.Module):
    """Embeddings, layers, final norm: everything under the key prefix `text_model.`."""

    def __init__(self, config: FrozenConfig) -> None:
        """Make the parts."""
        super().__init__()
        self.embeddings = ClipEmbeddings(config)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(ClipLayer(config) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor, mask: Tensor | None) -> list[Tensor]:
        """Return the embeddings and the output of each layer."""
        hidden = [self.embeddings(ids)]
        for layer in cast(nn.ModuleList, self.encoder.layers):
            hidden.append(layer(hidden[-1], mask))
        return hidden


class CLIPTextEncoder(PretrainedModule):
    """CLIP's text tower (Radford et al. 2021, arXiv:2103.00020, sec. 2.4) and, where one is found, its tokenizer.

    The keys are those of transformers' CLIPTextModel (with `text_projection`: CLIPTextModelWithProjection), with the
    prefix `text_model.` that transformers 4 and 5 both read; the flat keys that transformers 5 writes are read too.

    Args:
        config: fields of CLIPTextConfig.
        tokenizer: needed by `encode` only.
        reading: which states are read; None: as stored in the config, else as Stable Diffusion 1 does.
    """

    weights_name = "model"

    def __init__(
        self, config: Mapping[str, Any], tokenizer: ClipTokenizer | None = None, reading: Reading | None = None
    ) -> None:
        """Build the network with CLIP's initialisation."""
        super().__init__()
        self.config = _checked(config)
        self.set_reading(reading or Reading.of(config, SD1))
        self.tokenizer = tokenizer
        self.text_model = ClipTransformer(self.config)
        self.text_projection: nn.Linear | None = None
        if self.config.architectures[0] == "CLIPTextModelWithProjection":
            self.text_projection = nn.Linear(self.config.hidden_size, self.config.projection_dim, bias=False)
        self._initialise()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> CLIPTextEncoder:
        """Build the network from CLIPTextConfig fields, with random weights and no tokenizer."""
        return cls(config)

    @classmethod
    def from_pretrained(  # the base class's arguments, and where the tokenizer lies
        cls,
        folder: str | Path,
        *,
        subfolder: str | None = None,
        tokenizer: str | Path | ClipTokenizer | None = None,
        reading: Reading | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        variant: str | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> CLIPTextEncoder:
        """Load a text encoder and its tokenizer.

        Args:
            folder: the component folder itself, or a pipeline folder or hub id with `text_encoder` and `tokenizer`.
            subfolder: another component of a pipeline, such as "text_encoder_2".
            tokenizer: its folder; None looks beside the component (`tokenizer`, `tokenizer_2`) and in it.
            reading: which states are read, such as `conditioning.text.SDXL_2`; None: as stored.
        Raises: LdmPipeError naming what is missing, unexpected, misshapen or not finite.
        """
        parts = [subfolder or "text_encoder", _tokenizer_name(subfolder or "text_encoder")]
        patterns = [f"{part}/*.{ending}" for part in parts for ending in ("json", "txt", "safetensors")]
        patterns += ["*.json", "merges.txt", "model*.safetensors"]
        root = resolve_folder(folder, local_files_only=local_files_only, revision=revision, allow_patterns=patterns)
        if subfolder is None and not (root / "config.json").is_file() and (root / "text_encoder").is_dir():
            subfolder = "text_encoder"
        root = root / subfolder if subfolder else root
        encoder = super().from_pretrained(root, dtype=dtype, device=device, variant=variant)
        if isinstance(tokenizer, (str, Path)):
            tokenizer = ClipTokenizer.from_pretrained(tokenizer)
        encoder.tokenizer = tokenizer or _find_tokenizer(root)
        if reading is not None:
            encoder.set_reading(reading)
        return encoder

    def set_reading(self, reading: Reading) -> None:
        """Choose which states are read, here and when the encoder is saved.

        Raises: LdmPipeError for a projection that this tower does not have.
        """
        if reading.pooled == "projected" and self.config.architectures[0] != "CLIPTextModelWithProjection":
            raise LdmPipeError("this text encoder has no projection", "CLIPTextEncoder", 'Use pooled="pooled".')
        plain = {key: value for key, value in self.config.items() if key != READING_KEY}
        self.reading, self.config = reading, FrozenConfig({**plain, **reading.stored(SD1)})

    @classmethod
    def rename_keys(cls, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put transformers 5's flat keys under `text_model.` and leave out the old `position_ids` (0, 1, 2, ...)."""
        tops = ("embeddings.", "encoder.", "final_layer_norm.")
        named = {f"text_model.{name}" if name.startswith(tops) else name: value for name, value in tensors.items()}
        return {name: value for name, value in named.items() if not name.endswith("embeddings.position_ids")}

    def fit_tables(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Take a longer table of embeddings than the config names: learnt words whose number it does not count."""
        table, size = tensors.get(EMBEDDINGS), self.config.vocab_size
        if table is None or table.ndim != 2 or not size < len(table) <= _SIZES["vocab_size"]:
            return
        warnings.warn(f"{where}: the table has {len(table)} rows, vocab_size is {size}; the table counts", stacklevel=4)
        own = self.text_model.embeddings.token_embedding.weight
        grown = nn.Embedding(len(table), self.config.hidden_size, device=own.device, dtype=own.dtype)
        self.text_model.embeddings.token_embedding = grown
        self.config = FrozenConfig({**self.config, "vocab_size": len(table)})

    @property
    def max_length(self) -> int:
        """Return the length L of every encoded sequence."""
        own = self.reading.max_length or (self.tokenizer.max_length if self.tokenizer else None)
        return min(own or self.config.max_position_embeddings, self.config.max_position_embeddings)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> ClipOutput:
        """Run the transformer.

        Args:
            ids: token ids, shape (B, L), L at most max_position_embeddings.
            mask: True at tokens that may be attended to, shape (B, L); None: all (as Stable Diffusion does).
        """
        length = ids.shape[1]
        if mask is not None:
            causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
            mask = causal & mask.bool()[:, None, None, :]  # (B, 1, L, L)
        hidden = self.text_model(ids, mask)
        last = self.text_model.final_layer_norm(hidden[-1])
        # eos_token_id 2 stands in configs older than transformers PR 24773: there the end token is the largest id.
        end = self.config.eos_token_id
        at_end = ids.argmax(dim=1) if end == 2 else (ids == end).int().argmax(dim=1)
        pooled = last[torch.arange(len(ids), device=ids.device), at_end]  # (B, D)
        return ClipOutput(last, hidden, pooled, self.text_projection(pooled) if self.text_projection else None)

    def encode(self, prompts: Sequence[str], *, clip_skip: int | None = None) -> Condition:
        """Encode prompts for cross-attention, padded to the context length.

        One warning names the parts that did not fit; `tokenizer(prompts).truncated` lists them.

        Args:
            clip_skip: further layers to leave out at the end, as in diffusers: for Stable Diffusion 1 and 2 the output
                of the earlier layer goes through the final norm, for SDXL not. None: none.
        Returns: Condition with tokens (B, L, D), and what else the reading asks for.
        Raises: LdmPipeError for non-strings, a missing tokenizer, or more layers skipped than there are.
        """
        return encode_prompts(self, prompts, clip_skip)

    def encode_ids(self, ids: Tensor, mask: Tensor, *, clip_skip: int | None = None) -> Condition:
        """Encode ready rows of ids, (B, L) each; arguments and errors as in `encode`."""
        hide = self.reading.attend_mask or self.config.get("use_attention_mask")
        mask = check_mask(ids, mask).to(self.device)
        output = self(ids.to(self.device), mask if hide else None)
        tokens = choose_state(
            self.reading, output.hidden, output.last, self.text_model.final_layer_norm, clip_skip, "CLIPTextEncoder"
        )
        pooled = {"none": None, "pooled": output.pooled, "projected": output.projected}[self.reading.pooled]
        return Condition(tokens=tokens, token_mask=mask if self.reading.keep_mask else None, pooled=pooled)

    @torch.no_grad()
    def add_token(self, name: str, vectors: Tensor) -> None:
        """Teach a new word (textual inversion, Gal et al. 2022, arXiv:2208.01618).

        Args:
            name: as written in prompts, such as "<cat-toy>".
            vectors: its embeddings, shape (V, D) or (D,).
        Raises: LdmPipeError if the name is taken or the width is not this encoder's.
        """
        vectors = vectors.reshape(-1, vectors.shape[-1])
        if vectors.shape[1] != self.config.hidden_size:
            what = f"the vectors of {name!r} are {vectors.shape[1]} wide, the encoder {self.config.hidden_size}"
            raise LdmPipeError(what, "CLIPTextEncoder", "Use those trained for this encoder.")
        tokenizer, size = tokenizer_of(self), self.config.vocab_size
        assert isinstance(tokenizer, ClipTokenizer)
        tokenizer.add_token(name, range(size, size + len(vectors)))
        old = self.text_model.embeddings.token_embedding.weight
        table = nn.Embedding.from_pretrained(torch.cat([old, vectors.to(old)]), freeze=not old.requires_grad)
        self.text_model.embeddings.token_embedding = table
        # The old rule for the end token, the largest id, no longer holds.
        grown = {"vocab_size": size + len(vectors), "eos_token_id": tokenizer.end_ids[0]}
        self.config = FrozenConfig({**self.config, **grown})

    def without_projection(self) -> CLIPTextEncoder:
        """Return the same tower (shared weights) as a plain CLIPTextModel, the kind a Stable Diffusion folder holds."""
        reading = replace(self.reading, pooled="none") if self.reading.pooled == "projected" else self.reading
        plain = CLIPTextEncoder({**self.config, "architectures": ["CLIPTextModel"]}, self.tokenizer, reading)
        plain.text_model = self.text_model
        return plain.train(self.training)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Initialise as CLIP's own code: 0.02 and 0.01 for the tables, widths and depth for the layers."""
        width, depth = self.config.hidden_size, self.config.num_hidden_layers
        nn.init.normal_(self.text_model.embeddings.token_embedding.weight, std=0.02)
        nn.init.normal_(self.text_model.embeddings.position_embedding.weight, std=0.01)
        deep = width**-0.5 * (2 * depth) ** -0.5
        stds = {"fc1": (2 * width) ** -0.5, "fc2": deep, "out_proj": deep}
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=stds.get(name.rsplit(".", 1)[-1], width**-0.5))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def _checked(config: Mapping[str, Any]) -> FrozenConfig:
    """Validate the fields that shape the network and fill in the others' defaults."""
    where = "text encoder config"
    check_sizes(config, _SIZES, where=where)
    if config["hidden_size"] % config["num_attention_heads"]:
        width, heads = config["hidden_size"], config["num_attention_heads"]
        what = f"hidden_size {width} is not a multiple of num_attention_heads {heads}"
        raise LdmPipeError(what, where)
    if config.get("hidden_act") not in _ACTIVATIONS:
        raise LdmPipeError(f"hidden_act is {config.get('hidden_act')!r}, expected one of {sorted(_ACTIVATIONS)}", where)
    for name, default in _DEFAULTS.items():
        value = config.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise LdmPipeError(f"{name} is {value!r:.80}, expected a number", where)
    model_type = config.get("model_type", "clip_text_model")
    architectures = config.get("architectures") or ["CLIPTextModel"]
    if model_type != "clip_text_model" or architectures[0] not in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        raise LdmPipeError(f"model_type {model_type!r}, architectures {architectures} is not a CLIP text model", where)
    return FrozenConfig({**_DEFAULTS, **config, "model_type": model_type, "architectures": list(architectures)})


def _tokenizer_name(component: str) -> str:
    return component.replace("text_encoder", "tokenizer") if component.startswith("text_encoder") else "tokenizer"


def _find_tokenizer(root: Path) -> ClipTokenizer | None:
    for place in (root.parent / _tokenizer_name(root.name), root / "tokenizer", root):
        if (place / "vocab.json").is_file() or (place / "tokenizer.json").is_file():
            return ClipTokenizer.from_pretrained(place)
    return None
