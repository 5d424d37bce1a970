"""The diagonal Gaussian that a KL autoencoder's encoder predicts for each image.

Means and log variances enter; samples, the mode and the divergence from the standard normal leave. Nothing here draws
random numbers: noise is given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOG_VAR_MIN, LOG_VAR_MAX = -30.0, 20.0
"""Beyond these exp() is useless in float32; the limits are those of LDM's code and of diffusers."""


@dataclass(frozen=True)
class DiagonalGaussian:
    """Hold q(z | image) = N(mean, exp(log_var)) (VAE, Kingma & Welling 2014, arXiv:1312.6114, eq. 9).

    Args:
        mean: (B, C, h, w).
        log_var: (B, C, h, w), clamped to [-30, 20].
    """

    mean: Tensor
    log_var: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> DiagonalGaussian:
        """Split (B, 2 C, h, w) into mean and clamped log variance."""
        mean, log_var = moments.chunk(2, dim=1)
        return cls(mean, log_var.clamp(LOG_VAR_MIN, LOG_VAR_MAX))

    def sample(self, noise: Tensor) -> Tensor:
        """Return mean + std * noise (VAE, arXiv:1312.6114, eq. 10).

        Args:
            noise: unit Gaussian, shape of the mean.
        Returns: (B, C, h, w), in the dtype of the mean.
        """
        if noise.shape != self.mean.shape:
            raise ValueError(f"noise of shape {list(noise.shape)}: the latents need {list(self.mean.shape)}")
        return self.mean + torch.exp(0.5 * self.log_var) * noise.to(self.mean)

    def mode(self) -> Tensor:
        """Return the most likely latents, (B, C, h, w)."""
        return self.mean

    def kl(self) -> Tensor:
        """Return the divergence from the standard normal in nats (VAE, arXiv:1312.6114, appendix B).

            KL(q || N(0, 1)) = 1/2 sum(mean^2 + var - 1 - log var)

        Returns: (B,), float32.
        """
        mean, log_var = self.mean.float(), self.log_var.float()
        # expm1, since exp(v) - 1 - v cancels to negative values where v is small.
        return 0.5 * (mean.square() + torch.expm1(log_var) - log_var).flatten(1).sum(1)
