"""Check what a call starts from: pictures, masks, or latents.

What enters: what the caller gave. What leaves: tensors, one per picture to draw, or one LdmPipeError. This file runs no
network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ldm_pipe.drawing.output import MAX_SIDE, real_number, warn_ignored, whole_number
from ldm_pipe.drawing.request.shared import or_default
from ldm_pipe.pretrained import LdmPipeError

if TYPE_CHECKING:
    from ldm_pipe.pipelines.latent import LatentDiffusionPipeline


def check_latent_image(
    pipe: LatentDiffusionPipeline, given: Mapping[str, Any], count: int, num_prompts: int, *, handed_over: bool
) -> tuple[Mapping[str, Any], Tensor | None]:
    """Tell latents given as `image`, as to diffusers' refiner, from pictures: by the number of their channels.

    Returns: the arguments without them, and clean latents of every picture; those handed over become `latents`.
    """
    value, channels = given["image"], pipe.autoencoder.latent_channels
    if not isinstance(value, Tensor) or value.ndim != 4 or value.shape[1] != channels or channels == 3:
        return _check_handed_over(given, None) if handed_over else given, None
    for name in ("mask_image", "latents"):
        if given[name] is not None:
            raise LdmPipeError(f"{name} beside latents as image", how_to_fix=f"give a picture as image, or no {name}")
    given, latents = {**given, "image": None}, _repeat("image", value, count, num_prompts)
    return (_check_handed_over(given, latents), None) if handed_over else (given, latents)


def _check_handed_over(given: Mapping[str, Any], z0: Tensor | None) -> Mapping[str, Any]:
    """Check the latents that `denoising_start` goes on from, and return the arguments with them as `latents`."""
    for name in ("image", "mask_image", "strength"):
        if given[name] is not None:
            advice = f"leave {name} out: it goes on from the latents of another model's denoising_end"
            raise LdmPipeError(f"{name} beside denoising_start", how_to_fix=advice)
    latents = given["latents"] if z0 is None else z0
    if latents is None:
        advice = 'give latents of another model: base(prompt, denoising_end=..., output_type="latent").images'
        raise LdmPipeError("denoising_start without latents", how_to_fix=advice)
    return {**given, "latents": latents}


def check_pictures(
    pipe: LatentDiffusionPipeline, given: Mapping[str, Any], count: int, num_prompts: int, z0: Tensor | None
) -> tuple[Tensor | None, Tensor | None, float]:
    """Read `image` and `mask_image` and repeat them for every picture to draw."""
    from ldm_pipe.drawing.pixels import load_images, load_masks

    inpainting = given["mask_image"] is not None
    strength = real_number("strength", or_default(given["strength"], 1.0 if inpainting else 0.8), 0.0, 1.0)
    if not inpainting and pipe.paints:
        what = f"the U-Net takes {pipe.unet.config.in_channels} channels: it paints into pictures"
        raise LdmPipeError(what, how_to_fix="give image and mask_image")
    if given["image"] is None:
        if inpainting:
            raise LdmPipeError("mask_image without image", how_to_fix="give the picture to paint into as image")
        if given["strength"] is not None and z0 is None:
            warn_ignored("strength", "it needs an image")
        return None, None, 1.0 if z0 is None else strength
    size = None
    if given["height"] is not None or given["width"] is not None:
        default = pipe.default_size
        size = (
            whole_number("height", or_default(given["height"], default[0]), 1, MAX_SIDE),
            whole_number("width", or_default(given["width"], default[1]), 1, MAX_SIDE),
        )
    image = _repeat("image", load_images(given["image"], size), count, num_prompts)
    if given["latents"] is not None and not inpainting:
        raise LdmPipeError(
            "both of image and latents given", how_to_fix="give one of them: image starts from its own latents"
        )
    if not inpainting:
        return image, None, strength
    mask = _repeat("mask_image", load_masks(given["mask_image"], size), count, num_prompts)
    if mask.shape[2:] != image.shape[2:]:
        sizes = f"mask_image is {mask.shape[3]}x{mask.shape[2]}, image {image.shape[3]}x{image.shape[2]}"
        raise LdmPipeError(sizes, how_to_fix="give the same size, or height and width")
    return image, mask, strength


def _repeat(name: str, batch: Tensor, count: int, num_prompts: int) -> Tensor:
    """Repeat one picture for all, or one per prompt for each of its pictures."""
    if batch.shape[0] == count:
        return batch
    if batch.shape[0] not in (1, num_prompts):
        what = f"{batch.shape[0]} pictures in {name} for {num_prompts} prompts"
        raise LdmPipeError(what, how_to_fix="give one for all, or one for each")
    return batch.repeat_interleave(count // batch.shape[0], dim=0)
