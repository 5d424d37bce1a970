"""`VQModel`: images to normalised latents and back, through a codebook that belongs to the decoder.

Images in [-1, 1] enter `encode` and normalised latents leave, not yet quantised: diffusion runs on those. `decode`
quantises first (LDM, Rombach et al. 2022, arXiv:2112.10752, section 3.1: "the quantization layer absorbed by the
decoder"). Config fields and weight names are those of diffusers' class of this name. Training is in losses.py and
codebook.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoder.config import VQModelConfig, check, is_finite, is_positive, read_fields
from autoencoder.gaussian import LOG_VAR_MIN, DiagonalGaussian
from autoencoder.halves import Halves, TwoHalves, check_image, check_latents
from autoencoder.networks import Decoder, Encoder
from autoencoder.quantizer import Quantised, VectorQuantizer
from ldm_pipe.pretrained import LdmPipeError, PretrainedModule


class VQModel(TwoHalves, PretrainedModule):
    """Encode images to normalised latents; quantise and decode them (VQGAN, arXiv:2012.09841; LDM, arXiv:2112.10752).

    Args:
        config: the fields that shape the network.
        extra: fields of a config file that are not ours; kept in `.config` and written again.
    """

    class_name = "VQModel"
    _fields: VQModelConfig

    def __init__(self, config: VQModelConfig, extra: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        shape = (config.block_out_channels, config.layers_per_block, config.norm_num_groups, config.act_fn)
        attention, channels = config.mid_block_add_attention, config.latent_channels
        self.encoder = Encoder(config.in_channels, channels, *shape, mid_attention=attention)
        self.quant_conv = nn.Conv2d(channels, config.dim, 1)
        self.quantize = VectorQuantizer(config.num_vq_embeddings, config.dim)
        self.post_quant_conv = nn.Conv2d(config.dim, channels, 1)
        self.decoder = Decoder(channels, config.out_channels, *shape, mid_attention=attention)
        self._set_config(config, extra or {})
        self._halves = Halves(self.factor, config.force_upcast)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> VQModel:
        """Build an autoencoder with random weights from a diffusers config; a missing `scaling_factor` is 1.

        Raises: LdmPipeError naming the field and what is allowed.
        """
        known, extra = read_fields(config, VQModelConfig)
        return cls(VQModelConfig(**known), extra)

    # What the config says

    @property
    def latent_channels(self) -> int:
        """Return the channels of z (the config's `vq_embed_dim`, which may be missing)."""
        return self._fields.dim

    @property
    def num_codes(self) -> int:
        """Return the number of codebook vectors."""
        return self._fields.num_vq_embeddings

    @property
    def shift_factor(self) -> float:
        """Return 0: a shift is folded into the weights."""
        return 0.0

    # The two ways

    def encode_moments(self, image: Tensor) -> DiagonalGaussian:
        """Return the raw latents as a Gaussian without width (log variance -30), before normalisation.

        Args:
            image: (B, 3, H, W) in [-1, 1]; sides are multiples of the factor.
        Returns: Gaussian of shape (B, C, H / f, W / f).
        Raises: LdmPipeError if the size does not fit, or if numbers overflow and float32 does not cure it.
        """
        check_image(image, self._fields.in_channels, self.factor)
        build = self._halves.encoder(self.encoder, self.quant_conv)
        raw = self._halves.run(build, image, "the encoded image", self.dtype, training=self.training)
        return DiagonalGaussian(raw, torch.full_like(raw, LOG_VAR_MIN))

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Map an image to normalised latents z = raw * scaling_factor, not quantised.

        Args:
            image: (B, 3, H, W) in [-1, 1]; sides are multiples of the factor.
            noise: taken and ignored: nothing is random here (`AutoencoderKL.encode` samples with it).
        Returns: z, (B, C, H / f, W / f), in the dtype of the image.
        """
        return (self.encode_moments(image).mean.float() * self.scaling_factor).to(image.dtype)

    def decode(self, z: Tensor) -> Tensor:
        """Quantise normalised latents and map the codes to an image.

        Args:
            z: (B, C, h, w), normalised.
        Returns: image (B, 3, f h, f w), about [-1, 1] but not clipped, in the dtype of z.
        Raises: LdmPipeError if z has another shape, or if numbers overflow and float32 does not cure it.
        """
        check_latents(z, self.latent_channels)
        if not self.training and not bool(torch.isfinite(z).all()):  # some code is nearest to NaN, too
            fix = "What made these numbers failed, not the autoencoder."
            raise LdmPipeError("NaN or infinity in the input", "the decoded image", fix)
        return self._decode(self.quantise(z).codes).to(z.dtype)

    def quantise(self, z: Tensor) -> Quantised:
        """Return the raw latents, codes and indices of normalised latents (B, C, h, w)."""
        return self.quantize(z.float() / self.scaling_factor)

    def decode_indices(self, indices: Tensor) -> Tensor:
        """Map numbers of codes (B, h, w) to an image (B, 3, f h, f w)."""
        return self._decode(F.embedding(indices, self.quantize.weight).movedim(-1, 1))

    def _decode(self, codes: Tensor) -> Tensor:
        build = self._halves.decoder(self.decoder, self.post_quant_conv)
        return self._halves.run(build, codes, "the decoded image", self.dtype, training=self.training)

    def forward(self, image: Tensor, shrink: int = 1) -> tuple[Tensor, Quantised]:
        """Reconstruct an image, for training (wrappers such as DDP see only this).

        Args:
            shrink: average the latents over squares of this side before they are quantised (scale equivariance).
        Returns: the reconstruction (B, 3, H / shrink, W / shrink), with straight-through gradients, and what was
            quantised; normalisation plays no part.
        """
        check_image(image, self._fields.in_channels, self.factor)
        raw = self._halves.encoder(self.encoder, self.quant_conv)(self.dtype)(image.to(self.dtype))
        quantised = self.quantize(raw if shrink == 1 else F.avg_pool2d(raw, shrink))
        decode = self._halves.decoder(self.decoder, self.post_quant_conv)(self.dtype)
        return decode(quantised.straight_through().to(self.dtype)), quantised

    # The latent statistics

    @torch.no_grad()
    def set_latent_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Give z the mean 0 in every channel and the variance 1 over all channels, from statistics of the raw latents.

        The mean m moves into the weights, the deviation s into `scaling_factor`:

            raw' = raw - m,   codes' = codes - m,   raw = raw' + m,   scaling_factor = 1 / s,   s^2 = mean_c std_c^2

        which leaves every reconstruction as it was, but for rounding. One s for all channels: under unequal ones
        another code would be the nearest.
        """
        fits = (
            len(mean) == len(std) == self.latent_channels and all(map(is_finite, mean)) and all(map(is_positive, std))
        )
        check(fits, "mean and std", (mean, std), f"{self.latent_channels} numbers each, positive for the std")
        bias, inverse_bias = self.quant_conv.bias, self.post_quant_conv.bias
        assert bias is not None
        assert inverse_bias is not None
        shift = torch.tensor(mean, dtype=torch.float64, device=bias.device)
        bias.copy_(bias.double() - shift)
        self.quantize.weight.copy_(self.quantize.weight.double() - shift)
        inverse_bias.add_((self.post_quant_conv.weight[:, :, 0, 0].double() @ shift).to(inverse_bias))
        variance = sum(value**2 for value in std) / len(std)
        self._set_config(replace(self._fields, scaling_factor=variance**-0.5), self._extra)
