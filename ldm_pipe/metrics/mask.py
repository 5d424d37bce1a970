"""How well drawings keep to the masks they were asked for: intersection over union of outlines.

What enters: a pipeline that takes maps, prompts and masks; drawings on white. What leaves: numbers and the pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_pipe.pipelines.latent import LatentDiffusionPipeline

WHITE = 0.9  # the autoencoder gives plain white back to about 0.03


def filled(shape: Tensor) -> Tensor:
    """Fill the holes of shapes: what no way from the border reaches belongs to them.

    Args:
        shape: booleans, (B, H, W); a way leads over False, to the four neighbours of a pixel.
    """
    free = F.pad((~shape).float(), (1, 1, 1, 1), value=1.0)[:, None]  # (B, 1, H + 2, W + 2)
    reached = F.pad(torch.zeros_like(shape, dtype=torch.float32), (1, 1, 1, 1), value=1.0)[:, None]
    while True:
        across, down = (F.max_pool2d(reached, size, 1, pad) for size, pad in (((1, 3), (0, 1)), ((3, 1), (1, 0))))
        grown = torch.maximum(across, down) * free
        if torch.equal(grown, reached):
            return reached[:, 0, 1:-1, 1:-1] == 0
        reached = grown


def outlines(images: Tensor, white: float = WHITE) -> Tensor:
    """Tell what of drawings stands out from their white background, white parts inside included: (B, H, W).

    Args:
        images: in [0, 1], shape (B, 3, H, W).
        white: every channel of the background is at least this.
    """
    return filled((images < white).any(dim=1))


def mask_iou(first: Tensor, second: Tensor) -> Tensor:
    """Return |A and B| / |A or B| of shapes (Jaccard 1912), (B,); 1 where both are empty.

    Args:
        first, second: booleans, (B, H, W).
    """
    both, either = ((first & second).sum(dim=(1, 2)), (first | second).sum(dim=(1, 2)))
    return torch.where(either > 0, both / either.clamp(min=1), torch.ones_like(both, dtype=torch.float32))


@dataclass(frozen=True)
class MaskReport:
    """Mean intersection over union, and the pictures (N, 3, H, W) in [0, 1].

    Attributes:
        own: each prompt drawn in the mask of its own drawing.
        swapped: each prompt in the mask of the next.
        unasked: drawn without a mask, against the mask of its own drawing.
        chance: masks of different drawings with each other.
    """

    own: float
    swapped: float
    unasked: float
    chance: float
    own_images: Tensor
    swapped_images: Tensor


def measure_masks(
    pipe: LatentDiffusionPipeline,
    prompts: list[str],
    masks: Tensor,
    *,
    guidance_scale: float,
    num_inference_steps: int,
    batch_size: int = 20,
    seed: int = 0,
) -> MaskReport:
    """Draw every prompt in its own mask, in that of the next one, and in none.

    Args:
        masks: from 0 to 1, at the size of the pictures, shape (N, 1, H, W).
    """
    call = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps, "output_type": "pt"}

    def drawn(maps: Tensor | None) -> Tensor:
        parts = []
        for first in range(0, len(prompts), batch_size):
            rows = slice(first, first + batch_size)
            given = {} if maps is None else {"spatial": maps[rows]}
            parts.append(pipe(prompts[rows], seed=[seed] * len(prompts[rows]), **given, **call).images)
        return torch.cat(parts)

    turned = masks.roll(-1, dims=0)
    own, swapped, unasked = drawn(masks), drawn(turned), drawn(None)
    wanted, other = (filled(maps[:, 0] >= 0.5) for maps in (masks, turned))
    pairs = ((outlines(own), wanted), (outlines(swapped), other), (outlines(unasked), wanted), (other, wanted))
    means = [float(mask_iou(*pair).mean()) for pair in pairs]
    return MaskReport(*means, own_images=own, swapped_images=swapped)
