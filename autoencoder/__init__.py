"""Images to latents and back: the first stage of latent diffusion (LDM, arXiv:2112.10752)."""

from __future__ import annotations

from autoencoder.codebook import VQTraining
from autoencoder.config import AutoencoderKLConfig, VQModelConfig
from autoencoder.discriminator import LogitAverages, PatchDiscriminator
from autoencoder.gaussian import DiagonalGaussian
from autoencoder.kl import AutoencoderKL
from autoencoder.loading import Autoencoder, load_autoencoder
from autoencoder.losses import (
    AutoencoderLossConfig,
    adaptive_weight,
    adversarial_loss,
    autoencoder_loss,
    discriminator_loss,
    perceptual_distance,
    quantiser_loss,
    reconstruction_loss,
)
from autoencoder.preview import PreviewDecoder
from autoencoder.quantizer import Quantised
from autoencoder.vq import VQModel

__all__ = [
    "Autoencoder",
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "AutoencoderLossConfig",
    "DiagonalGaussian",
    "LogitAverages",
    "PatchDiscriminator",
    "PreviewDecoder",
    "Quantised",
    "VQModel",
    "VQModelConfig",
    "VQTraining",
    "adaptive_weight",
    "adversarial_loss",
    "autoencoder_loss",
    "discriminator_loss",
    "load_autoencoder",
    "perceptual_distance",
    "quantiser_loss",
    "reconstruction_loss",
]
