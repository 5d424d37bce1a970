"""The configs of the autoencoders: what can be built, checked before anything is allocated.

Fields of a config file enter; a frozen, valid config leaves, or one error that names the field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeGuard

from autoencoder.networks import ACTIVATIONS
from ldm_pipe.pretrained import LdmPipeError

DEFAULT_SCALING_FACTOR = 0.18215
MAX_CHANNELS, MAX_LEVELS, MAX_BLOCKS, MAX_SIZE = 16384, 12, 64, 2**20
MAX_CODES = 2**20


@dataclass(frozen=True)
class AutoencoderKLConfig:
    """The fields of diffusers' `AutoencoderKL` config, with its defaults.

    Normalised latents are z = (raw - shift) * scale with scale = scaling_factor, shift = shift_factor or 0; where
    `latents_mean` and `latents_std` are given (one number per channel), scale = scaling_factor / std, shift = mean.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 32
    scaling_factor: float = DEFAULT_SCALING_FACTOR
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be built, before anything is allocated."""
        _check_network(self)
        shift = self.shift_factor
        check(shift is None or is_finite(shift), "shift_factor", shift, "a finite number or null")
        mean, std = self.latents_mean, self.latents_std
        check((mean is None) == (std is None), "latents_mean", mean, "given together with latents_std, or not at all")
        for name, values, good in (("latents_mean", mean, is_finite), ("latents_std", std, is_positive)):
            fits = values is None or (len(values) == self.latent_channels and all(map(good, values)))
            check(fits, name, values, f"{self.latent_channels} numbers, positive for the std")


@dataclass(frozen=True)
class VQModelConfig:
    """The fields of diffusers' `VQModel` config, with its defaults but for one: a missing `scaling_factor` is 1.

    diffusers fills in 0.18215, with which the LDM models of the hub decode to noise (diffusers#5166, #5213, #6725).
    Normalised latents are z = raw * scaling_factor. `latent_channels` is the width between encoder and quantiser;
    latents have `vq_embed_dim` channels, by default the same. `lookup_from_codebook` concerns decoding from indices in
    diffusers and changes nothing here.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 3
    sample_size: int | tuple[int, ...] = 32
    num_vq_embeddings: int = 256
    norm_num_groups: int = 32
    vq_embed_dim: int | None = None
    scaling_factor: float = 1.0
    norm_type: str = "group"
    mid_block_add_attention: bool = True
    lookup_from_codebook: bool = False
    force_upcast: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be built, before anything is allocated."""
        _check_network(self)
        _check_whole("num_vq_embeddings", self.num_vq_embeddings, MAX_CODES)
        _check_whole("vq_embed_dim", self.dim, MAX_CHANNELS)
        check(self.norm_type == "group", "norm_type", self.norm_type, "'group' (no spatial norms)")

    @property
    def dim(self) -> int:
        """Return the channels of the latents."""
        return self.latent_channels if self.vq_embed_dim is None else self.vq_embed_dim


def read_fields(config: Mapping[str, Any], cls: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a config file into the fields of a config class, lists as tuples, and the rest."""
    names = {field.name for field in fields(cls)}
    known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in names}
    if known.get("scaling_factor", 0) is None:
        del known["scaling_factor"]
    for name in ("down_block_types", "up_block_types", "block_out_channels"):
        check(isinstance(known.get(name, ()), tuple), name, known.get(name), "a list")
    return known, {k: v for k, v in config.items() if k not in names}


def listed(config: AutoencoderKLConfig | VQModelConfig) -> dict[str, Any]:
    """Return the fields as JSON knows them: tuples as lists."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}


def _check_network(config: AutoencoderKLConfig | VQModelConfig) -> None:
    """Check the fields that both kinds have."""
    for name in ("in_channels", "out_channels", "latent_channels", "norm_num_groups"):
        _check_whole(name, getattr(config, name), MAX_CHANNELS)
    _check_whole("layers_per_block", config.layers_per_block, MAX_BLOCKS)
    widths, groups = config.block_out_channels, config.norm_num_groups
    check(0 < len(widths) <= MAX_LEVELS, "block_out_channels", widths, f"1 to {MAX_LEVELS} widths")
    for width in widths:
        _check_whole("block_out_channels", width, MAX_CHANNELS)
        check(width % groups == 0, "block_out_channels", widths, f"multiples of {groups}")
    for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        types = getattr(config, name)
        check(types == (kind,) * len(widths), name, types, f"{len(widths)} times {kind!r}")
    check(config.act_fn in ACTIVATIONS, "act_fn", config.act_fn, f"one of {sorted(ACTIVATIONS)}")
    sizes = config.sample_size if isinstance(config.sample_size, tuple) else (config.sample_size,)
    for size in sizes:
        _check_whole("sample_size", size, MAX_SIZE)
    check(is_positive(config.scaling_factor), "scaling_factor", config.scaling_factor, "a positive number")


def is_finite(value: object) -> TypeGuard[int | float]:
    """Tell whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_positive(value: object) -> TypeGuard[int | float]:
    """Tell whether a value is a finite number above zero."""
    return is_finite(value) and value > 0


def check(good: bool, name: str, value: object, allowed: str) -> None:
    """Raise LdmPipeError, naming field, value and what is allowed, unless good."""
    if not good:
        raise LdmPipeError(f"{name} is {value!r}, allowed: {allowed}", "autoencoder config")


def _check_whole(name: str, value: object, largest: int) -> None:
    good = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= largest
    check(good, name, value, f"a whole number from 1 to {largest}")
