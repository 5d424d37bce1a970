"""unCLIP's prior: a transformer from the CLIP embedding and the tokens of a caption to the CLIP embedding of a picture.

What enters: a noised embedding x_t, t and the slots of a condition. What leaves: the raw prediction, of x_t's shape.
This file knows neither noise laws nor what the prediction means. Keys and config are those of diffusers'
`PriorTransformer`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe.networks.attention import Attention
from ldm_pipe.networks.layers import ACTIVATIONS, VectorEmbedding, sinusoid
from ldm_pipe.pretrained import FrozenConfig, LdmPipeError, PretrainedModule, check_sizes

DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 32,
    "attention_head_dim": 64,
    "num_layers": 20,
    "embedding_dim": 768,
    "num_embeddings": 77,
    "additional_embeddings": 4,
    "dropout": 0.0,
    "time_embed_act_fn": "silu",
    "norm_in_type": None,
    "embedding_proj_norm_type": None,
    "encoder_hid_proj_type": "linear",
    "added_emb_type": "prd",
    "time_embed_dim": None,
    "embedding_proj_dim": None,
    "clip_embed_dim": None,
}
_WORDS: dict[str, tuple[str | None, ...]] = {
    "time_embed_act_fn": tuple(ACTIVATIONS),
    "norm_in_type": (None, "layer"),
    "embedding_proj_norm_type": (None, "layer"),
    "encoder_hid_proj_type": (None, "linear"),
    "added_emb_type": (None, "prd"),
}
_SIZES = dict.fromkeys(("num_attention_heads", "attention_head_dim", "embedding_dim", "num_embeddings"), 1 << 20)
_SIZES |= {"num_layers": 256}
_WIDTHS = dict.fromkeys(("time_embed_dim", "embedding_proj_dim", "clip_embed_dim"), 1 << 20)  # None: another part's


class PriorBlock(nn.Module):
    """Self-attention, then two layers with a GELU between; each after a norm and added to its input."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        """Build both parts; names are those that diffusers stores."""
        super().__init__()
        self.norm1, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn1 = Attention(dim, num_heads, None, upcast=False, bias=True)
        self.dropout = nn.Dropout(dropout)
        self.ff = nn.Module()
        first = nn.Module()
        first.proj = nn.Linear(dim, 4 * dim)
        self.ff.net = nn.ModuleList([first, nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Map (B, L, D) to (B, L, D); bias on the attention scores, (B, 1, L, L)."""
        x = x + self.dropout(self.attn1(self.norm1(x), None, bias))
        first, _, second = self.ff.net  # type: ignore[misc]
        return x + second(self.dropout(F.gelu(first.proj(self.norm3(x)))))


