"""How the two halves of an autoencoder are run: in slices or strips to save memory, in float32 where float16 fails.

A half and its input enter, its output leaves, or one error that says where numbers were lost. What the latents mean
(moments, codes, scale) is not known here; `AutoencoderKL` and `VQModel` share this file.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from autoencoder.config import AutoencoderKLConfig, VQModelConfig, check, listed
from autoencoder.networks import Decoder, Encoder
from autoencoder.tiling import Strips
from ldm_pipe.pretrained import FrozenConfig, LdmPipeError

DEFAULT_TILE_SIZE = 512

ModuleT = TypeVar("ModuleT", bound="nn.Module | None")
Build = Callable[[torch.dtype], Callable[[Tensor], Tensor]]
"""Makes one half of the network in a dtype."""

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION_KEY = re.compile(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
_ATTENTION_WEIGHT = re.compile(r".*\.attentions\.\d+\.(to_q|to_k|to_v|to_out\.0)\.weight")


class Halves:
    """Run the halves of one autoencoder.

    Args:
        factor: pixels per latent along a side.
        force_upcast: compute float16 weights in float32.
    """

    def __init__(self, factor: int, force_upcast: bool) -> None:
        self.factor, self.force_upcast = factor, force_upcast
        self.slicing = False
        self.tile_area: int | None = None  # pixels

    def set_tile_size(self, tile_size: int) -> None:
        """Work on squares of this side at once."""
        check(tile_size >= 16, "tile_size", tile_size, "at least 16 pixels")
        self.tile_area = tile_size**2

    def encoder(self, encoder: Encoder, conv: nn.Conv2d | None) -> Build:
        """Return what makes image -> features, through the 1x1 convolution where there is one."""

        def build(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
            network, last = _cast(encoder, dtype), _cast(conv, dtype)

            def encode(image: Tensor) -> Tensor:
                strips = self._strips(image)
                features = strips.encode(network, image) if strips else network(image)
                return last(features) if last else features

            return encode

        return build

    def decoder(self, decoder: Decoder, conv: nn.Conv2d | None) -> Build:
        """Return what makes raw latents -> image."""

        def build(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
            network, first = _cast(decoder, dtype), _cast(conv, dtype)

            def decode(raw: Tensor) -> Tensor:
                raw = first(raw) if first else raw
                strips = self._strips(raw, self.factor)
                return strips.decode(network, raw) if strips else network(raw)

            return decode

        return build

    def _strips(self, x: Tensor, factor: int = 1) -> Strips | None:
        """Return what works on a picture in pieces, or None where it is small enough."""
        if self.tile_area is None or x.shape[2] * x.shape[3] * factor**2 <= self.tile_area:
            return None
        return Strips(self.tile_area, x.device)

    def run(self, build: Build, x: Tensor, what: str, dtype: torch.dtype, *, training: bool) -> Tensor:
        """Apply one half, in slices where asked; cure overflow of float16 by float32.

        Args:
            what: what errors call the output.
            dtype: of the weights.
        Raises: LdmPipeError if numbers are lost and float32 does not cure it.
        """
        # A CPU has no fast path for float16.
        upcast = dtype == torch.float16 and (self.force_upcast or x.device.type == "cpu")
        dtype = torch.float32 if upcast else dtype
        if not torch.is_grad_enabled():  # pays for the convolutions, not for their gradients (measured on a CPU)
            x = x.contiguous(memory_format=torch.channels_last)
        y = self._in_slices(build(dtype), x.to(dtype)).contiguous()
        if training or bool(torch.isfinite(y).all()):
            return y
        if not bool(torch.isfinite(x).all()):
            fix = "What made these numbers failed, not the autoencoder."
            raise LdmPipeError("NaN or infinity in the input", what, fix)
        if y.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type):
            raise LdmPipeError("NaN or infinity in the output, in float32", what, "The weights are damaged.")
        warnings.warn(f"{what} overflowed in {y.dtype}; computing it again in float32", stacklevel=3)
        with torch.autocast(x.device.type, enabled=False):
            y = self._in_slices(build(torch.float32), x.float()).contiguous()
        if not bool(torch.isfinite(y).all()):
            raise LdmPipeError("NaN or infinity in the output, in float32 too", what, "The weights are damaged.")
        return y

    def _in_slices(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.slicing and x.shape[0] > 1:
            return torch.cat([function(part) for part in x.split(1)])
        return function(x)


class TwoHalves:
    """What every autoencoder offers whatever its latents are: size, scale, and the switches that save memory."""

    decoder: Decoder
    config: FrozenConfig
    _fields: Any
    _extra: dict[str, Any]
    _halves: Halves

    @classmethod
    def rename_keys(cls, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Map the attention's old names."""
        return rename_old_attention(tensors)

    def _set_config(self, config: AutoencoderKLConfig | VQModelConfig, extra: Mapping[str, Any]) -> None:
        self._fields, self._extra = config, dict(extra)
        self.config = FrozenConfig({**listed(config), **self._extra})

    @property
    def factor(self) -> int:
        """Return how many pixels one latent spans along a side."""
        return 2 ** (len(self._fields.block_out_channels) - 1)

    @property
    def scaling_factor(self) -> float:
        """Return the config's scale of the normalised latents."""
        return self._fields.scaling_factor

    @property
    def last_layer(self) -> Tensor:
        """Return the weight that adaptive loss weights take gradients at."""
        return self.decoder.conv_out.weight

    def enable_slicing(self) -> None:
        """Encode and decode one image of a batch at a time, to save memory."""
        self._halves.slicing = True

    def disable_slicing(self) -> None:
        """Encode and decode whole batches again."""
        self._halves.slicing = False

    def enable_tiling(self, tile_size: int = DEFAULT_TILE_SIZE) -> None:
        """Encode and decode images larger than a tile piece by piece, to save memory; the result is the same.

        Args:
            tile_size: side in pixels of the square whose area is worked on at once.
        """
        self._halves.set_tile_size(tile_size)

    def disable_tiling(self) -> None:
        """Encode and decode images at once again."""
        self._halves.tile_area = None


