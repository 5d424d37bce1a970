"""What only training knows of a codebook: how often codes are used, averages that move them, and their revival.

Counts and sums of the latents of each code enter after every step, from all processes; the codebook moves. Who gathers
them, and when, is not known here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autoencoder.quantizer import Quantised
from autoencoder.vq import VQModel
from ldm_pipe.pretrained import LdmPipeError


class VQTraining(nn.Module):
    """Wrap a `VQModel` for training; what resuming needs beyond its weights lies in buffers.

    Args:
        autoencoder: with `ema`, its codebook becomes a buffer.
        ema: move the codebook by averages instead of gradients (VQ-VAE, arXiv:1711.00937, appendix A.1).
        decay: of the averages of use (and with `ema` of the codes), per step.
        dead_below: a code whose average use is less than this part of the mean use is dead; 0: none ever is.
    """

    usage: Tensor
    sums: Tensor

    def __init__(self, autoencoder: VQModel, *, ema: bool, decay: float = 0.99, dead_below: float = 0.03) -> None:
        super().__init__()
        if not 0.0 <= decay < 1.0 or not 0.0 <= dead_below < 1.0:
            what = f"decay {decay}, dead_below {dead_below}"
            raise LdmPipeError(what, "codebook", "Both must be at least 0 and below 1.")
        self.autoencoder, self.ema, self.decay, self.dead_below = autoencoder, ema, decay, dead_below
        if ema:
            autoencoder.quantize.keep_from_optimiser()
        weight = autoencoder.quantize.weight
        self.register_buffer("usage", weight.new_zeros(len(weight)))
        self.register_buffer("sums", torch.zeros_like(weight) if ema else None)

    def forward(self, image: Tensor, shrink: int = 1) -> tuple[Tensor, Quantised]:
        """Reconstruct an image, see `VQModel.forward`."""
        return self.autoencoder(image, shrink)

    @torch.no_grad()
    def count(self, quantised: Quantised) -> tuple[Tensor, Tensor]:
        """Return how often each code was chosen, (K,), and the sum of its latents, (K, D)."""
        weight, indices = self.autoencoder.quantize.weight, quantised.indices.flatten()
        counts = torch.bincount(indices, minlength=len(weight)).to(weight)
        sums = torch.zeros_like(weight).index_add_(0, indices, quantised.raw.movedim(1, -1).flatten(0, 2).to(weight))
        return counts, sums

    @torch.no_grad()
    def update(self, counts: Tensor, sums: Tensor) -> None:
        """Follow one step (VQ-VAE, van den Oord et al. 2017, arXiv:1711.00937, eq. 6 to 8).

            N_k <- d N_k + (1 - d) n_k,   m_k <- d m_k + (1 - d) sum of its latents,   e_k = m_k / N_k

        Args:
            counts: (K,), of the whole batch.
            sums: (K, D), of the whole batch; only used with `ema`.
        """
        self.usage.lerp_(counts, 1.0 - self.decay)
        if self.ema:
            self.sums.lerp_(sums, 1.0 - self.decay)
            chosen = self.usage > 1e-12  # below, the quotient is rounding
            means = self.sums / self.usage.clamp_min(1e-12)[:, None]
            self.autoencoder.quantize.weight.copy_(
                torch.where(chosen[:, None], means, self.autoencoder.quantize.weight)
            )

    @torch.no_grad()
    def revive(self, vectors: Tensor, generator: torch.Generator) -> Tensor:
        """Move dead codes to latents of the batch, drawn without repetition (Jukebox, arXiv:2005.00341, section 3.1).

        Args:
            vectors: latents to choose from, (N, D).
            generator: on the CPU; the same in all processes.
        Returns: the numbers of the codes that were moved, (n,).
        """
        mean = self.usage.mean()
        dead = (self.usage < self.dead_below * mean).nonzero().flatten()
        dead = dead[: len(vectors)]
        rows = torch.randperm(len(vectors), generator=generator)[: len(dead)].to(vectors.device)
        weight = self.autoencoder.quantize.weight
        weight[dead] = vectors[rows].to(weight)
        self.usage[dead] = mean  # time to be chosen before it counts as dead again
        if self.ema:
            self.sums[dead] = weight[dead] * mean
        return dead
