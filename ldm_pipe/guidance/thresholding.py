"""Keep the estimate of x0 within the range of the data, for every sampler alike.

Enters: a `Denoise`. Leaves: a `Denoise` whose x0 is clipped or squeezed, in latents or in pixels. This file does not
know samplers: they derive what else they need from x0 (but for DDIM with `keep_eps`, as in diffusers).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from ldm_pipe.denoiser import Denoise, Denoised, parameter_dtype
from ldm_pipe.pretrained import LdmPipeError

Kind = Literal["static", "dynamic"]
Space = Literal["latent", "pixel"]
PERCENTILE = 0.995


class PixelCodec(Protocol):
    """What thresholding in pixels needs of an autoencoder."""

    def decode(self, z: Tensor, /) -> Tensor: ...  # noqa: D102
    def encode(self, image: Tensor, /) -> Tensor: ...  # noqa: D102


def static(x0: Tensor, max_value: float = 1.0) -> Tensor:
    """Clip x0 to [-max_value, max_value] (Saharia et al. 2022, arXiv:2205.11487, section 2.3)."""
    return x0.clamp(-max_value, max_value)


def dynamic(x0: Tensor, percentile: float = PERCENTILE, max_value: float = 1.0, cap: float = math.inf) -> Tensor:
    """Squeeze each sample by its own percentile (Saharia et al. 2022, arXiv:2205.11487, section 2.3).

        s = min(max(percentile of |x0|, max_value), cap),   x0 = clip(x0, -s, s) max_value / s

    Args:
        x0: shape (B, *).
        percentile: in (0, 1].
        max_value: the data live in [-max_value, max_value]: 1 for pixels, several standard deviations for latents.
        cap: the largest s (diffusers' `sample_max_value`); at max_value nothing but the static clip is left.

    Returns: x0 within [-max_value, max_value], shape (B, *).
    """
    # one row at a time: torch.quantile limits its input, and no sample sees its neighbours
    quantiles = torch.stack([torch.quantile(row, percentile) for row in x0.abs().flatten(1)])
    s = quantiles.clamp(max_value, max(cap, max_value)).reshape(-1, *(1,) * (x0.ndim - 1))  # (B, 1, ...)
    return x0.clamp(-s, s) * (max_value / s)


def threshold(
    denoise: Denoise,
    kind: Kind = "dynamic",
    *,
    percentile: float = PERCENTILE,
    max_value: float = 1.0,
    cap: float = math.inf,
    space: Space = "latent",
    autoencoder: PixelCodec | None = None,
) -> Denoise:
    """Threshold the x0 of a denoiser.

    Args:
        denoise: what is thresholded, guidance included.
        kind: "static" or "dynamic"; see the functions of these names.
        percentile: for "dynamic".
        max_value: the data live in [-max_value, max_value].
        cap: for "dynamic".
        space: "latent": x0 as it is; "pixel": x0 is decoded, thresholded and encoded again.
        autoencoder: for "pixel": its decode(z) and encode(image).

    Returns: (x_t, t) -> Denoised.
    """
    _check(kind, percentile, max_value, cap, space, autoencoder)

    def squeeze(x0: Tensor) -> Tensor:
        return static(x0, max_value) if kind == "static" else dynamic(x0, percentile, max_value, cap)

    def thresholded(x_t: Tensor, t: Tensor) -> Denoised:
        estimate = denoise(x_t, t)
        if space == "latent" or autoencoder is None:
            return Denoised(squeeze(estimate.x0), estimate.var_mix, estimate.x0)
        dtype = parameter_dtype(autoencoder, estimate.x0.dtype)
        image = squeeze(autoencoder.decode(estimate.x0.to(dtype)).to(estimate.x0.dtype))
        return Denoised(autoencoder.encode(image.to(dtype)).to(estimate.x0.dtype), estimate.var_mix, estimate.x0)

    return thresholded


def from_config(denoise: Denoise, config: Mapping[str, Any]) -> Denoise:
    """Threshold as a diffusers scheduler config asks for: `thresholding`, else `clip_sample`, else not at all.

    Diffusers' StableDiffusionPipeline turns `clip_sample` off whatever the file says; hide it to do the same.
    """
    if config.get("thresholding"):
        cap = float(config.get("sample_max_value", 1.0))
        return threshold(denoise, "dynamic", percentile=config.get("dynamic_thresholding_ratio", PERCENTILE), cap=cap)
    if config.get("clip_sample"):
        return threshold(denoise, "static", max_value=float(config.get("clip_sample_range", 1.0)))
    return denoise


def _check(
    kind: Kind, percentile: float, max_value: float, cap: float, space: Space, autoencoder: PixelCodec | None
) -> None:
    """Refuse what means nothing and warn of what has no effect."""
    for name, value, allowed in (("kind", kind, get_args(Kind)), ("space", space, get_args(Space))):
        if value not in allowed:
            raise LdmPipeError(f"thresholding {name} is {value!r}", how_to_fix=f"use one of {', '.join(allowed)}")
    if not 0 < percentile <= 1:
        raise LdmPipeError(f"thresholding percentile is {percentile}", how_to_fix="use a number above 0 and up to 1")
    if not 0 < max_value < math.inf:
        raise LdmPipeError(f"thresholding max_value is {max_value}", how_to_fix="use a positive number")
    if not cap > 0:
        raise LdmPipeError(f"thresholding cap is {cap}", how_to_fix="use a number above max_value")
    if space == "pixel" and autoencoder is None:
        raise LdmPipeError("thresholding in pixels without an autoencoder", how_to_fix="pass autoencoder=")
    if space == "latent" and autoencoder is not None:
        _warn("the autoencoder", 'space is "latent"')
    if kind == "static" and percentile != PERCENTILE:
        _warn("percentile", 'kind is "static"')
    if kind == "static" and cap != math.inf:
        _warn("cap", 'kind is "static"')
    if kind == "dynamic" and cap <= max_value:
        _warn("the percentile of dynamic thresholding", f"cap (sample_max_value) {cap:g} leaves only the static clip")


def _warn(setting: str, reason: str) -> None:
    warnings.warn(f"thresholding: {setting} has no effect, because {reason}", UserWarning, stacklevel=4)
