"""Convolutions on a CPU whose weights are laid out for it once, instead of in every call.

What enters: any module. What leaves: the same module, whose convolutions in inference run on weights in oneDNN's own
layout. Keys, saving, training and other devices stay as they were. This file knows no network.

It pays where a weight is large and its feature map small (twice as fast from 1280 to 1280 channels at 8x8, nothing from
32x32 on), and it costs the memory of those weights a second time: an option, off.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class _Packed:
    """A weight in oneDNN's layout, and what it was made from; a copied or pickled one is empty."""

    def __init__(self, tensor: Tensor | None = None, made_from: tuple[Any, ...] = ()) -> None:
        self.tensor, self.made_from = tensor, made_from

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Packed, ()


def _fingerprint(weight: Tensor, x: Tensor) -> tuple[Any, ...]:
    """Tell weights and input shapes apart; four values, because writing through `.data` counts as no new version."""
    step = weight.numel() // 4
    values = weight.as_strided((4,), (step,), weight.storage_offset()).tolist()
    return weight.data_ptr(), weight._version, x.shape, values


class PackedConv2d(nn.Conv2d):
    """A convolution that packs its weight at its first call in inference, and anew when that or the input changes."""

    _packed: _Packed

    def _fits(self, x: Tensor) -> bool:
        weight = self.weight
        if torch.is_grad_enabled() or weight.is_inference() or torch.compiler.is_compiling():
            return False  # inference tensors count no versions
        if torch.is_autocast_enabled("cpu") or not weight.device.type == x.device.type == "cpu":
            return False
        return weight.dtype == x.dtype == torch.float32 and x.ndim == 4 and weight.numel() >= 4

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (B, C, h, w)."""
        x = input
        if not self._fits(x):
            return super().forward(x)
        now, packed = _fingerprint(self.weight, x), self._packed
        if packed.made_from != now or packed.tensor is None:
            tensor = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight.detach(), self.padding, self.stride, self.dilation, self.groups, x.shape
            )
            packed = self._packed = _Packed(tensor, now)
        return torch.ops.mkldnn._convolution_pointwise(
            x, packed.tensor, self.bias, self.padding, self.stride, self.dilation, self.groups, "none", [], ""
        )

    def train(self, mode: bool = True) -> PackedConv2d:
        """Free the packed weight when training begins."""
        if mode:
            self._packed = _Packed()
        return super().train(mode)


def _make_packed(layer: nn.Module) -> None:
    layer.__class__ = PackedConv2d  # type: ignore[assignment]
    layer._packed = _Packed()  # type: ignore[attr-defined]


def can_pack() -> bool:
    """Try out on a tiny convolution whether this build of torch has the operators and they compute the same."""
    layer, x = nn.Conv2d(8, 8, 3, padding=1, device="cpu"), torch.ones(1, 8, 4, 4, device="cpu")
    with torch.no_grad():
        expected = layer(x)
        _make_packed(layer)
        try:
            return bool(torch.allclose(layer(x), expected, atol=1e-5))
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):
            return False


def pack_for_inference(module: ModuleT) -> ModuleT:
    """Let the convolutions of a module run on packed weights, where this build of torch can.

    The module itself is changed and returned; `unpack` undoes it. Convolutions of one position are matrix products,
    whose weights need no packing, and those with strings for padding are left alone.
    """
    if can_pack():
        for layer in module.modules():
            plain = type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
            if plain and layer.kernel_size != (1, 1):
                _make_packed(layer)
    return module


def unpack(module: ModuleT) -> ModuleT:
    """Undo `pack_for_inference`, and free the packed weights."""
    for layer in module.modules():
        if type(layer) is PackedConv2d:
            del layer._packed
            layer.__class__ = nn.Conv2d  # type: ignore[assignment]
    return module
