"""Map diffusers' `UNet2DConditionModel` config to a `UNetSpec` and back.

What enters: a JSON object. What leaves: a spec, or an `LdmPipeError` naming the field and the value that the network
cannot represent. Unknown fields are not looked at here (the network keeps them in `.config`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.unet.spec import AttentionKind, ClassEmbedding, EmbeddingSpec, LevelSpec, MidSpec, UNetSpec

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
    "addition_embed_type": (None, "text_time"),
    "class_embed_type": (None, "timestep", "identity", "projection", "simple_projection"),
    "encoder_hid_dim_type": (None, "text_proj"),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1, 1.0),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "attention_type": ("default",),
    "cross_attention_norm": (None,),
    "downsample_padding": (0, 1),
    "mid_block_type": (None, "UNetMidBlock2D", "UNetMidBlock2DCrossAttn"),
    "act_fn": ("silu", "swish", "gelu", "mish", "relu"),
    "time_embedding_act_fn": (None, "silu", "swish", "gelu", "mish", "relu"),
}
_DOWN_KINDS: dict[str, AttentionKind] = {"DownBlock2D": "none", "CrossAttnDownBlock2D": "transformer"}
_UP_KINDS: dict[str, AttentionKind] = {"UpBlock2D": "none", "CrossAttnUpBlock2D": "transformer"}


def _refuse(field: str, value: Any, allowed: str) -> LdmPipeError:
    return LdmPipeError(f"{field} = {value!r} cannot be represented", "U-Net config", f"Allowed: {allowed}.")


def _per_level(config: Mapping[str, Any], field: str, count: int) -> list[Any]:
    """Spread a single value over all levels; a list must have one entry per level."""
    value = config[field]
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise _refuse(field, value, f"one value, or a list of {count} as block_out_channels has")
    return list(value)


def _positive(config: Mapping[str, Any], field: str) -> int:
    value = config[field]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _refuse(field, value, "a whole number of at least 1")
    return value


def _all_positive(field: str, values: list[Any], least: int = 1) -> list[int]:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise _refuse(field, value, f"whole numbers of at least {least}")
    return values


def _depths(field: str, value: Any, num_blocks: int) -> tuple[int, ...]:
    """Spread a depth over the residual blocks of a level; a list must have one entry per block."""
    depths = list(value) if isinstance(value, (list, tuple)) else [value] * num_blocks
    if len(depths) < num_blocks:
        raise _refuse(field, value, f"a number, or at least {num_blocks} numbers for this level")
    return tuple(_all_positive(field, depths[:num_blocks], least=0))


def _check_known(config: Mapping[str, Any]) -> None:
    for field, allowed in _KNOWN_VALUES.items():
        if not any(config[field] == value and type(config[field]) is type(value) for value in allowed):
            raise _refuse(field, config[field], ", ".join(repr(value) for value in allowed))


def _kinds(config: Mapping[str, Any], field: str, known: dict[str, AttentionKind], count: int) -> list[AttentionKind]:
    names = config[field]
    if len(names) != count:
        raise _refuse(field, names, f"a list of {count} as block_out_channels has")
    for name in names:
        if name not in known:
            raise _refuse(field, name, ", ".join(known))
    return [known[name] for name in names]


def _read_levels(config: Mapping[str, Any]) -> tuple[LevelSpec, ...]:
    channels = _all_positive("block_out_channels", list(config["block_out_channels"]))
    count = len(channels)
    down = _kinds(config, "down_block_types", _DOWN_KINDS, count)
    up = _kinds(config, "up_block_types", _UP_KINDS, count)[::-1]
    residual = _all_positive("layers_per_block", _per_level(config, "layers_per_block", count))
    # diffusers' field is misnamed: here `attention_head_dim` is the number of heads (diffusers#2011)
    heads = _all_positive("attention_head_dim", _per_level(config, "attention_head_dim", count))
    cross = _all_positive("cross_attention_dim", _per_level(config, "cross_attention_dim", count))
    only_cross = _per_level(config, "only_cross_attention", count)
    depths = _per_level(config, "transformer_layers_per_block", count)
    reverse = config["reverse_transformer_layers_per_block"]
    if reverse is not None and (not isinstance(reverse, (list, tuple)) or len(reverse) != count):
        raise _refuse("reverse_transformer_layers_per_block", reverse, f"null or a list of {count}")
    nested = any(isinstance(depth, (list, tuple)) for depth in depths)
    if reverse is None and nested:
        raise _refuse(
            "transformer_layers_per_block", depths, "numbers, or reverse_transformer_layers_per_block as well"
        )
    up_depths = depths if reverse is None else list(reverse)[::-1]
    levels = []
    for i in range(count):
        if channels[i] % heads[i] and "transformer" in (down[i], up[i]):
            raise _refuse("attention_head_dim", heads[i], f"numbers of heads that divide {channels[i]} channels")
        if channels[i] % config["norm_num_groups"]:
            raise _refuse("norm_num_groups", config["norm_num_groups"], f"divisors of {channels[i]} channels")
        levels.append(
            LevelSpec(
                channels=channels[i],
                num_residual=residual[i],
                down_attention=down[i],
                up_attention=up[i],
                down_depths=_depths("transformer_layers_per_block", depths[i], residual[i]),
                up_depths=_depths("transformer_layers_per_block", up_depths[i], residual[i] + 1),
                num_heads=heads[i],
                cross_dim=cross[i],
                only_cross=bool(only_cross[i]),
            )
        )
    return tuple(levels)


def _read_mid(config: Mapping[str, Any], last: LevelSpec) -> MidSpec:
    kinds = {None: "none", "UNetMidBlock2D": "residual", "UNetMidBlock2DCrossAttn": "transformer"}
    depth = _per_level(config, "transformer_layers_per_block", len(config["block_out_channels"]))[-1]
    kind = kinds[config["mid_block_type"]]
    if kind == "transformer" and last.channels % last.num_heads:
        raise _refuse("attention_head_dim", last.num_heads, f"numbers of heads that divide {last.channels} channels")
    return MidSpec(
        kind=kind,  # type: ignore[arg-type]
        depth=_depths("transformer_layers_per_block", depth, 1)[0],
        num_heads=last.num_heads,
        cross_dim=last.cross_dim,
        scale_factor=float(config["mid_block_scale_factor"]),
    )


def _read_embedding(config: Mapping[str, Any]) -> EmbeddingSpec:
    kind: ClassEmbedding = config["class_embed_type"] or ("table" if config["num_class_embeds"] is not None else "none")
    numbers = config["addition_embed_type"] == "text_time"
    vector = kind in ("projection", "simple_projection") or numbers
    if numbers and kind != "none":
        raise _refuse("class_embed_type", kind, "null together with addition_embed_type = 'text_time'")
    time_dim = config["time_embedding_dim"] or config["block_out_channels"][0] * 4
    return EmbeddingSpec(
        time_dim=time_dim,
        flip_sin_to_cos=bool(config["flip_sin_to_cos"]),
        freq_shift=config["freq_shift"],
        last_activation=config["time_embedding_act_fn"],
        class_kind=kind,
        num_classes=_positive(config, "num_class_embeds") if kind == "table" else 0,
        vector_dim=_positive(config, "projection_class_embeddings_input_dim") if vector else 0,
        concat_class=bool(config["class_embeddings_concat"]) and kind != "none",
        number_dim=_positive(config, "addition_time_embed_dim") if numbers else 0,
    )


def read_config(config: Mapping[str, Any]) -> UNetSpec:
    """Read diffusers' config into a spec; fields left out take diffusers' defaults.

    Raises: LdmPipeError naming the field and its value, where the network cannot represent it.
    """
    config = {**DEFAULTS, **config}
    _check_known(config)
    for field in ("in_channels", "out_channels", "norm_num_groups", "conv_in_kernel", "conv_out_kernel"):
        _positive(config, field)
    if not isinstance(config["block_out_channels"], (list, tuple)) or not config["block_out_channels"]:
        raise _refuse("block_out_channels", config["block_out_channels"], "a list of widths")
    levels = _read_levels(config)
    token_dim = 0
    if config["encoder_hid_dim"] is not None:
        token_dim = _positive(config, "encoder_hid_dim")
        if isinstance(config["cross_attention_dim"], (list, tuple)):
            raise _refuse("encoder_hid_dim", token_dim, "null where cross_attention_dim is a list")
    elif config["encoder_hid_dim_type"] is not None:
        raise _refuse("encoder_hid_dim", None, "a width, because encoder_hid_dim_type is given")
    return UNetSpec(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        levels=levels,
        mid=_read_mid(config, levels[-1]),
        embedding=_read_embedding(config),
        activation=config["act_fn"],
        num_groups=config["norm_num_groups"],
        norm_eps=float(config["norm_eps"]),
        dropout=float(config["dropout"]),
        linear_projection=bool(config["use_linear_projection"]),
        upcast_attention=bool(config["upcast_attention"]),
        resampling="conv" if config["downsample_padding"] == 1 else "conv_asymmetric",
        center_input=bool(config["center_input_sample"]),
        in_kernel=config["conv_in_kernel"],
        out_kernel=config["conv_out_kernel"],
        token_dim=token_dim,
    )


def _one_or_list(values: list[Any]) -> Any:
    return values[0] if all(value == values[0] for value in values) else values


def _level_fields(spec: UNetSpec) -> dict[str, Any]:
    levels = spec.levels
    down_names = {kind: name for name, kind in _DOWN_KINDS.items()}
    up_names = {kind: name for name, kind in _UP_KINDS.items()}
    down = [_one_or_list(list(level.down_depths)) for level in levels]
    up = [_one_or_list(list(level.up_depths)) for level in levels]
    same = down == up and not any(isinstance(depth, list) for depth in down)
    return {
        "block_out_channels": [level.channels for level in levels],
        "layers_per_block": _one_or_list([level.num_residual for level in levels]),
        "down_block_types": [down_names[level.down_attention] for level in levels],
        "up_block_types": [up_names[level.up_attention] for level in levels[::-1]],
        "attention_head_dim": _one_or_list([level.num_heads for level in levels]),
        "cross_attention_dim": _one_or_list([level.cross_dim for level in levels]),
        "only_cross_attention": _one_or_list([level.only_cross for level in levels]),
        "transformer_layers_per_block": _one_or_list(down) if same else down,
        "reverse_transformer_layers_per_block": None if same else up[::-1],
    }


def write_config(spec: UNetSpec) -> dict[str, Any]:
    """Write the config that diffusers reads; `read_config` of it gives the same spec.

    The mid block has no fields of its own there: it takes depth, heads and token width of the last level.
    """
    embedding = spec.embedding
    vector = embedding.vector_dim or None
    mid_names = {"none": None, "residual": "UNetMidBlock2D", "transformer": "UNetMidBlock2DCrossAttn"}
    config = {
        **DEFAULTS,
        **_level_fields(spec),
        "in_channels": spec.in_channels,
        "out_channels": spec.out_channels,
        "mid_block_type": mid_names[spec.mid.kind],
        "mid_block_scale_factor": spec.mid.scale_factor,
        "time_embedding_dim": embedding.time_dim,
        "flip_sin_to_cos": embedding.flip_sin_to_cos,
        "freq_shift": embedding.freq_shift,
        "time_embedding_act_fn": embedding.last_activation,
        "class_embed_type": None if embedding.class_kind in ("none", "table") else embedding.class_kind,
        "num_class_embeds": embedding.num_classes or None,
        "projection_class_embeddings_input_dim": vector,
        "class_embeddings_concat": embedding.concat_class,
        "addition_embed_type": "text_time" if embedding.number_dim else None,
        "addition_time_embed_dim": embedding.number_dim or None,
        "act_fn": spec.activation,
        "norm_num_groups": spec.num_groups,
        "norm_eps": spec.norm_eps,
        "dropout": spec.dropout,
        "use_linear_projection": spec.linear_projection,
        "upcast_attention": spec.upcast_attention,
        "downsample_padding": 1 if spec.resampling == "conv" else 0,
        "center_input_sample": spec.center_input,
        "conv_in_kernel": spec.in_kernel,
        "conv_out_kernel": spec.out_kernel,
        "encoder_hid_dim": spec.token_dim or None,
        "encoder_hid_dim_type": "text_proj" if spec.token_dim else None,
    }
    if read_config(config) != spec:
        raise LdmPipeError(
            "this U-Net has no diffusers config", "U-Net spec", "The mid block must follow the last level."
        )
    return config
