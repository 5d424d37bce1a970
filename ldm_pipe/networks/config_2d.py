"""Map diffusers' `UNet2DModel` config (no tokens: LDM without text, super-resolution, ADM) to a `UNetSpec` and back.

What enters: a JSON object. What leaves: a spec, or an `LdmPipeError` naming the field and the value that the network
cannot represent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm_pipe.networks.fields import (
    MOST_LAYERS,
    all_positive,
    check_known,
    check_types,
    kinds,
    positive,
    read_channels,
    refuse,
)
from ldm_pipe.networks.spec import (
    AttentionKind,
    ClassEmbedding,
    EmbeddingSpec,
    LevelSpec,
    MidSpec,
    Resampling,
    UNetSpec,
)
from ldm_pipe.pretrained import LdmPipeError

# What diffusers 0.42 assumes for a field that a config.json leaves out.
DEFAULTS_2D: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}

# diffusers' UNet2DModel knows one width of heads, and a sinusoid as wide as the first level. A network with other ones
# (ADM's 128, 512 and 64 -> 256) is written as a class of ours, so that diffusers refuses it instead of drawing wrongly.
OWN_CLASS_2D = "LdmPipeUNet2DModel"
OWN_DEFAULTS_2D: dict[str, Any] = {"num_heads": None, "sinusoid_dim": 0}

# Fields for which the network knows these values only; anything else is refused.
_KNOWN_VALUES: dict[str, tuple[Any, ...]] = {
    "time_embedding_type": ("positional",),
    "mid_block_type": (None, "UNetMidBlock2D"),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "act_fn": ("silu", "swish"),  # the outer activations of this class are SiLU whatever is written here
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None, "timestep", "identity"),
    "add_attention": (True, False),
}
# kind of attention, and how the resolution changes; None: as `downsample_type` and `upsample_type` say
_Block = tuple[AttentionKind, Resampling | None]
_DOWN: dict[str, _Block] = {
    "DownBlock2D": ("none", "conv"),
    "ResnetDownsampleBlock2D": ("none", "residual"),
    "AttnDownBlock2D": ("picture", None),
}
_UP: dict[str, _Block] = {
    "UpBlock2D": ("none", "conv"),
    "ResnetUpsampleBlock2D": ("none", "residual"),
    "AttnUpBlock2D": ("picture", None),
}


def _head_count(config: Mapping[str, Any], channels: int) -> int:
    width, count = config["attention_head_dim"], config["num_heads"]
    if count is not None:
        if channels % positive(config, "num_heads"):
            raise refuse("num_heads", count, f"null or divisors of {channels} channels")
        return count
    if width is None:
        return 1
    if channels % width:
        raise refuse("attention_head_dim", width, f"null or divisors of {channels} channels")
    return channels // width


def _read_levels(config: Mapping[str, Any]) -> tuple[LevelSpec, ...]:
    channels = read_channels(config)
    down = kinds(config, "down_block_types", _DOWN, len(channels))
    up = kinds(config, "up_block_types", _UP, len(channels))[::-1]
    width = config["attention_head_dim"]
    if width is not None:
        all_positive("attention_head_dim", [width])
    num_residual = positive(config, "layers_per_block", most=MOST_LAYERS)
    conv: Resampling = "conv" if config["downsample_padding"] == 1 else "conv_asymmetric"
    down_type: Resampling = "residual" if config["downsample_type"] == "resnet" else conv
    up_type: Resampling = "residual" if config["upsample_type"] == "resnet" else "conv"
    levels = []
    for i, ((down_kind, shrink), (up_kind, grow)) in enumerate(zip(down, up, strict=True)):
        used = "picture" in (down_kind, up_kind)
        levels.append(
            LevelSpec(
                channels=channels[i],
                num_residual=num_residual,
                down_attention=down_kind,
                up_attention=up_kind,
                down_depths=(1,) * num_residual,
                up_depths=(1,) * (num_residual + 1),
                num_heads=_head_count(config, channels[i]) if used else 0,
                cross_dim=0,
                only_cross=False,
                down_resampling=(conv if shrink == "conv" else shrink) or down_type,
                up_resampling=grow or up_type,
            )
        )
    return tuple(levels)


def _read_mid(config: Mapping[str, Any], channels: int) -> MidSpec:
    scale_shift = config["resnet_time_scale_shift"] == "scale_shift"
    groups = config["attn_norm_num_groups"]
    if groups is None:
        groups = 0 if scale_shift else config["norm_num_groups"]
    elif channels % positive(config, "attn_norm_num_groups"):
        raise refuse("attn_norm_num_groups", groups, f"null or divisors of {channels} channels")
    attends = config["mid_block_type"] is not None and config["add_attention"]
    return MidSpec(
        kind="none" if config["mid_block_type"] is None else "picture" if attends else "two_residual",
        depth=1,
        num_heads=_head_count(config, channels) if attends else 0,
        cross_dim=0,
        scale_factor=float(config["mid_block_scale_factor"]),
        attention_groups=groups if attends else 0,
    )


def read_config_2d(config: Mapping[str, Any]) -> UNetSpec:
    """Read diffusers' config into a spec; fields left out take diffusers' defaults.

    Raises: LdmPipeError naming the field and its value, where the network cannot represent it.
    """
    config = {**DEFAULTS_2D, **OWN_DEFAULTS_2D, **config}
    check_types(config, {**DEFAULTS_2D, **OWN_DEFAULTS_2D})
    check_known(config, _KNOWN_VALUES)
    for field in ("in_channels", "out_channels", "norm_num_groups"):
        positive(config, field)
    levels = _read_levels(config)
    kind: ClassEmbedding = config["class_embed_type"] or ("table" if config["num_class_embeds"] is not None else "none")
    embedding = EmbeddingSpec(
        time_dim=config["time_embedding_dim"] or levels[0].channels * 4,
        flip_sin_to_cos=bool(config["flip_sin_to_cos"]),
        freq_shift=config["freq_shift"],
        last_activation=None,
        class_kind=kind,
        num_classes=positive(config, "num_class_embeds") if kind == "table" else 0,
        vector_dim=0,
        concat_class=False,
        number_dim=0,
        sinusoid_dim=config["sinusoid_dim"],
    )
    return UNetSpec(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        levels=levels,
        mid=_read_mid(config, levels[-1].channels),
        embedding=embedding,
        activation=config["act_fn"],
        num_groups=config["norm_num_groups"],
        norm_eps=float(config["norm_eps"]),
        dropout=float(config["dropout"]),
        linear_projection=False,
        upcast_attention=False,
        center_input=bool(config["center_input_sample"]),
        in_kernel=3,
        out_kernel=3,
        token_dim=0,
        scale_shift=config["resnet_time_scale_shift"] == "scale_shift",
    )


def _head_width(spec: UNetSpec) -> int | None:
    """Return the one width of all heads; one head at every level is written as null."""
    counts = [(level.channels, level.num_heads) for level in spec.levels if level.num_heads]
    counts += [(spec.levels[-1].channels, spec.mid.num_heads)] if spec.mid.num_heads else []
    widths = {channels // heads for channels, heads in counts}
    if len(widths) > 1:
        if all(heads == 1 for _, heads in counts):
            return None
        what = f"attention heads of different widths: {sorted(widths)}"
        fix = "One width for all levels fits; a fixed number of heads at levels of different width does not."
        raise LdmPipeError(what, "diffusers' UNet2DModel", fix)
    return widths.pop() if widths else DEFAULTS_2D["attention_head_dim"]


def _names(kinds_: list[AttentionKind], resamplings: list[Resampling], known: Mapping[str, _Block]) -> tuple[Any, str]:
    """Return block types and the resampling of those with attention; the last level changes no resolution."""
    of_attention = {how for kind, how in zip(kinds_, resamplings, strict=True) if kind == "picture"}
    names = {block: name for name, block in known.items()}
    blocks: list[_Block] = [
        ("picture", None) if kind == "picture" else ("none", "residual" if how == "residual" else "conv")
        for kind, how in zip(kinds_, resamplings, strict=True)
    ]
    return [names[block] for block in blocks], "resnet" if of_attention == {"residual"} else "conv"


def write_config_2d(spec: UNetSpec) -> dict[str, Any]:
    """Write the config that diffusers reads; `read_config_2d` of it gives the same spec.

    Raises: LdmPipeError if this class of diffusers cannot represent the spec.
    """
    levels, embedding = spec.levels, spec.embedding
    down, down_type = _names([x.down_attention for x in levels], [x.down_resampling for x in levels], _DOWN)
    up, up_type = _names([x.up_attention for x in levels], [x.up_resampling for x in levels], _UP)
    config = {
        **DEFAULTS_2D,
        "in_channels": spec.in_channels,
        "out_channels": spec.out_channels,
        "center_input_sample": spec.center_input,
        "time_embedding_dim": embedding.time_dim,
        "freq_shift": embedding.freq_shift,
        "flip_sin_to_cos": embedding.flip_sin_to_cos,
        "down_block_types": down,
        "mid_block_type": None if spec.mid.kind == "none" else "UNetMidBlock2D",
        "up_block_types": up[::-1],
        "block_out_channels": [level.channels for level in levels],
        "layers_per_block": levels[0].num_residual,
        "mid_block_scale_factor": spec.mid.scale_factor,
        "downsample_padding": 0 if any(x.down_resampling == "conv_asymmetric" for x in levels) else 1,
        "downsample_type": down_type,
        "upsample_type": up_type,
        "dropout": spec.dropout,
        "act_fn": spec.activation,
        "attention_head_dim": _head_width(spec),
        "norm_num_groups": spec.num_groups,
        "attn_norm_num_groups": spec.mid.attention_groups or None,
        "norm_eps": spec.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if spec.scale_shift else "default",
        "add_attention": spec.mid.kind != "two_residual",
        "class_embed_type": None if embedding.class_kind in ("none", "table") else embedding.class_kind,
        "num_class_embeds": embedding.num_classes or None,
    }
    if read_config_2d(config) != spec:
        fix = "It knows one number of residual blocks, one width of heads, and no tokens."
        raise LdmPipeError("this U-Net cannot be represented", "diffusers' UNet2DModel", fix)
    return config
