"""The one choice of guidance of a call: the caller's own, else classifier-free guidance.

Enters: a `Denoiser`, conditions with their weights, and an unconditional one. Leaves: a `Denoise`. This file does not
know samplers or how conditions are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldm_pipe.denoiser import Denoise, Denoiser
from ldm_pipe.guidance.classifier_free import cfg
from ldm_pipe.guidance.composed import composed
from ldm_pipe.guidance.pair import Guidance


def guide(
    denoiser: Denoiser,
    conds: Sequence[Any],
    weights: Tensor | None,
    uncond: Any,
    scale: float,
    *,
    rescale: float = 0.0,
    guidance: Guidance | None = None,
) -> Denoise:
    """Guide a denoiser, as the caller chose.

    Args:
        denoiser: the model.
        conds: K conditions of B rows each; K is 1 but for prompts with branches.
        weights: of the branches, shape (K, B); None: one condition of weight 1.
        uncond: empty or negative condition, B rows; None where nothing is guided and nothing branches.
        scale: w; up to 1 there is no guidance, as in diffusers.
        rescale: see `cfg`.
        guidance: called as (denoiser, conds, weights, uncond) -> Denoise, with a scale of its own; None:
            `cfg`, or `composed` where the prompt has branches.

    Returns: (x_t, t) -> Denoised.
    """
    if guidance is not None:
        ones = torch.ones(len(conds), conds[0].batch_size) if weights is None else weights
        return guidance(denoiser, conds, ones, uncond)
    if weights is not None:
        return composed(denoiser, conds, weights, uncond, max(scale, 1.0), rescale=rescale if scale > 1 else 0.0)
    if uncond is None or scale <= 1:
        return cfg(denoiser, conds[0], None, 1.0)
    return cfg(denoiser, conds[0], uncond, scale, rescale=rescale)
