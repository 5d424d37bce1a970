"""Pictures and maps -> Condition.spatial: what lies beside the noisy latents, channel by channel.

What enters: semantic maps, masks, depth, edges, low-resolution pictures. What leaves: a Condition at the size of the
latents. This file knows no noise schedule (it is handed alpha and sigma) and no autoencoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conditioning.condition import Condition
from ldm_pipe.pretrained import FrozenConfig, LdmPipeError, PretrainedModule

METHODS = ("nearest", "bilinear", "bicubic", "area")
Size = tuple[int, int]
SpatialKind = Literal["map", "depth"]


@dataclass(frozen=True)
class SpatialInput:
    """What a model takes beside its latents, and what it takes where there is none; stored with the model.

    Args:
        channels: of the map.
        kind: "map": from 0 to 1, shown as 2 map - 1, so that 0 means "no map" and guidance can push away from it;
            "depth": of any unit, as Stable Diffusion 2 reads it (see `depth_condition`), in every evaluation alike.
        method: how a map is resized to the latents.
    """

    channels: int
    kind: SpatialKind = "map"
    method: str = "area"

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        whole = isinstance(self.channels, int) and not isinstance(self.channels, bool) and 1 <= self.channels <= 4096
        if not whole or (self.kind == "depth" and self.channels != 1):
            what = f"channels is {self.channels!r} of kind {self.kind!r}"
            raise LdmPipeError(what, "spatial input", "Use a whole number from 1 to 4096; depth has 1.")
        if self.kind not in get_args(SpatialKind) or self.method not in METHODS:
            what = f"kind is {self.kind!r}, method {self.method!r}"
            raise LdmPipeError(what, "spatial input", f"Known: {get_args(SpatialKind)}, {METHODS}.")

    @classmethod
    def read(cls, stored: Any, where: str) -> SpatialInput:
        """Read what `stored` wrote.

        Raises: LdmPipeError for unknown fields or values.
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(stored, Mapping) or not {"channels"} <= set(stored) <= known:
            what = f"the spatial input is {stored!r:.120}"
            raise LdmPipeError(what, where, f"It holds channels, and may hold {sorted(known)}.")
        return cls(**stored)

    def stored(self) -> dict[str, Any]:
        """Return what JSON holds of it."""
        return asdict(self)

    def condition(self, maps: Tensor, size: Size) -> Condition:
        """Lay maps, (B, K, H, W), beside latents of a size.

        Raises: LdmPipeError for other channels, values outside 0 to 1 (kind "map"), or values that are not finite.
        """
        if self.kind == "depth":
            return depth_condition(maps, size)
        _check_map("map", maps, self.channels)
        low, high = float(maps.min()), float(maps.max())
        if low < 0 or high > 1:
            what = f"the map goes from {low:g} to {high:g}"
            raise LdmPipeError(what, "spatial condition", "Give values from 0 to 1.")
        return Condition(spatial=2 * _resize(maps, size, self.method) - 1)

    def null(self, condition: Condition) -> Condition:
        """Return what stands in the unconditional evaluation: no map, but the same depth."""
        maps = condition.slots()["spatial"]
        return Condition(spatial=torch.zeros_like(maps) if self.kind == "map" else maps)


class SpatialRescaler(PretrainedModule):
    """Shrink a map stage by stage, then mix its channels (LDM, ldm/modules/encoders/modules.py, same keys).

    Args:
        config: `in_channels`; `out_channels` (None: no mixing); `num_stages`; `multiplier` (0.5); `method`.
    """

    weights_name = "model"
    class_name = "SpatialRescaler"

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Make the 1x1 convolution."""
        super().__init__()
        defaults = {"out_channels": None, "num_stages": 1, "multiplier": 0.5, "method": "bilinear"}
        self.config = FrozenConfig({**defaults, **config})
        sizes = [self.config.get("in_channels"), self.config.num_stages]
        sizes += [self.config.out_channels] if self.config.out_channels is not None else []
        if not all(isinstance(size, int) and 0 <= size <= 4096 for size in sizes) or not self.config.in_channels:
            raise LdmPipeError(f"channels and stages are {sizes}", "spatial rescaler config", "Use whole numbers.")
        if self.config.method not in METHODS or not 0 < float(self.config.multiplier) <= 1:
            what = f"method {self.config.method!r}, multiplier {self.config.multiplier!r}"
            raise LdmPipeError(what, "spatial rescaler config", f"Known: {METHODS}, multipliers above 0 up to 1.")
        self.channel_mapper: nn.Conv2d | None = None
        if self.config.out_channels:
            self.channel_mapper = nn.Conv2d(self.config.in_channels, self.config.out_channels, 1, bias=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SpatialRescaler:
        """Build with random weights."""
        return cls(config)

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B, K, H, W) to (B, K', h, w)."""
        for _ in range(self.config.num_stages):
            maps = F.interpolate(maps, scale_factor=self.config.multiplier, mode=self.config.method)
        return maps if self.channel_mapper is None else self.channel_mapper(maps)

    def encode(self, maps: Tensor, size: Size | None = None) -> Condition:
        """Encode maps, (B, K, H, W).

        Args:
            size: of the latents; None: whatever comes out.
        Raises: LdmPipeError for other channels, or a map that does not shrink to that size.
        """
        _check_map("map", maps, self.config.in_channels)
        if maps.device.type == "cpu" and self.channel_mapper is not None:
            maps = maps.to(self.channel_mapper.weight)
        spatial = self(maps)
        if size is not None and tuple(spatial.shape[2:]) != tuple(size):
            rows, columns = (
                round(size[0] * maps.shape[2] / spatial.shape[2]),
                size[1] * maps.shape[3] / spatial.shape[3],
            )
            what = f"the map is {maps.shape[2]}x{maps.shape[3]}, the latents are {size[0]}x{size[1]}"
            raise LdmPipeError(what, "SpatialRescaler", f"Give one of {rows}x{round(columns)}.")
        return Condition(spatial=spatial)


