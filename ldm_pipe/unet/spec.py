"""What a U-Net is made of: a list of levels in which every quantity is spelled out.

What enters and leaves: plain numbers and words. This file knows no tensors and no file format (that is `config.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

AttentionKind = Literal["none", "transformer"]
Resampling = Literal["conv", "conv_asymmetric"]
MidKind = Literal["none", "residual", "transformer"]
ClassEmbedding = Literal["none", "table", "timestep", "identity", "projection", "simple_projection"]


@dataclass(frozen=True)
class LevelSpec:
    """One resolution: `num_residual` blocks on the way down and one more on the way up.

    `down_depths` and `up_depths` hold the number of transformer blocks after each residual block.
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


@dataclass(frozen=True)
class MidSpec:
    """The blocks at the lowest resolution; residual sums there are divided by `scale_factor`."""

    kind: MidKind
    depth: int
    num_heads: int
    cross_dim: int
    scale_factor: float


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
    resampling: Resampling
    center_input: bool
    in_kernel: int
    out_kernel: int
    token_dim: int  # width of the tokens before a first projection; 0: no such projection
