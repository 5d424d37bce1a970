"""The time-conditioned cross-attention U-Net, driven by a list of levels.

What enters: x_t, t and the slots of a condition. What leaves: the raw prediction, of x_t's height and width. This file
knows neither noise schedules nor what the prediction means (that is `denoiser.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm_pipe.networks.attention import Attention, SpatialTransformer, choose_attention, mask_to_bias
from ldm_pipe.networks.config import DEFAULTS, NORM_TOKENS_GROUPS, read_config, write_config
from ldm_pipe.networks.config_2d import DEFAULTS_2D, OWN_CLASS_2D, OWN_DEFAULTS_2D, read_config_2d
from ldm_pipe.networks.fields import refuse
from ldm_pipe.networks.kept import Kept
from ldm_pipe.networks.layers import (
    ACTIVATIONS,
    Downsample,
    GroupNorm,
    ResidualBlock,
    Upsample,
    VectorEmbedding,
    sinusoid,
)
from ldm_pipe.networks.picture_attention import PictureAttention, PooledTokens
from ldm_pipe.networks.spec import AttentionKind, EmbeddingSpec, LevelSpec, UNetSpec
from ldm_pipe.pretrained import FrozenConfig, LdmPipeError, PretrainedModule


class Stage(nn.Module):
    """Residual blocks, a transformer after each where there are any, and a change of resolution at the end.

    One class for the way down, the middle and the way up; attribute names are those that diffusers stores.
    """

    def __init__(
        self,
        direction: Literal["down", "mid", "up"],
        resnets: list[ResidualBlock],
        attentions: Sequence[SpatialTransformer | PictureAttention],
        resampler: Downsample | Upsample | ResidualBlock | None = None,
    ) -> None:
        """Hold the parts; absent kinds leave no key."""
        super().__init__()
        self.direction, self.checkpointing = direction, False
        self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)
        self.downsamplers = nn.ModuleList([resampler] if resampler is not None and direction == "down" else [])
        self.upsamplers = nn.ModuleList([resampler] if resampler is not None and direction == "up" else [])

    def _run(self, module: nn.Module, *args: Tensor | Kept | None) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(module, *args, use_reentrant=False))
        return cast(Tensor, module(*args))

    def forward(self, x: Tensor, emb: Tensor, kept: Kept | None, bias: Tensor | None, skips: list[Tensor]) -> Tensor:
        """Map features; the way down appends what it leaves to `skips`, the way up takes it from there."""
        for i, resnet in enumerate(self.resnets):
            if self.direction == "up":
                x = torch.cat([x, skips.pop()], dim=1)
            x = self._run(resnet, x, emb)
            if i < len(self.attentions):
                x = self._run(self.attentions[i], x, kept, bias)
            if self.direction == "down":
                skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x, emb) if isinstance(downsampler, ResidualBlock) else downsampler(x)
            skips.append(x)
        for upsampler in self.upsamplers:
            size = (skips[-1].shape[-2], skips[-1].shape[-1])
            x = upsampler(x, emb, size) if isinstance(upsampler, ResidualBlock) else upsampler(x, size, kept)
        return x


def _residual(
    spec: UNetSpec,
    in_channels: int,
    out_channels: int,
    *,
    scale_factor: float | None = None,
    resample: Literal["down", "up"] | None = None,
) -> ResidualBlock:
    emb = spec.embedding
    return ResidualBlock(
        in_channels,
        out_channels,
        emb.time_dim * (2 if emb.concat_class else 1),
        num_groups=spec.num_groups,
        eps=spec.norm_eps,
        activation=spec.activation,
        dropout=spec.dropout,
        scale_factor=spec.residual_scale if scale_factor is None else scale_factor,
        scale_shift=spec.scale_shift,
        resample=resample,
    )


def _attentions(
    spec: UNetSpec, level: LevelSpec, kind: AttentionKind, depths: tuple[int, ...]
) -> Sequence[SpatialTransformer | PictureAttention]:
    """Build what follows the residual blocks of a level, one for each depth."""
    match kind:
        case "none":
            return []
        case "transformer":
            return _transformers(spec, level, depths)
        case "picture":
            groups, eps = spec.num_groups, spec.norm_eps
            return [PictureAttention(level.channels, level.num_heads, num_groups=groups, eps=eps) for _ in depths]
        case "joint":
            return [_joint(spec, level.channels, level.num_heads, level.cross_dim, level.only_cross) for _ in depths]


def _joint(spec: UNetSpec, channels: int, num_heads: int, token_dim: int, only_cross: bool) -> PictureAttention:
    tokens = {"token_dim": token_dim, "token_groups": NORM_TOKENS_GROUPS if spec.norm_tokens else 0}
    return PictureAttention(channels, num_heads, num_groups=spec.num_groups, only_tokens=only_cross, **tokens)


def _transformers(spec: UNetSpec, level: LevelSpec, depths: tuple[int, ...]) -> list[SpatialTransformer]:
    return [
        SpatialTransformer(
            level.channels,
            level.num_heads,
            depth,
            level.cross_dim,
            num_groups=spec.num_groups,
            linear=spec.linear_projection,
            only_cross=level.only_cross,
            upcast=spec.upcast_attention,
        )
        for depth in depths
    ]


def down_stage(spec: UNetSpec, index: int) -> Stage:
    """Build the way down at a level."""
    level = spec.levels[index]
    before = spec.levels[max(index - 1, 0)].channels
    resnets = [_residual(spec, before if i == 0 else level.channels, level.channels) for i in range(level.num_residual)]
    attentions = _attentions(spec, level, level.down_attention, level.down_depths)
    if index == len(spec.levels) - 1:
        return Stage("down", resnets, attentions)
    if level.down_resampling == "residual":
        return Stage("down", resnets, attentions, _residual(spec, level.channels, level.channels, resample="down"))
    down = Downsample(level.channels, asymmetric=level.down_resampling == "conv_asymmetric")
    return Stage("down", resnets, attentions, down)


def mid_stage(spec: UNetSpec) -> Stage:
    """Build what lies between the two ways."""
    channels, mid = spec.levels[-1].channels, spec.mid
    count = 1 if mid.kind == "residual" else 2
    resnets = [_residual(spec, channels, channels, scale_factor=mid.scale_factor) for _ in range(count)]
    attentions: list[SpatialTransformer | PictureAttention] = []
    match mid.kind:
        case "transformer":
            level = replace(spec.levels[-1], num_heads=mid.num_heads, cross_dim=mid.cross_dim, only_cross=False)
            attentions += _transformers(spec, level, (mid.depth,))
        case "joint":
            attentions.append(_joint(spec, channels, mid.num_heads, mid.cross_dim, mid.only_cross))
        case "picture":
            norm = {"num_groups": mid.attention_groups, "eps": spec.norm_eps}
            attentions.append(PictureAttention(channels, mid.num_heads, scale_factor=mid.scale_factor, **norm))
    return Stage("mid", resnets, attentions)


def _up_stage(spec: UNetSpec, index: int) -> Stage:
    """Build the way up at a level; each block also reads one feature map that was left on the way down."""
    level = spec.levels[index]
    below = spec.levels[min(index + 1, len(spec.levels) - 1)].channels
    above = spec.levels[max(index - 1, 0)].channels
    count = level.num_residual + 1
    resnets = []
    for i in range(count):
        from_below = below if i == 0 else level.channels
        from_down = above if i == count - 1 else level.channels
        resnets.append(_residual(spec, from_below + from_down, level.channels))
    attentions = _attentions(spec, level, level.up_attention, level.up_depths)
    if index == 0:
        return Stage("up", resnets, attentions)
    if level.up_resampling == "residual":
        return Stage("up", resnets, attentions, _residual(spec, level.channels, level.channels, resample="up"))
    return Stage("up", resnets, attentions, Upsample(level.channels))


def _class_embedding(emb: EmbeddingSpec, sinusoid_dim: int, activation: str) -> nn.Module | None:
    match emb.class_kind:
        case "none":
            return None
        case "table":
            return nn.Embedding(emb.num_classes, emb.time_dim)
        case "timestep":
            return VectorEmbedding(sinusoid_dim, emb.time_dim, activation)
        case "identity":
            return nn.Identity()
        case "projection":
            return VectorEmbedding(emb.vector_dim, emb.time_dim)
        case "simple_projection":
            return nn.Linear(emb.vector_dim, emb.time_dim)


def _defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    match config.get("_class_name"):
        case "UNet2DModel":
            return DEFAULTS_2D
        case name if name == OWN_CLASS_2D:
            return {**DEFAULTS_2D, **OWN_DEFAULTS_2D}
        case _:
            return DEFAULTS


def _needed(slot: Tensor | None, name: str, reason: str) -> Tensor:
    if slot is None:
        raise LdmPipeError(f"{name} is missing", "U-Net", f"This network reads it ({reason}).")
    return slot


class UNet(PretrainedModule):
    """Predict noise (or x0, or v) from x_t, t and a condition (Rombach et al. 2022, arXiv:2112.10752).

    Keys, attribute names and config are those of diffusers' `UNet2DConditionModel`, or of its `UNet2DModel` where
    nothing reads tokens and the config says so.
    """

    class_name = "UNet2DConditionModel"
    other_class_names = ("UNet2DModel", OWN_CLASS_2D)

    def __init__(self, spec: UNetSpec, config: Mapping[str, Any] | None = None) -> None:
        """Build the network with random weights.

        Args:
            spec: the levels and everything else.
            config: what `.config` shall show (unknown fields included); None writes it from the spec.
        """
        super().__init__()
        self.spec = spec
        config = write_config(spec) if config is None else config
        self.config = FrozenConfig({**_defaults(config), **config})
        first, emb = spec.levels[0].channels, spec.embedding
        self.conv_in = nn.Conv2d(spec.in_channels, first, spec.in_kernel, padding=(spec.in_kernel - 1) // 2)
        self.time_embedding = VectorEmbedding(emb.sinusoid_dim or first, emb.time_dim, spec.activation)
        if spec.token_dim:
            self.encoder_hid_proj = nn.Linear(spec.token_dim, spec.levels[0].cross_dim)
        self.class_embedding = _class_embedding(emb, emb.sinusoid_dim or first, spec.activation)
        if emb.number_dim:
            self.add_embedding: nn.Module = VectorEmbedding(emb.vector_dim, emb.time_dim)
        elif emb.pool_heads:
            width = spec.token_dim or spec.levels[0].cross_dim
            self.add_embedding = PooledTokens(width, emb.time_dim, emb.pool_heads)
        indices = range(len(spec.levels))
        self.down_blocks = nn.ModuleList(down_stage(spec, i) for i in indices)
        self.mid_block = None if spec.mid.kind == "none" else mid_stage(spec)
        self.up_blocks = nn.ModuleList(_up_stage(spec, i) for i in reversed(indices))
        self.conv_norm_out = GroupNorm(spec.num_groups, first, eps=spec.norm_eps)
        self.conv_out = nn.Conv2d(first, spec.out_channels, spec.out_kernel, padding=(spec.out_kernel - 1) // 2)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> UNet:
        """Build from diffusers' config with random weights; unknown fields are kept in `.config`.

        Raises: LdmPipeError naming the field and value that cannot be represented.
        """
        written = config.get("_class_name", cls.class_name)
        if written not in (cls.class_name, *cls.other_class_names):
            raise refuse("_class_name", written, ", ".join((cls.class_name, *cls.other_class_names)))
        return cls(read_config(config) if written == cls.class_name else read_config_2d(config), config)

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Save memory in training: blocks are computed again on the way back (Chen et al. 2016, arXiv:1604.06174)."""
        for stage in self.modules():
            if isinstance(stage, Stage):
                stage.checkpointing = enabled

    def set_attention(self, name: str) -> None:
        """Choose the attention kernel: "sdpa" (torch's own) or "xformers".

        Raises: LdmPipeError with the reason, where xformers has no operator that runs for these weights.
        """
        modules = [module for module in self.modules() if isinstance(module, (Attention, PictureAttention))]
        for module in modules:
            head_dim = module.to_q.out_features // module.num_heads
            module.attend = choose_attention(name, device=self.device, dtype=self.dtype, head_dim=head_dim)

    def _embed(
        self, x: Tensor, t: Tensor | float, pooled: Tensor | None, labels: Tensor | None, kept: Kept | None
    ) -> Tensor:
        """Embed t, and what is added to it: (B, E)."""
        spec = self.spec.embedding
        dim = spec.sinusoid_dim or self.spec.levels[0].channels
        t = torch.as_tensor(t, device=x.device).reshape(-1)  # one row for all, where t is one for all
        frequencies = {"flip_sin_to_cos": spec.flip_sin_to_cos, "freq_shift": spec.freq_shift}
        emb = self.time_embedding(sinusoid(t, dim, **frequencies).to(x.dtype))
        if self.class_embedding is not None:
            if spec.class_kind in ("table", "timestep"):
                given = _needed(labels, "labels", f"class_embed_type {spec.class_kind!r}")
                if spec.class_kind == "timestep":
                    given = sinusoid(given, dim, **frequencies).to(x.dtype)
            else:
                given = _needed(pooled, "pooled", f"class_embed_type {spec.class_kind!r}").to(x.dtype)
            extra = self.class_embedding(given)
            emb = torch.cat([emb.expand_as(extra), extra], dim=-1) if spec.concat_class else emb + extra
        if spec.pool_heads and kept is not None:
            emb = emb + kept.once(self.add_embedding, lambda: self.add_embedding(kept.given))
        elif spec.number_dim:
            vector = _needed(pooled, "pooled", "addition_embed_type 'text_time'")
            numbers = sinusoid(
                _needed(labels, "labels", "addition_embed_type 'text_time'"), spec.number_dim, **frequencies
            )
            emb = emb + self.add_embedding(torch.cat([vector, numbers.flatten(1).to(vector.dtype)], dim=-1).to(x.dtype))
        return emb if spec.last_activation is None else ACTIVATIONS[spec.last_activation](emb)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor | float,
        *,
        tokens: Tensor | Kept | None = None,
        token_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        spatial: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Predict from noisy x.

        Args:
            x_t: noisy latents, shape (B, C, h, w).
            t: network time, shape () or (B,).
            tokens: shape (B, L, D), or what `keep_tokens` made of them; needed by every level with attention.
            token_mask: shape (B, L), true or 1 = keep.
            pooled: shape (B, P); read by SDXL kinds and by class_embed_type "projection" kinds, else not looked at.
            spatial: joined to x_t along the channels, shape (B, K, h, w), C + K = in_channels.
            labels: class numbers or noise levels (B,), or SDXL's six sizes (B, 6).
        Returns: shape (B, out_channels, h, w).
        Raises: LdmPipeError if a slot that this network reads is missing or of the wrong width.
        """
        x = x_t if spatial is None else torch.cat([x_t, spatial.to(x_t.dtype)], dim=1)
        if x.shape[1] != self.spec.in_channels:
            parts = f"{x_t.shape[1]} channels of x_t and {0 if spatial is None else spatial.shape[1]} of spatial"
            what = f"{parts}, expected {self.spec.in_channels} together (in_channels)"
            raise LdmPipeError(what, "U-Net", "An inpainting or depth U-Net needs `spatial`; others take none.")
        if self.spec.center_input:
            x = 2.0 * x - 1.0
        if labels is not None and self.class_embedding is None and not self.spec.embedding.number_dim:
            raise LdmPipeError("labels were given, but this U-Net reads none", "U-Net", "Leave labels out.")
        kept, bias = self._prepare_tokens(tokens, token_mask)
        emb = self._embed(x, t, pooled, labels, kept)
        if not self.spec.bare_embedding:
            emb = ACTIVATIONS[self.spec.activation](emb)  # every residual block starts so
        x = self.conv_in(x)
        skips = [x]
        for stage in self.down_blocks:
            x = stage(x, emb, kept, bias, skips)
        if self.mid_block is not None:
            x = self.mid_block(x, emb, kept, bias, skips)
        for stage in self.up_blocks:
            x = stage(x, emb, kept, bias, skips)
        return self.conv_out(ACTIVATIONS[self.spec.activation](self.conv_norm_out(x)))

    def keep_tokens(self, tokens: Tensor) -> Kept:
        """Take the tokens (B, L, D) of many evaluations with the same weights: what these share is computed once."""
        return Kept(self._project_tokens(tokens), keep=True, given=tokens)

    def _project_tokens(self, tokens: Tensor) -> Tensor:
        width = self.spec.token_dim or self.spec.levels[0].cross_dim
        if not width:
            raise LdmPipeError("tokens were given, but this U-Net reads none", "U-Net", "Leave tokens out.")
        if tokens.ndim != 3 or tokens.shape[-1] != width:
            what = f"tokens of shape {tuple(tokens.shape)}, expected (B, L, {width})"
            raise LdmPipeError(what, "U-Net", "Use the text encoder that this U-Net was trained with.")
        return self.encoder_hid_proj(tokens) if self.spec.token_dim else tokens

    def _prepare_tokens(
        self, tokens: Tensor | Kept | None, token_mask: Tensor | None
    ) -> tuple[Kept | None, Tensor | None]:
        if tokens is None:
            if self.spec.reads_tokens:
                raise LdmPipeError("tokens are missing", "U-Net", "Give the encoded prompt as tokens (B, L, D).")
            return None, None
        kept = tokens if isinstance(tokens, Kept) else Kept(self._project_tokens(tokens), keep=False, given=tokens)
        if token_mask is None:
            return kept, None
        if token_mask.ndim != 2 or token_mask.shape[1] != kept.tokens.shape[1]:
            what = f"token_mask of shape {tuple(token_mask.shape)} for {kept.tokens.shape[1]} tokens"
            raise LdmPipeError(what, "U-Net", "Give one value for each token, (B, L).")
        return kept, mask_to_bias(token_mask, kept.tokens.dtype)
