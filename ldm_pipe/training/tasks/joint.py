"""U-Net and text encoder as one network, trained as one.

What enters: noisy latents, times and token ids. What leaves: the prediction, with gradients for both. This file knows
no loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm_pipe.pretrained import LdmPipeError


class JointNet(nn.Module):
    """Encode, then predict (Rombach et al. 2022, arXiv:2112.10752, eq. 3, both networks trained).

    Args:
        unet: the U-Net.
        text_encoder: any of `conditioning`, with its tokenizer.
    """

    def __init__(self, unet: nn.Module, text_encoder: nn.Module) -> None:
        """Hold both."""
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder.requires_grad_(True)

    def forward(self, x_t: Tensor, t: Tensor, *, tokens: Tensor, token_mask: Tensor, **beside: Tensor) -> Tensor:
        """Predict from noisy x.

        Args:
            x_t: noisy latents, shape (B, C, h, w).
            t: network time, shape (B,).
            tokens: token ids, shape (B, L).
            token_mask: True up to the end of the text, shape (B, L).
            beside: further slots of the U-Net: spatial, labels.
        """
        encoder: Any = self.text_encoder
        return self.unet(x_t, t, **encoder.encode_ids(tokens, token_mask).slots(), **beside)


@torch.no_grad()
def token_ids(text_encoder: Any, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Tokenize all texts of a run: ids and mask, (V, L) each.

    Raises: LdmPipeError if there is no tokenizer.
    """
    if text_encoder.tokenizer is None:
        raise LdmPipeError("the text encoder has no tokenizer", "train_text_encoder", "Give its folder one.")
    batch = text_encoder.tokenizer(texts, max_length=text_encoder.max_length)
    return batch.ids, batch.mask
