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
    """Read the user's masks: white (at least one half) is drawn anew, black is kept.

    Returns: (B, 1, H, W) of 0 and 1, float32.
    """
    import numpy as np
    from PIL import Image as pil

    from ldm_pipe.data.images import open_image

    def from_pil(image: Image | str | Path) -> Tensor:
        picture = open_image(image).convert("L")
        if size is not None and picture.size != (size[1], size[0]):
            picture = picture.resize((size[1], size[0]), pil.Resampling.NEAREST)
        return torch.from_numpy(np.array(picture, dtype=np.float32) / 255)[None, None]  # (1, 1, H, W)

    return (_load("mask_image", value, 1, from_pil, size) >= 0.5).float()


def load_maps(value: Any, channels: int, name: str = "spatial") -> Tensor:
    """Read the user's maps: pictures in grey (1 channel) or colour (3), arrays (H, W, K), tensors (K, H, W).

    Returns: (B, channels, H, W) in [0, 1], float32.
    """
    import numpy as np

    from ldm_pipe.data.images import open_image

    def from_pil(image: Image | str | Path) -> Tensor:
        if channels not in (1, 3):
            raise LdmPipeError(f"{name} is a picture", how_to_fix=f"this model takes tensors ({channels}, H, W)")
        picture = open_image(image).convert("L" if channels == 1 else "RGB")
        array = np.array(picture, dtype=np.float32).reshape(picture.height, picture.width, channels)
        return torch.from_numpy(array / 255).permute(2, 0, 1)[None]  # (1, K, H, W)

    return _load(name, value, channels, from_pil, None)


def _load(
    name: str, value: Any, channels: int, from_pil: Callable[..., Tensor], size: tuple[int, int] | None
) -> Tensor:
    """Read one or several pictures to (B, channels, H, W)."""
    if isinstance(value, (list, tuple)):
        if not value:
            raise LdmPipeError(f"{name} is an empty list", how_to_fix=f"give {IMAGE_KINDS}")
        parts = [_load(name, item, channels, from_pil, size) for item in value]
        if len({part.shape[1:] for part in parts}) > 1:
            sizes = sorted({f"{part.shape[3]}x{part.shape[2]}" for part in parts})
            raise LdmPipeError(f"{name}: pictures of different sizes {sizes}", how_to_fix="give height and width")
        return torch.cat(parts)
    if isinstance(value, (str, Path)) or hasattr(value, "getbands"):
        return from_pil(value)
    tensor = _from_array(name, value, channels)
    if size is not None and tuple(tensor.shape[2:]) != size:
        method = (
            {"mode": "nearest"} if channels == 1 else {"mode": "bilinear", "antialias": True, "align_corners": False}
        )
        tensor = torch.nn.functional.interpolate(tensor, size=size, **method)  # type: ignore[arg-type]
    return tensor


def _from_array(name: str, value: Any, channels: int) -> Tensor:
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
        tensor = torch.from_numpy(np.array(array))  # a copy: it may be read-only
        tensor = tensor.permute(0, 3, 1, 2) if tensor.ndim == 4 else tensor
    else:
        raise LdmPipeError(f"{name} is a {type(value).__name__}", how_to_fix=f"give {IMAGE_KINDS}")
    if tensor.ndim != 4 or tensor.shape[1] != channels or 0 in tensor.shape:
        kinds = IMAGE_KINDS.replace("3", str(channels))
        raise LdmPipeError(f"{name}: shape {tuple(value.shape)}", how_to_fix=f"give {kinds}")
    scaled = tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor.float()
    if not bool(torch.isfinite(scaled).all()) or scaled.min() < 0 or scaled.max() > 1:
        what = f"{name}: values from {scaled.min():g} to {scaled.max():g}"
        raise LdmPipeError(what, how_to_fix="give values in [0, 1] (image / 2 + 0.5 maps from [-1, 1]), or uint8")
    return scaled


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
