"""The configs of the autoencoders: what can be built, checked before anything is allocated.

Fields of a config file enter; a frozen, valid config leaves, or one error that names the field.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeGuard

from autoencoder.networks import ACTIVATIONS
from ldm_pipe.pretrained import LdmPipeError

DEFAULT_SCALING_FACTOR = 0.18215
MAX_CHANNELS, MAX_LEVELS, MAX_BLOCKS, MAX_SIZE = 16384, 12, 64, 2**20


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
        for name in ("in_channels", "out_channels", "latent_channels", "norm_num_groups"):
            _check_whole(name, getattr(self, name), MAX_CHANNELS)
        _check_whole("layers_per_block", self.layers_per_block, MAX_BLOCKS)
        widths = self.block_out_channels
        check(0 < len(widths) <= MAX_LEVELS, "block_out_channels", widths, f"1 to {MAX_LEVELS} widths")
        for width in widths:
            _check_whole("block_out_channels", width, MAX_CHANNELS)
            check(
                width % self.norm_num_groups == 0, "block_out_channels", widths, f"multiples of {self.norm_num_groups}"
            )
        for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            types = getattr(self, name)
            check(types == (kind,) * len(widths), name, types, f"{len(widths)} times {kind!r}")
        check(self.act_fn in ACTIVATIONS, "act_fn", self.act_fn, f"one of {sorted(ACTIVATIONS)}")
        sizes = self.sample_size if isinstance(self.sample_size, tuple) else (self.sample_size,)
        for size in sizes:
            _check_whole("sample_size", size, MAX_SIZE)
        check(is_positive(self.scaling_factor), "scaling_factor", self.scaling_factor, "a positive number")
        shift = self.shift_factor
        check(shift is None or is_finite(shift), "shift_factor", shift, "a finite number or null")
        mean, std = self.latents_mean, self.latents_std
        check((mean is None) == (std is None), "latents_mean", mean, "given together with latents_std, or not at all")
        for name, values, good in (("latents_mean", mean, is_finite), ("latents_std", std, is_positive)):
            fits = values is None or (len(values) == self.latent_channels and all(map(good, values)))
            check(fits, name, values, f"{self.latent_channels} numbers, positive for the std")


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