class PriorTransformer(PretrainedModule):
    """Predict the CLIP embedding of a picture from a caption (Ramesh et al. 2022, arXiv:2204.06125, section 2.2).

    The sequence is: the caption's tokens, its embedding, t, x_t, and one token whose output is the prediction. Every
    token looks at itself and those before it. Kandinsky's prior is the same network; Shap-E's differs by config values,
    which are read too.

    Args:
        config: fields of diffusers' `PriorTransformer`; unknown ones are kept.
    """

    class_name = "PriorTransformer"

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Build the network with random weights."""
        super().__init__()
        self.config = c = _checked(config)
        width, dim = c.num_attention_heads * c.attention_head_dim, c.embedding_dim
        proj_dim, out_dim = c.embedding_proj_dim or dim, c.clip_embed_dim or dim
        self.time_embedding = VectorEmbedding(width, width, c.time_embed_act_fn, hidden=c.time_embed_dim)
        self.proj_in = nn.Linear(dim, width)
        self.embedding_proj_norm = nn.LayerNorm(proj_dim) if c.embedding_proj_norm_type else None
        self.embedding_proj = nn.Linear(proj_dim, width)
        self.encoder_hidden_states_proj = nn.Linear(dim, width) if c.encoder_hid_proj_type else None
        self.positional_embedding = nn.Parameter(torch.zeros(1, c.num_embeddings + c.additional_embeddings, width))
        self.prd_embedding = nn.Parameter(torch.zeros(1, 1, width)) if c.added_emb_type else None
        self.transformer_blocks = nn.ModuleList(
            PriorBlock(width, c.num_attention_heads, c.dropout) for _ in range(c.num_layers)
        )
        self.norm_in = nn.LayerNorm(width) if c.norm_in_type else None
        self.norm_out = nn.LayerNorm(width)
        self.proj_to_clip_embeddings = nn.Linear(width, out_dim)
        self.clip_mean, self.clip_std = nn.Parameter(torch.zeros(1, out_dim)), nn.Parameter(torch.ones(1, out_dim))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PriorTransformer:
        """Build from diffusers' config with random weights.

        Raises: LdmPipeError naming the field and value that cannot be represented.
        """
        return cls(config)

    def denormalise(self, x0: Tensor) -> Tensor:
        """Return CLIP embeddings (B, P) from what is diffused, which has mean 0 and deviation 1."""
        return x0 * self.clip_std.to(x0) + self.clip_mean.to(x0)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor | float,
        *,
        tokens: Tensor | None = None,
        token_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        spatial: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Run the network once.

        Args:
            x_t: noised embeddings, shape (B, P), or several of each sample, (B, N, P).
            t: network time, a number or one per sample, (B,).
            tokens: of the caption, shape (B, L, D).
            token_mask: True where a token may be looked at, shape (B, L). Without one nothing is hidden, not even what
                comes after a token, as in diffusers.
            pooled: embedding of the caption, shape (B, P).
            spatial, labels: not read.

        Returns: shape of x_t.

        Raises: LdmPipeError for a slot that is missing, not read, or of another shape.
        """
        batch = len(x_t)
        tokens = self._check(tokens, pooled, spatial, labels)
        assert pooled is not None
        times = torch.as_tensor(t, device=x_t.device).reshape(-1)
        frequencies = sinusoid(times, self.norm_out.normalized_shape[0], flip_sin_to_cos=True, freq_shift=0)
        embedded = self.time_embedding(frequencies.to(x_t.dtype)).expand(batch, -1)
        caption = pooled.to(x_t.dtype)
        caption = caption if self.embedding_proj_norm is None else self.embedding_proj_norm(caption)
        parts = [] if tokens is None else [tokens.to(x_t.dtype)]
        parts += [self.embedding_proj(caption)[:, None], embedded[:, None]]
        num_before = sum(part.shape[1] for part in parts)
        parts.append(self.proj_in(x_t if x_t.ndim == 3 else x_t[:, None]))
        if self.prd_embedding is not None:
            parts.append(self.prd_embedding.to(x_t.dtype).expand(batch, -1, -1))
        x = self._place(torch.cat(parts, dim=1), num_before)  # (B, L + N + 3, D)
        bias = None if token_mask is None else self._bias(token_mask, x)
        x = x if self.norm_in is None else self.norm_in(x)
        for block in self.transformer_blocks:
            x = block(x, bias)
        x = self.norm_out(x)
        x = x[:, num_before:] if self.prd_embedding is None else x[:, -1:]
        return self.proj_to_clip_embeddings(x if x_t.ndim == 3 else x[:, 0])

    def _check(
        self, tokens: Tensor | None, pooled: Tensor | None, spatial: Tensor | None, labels: Tensor | None
    ) -> Tensor | None:
        """Check the slots, and return the projected tokens."""
        if spatial is not None or labels is not None:
            raise LdmPipeError("the prior reads neither maps nor labels", "PriorTransformer", "Leave them out.")
        width = self.embedding_proj.in_features
        if pooled is None or pooled.ndim != 2 or pooled.shape[1] != width:
            found = None if pooled is None else tuple(pooled.shape)
            raise LdmPipeError(f"pooled is {found}", "PriorTransformer", f"Give the caption's embedding (B, {width}).")
        project = self.encoder_hidden_states_proj
        wanted = self.norm_out.normalized_shape[0] if project is None else project.in_features
        if (tokens is None and project is not None) or (tokens is not None and tokens.shape[-1] != wanted):
            found = None if tokens is None else tuple(tokens.shape)
            raise LdmPipeError(
                f"tokens are {found}", "PriorTransformer", f"Give those of the caption, (B, L, {wanted})."
            )
        return tokens if tokens is None or project is None else project(tokens.to(project.weight.dtype))

    def _place(self, x: Tensor, num_before: int) -> Tensor:
        """Add positions, which some models know of x_t only."""
        places = self.positional_embedding.to(x.dtype)
        if places.shape[1] < x.shape[1]:
            places = F.pad(places, (0, 0, num_before, 0 if self.prd_embedding is None else 1))
        if places.shape[1] != x.shape[1]:
            what = f"{x.shape[1]} tokens in all for {self.positional_embedding.shape[1]} positions"
            raise LdmPipeError(what, "PriorTransformer", f"Give {self.config.num_embeddings} tokens of the caption.")
        return x + places

    def _bias(self, token_mask: Tensor, x: Tensor) -> Tensor:
        """Hide masked tokens and what comes after each: (B, 1, L, L), with diffusers' -10000 for each reason."""
        length = x.shape[1]
        if token_mask.shape != (len(x), length - self.config.additional_embeddings):
            what = f"token_mask is {tuple(token_mask.shape)} beside {length} tokens in all"
            advice = f"Give (B, {length - self.config.additional_embeddings})."
            raise LdmPipeError(what, "PriorTransformer", advice)
        hidden = F.pad(1 - token_mask.to(x.dtype), (0, self.config.additional_embeddings))[:, None, None, :]
        after = torch.ones(length, length, dtype=x.dtype, device=x.device).triu(1)
        return (hidden + after) * -10000.0


def _checked(config: Mapping[str, Any]) -> FrozenConfig:
    """Fill in diffusers' defaults and refuse what the network cannot represent."""
    full, where = {**DEFAULTS, **config}, "PriorTransformer config"
    for name, allowed in _WORDS.items():
        if full[name] not in allowed:
            raise LdmPipeError(f"{name} is {full[name]!r:.80}", where, f"Allowed: {', '.join(map(str, allowed))}.")
    check_sizes(full, _SIZES, where=where)
    check_sizes(full, _WIDTHS, where=where, required=False)
    more = full["additional_embeddings"]
    if isinstance(more, bool) or not isinstance(more, int) or not 0 <= more <= 1 << 20:
        raise LdmPipeError(f"additional_embeddings is {more!r:.80}", where, "Allowed: a whole number from 0.")
    rate = full["dropout"]
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not math.isfinite(rate) or not 0 <= rate < 1:
        raise LdmPipeError(f"dropout is {rate!r:.80}", where, "Allowed: a number from 0 to below 1.")
    return FrozenConfig(full)
