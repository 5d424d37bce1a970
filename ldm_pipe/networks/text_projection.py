"""What unCLIP's decoder is told: CLIP embeddings become further tokens, and a vector beside the embedding of t.

What enters: embeddings of a picture and of its caption, and the caption's tokens. What leaves: tokens and a vector of
the U-Net's widths. Keys and config are those of diffusers' `UnCLIPTextProjModel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm_pipe.pretrained import FrozenConfig, LdmPipeError, PretrainedModule, check_sizes

DEFAULTS = {"clip_extra_context_tokens": 4, "clip_embeddings_dim": 768}
_SIZES = dict.fromkeys((*DEFAULTS, "time_embed_dim", "cross_attention_dim"), 1 << 20)


class UnCLIPTextProjModel(PretrainedModule):
    """Project CLIP embeddings for the decoder (Ramesh et al. 2022, arXiv:2204.06125, section 2.1).

    Args:
        config: fields of diffusers' `UnCLIPTextProjModel`; unknown ones are kept.
    """

    class_name = "UnCLIPTextProjModel"

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Build the projections with random weights."""
        super().__init__()
        self.config = c = _checked(config)
        width, time_dim, token_dim = c.clip_embeddings_dim, c.time_embed_dim, c.cross_attention_dim
        self.learned_classifier_free_guidance_embeddings = nn.Parameter(torch.zeros(width))
        self.embedding_proj = nn.Linear(width, time_dim)
        self.clip_image_embeddings_project_to_time_embeddings = nn.Linear(width, time_dim)
        self.clip_extra_context_tokens_proj = nn.Linear(width, c.clip_extra_context_tokens * token_dim)
        self.encoder_hidden_states_proj = nn.Linear(width, token_dim)
        self.text_encoder_hidden_states_norm = nn.LayerNorm(token_dim)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> UnCLIPTextProjModel:
        """Build from diffusers' config with random weights.

        Raises: LdmPipeError naming the field and value that cannot be represented.
        """
        return cls(config)

    def forward(self, image: Tensor | None, caption: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Project one batch.

        Args:
            image: embeddings of pictures, shape (B, P); None: the learnt one that stands for none, as guidance needs.
            caption: embeddings of captions, shape (B, P).
            tokens: of the captions, shape (B, L, P).
        Returns: tokens (B, K + L, D), the K of the picture first, and the vector (B, E).
        Raises: LdmPipeError for another width.
        """
        if image is None:
            image = self.learned_classifier_free_guidance_embeddings.expand(len(caption), -1)
        for name, value in (("image", image), ("caption", caption), ("tokens", tokens)):
            if value.shape[-1] != self.config.clip_embeddings_dim or len(value) != len(caption):
                what = f"{name} has shape {tuple(value.shape)}, the caption {tuple(caption.shape)}"
                advice = f"Give rows of width {self.config.clip_embeddings_dim}."
                raise LdmPipeError(what, "UnCLIPTextProjModel", advice)
        vector = self.clip_image_embeddings_project_to_time_embeddings(image) + self.embedding_proj(caption)
        further = self.clip_extra_context_tokens_proj(image)  # (B, D K), the token's number running fastest
        further = further.unflatten(1, (-1, self.config.clip_extra_context_tokens)).transpose(1, 2)  # (B, K, D)
        own = self.text_encoder_hidden_states_norm(self.encoder_hidden_states_proj(tokens))
        return torch.cat([further, own], dim=1), vector


def _checked(config: Mapping[str, Any]) -> FrozenConfig:
    full = {**DEFAULTS, **config}
    check_sizes(full, _SIZES, where="UnCLIPTextProjModel config")
    return FrozenConfig(full)
