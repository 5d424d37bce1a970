"""What a U-Net is made of: a list of levels in which every quantity is spelled out.

What enters and leaves: plain numbers and words. This file knows no tensors and no file format (that is `config.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# "transformer": blocks of self-attention, attention to tokens, feed-forward (Stable Diffusion); "picture": positions to
# each other (ADM, LDM without text); "joint": to each other and to the tokens at once (IF, Karlo)
AttentionKind = Literal["none", "transformer", "picture", "joint"]
Resampling = Literal["conv", "conv_asymmetric", "residual"]
MidKind = Literal["none", "residual", "two_residual", "transformer", "picture", "joint"]
ClassEmbedding = Literal["none", "table", "timestep", "identity", "projection", "simple_projection"]


@dataclass(frozen=True)
class LevelSpec:
    """One resolution: `num_residual` blocks on the way down and one more on the way up.

    `down_depths` and `up_depths` hold the number of transformer blocks after each residual block. `num_heads` and
    `cross_dim` are 0 where nothing reads them.
    """

    channels: int
    num_residual: int
    down_attention: AttentionKind
    up_attention: AttentionKind
    down_depths: tuple[int, ...]
    up_depths: tuple[int, ...]
    num_heads: int
    cross_dim: int
    only_cross: bool
    down_resampling: Resampling
    up_resampling: Resampling


@dataclass(frozen=True)
class MidSpec:
    """The blocks at the lowest resolution; residual sums there are divided by `scale_factor`."""

    kind: MidKind
    depth: int
    num_heads: int
    cross_dim: int
    scale_factor: float
    only_cross: bool = False
    attention_groups: int = 0  # of the norm before attention among positions; 0: no norm


@dataclass(frozen=True)
class EmbeddingSpec:
    """What is added to the embedding of t, and how t itself is embedded."""

    time_dim: int
    flip_sin_to_cos: bool
    freq_shift: float
    last_activation: str | None
    class_kind: ClassEmbedding
    num_classes: int
    vector_dim: int  # width of the pooled vector (with the embedded numbers, for text_time); 0: none
    concat_class: bool
    number_dim: int  # text_time: width of the sinusoid of each number in `labels`; 0: none
    pool_heads: int = 0  # heads of the attention that pools the tokens into a vector; 0: none
    sinusoid_dim: int = 0  # width of the sinusoid of t; 0: that of the first level


@dataclass(frozen=True)
class UNetSpec:
    """A whole U-Net, highest resolution first."""

    in_channels: int
    out_channels: int
    levels: tuple[LevelSpec, ...]
    mid: MidSpec
    embedding: EmbeddingSpec
    activation: str
    num_groups: int
    norm_eps: float
    dropout: float
    linear_projection: bool
    upcast_attention: bool
    center_input: bool
    in_kernel: int
    out_kernel: int
    token_dim: int  # width of the tokens before a first projection; 0: no such projection
    scale_shift: bool = False  # the embedding scales and shifts the second norm of a residual block
    bare_embedding: bool = False  # residual blocks project the embedding without an activation
    residual_scale: float = 1.0  # residual sums outside the mid block are divided by it
    norm_tokens: bool = False  # "joint" attention normalises the tokens first

    @property
    def reads_tokens(self) -> bool:
        """Tell whether any part looks at tokens."""
        used = {kind for level in self.levels for kind in (level.down_attention, level.up_attention)} | {self.mid.kind}
        return bool(used & {"transformer", "joint"}) or self.embedding.pool_heads > 0
