"""Conversions before fine-tuning: a U-Net that fills holes, another prediction, a schedule that ends in pure noise.

What enters: a pipeline and a FinetuneConfig. What leaves: the pipeline with the parts that are to be trained, and the
masks that an inpainting network is shown. This file knows no loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ldm_pipe.networks import UNet
from ldm_pipe.pipelines.latent import LatentDiffusionPipeline
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import NoiseSchedule
from ldm_pipe.training.run.loop import Micro
from ldm_pipe.training.run.rng import batch_uniform
from ldm_pipe.training.tasks.diffusion import PREDICTIONS
from ldm_pipe.training.tasks.finetune.config import FinetuneConfig

WHOLE_SHARE = 0.25  # of the masks hide everything: then it is plain drawing


def convert(pipe: LatentDiffusionPipeline, config: FinetuneConfig) -> LatentDiffusionPipeline:
    """Change U-Net and noise law as the config asks.

    Raises: LdmPipeError where the model cannot be changed so.
    """
    channels = pipe.autoencoder.latent_channels
    if config.inpainting and pipe.unet.config.in_channels == channels:
        pipe.unet = widened(pipe.unet, 2 * channels + 1)
    fills = pipe.unet.config.in_channels == 2 * channels + 1
    if fills != config.inpainting:
        what = f"the U-Net takes {pipe.unet.config.in_channels} channels"
        raise LdmPipeError(what, "config", "Add --inpainting for an inpainting model, and only for one.")
    law = pipe.schedule
    if config.prediction_type is None and not config.zero_terminal_snr:
        return pipe
    if not isinstance(law, NoiseSchedule):
        what = f"prediction_type and zero_terminal_snr change discrete schedules, this model has a {type(law).__name__}"
        raise LdmPipeError(what, "config", "Leave both out.")
    prediction = law.prediction if config.prediction_type is None else PREDICTIONS[config.prediction_type]
    zero = law.zero_terminal_snr or config.zero_terminal_snr
    pipe.schedule = replace(law, prediction=prediction, zero_terminal_snr=zero)
    if zero:  # only "trailing" visits the last level (Lin et al. 2023, arXiv:2305.08891, section 3.3)
        pipe.defaults = replace(pipe.defaults, spacing="trailing")
    return pipe


@torch.no_grad()
def widened(unet: UNet, in_channels: int) -> UNet:
    """Return the same network with more input channels, which change nothing yet: their weights are zero."""
    tensors = dict(unet.state_dict())
    old = tensors["conv_in.weight"]
    tensors["conv_in.weight"] = torch.cat([old, old.new_zeros(len(old), in_channels - old.shape[1], *old.shape[2:])], 1)
    wide = UNet.from_config({**unet.config, "in_channels": in_channels})
    wide.load_state_dict(tensors)
    return wide.eval()


def random_masks(seed: int, micro: Micro, shape: Sequence[int]) -> Tensor:
    """Draw the masks of a slice, keyed by (seed, step, position): 1 where a picture is hidden, (B, 1, H, W)."""
    draws = batch_uniform(6, seed, "mask", micro.step, positions=micro.positions)
    return torch.stack([random_mask(row, *shape) for row in draws])


def random_mask(draws: Tensor, height: int, width: int) -> Tensor:
    """Hide a rectangle or an ellipse of a picture, or now and then all of it.

    Args:
        draws: six uniforms in [0, 1): whether all, which form, sides, place from the top and from the left.
        height, width: of the picture in pixels.
    Returns: 1 where it is hidden, shape (1, height, width).
    """
    whole, form, *rest = draws.tolist()
    if whole < WHOLE_SHARE:
        return torch.ones(1, height, width)
    high, wide = ((0.2 + 0.6 * value) * side for value, side in zip(rest[:2], (height, width), strict=True))
    top, left = rest[2] * (height - high), rest[3] * (width - wide)
    down = ((torch.arange(height)[:, None] + 0.5 - top) * 2 / high - 1).abs()  # 1 at the edge of the form
    across = ((torch.arange(width)[None] + 0.5 - left) * 2 / wide - 1).abs()
    inside = (torch.maximum(down, across) if form < 0.5 else down.square() + across.square()) <= 1
    return inside.float()[None]