def check_image(image: Tensor, channels: int, factor: int) -> None:
    """Refuse an image that the encoder does not take.

    Raises: LdmPipeError naming size, factor and the nearest sizes that fit.
    """
    if image.ndim != 4 or image.shape[1] != channels:
        fix = f"Give (B, {channels}, H, W) in [-1, 1]."
        raise LdmPipeError(f"image of shape {list(image.shape)}", "encode", fix)
    height, width = image.shape[2:]
    if height % factor or width % factor or not height or not width:
        what = f"image size {height}x{width}: sides must be multiples of {factor}"
        fix = f"Nearest heights: {_nearest(height, factor)}; nearest widths: {_nearest(width, factor)}."
        raise LdmPipeError(what, "encode", fix)


def check_latents(z: Tensor, channels: int) -> None:
    """Refuse latents that the decoder does not take."""
    if z.ndim != 4 or z.shape[1] != channels:
        raise LdmPipeError(f"latents of shape {list(z.shape)}", "decode", f"Give (B, {channels}, h, w).")


def rename_old_attention(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Map the attention's old names (query, key, value, proj_attn) and its 1x1 convolutions to linear layers."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if match := _OLD_ATTENTION_KEY.fullmatch(name):
            name = f"{match[1]}.{_OLD_ATTENTION[match[2]]}.{match[3]}"
        if _ATTENTION_WEIGHT.fullmatch(name) and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
            tensor = tensor[:, :, 0, 0]
        renamed[name] = tensor
    return renamed


def _nearest(side: int, factor: int) -> str:
    """Name the multiples of the factor next to a side."""
    down, up = max(side // factor, 1) * factor, max(-(-side // factor), 1) * factor
    return f"{down} or {up}" if down != up else str(up)


def _cast(module: ModuleT, dtype: torch.dtype) -> ModuleT:
    """Return a module itself or, for another dtype, a temporary copy (the model is never changed by a call)."""
    if module is None or next(module.parameters()).dtype == dtype:
        return module
    return copy.deepcopy(module).to(dtype)
