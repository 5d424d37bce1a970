"""Images to latents and back: the first stage of latent diffusion (LDM, arXiv:2112.10752)."""

from __future__ import annotations

from autoencoder.discriminator import PatchDiscriminator
from autoencoder.gaussian import DiagonalGaussian
from autoencoder.kl import AutoencoderKL, AutoencoderKLConfig
from autoencoder.losses import (
    AutoencoderLossConfig,
    adaptive_weight,
    adversarial_loss,
    autoencoder_loss,
    discriminator_loss,
    perceptual_distance,
    reconstruction_loss,
)

__all__ = [
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "AutoencoderLossConfig",
    "DiagonalGaussian",
    "PatchDiscriminator",
    "adaptive_weight",
    "adversarial_loss",
    "autoencoder_loss",
    "discriminator_loss",
    "perceptual_distance",
    "reconstruction_loss",
]
