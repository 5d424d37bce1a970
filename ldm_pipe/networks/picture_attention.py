"""Attention among a picture's positions, where ADM, LDM without text, IF and Karlo have it instead of transformers.

What enters: features (B, C, h, w), and tokens where they are read. What leaves: features of the same shape, or a
vector pooled from tokens. Attribute names are those that diffusers stores.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe.networks.attention import Attend, attend_sdpa
from ldm_pipe.networks.kept import Kept
from ldm_pipe.networks.layers import GroupNorm


class PictureAttention(nn.Module):
    """Let every position look at every other one, and at tokens beside them (Dhariwal & Nichol 2021, arXiv:2105.05233).

    Keys and values of the tokens are joined to those of the positions; a token mask holds for the tokens only.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        *,
        num_groups: int,
        eps: float = 1e-5,
        scale_factor: float = 1.0,
        token_dim: int = 0,
        token_groups: int = 0,
        only_tokens: bool = False,
    ) -> None:
        """Build the projections.

        Args:
            num_groups: of the norm before them; 0: no norm.
            scale_factor: what the sum with the input is divided by.
            token_dim: width of the tokens; 0: none are read.
            token_groups: of a norm of the tokens, over groups of channels and all tokens; 0: no norm.
            only_tokens: positions do not look at each other.
        """
        super().__init__()
        self.num_heads, self.scale_factor = num_heads, scale_factor
        self.attend: Attend = attend_sdpa
        self.group_norm = GroupNorm(num_groups, channels, eps=eps) if num_groups else None
        self.to_q = nn.Linear(channels, channels)
        self.to_k = None if only_tokens else nn.Linear(channels, channels)
        self.to_v = None if only_tokens else nn.Linear(channels, channels)
        self.norm_cross = nn.GroupNorm(token_groups, token_dim) if token_groups else None
        self.add_k_proj = nn.Linear(token_dim, channels) if token_dim else None
        self.add_v_proj = nn.Linear(token_dim, channels) if token_dim else None
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def _of_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Project tokens (B, L, D) to keys and values (B, L, C)."""
        assert self.add_k_proj is not None
        assert self.add_v_proj is not None
        if self.norm_cross is not None:
            tokens = self.norm_cross(tokens.transpose(1, 2)).transpose(1, 2)
        return self.add_k_proj(tokens), self.add_v_proj(tokens)

    def forward(self, x: Tensor, kept: Kept | None, bias: Tensor | None) -> Tensor:
        """Map features (B, C, h, w) to the same shape."""
        batch, channels, height, width = x.shape
        h = x if self.group_norm is None else self.group_norm(x)
        h = h.permute(0, 2, 3, 1).reshape(batch, height * width, channels)  # (B, hw, C)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        if self.add_k_proj is not None:
            assert kept is not None
            key, value = kept.once(self, lambda: self._of_tokens(kept.tokens))
            keys.append(key)
            values.append(value)
        if self.to_k is not None and self.to_v is not None:
            keys.append(self.to_k(h))
            values.append(self.to_v(h))
            if bias is not None:
                bias = F.pad(bias, (0, height * width))
        q, k, v = (
            part.reshape(batch, part.shape[1], self.num_heads, -1)
            for part in (self.to_q(h), torch.cat(keys, dim=1), torch.cat(values, dim=1))
        )
        out = self.attend(q, k, v, bias if self.add_k_proj is not None else None)
        out = self.to_out[0](out.reshape(batch, height * width, channels))
        x = x + out.view(batch, height, width, channels).permute(0, 3, 1, 2)
        return x if self.scale_factor == 1.0 else x / self.scale_factor


class _Pooling(nn.Module):
    """One query, the mean of the tokens, looks at itself and all tokens (CLIP's, Radford et al. 2021, section 2.4)."""

    def __init__(self, width: int, num_heads: int) -> None:
        """Build three projections and what is added to the mean."""
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.empty(1, width))
        nn.init.normal_(self.positional_embedding, std=width**-0.5)
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, L, D) to (B, D)."""
        first = tokens.mean(dim=1, keepdim=True) + self.positional_embedding
        tokens = torch.cat([first, tokens], dim=1)  # (B, 1 + L, D)
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1))
            for part in (self.q_proj(first), self.k_proj(tokens), self.v_proj(tokens))
        )
        return attend_sdpa(q, k, v, None).flatten(1)


class PooledTokens(nn.Module):
    """Make a vector of the embedding's width from the tokens (IF); padding is pooled as well, as there."""

    def __init__(self, width: int, out_dim: int, num_heads: int) -> None:
        """Build norm, pooling, projection, norm."""
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.pool = _Pooling(width, num_heads)
        self.proj = nn.Linear(width, out_dim)
        self.norm2 = nn.LayerNorm(out_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, L, D) to (B, E)."""
        return self.norm2(self.proj(self.pool(self.norm1(tokens))))
