"""The border between the pipeline and its user's pictures: PIL, numpy, paths and tensors in, the same out.

Inside, pictures are tensors (B, 3, H, W) and masks (B, 1, H, W) of 0 (keep) and 1 (draw anew). This file knows no
latents and no networks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm_pipe.pretrained import LdmPipeError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

IMAGE_KINDS = (
    "a PIL picture, a path, an array (H, W, 3) or (B, H, W, 3), a tensor (3, H, W) or (B, 3, H, W), or a list of them"
)


def load_images(value: Any, size: tuple[int, int] | None = None) -> Tensor:
    """Read the user's pictures.

    Args:
        value: see IMAGE_KINDS; arrays and tensors hold [0, 1], or 0..255 in uint8.
        size: (height, width) to bring them to; None keeps their own.
    Returns: (B, 3, H, W) in [0, 1], float32. 8-bit values survive the way back exactly.
    Raises: LdmPipeError if they cannot be read or differ in size.
    """
    import numpy as np
    from PIL import Image as pil

    from ldm_pipe.data.images import open_image

    def from_pil(image: Image | str | Path) -> Tensor:
        picture = open_image(image)
        if size is not None and picture.size != (size[1], size[0]):
            picture = picture.resize((size[1], size[0]), pil.Resampling.LANCZOS)
        return torch.from_numpy(np.array(picture, dtype=np.float32) / 255).permute(2, 0, 1)[None]  # (1, 3, H, W)

    return _load("image", value, 3, from_pil, size).contiguous()


def load_masks(value: Any, size: tuple[int, int] | None = None) -> Tensor:
    """Read the user's masks: white (at least one half) is drawn anew, black and what is transparent is kept.

    Returns: (B, 1, H, W) of 0 and 1, float32.
    Raises: LdmPipeError also for a mask that has brighter parts, of which none is white.
    """
    import numpy as np
    from PIL import Image as pil

    def from_pil(image: Image | str | Path) -> Tensor:
        unit = _mask_of_picture(image)
        if size is not None and unit.shape != size:
            unit = np.asarray(pil.fromarray(unit).resize((size[1], size[0]), pil.Resampling.NEAREST))
        return torch.from_numpy(np.array(unit))[None, None]  # (1, 1, H, W)

    unit = _load("mask_image", value, 1, from_pil, size, _white_is_largest)
    for one in unit:
        if 0 < one.max() < 0.5:
            what = f"mask_image: its brightest part is {one.max():.3g} of white, so that nothing would be drawn anew"
            raise LdmPipeError(what, how_to_fix="make white what is to be drawn anew: at least one half")
    return (unit >= 0.5).float()


def _mask_of_picture(source: Image | str | Path) -> np.ndarray:
    """Read a mask that is a picture to (H, W) in [0, 1], float32; transparent parts count as black."""
    import numpy as np

    from ldm_pipe.data.images import open_image, open_lazily

    image = source if hasattr(source, "getbands") else open_lazily(source)
    grey = np.asarray(open_image(image, background=(0, 0, 0)).convert("L"))
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.int64)
        deep[deep == image.info.get("transparency", -1)] = 0
        return _white_is_largest("mask_image", torch.from_numpy(deep)).numpy()
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        shades = set(np.asarray(rgba.convert("L"))[np.asarray(rgba)[..., 3] == 255].tolist())
        whole = np.asarray(rgba)[..., 3].min() == 255
        if not whole and (grey.max() < 128 or (len(shades) > 1 and not shades <= {0, 255})):
            what = "mask_image tells its shape by transparency, which some read as keep and some as draw anew"
            fix = "give mask.getchannel('A') where the opaque is drawn anew, or ImageOps.invert of it"
            raise LdmPipeError(what, how_to_fix=fix)
    return _white_is_largest("mask_image", torch.from_numpy(np.array(grey))).numpy()


def _white_is_largest(name: str, values: Tensor) -> Tensor:
    """Bring a mask to [0, 1]; whole numbers tell by the largest of them what white is: 1, 255, or the 65535 of 16 bits.

    So a mask of 0 and 1 in 8 bits paints what it says, not nothing.
    """
    if values.is_floating_point() or values.dtype == torch.bool:
        return values.float()
    numbers = values.double()
    largest = float(numbers.max())
    white = next((white for white in (1, 255, 65535) if largest <= white), None)
    if white is None or numbers.min() < 0:
        what = f"{name}: whole numbers from {numbers.min():g} to {largest:g}"
        raise LdmPipeError(what, how_to_fix="give 0 and 1, or 0 to 255")
    return (numbers / white).float()


def _eight_bits(name: str, values: Tensor) -> Tensor:
    """Bring bytes to [0, 1]; other numbers are there already."""
    return values.float() / 255 if values.dtype == torch.uint8 else values.float()


def load_maps(value: Any, channels: int, name: str = "spatial") -> Tensor:
    """Read the user's maps: pictures in grey (1 channel) or colour (3), arrays (H, W, K), tensors (K, H, W).

    Returns: (B, channels, H, W) in [0, 1], float32.
    Raises: LdmPipeError also for bytes of 0 and 1, which mean nearly black here and a mask to their user.
    """
    import numpy as np

    from ldm_pipe.data.images import open_image, open_lazily

    what = f"{name} is nearly black: it holds 0 and 1 of 255, or no more than 255 of the 65535 of deep pictures"
    too_dark = LdmPipeError(what, how_to_fix="stretch it to white, or give numbers in [0, 1] as float")

    def from_pil(image: Image | str | Path) -> Tensor:
        if channels not in (1, 3):
            raise LdmPipeError(f"{name} is a picture", how_to_fix=f"this model takes tensors ({channels}, H, W)")
        picture = open_image(image).convert("L" if channels == 1 else "RGB")
        source = image if hasattr(image, "getbands") else open_lazily(image)
        if source.mode.startswith("I") and 0 < np.asarray(source).max() < 256:
            raise too_dark
        array = np.array(picture, dtype=np.uint8).reshape(picture.height, picture.width, channels)
        return scaled(name, torch.from_numpy(array)).permute(2, 0, 1)[None]  # (1, K, H, W)

    def scaled(name: str, values: Tensor) -> Tensor:
        if values.dtype == torch.uint8 and values.numel() and values.max() == 1:
            raise too_dark
        return _eight_bits(name, values)

    return _load(name, value, channels, from_pil, None, scaled)


def _load(
    name: str,
    value: Any,
    channels: int,
    from_pil: Callable[..., Tensor],
    size: tuple[int, int] | None,
    scaled: Callable[[str, Tensor], Tensor] = _eight_bits,
) -> Tensor:
    """Read one or several pictures to (B, channels, H, W); `scaled` brings the numbers of arrays to [0, 1]."""
    if isinstance(value, (list, tuple)):
        if not value:
            raise LdmPipeError(f"{name} is an empty list", how_to_fix=f"give {IMAGE_KINDS}")
        parts = [_load(name, item, channels, from_pil, size, scaled) for item in value]
        if len({part.shape[1:] for part in parts}) > 1:
            sizes = sorted({f"{part.shape[3]}x{part.shape[2]}" for part in parts})
            raise LdmPipeError(f"{name}: pictures of different sizes {sizes}", how_to_fix="give height and width")
        return torch.cat(parts)
    if isinstance(value, (str, Path)) or hasattr(value, "getbands"):
        return from_pil(value)
    tensor = _from_array(name, value, channels, scaled)
    if size is not None and tuple(tensor.shape[2:]) != size:
        method = (
            {"mode": "nearest"} if channels == 1 else {"mode": "bilinear", "antialias": True, "align_corners": False}
        )
        tensor = torch.nn.functional.interpolate(tensor, size=size, **method)  # type: ignore[arg-type]
    return tensor


def _from_array(name: str, value: Any, channels: int, scaled: Callable[[str, Tensor], Tensor]) -> Tensor:
    """Read a tensor (channels first) or an array (channels last) to (B, channels, H, W) in [0, 1]."""
    if isinstance(value, Tensor):
        tensor = value.detach().cpu()
        tensor = tensor[None, None] if tensor.ndim == 2 and channels == 1 else tensor
        tensor = tensor[None] if tensor.ndim == 3 else tensor
    elif hasattr(value, "__array_interface__"):
        import numpy as np

        array = np.asarray(value)
        if array.dtype.kind not in "buif":
            raise LdmPipeError(f"{name}: an array of {array.dtype}", how_to_fix=f"give {IMAGE_KINDS}")
        array = array[..., None] if array.ndim == 2 and channels == 1 else array
        array = array[None] if array.ndim == 3 else array
        kept = array.dtype if array.dtype.itemsize <= 8 else np.dtype(np.float64)
        tensor = torch.from_numpy(np.array(array, dtype=kept.newbyteorder("=")))  # a copy: it may be read-only
        tensor = tensor.permute(0, 3, 1, 2) if tensor.ndim == 4 else tensor
    else:
        raise LdmPipeError(f"{name} is a {type(value).__name__}", how_to_fix=f"give {IMAGE_KINDS}")
    if tensor.ndim != 4 or tensor.shape[1] != channels or 0 in tensor.shape:
        kinds = IMAGE_KINDS.replace("3", str(channels))
        raise LdmPipeError(f"{name}: shape {tuple(value.shape)}", how_to_fix=f"give {kinds}")
    if tensor.is_complex():
        raise LdmPipeError(f"{name}: complex numbers", how_to_fix=f"give {IMAGE_KINDS}")
    unit = scaled(name, tensor)
    if not bool(torch.isfinite(unit).all()) or unit.min() < 0 or unit.max() > 1:
        what = f"{name}: values from {unit.min():g} to {unit.max():g}"
        raise LdmPipeError(what, how_to_fix="give values in [0, 1] (image / 2 + 0.5 maps from [-1, 1]), or uint8")
    return unit


def give_images(
    image: Tensor, output_type: str, known: Tensor | None = None, mask: Tensor | None = None
) -> list[Image] | np.ndarray | Tensor:
    """Turn pictures (B, 3, H, W) in [-1, 1] into what `output_type` names, known pixels pasted back.

    Args:
        known: pictures in [0, 1], (B, 3, H, W), kept wherever `mask`, (B, 1, H, W), is 0.
    Raises: LdmPipeError on NaN or infinity, instead of black pictures.
    """
    if not bool(torch.isfinite(image).all()):
        what = "the decoded picture holds NaN or infinity"
        raise LdmPipeError(what, "autoencoder", "Decode in float32 or bfloat16: pipe.autoencoder.to(torch.float32).")
    unit = (image.float() / 2 + 0.5).clamp(0, 1)
    if known is not None and mask is not None:
        unit = torch.where(mask.to(unit.device) >= 0.5, unit, known.to(unit.device))
    if output_type == "pt":
        return unit
    array = unit.cpu().permute(0, 2, 3, 1).numpy()  # (B, H, W, 3)
    if output_type == "np":
        return array
    from PIL import Image as pil

    return [pil.fromarray(one) for one in (array * 255).round().astype("uint8")]
