"""Map diffusers' `UNet2DConditionModel` config to a `UNetSpec` and back.

What enters: a JSON object. What leaves: a spec, or an `LdmPipeError` naming the field and the value that the network
cannot represent. Unknown fields are not looked at here (the network keeps them in `.config`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldm_pipe.networks.fields import (
    MOST_LAYERS,
    all_positive,
    check_known,
    check_types,
    kinds,
    one_or_list,
    per_level,
    positive,
    read_channels,
    refuse,
)
from ldm_pipe.networks.spec import (
    AttentionKind,
    ClassEmbedding,
    EmbeddingSpec,
    LevelSpec,
    MidKind,
    MidSpec,
    Resampling,
    UNetSpec,
)
from ldm_pipe.pretrained import LdmPipeError

# What diffusers 0.42 assumes for a field that a config.json leaves out.
DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "only_cross_attention": False,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": 0.0,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "use_linear_projection": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "num_class_embeds": None,
    "upcast_attention": False,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "projection_class_embeddings_input_dim": None,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
    "addition_embed_type_num_heads": 64,
}

# Fields for which the network knows these values only; anything else is refused.
_KNOWN_VALUES: dict[str, tuple[Any, ...]] = {
    "num_attention_heads": (None,),
    "dual_cross_attention": (False,),
    "addition_embed_type": (None, "text_time", "text"),
    "class_embed_type": (None, "timestep", "identity", "projection", "simple_projection"),
    "encoder_hid_dim_type": (None, "text_proj"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "attention_type": ("default",),
    "cross_attention_norm": (None, "group_norm"),
    "downsample_padding": (0, 1),
    "act_fn": ("silu", "swish", "gelu", "mish", "relu"),
    "time_embedding_act_fn": (None, "silu", "swish", "gelu", "mish", "relu"),
}
NORM_TOKENS_GROUPS = 32  # written out in diffusers' attention


def _depths(field: str, value: Any, num_blocks: int) -> tuple[int, ...]:
    """Spread a depth over the residual blocks of a level; a list must have one entry per block."""
    depths = list(value) if isinstance(value, (list, tuple)) else [value] * num_blocks
    if len(depths) < num_blocks:
        raise refuse(field, value, f"a number, or at least {num_blocks} numbers for this level")
    return tuple(all_positive(field, depths[:num_blocks], least=0, most=MOST_LAYERS))


@dataclass(frozen=True)
class _Family:
    """Block types that go together: in one family `attention_head_dim` counts heads, in the other it is their width."""

    down: Mapping[str, AttentionKind]
    up: Mapping[str, AttentionKind]
    mid: Mapping[str | None, MidKind]
    head_widths: bool


_PLAIN = _Family(
    {"DownBlock2D": "none", "CrossAttnDownBlock2D": "transformer"},
    {"UpBlock2D": "none", "CrossAttnUpBlock2D": "transformer"},
    {None: "none", "UNetMidBlock2D": "residual", "UNetMidBlock2DCrossAttn": "transformer"},
    head_widths=False,
)
_JOINT = _Family(
    {"ResnetDownsampleBlock2D": "none", "SimpleCrossAttnDownBlock2D": "joint"},
    {"ResnetUpsampleBlock2D": "none", "SimpleCrossAttnUpBlock2D": "joint"},
    {None: "none", "UNetMidBlock2DSimpleCrossAttn": "joint"},
    head_widths=True,
)


def _family(config: Mapping[str, Any]) -> _Family:
    """Tell the family by the first block; the whole config must stay within it."""
    names = config["down_block_types"]
    first = names[0] if isinstance(names, (list, tuple)) and names else None
    family = _JOINT if first in _JOINT.down else _PLAIN
    if config["mid_block_type"] not in family.mid:
        allowed = ", ".join(str(name) for name in family.mid)
        raise refuse("mid_block_type", config["mid_block_type"], f"{allowed} beside {first}")
    if family is _PLAIN:
        check_known(config, {"resnet_skip_time_act": (False,), "resnet_out_scale_factor": (1, 1.0)})
        check_known(config, {"cross_attention_norm": (None,)})
    return family


def _heads(channels: int, value: int, family: _Family, used: bool) -> int:
    """Turn `attention_head_dim` into a number of heads; its meaning there depends on the family (diffusers#2011)."""
    if used and channels % value:
        raise refuse("attention_head_dim", value, f"divisors of {channels} channels")
    if family.head_widths:
        return channels // value if used else 0
    return value


def _up_depths(config: Mapping[str, Any], depths: list[Any]) -> list[Any]:
    reverse, count = config["reverse_transformer_layers_per_block"], len(depths)
    if reverse is None:
        if any(isinstance(depth, (list, tuple)) for depth in depths):
            allowed = "numbers, or reverse_transformer_layers_per_block as well"
            raise refuse("transformer_layers_per_block", depths, allowed)
        return depths
    if not isinstance(reverse, (list, tuple)) or len(reverse) != count:
        raise refuse("reverse_transformer_layers_per_block", reverse, f"null or a list of {count}")
    return list(reverse)[::-1]


def _read_levels(config: Mapping[str, Any], family: _Family) -> tuple[LevelSpec, ...]:
    channels = read_channels(config)
    count = len(channels)
    down = kinds(config, "down_block_types", family.down, count)
    up = kinds(config, "up_block_types", family.up, count)[::-1]
    residual = all_positive("layers_per_block", per_level(config, "layers_per_block", count), most=MOST_LAYERS)
    heads = all_positive("attention_head_dim", per_level(config, "attention_head_dim", count))
    cross = all_positive("cross_attention_dim", per_level(config, "cross_attention_dim", count))
    only_cross = per_level(config, "only_cross_attention", count)
    depths = per_level(config, "transformer_layers_per_block", count)
    up_depths = _up_depths(config, depths)
    conv: Resampling = "conv" if config["downsample_padding"] == 1 else "conv_asymmetric"
    return tuple(
        LevelSpec(
            channels=channels[i],
            num_residual=residual[i],
            down_attention=down[i],
            up_attention=up[i],
            down_depths=_depths("transformer_layers_per_block", depths[i], residual[i]),
            up_depths=_depths("transformer_layers_per_block", up_depths[i], residual[i] + 1),
            num_heads=_heads(channels[i], heads[i], family, (down[i], up[i]) != ("none", "none")),
            cross_dim=cross[i],
            only_cross=bool(only_cross[i]),
            down_resampling="residual" if family is _JOINT else conv,
            up_resampling="residual" if family is _JOINT else "conv",
        )
        for i in range(count)
    )


def _read_mid(config: Mapping[str, Any], last: LevelSpec, family: _Family) -> MidSpec:
    count = len(config["block_out_channels"])
    kind = family.mid[config["mid_block_type"]]
    value, only_cross = config["only_cross_attention"], config["mid_block_only_cross_attention"]
    if only_cross is None:
        only_cross = value if isinstance(value, bool) else False
    heads = per_level(config, "attention_head_dim", count)[-1]
    depths = per_level(config, "transformer_layers_per_block", count)
    return MidSpec(
        kind=kind,
        depth=_depths("transformer_layers_per_block", depths[-1], 1)[0],
        num_heads=_heads(last.channels, heads, family, kind in ("transformer", "joint")),
        cross_dim=last.cross_dim,
        scale_factor=float(config["mid_block_scale_factor"]),
        only_cross=bool(only_cross) and kind == "joint",
    )


def _read_embedding(config: Mapping[str, Any]) -> EmbeddingSpec:
    kind: ClassEmbedding = config["class_embed_type"] or ("table" if config["num_class_embeds"] is not None else "none")
    numbers = config["addition_embed_type"] == "text_time"
    vector = kind in ("projection", "simple_projection") or numbers
    if numbers and kind != "none":
        raise refuse("class_embed_type", kind, "null together with addition_embed_type = 'text_time'")
    pool_heads = 0
    if config["addition_embed_type"] == "text":
        pool_heads = positive(config, "addition_embed_type_num_heads")
        width = config["cross_attention_dim"] if config["encoder_hid_dim"] is None else config["encoder_hid_dim"]
        if not isinstance(width, int) or width % pool_heads:
            raise refuse("addition_embed_type_num_heads", pool_heads, f"divisors of the tokens' width {width}")
    return EmbeddingSpec(
        time_dim=config["time_embedding_dim"] or config["block_out_channels"][0] * 4,
        flip_sin_to_cos=bool(config["flip_sin_to_cos"]),
        freq_shift=config["freq_shift"],
        last_activation=config["time_embedding_act_fn"],
        class_kind=kind,
        num_classes=positive(config, "num_class_embeds") if kind == "table" else 0,
        vector_dim=positive(config, "projection_class_embeddings_input_dim") if vector else 0,
        concat_class=bool(config["class_embeddings_concat"]) and kind != "none",
        number_dim=positive(config, "addition_time_embed_dim") if numbers else 0,
        pool_heads=pool_heads,
    )


def _read_token_dim(config: Mapping[str, Any]) -> int:
    if config["encoder_hid_dim"] is None:
        if config["encoder_hid_dim_type"] is not None:
            raise refuse("encoder_hid_dim", None, "a width, because encoder_hid_dim_type is given")
        return 0
    token_dim = positive(config, "encoder_hid_dim")
    if isinstance(config["cross_attention_dim"], (list, tuple)):
        raise refuse("encoder_hid_dim", token_dim, "null where cross_attention_dim is a list")
    return token_dim


def read_config(config: Mapping[str, Any]) -> UNetSpec:
    """Read diffusers' config into a spec; fields left out take diffusers' defaults.

    Raises: LdmPipeError naming the field and its value, where the network cannot represent it.
    """
    config = {**DEFAULTS, **config}
    check_types(config, DEFAULTS)
    check_known(config, _KNOWN_VALUES)
    for field in ("in_channels", "out_channels", "norm_num_groups", "conv_in_kernel", "conv_out_kernel"):
        positive(config, field)
    family = _family(config)
    levels = _read_levels(config, family)
    if config["cross_attention_norm"] is not None and levels[0].cross_dim % NORM_TOKENS_GROUPS:
        raise refuse("cross_attention_dim", levels[0].cross_dim, f"multiples of {NORM_TOKENS_GROUPS}")
    return UNetSpec(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        levels=levels,
        mid=_read_mid(config, levels[-1], family),
        embedding=_read_embedding(config),
        activation=config["act_fn"],
        num_groups=config["norm_num_groups"],
        norm_eps=float(config["norm_eps"]),
        dropout=float(config["dropout"]),
        linear_projection=bool(config["use_linear_projection"]),
        upcast_attention=bool(config["upcast_attention"]),
        center_input=bool(config["center_input_sample"]),
        in_kernel=config["conv_in_kernel"],
        out_kernel=config["conv_out_kernel"],
        token_dim=_read_token_dim(config),
        scale_shift=config["resnet_time_scale_shift"] == "scale_shift",
        bare_embedding=bool(config["resnet_skip_time_act"]),
        residual_scale=float(config["resnet_out_scale_factor"]),
        norm_tokens=config["cross_attention_norm"] is not None,
    )


def _head_field(spec: UNetSpec, family: _Family) -> Any:
    """Write `attention_head_dim`; levels without attention take the value of their neighbours."""
    if not family.head_widths:
        return one_or_list([level.num_heads for level in spec.levels])
    widths = [level.channels // level.num_heads if level.num_heads else 0 for level in spec.levels]
    if spec.mid.num_heads:
        widths[-1] = spec.levels[-1].channels // spec.mid.num_heads
    some = next((width for width in widths if width), DEFAULTS["attention_head_dim"])
    return one_or_list([width or some for width in widths])


def _level_fields(spec: UNetSpec, family: _Family) -> dict[str, Any]:
    levels = spec.levels
    down_names = {kind: name for name, kind in family.down.items()}
    up_names = {kind: name for name, kind in family.up.items()}
    mid_names = {kind: name for name, kind in family.mid.items()}
    down = [one_or_list(list(level.down_depths)) for level in levels]
    up = [one_or_list(list(level.up_depths)) for level in levels]
    same = down == up and not any(isinstance(depth, list) for depth in down)
    only_cross = one_or_list([level.only_cross for level in levels])
    follows = spec.mid.only_cross == (only_cross is True)
    return {
        "block_out_channels": [level.channels for level in levels],
        "layers_per_block": one_or_list([level.num_residual for level in levels]),
        "down_block_types": [down_names[level.down_attention] for level in levels],
        "mid_block_type": mid_names[spec.mid.kind],
        "up_block_types": [up_names[level.up_attention] for level in levels[::-1]],
        "attention_head_dim": _head_field(spec, family),
        "cross_attention_dim": one_or_list([level.cross_dim for level in levels]),
        "only_cross_attention": only_cross,
        "mid_block_only_cross_attention": None if follows or family is _PLAIN else spec.mid.only_cross,
        "transformer_layers_per_block": one_or_list(down) if same else down,
        "reverse_transformer_layers_per_block": None if same else up[::-1],
        "downsample_padding": 0 if levels[0].down_resampling == "conv_asymmetric" else 1,
    }


def write_config(spec: UNetSpec) -> dict[str, Any]:
    """Write the config that diffusers reads; `read_config` of it gives the same spec.

    The mid block has no fields of its own there: it takes depth, heads and token width of the last level.
    """
    embedding = spec.embedding
    vector = embedding.vector_dim or None
    family = _JOINT if spec.levels[0].down_resampling == "residual" else _PLAIN
    added = "text_time" if embedding.number_dim else "text" if embedding.pool_heads else None
    config = {
        **DEFAULTS,
        **_level_fields(spec, family),
        "in_channels": spec.in_channels,
        "out_channels": spec.out_channels,
        "mid_block_scale_factor": spec.mid.scale_factor,
        "time_embedding_dim": embedding.time_dim,
        "flip_sin_to_cos": embedding.flip_sin_to_cos,
        "freq_shift": embedding.freq_shift,
        "time_embedding_act_fn": embedding.last_activation,
        "class_embed_type": None if embedding.class_kind in ("none", "table") else embedding.class_kind,
        "num_class_embeds": embedding.num_classes or None,
        "projection_class_embeddings_input_dim": vector,
        "class_embeddings_concat": embedding.concat_class,
        "addition_embed_type": added,
        "addition_embed_type_num_heads": embedding.pool_heads or DEFAULTS["addition_embed_type_num_heads"],
        "addition_time_embed_dim": embedding.number_dim or None,
        "act_fn": spec.activation,
        "norm_num_groups": spec.num_groups,
        "norm_eps": spec.norm_eps,
        "dropout": spec.dropout,
        "use_linear_projection": spec.linear_projection,
        "upcast_attention": spec.upcast_attention,
        "center_input_sample": spec.center_input,
        "conv_in_kernel": spec.in_kernel,
        "conv_out_kernel": spec.out_kernel,
        "resnet_time_scale_shift": "scale_shift" if spec.scale_shift else "default",
        "resnet_skip_time_act": spec.bare_embedding,
        "resnet_out_scale_factor": spec.residual_scale,
        "cross_attention_norm": "group_norm" if spec.norm_tokens else None,
        "encoder_hid_dim": spec.token_dim or None,
        "encoder_hid_dim_type": "text_proj" if spec.token_dim else None,
    }
    if read_config(config) != spec:
        raise LdmPipeError(
            "this U-Net has no diffusers config", "U-Net spec", "The mid block must follow the last level."
        )
    return config
