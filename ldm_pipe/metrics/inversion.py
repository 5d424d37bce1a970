"""How exactly DDIM inversion finds the way back: from a picture to noise and down again.

What enters: a pipeline and prompts. What leaves: numbers per picture. No guidance on either way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor

from ldm_pipe.data.images import to_tensor
from ldm_pipe.metrics.images import psnr
from ldm_pipe.pipelines.latent import LatentDiffusionPipeline


@dataclass(frozen=True)
class InversionReport:
    """What one setting of the inversion gave, one number per picture.

    Attributes:
        latent_rmse: root mean square difference of the latents from those the autoencoder gave.
        psnr: of the decoded pictures, dB, against what the autoencoder makes of the pictures.
        picture_psnr: against the pictures themselves: what the autoencoder loses is in it.
        noise_std: standard deviation of the noise found; 1 for noise as the model knows it.
        images: the pictures after both ways.
    """

    latent_rmse: Tensor
    psnr: Tensor
    picture_psnr: Tensor
    noise_std: Tensor
    images: list[Image]


@torch.no_grad()
def inversion_psnr(pipe: LatentDiffusionPipeline, wanted: Tensor, got: Tensor) -> Tensor:
    """Return the PSNR of pictures decoded from latents against those decoded from others, dB, shape (B,)."""
    with pipe.on_device(pipe.autoencoder):
        images = [pipe.autoencoder.decode(z.to(pipe.autoencoder.dtype)).float() for z in (wanted, got)]
    return psnr(*images)


def measure_inversion(
    pipe: LatentDiffusionPipeline,
    images: list[Image],
    prompts: list[str],
    *,
    num_steps: int = 50,
    num_refinements: int = 0,
    spacing: str | None = None,
) -> InversionReport:
    """Invert pictures and draw them again, num_steps up and as many down, with DDIM and without guidance.

    Args:
        images: B pictures of one size.
        prompts: B texts, told on both ways.
    """
    call = {"num_inference_steps": num_steps, "spacing": spacing, "guidance_scale": 1.0}
    found = pipe.invert(images, prompts, num_refinements=num_refinements, **call)
    back = pipe(prompts, latents=found.latents, sampler="ddim", return_latents=True, seed=0, **call)
    difference = (back.latents - found.encoded).flatten(1)
    return InversionReport(
        latent_rmse=difference.square().mean(1).sqrt(),
        psnr=inversion_psnr(pipe, found.encoded, back.latents),
        picture_psnr=psnr(*(torch.stack([to_tensor(one) for one in side]) for side in (images, back.images))),
        noise_std=found.latents.flatten(1).std(1),
        images=back.images,
    )
