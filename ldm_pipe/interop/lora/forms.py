"""What an adapter changes in one module's weight: LoRA, DoRA, LoHa and LoKr.

What enters: the factors of a file. What leaves: the change of the weight. This file knows neither names nor networks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod

import torch
from torch import Tensor


def _tucker(core: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Join a core (r, s, kh, kw) to its factors (r, O) and (s, I): a kernel (O, I, kh, kw)."""
    return torch.einsum("rskl,ro,si->oikl", core.float(), rows.float(), columns.float())


@dataclass(frozen=True)
class LoraLayer:
    """A product of two thin matrices (Hu et al. 2021, arXiv:2106.09685, eq. 3), of a convolution too.

        change = scale (alpha / r) B A;   with a core T (r, r, kh, kw) in between: B T A
        with a magnitude m (Liu et al. 2024, DoRA, arXiv:2402.09353, eq. 5):
        change = m (W + scale (alpha / r) B A) / ||W + scale (alpha / r) B A|| - W

    Attributes:
        down: A, shape (r, I, ...).
        up: B, shape (O, r, ...).
        alpha: of the scale alpha / r.
        core: T of LyCORIS' convolutions.
        magnitude: m, (O, ...) for each output channel, or (1, I, ...) for each input channel (older LyCORIS).
    """

    down: Tensor
    up: Tensor
    alpha: float
    core: Tensor | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Return r."""
        return self.down.shape[0]

    def delta(self) -> Tensor:
        """Return (alpha / r) B A in the weight's shape, float32."""
        down, up = self.down.float(), self.up.float()
        if self.core is not None:
            return _tucker(self.core, up.flatten(1).T, down.flatten(1)) * (self.alpha / self.rank)
        change = (up.flatten(1) @ down.flatten(1)) * (self.alpha / self.rank)
        return change.reshape(up.shape[0], *down.shape[1:])


@dataclass(frozen=True)
class LohaLayer:
    """An elementwise product of two thin products (Hyeon-Woo et al. 2021, FedPara, arXiv:2108.06098, eq. 3).

        change = scale (alpha / r) (A1 B1) * (A2 B2)

    Attributes:
        a1, a2: shape (O, r); b1, b2: shape (r, I ...); with cores (r, r, kh, kw): (r, O) and (r, I).
    """

    a1: Tensor
    b1: Tensor
    a2: Tensor
    b2: Tensor
    alpha: float
    core1: Tensor | None = None
    core2: Tensor | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Return r."""
        return self.b1.shape[0]

    def delta(self) -> Tensor:
        """Return the change at scale 1, float32; its trailing sides may be flat."""
        if self.core1 is not None and self.core2 is not None:
            first, second = _tucker(self.core1, self.a1, self.b1), _tucker(self.core2, self.a2, self.b2)
        else:
            first, second = self.a1.float() @ self.b1.float(), self.a2.float() @ self.b2.float()
        return first * second * (self.alpha / self.rank)


@dataclass(frozen=True)
class LokrLayer:
    """A Kronecker product (Edalati et al. 2022, KronA, arXiv:2212.10650, eq. 3), each factor whole or a thin product.

        change = scale (alpha / r) kron(W1, W2);   both whole: alpha / r is 1

    Attributes:
        w1, w2: whole, or pairs (a, b) of thin ones; `core` joins the second pair to a kernel.
    """

    w1: Tensor | tuple[Tensor, Tensor]
    w2: Tensor | tuple[Tensor, Tensor]
    alpha: float
    core: Tensor | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int | None:
        """Return r; None where both factors are whole."""
        return next((pair[1].shape[0] for pair in (self.w1, self.w2) if isinstance(pair, tuple)), None)

    def delta(self) -> Tensor:
        """Return the change at scale 1, float32; its trailing sides may be flat."""
        w1 = self.w1.float() if isinstance(self.w1, Tensor) else self.w1[0].float() @ self.w1[1].float()
        if isinstance(self.w2, Tensor):
            w2 = self.w2.float()
        elif self.core is not None:
            w2 = _tucker(self.core, *self.w2)
        else:
            w2 = self.w2[0].float() @ self.w2[1].float()
        w1 = w1.reshape(*w1.shape, *[1] * (w2.ndim - w1.ndim))
        return torch.kron(w1, w2.contiguous()) * (1.0 if self.rank is None else self.alpha / self.rank)


AnyLayer = LoraLayer | LohaLayer | LokrLayer
Layers = dict[tuple[str, str], AnyLayer]  # (network, module) -> its change


def tensors_of(layer: AnyLayer) -> list[Tensor]:
    """Return all tensors of a layer."""
    values = [getattr(layer, field.name) for field in fields(layer)]
    return [x for value in values for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, Tensor)]


def delta_shape(layer: AnyLayer) -> tuple[int, ...] | None:
    """Return the shape of the change without computing it; None if the factors do not fit each other."""
    given = {field.name: getattr(layer, field.name) for field in fields(layer)}
    empty = {
        name: tuple(x.to("meta") for x in value)
        if isinstance(value, tuple)
        else value.to("meta")
        if isinstance(value, Tensor)
        else value
        for name, value in given.items()
    }
    try:
        return tuple(type(layer)(**empty).delta().shape)
    except (RuntimeError, ValueError, IndexError, ZeroDivisionError):
        return None


def fits(layer: AnyLayer, weight: Tensor) -> bool:
    """Tell whether a layer changes a weight of this shape."""
    shape = delta_shape(layer)
    if shape is None or shape[0] != weight.shape[0] or prod(shape) != weight.numel():
        return False
    if len(shape) == weight.ndim and shape[1] != weight.shape[1]:
        return False
    return layer.magnitude is None or _magnitude_dims(layer.magnitude, weight) is not None


def _magnitude_dims(magnitude: Tensor, weight: Tensor) -> tuple[int, ...] | None:
    """Return the axes that the norm beside a magnitude sums over; None if it fits neither outputs nor inputs."""
    if magnitude.shape[:1] == weight.shape[:1] and magnitude.numel() == weight.shape[0]:
        return tuple(range(1, weight.ndim))
    if magnitude.shape[:1] == (1,) and magnitude.numel() == weight.shape[1]:
        return (0, *range(2, weight.ndim))
    return None


def changed(layer: AnyLayer, weight: Tensor, scale: float) -> Tensor:
    """Return the change of a weight (float32) by a layer at a scale, in its shape.

    With a magnitude the scale acts within the norm, as in PEFT: it is no factor of the change.
    """
    delta = scale * layer.delta().reshape(weight.shape).to(weight.device)
    if layer.magnitude is None:
        return delta
    dims = _magnitude_dims(layer.magnitude, weight)
    assert dims is not None
    moved = weight + delta
    norm = torch.linalg.vector_norm(moved, dim=dims, keepdim=True)
    return moved * (layer.magnitude.float().to(weight.device).reshape(norm.shape) / norm) - weight