def one_hot_map(classes: Tensor, num_classes: int) -> Tensor:
    """Turn a map of class numbers (B, H, W) into channels (B, num_classes, H, W) of 0 and 1.

    Raises: LdmPipeError for numbers out of range.
    """
    if classes.ndim != 3 or classes.is_floating_point():
        raise LdmPipeError(
            f"the map is {classes.dtype} {list(classes.shape)}", "semantic map", "Give integers (B, H, W)."
        )
    low, high = int(classes.min()), int(classes.max())
    if low < 0 or high >= num_classes:
        raise LdmPipeError(f"classes {low} to {high} in the map", "semantic map", f"Known are 0 to {num_classes - 1}.")
    return F.one_hot(classes.long(), num_classes).permute(0, 3, 1, 2).float()


def map_condition(maps: Tensor, size: Size, method: str = "area") -> Condition:
    """Resize a mask or map (B, K, H, W) to the latents and lay it beside them, without weights of its own."""
    _check_map("map", maps, maps.shape[1] if maps.ndim == 4 else 1)
    return Condition(spatial=_resize(maps, size, method))


def depth_condition(depth: Tensor, size: Size) -> Condition:
    """Lay a depth map beside the latents as Stable Diffusion 2's depth model reads it: each from -1 to 1.

    Args:
        depth: of any unit, shape (B, 1, H, W).
        size: of the latents.
    """
    _check_map("depth map", depth, 1)
    small = _resize(depth, size, "bicubic")
    low, high = small.amin(dim=(1, 2, 3), keepdim=True), small.amax(dim=(1, 2, 3), keepdim=True)
    # a flat map has no depth to spread: it becomes -1 everywhere instead of 0 / 0
    spread = torch.where(high > low, high - low, torch.ones_like(low))
    return Condition(spatial=2 * (small - low) / spread - 1)


def sobel_edges(image: Tensor) -> Tensor:
    """Find edges by Sobel's operator on the grey value: (B, 3, H, W) to (B, 1, H, W), 0 to 1 within each picture."""
    _check_map("image", image, 3)
    grey = F.pad(image.mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]).to(image)
    across = F.conv2d(grey, torch.stack([kernel, kernel.T])[:, None])
    size = across.square().sum(dim=1, keepdim=True).sqrt()
    highest = size.amax(dim=(1, 2, 3), keepdim=True)
    return size / torch.where(highest > 0, highest, torch.ones_like(highest))


def low_resolution(
    image: Tensor,
    size: Size,
    *,
    noise_level: Tensor | None = None,
    eps: Tensor | None = None,
    alpha: Tensor | None = None,
    sigma: Tensor | None = None,
) -> Condition:
    """Lay a small picture beside the latents, with noise of a known level (Ho et al. 2021, arXiv:2106.15282, sec. 4).

        spatial = alpha image + sigma eps,    labels = noise level

    Args:
        image: in [-1, 1], shape (B, 3, H, W); resized if it has not the latents' size.
        noise_level: step of the noise schedule, shape (B,); None: no noise, no label.
        eps: unit Gaussian, shape (B, 3, h, w).
        alpha, sigma: of the schedule at noise_level, shape (B,).
    """
    _check_map("image", image, 3)
    small = image if tuple(image.shape[2:]) == tuple(size) else _resize(image, size, "bicubic")
    if noise_level is None:
        return Condition(spatial=small)
    if eps is None or alpha is None or sigma is None or eps.shape != small.shape:
        found = None if eps is None else list(eps.shape)
        what = f"eps is {found}, alpha and sigma {'are missing' if alpha is None or sigma is None else 'are there'}"
        raise LdmPipeError(what, "low_resolution", f"A noise level needs all three, eps {list(small.shape)}.")
    a, s = (value.reshape(-1, 1, 1, 1).to(small) for value in (alpha, sigma))
    return Condition(spatial=a * small + s * eps, labels=noise_level)


def _resize(maps: Tensor, size: Size, method: str) -> Tensor:
    if method not in METHODS:
        raise LdmPipeError(f"method is {method!r}", "spatial condition", f"Known: {METHODS}.")
    return F.interpolate(maps.float(), size=tuple(size), mode=method)


def _check_map(name: str, maps: Tensor, channels: int) -> None:
    if not isinstance(maps, Tensor) or maps.ndim != 4 or maps.shape[1] != channels or 0 in maps.shape:
        found = list(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise LdmPipeError(f"the {name} is {found}", "spatial condition", f"Give a tensor (B, {channels}, H, W).")
    if maps.is_floating_point() and not bool(torch.isfinite(maps).all()):
        raise LdmPipeError(f"NaN or infinity in the {name}", "spatial condition", "Look at where it comes from.")
