"""`AutoencoderKL`: images to normalised latents and back, through a diagonal Gaussian.

Images in [-1, 1] enter `encode` and normalised latents leave; `decode` goes back. The latent scale and shift live here
and nowhere else. Config fields and weight names are those of diffusers' class of this name. Source: LDM (Rombach et
al. 2022, arXiv:2112.10752, section 3.1 and appendix G). Training objectives are in losses.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoder.config import AutoencoderKLConfig, check, is_positive, read_fields
from autoencoder.gaussian import DiagonalGaussian
from autoencoder.halves import Halves, TwoHalves, check_image, check_latents
from autoencoder.networks import Decoder, Encoder
from ldm_pipe.pretrained import LdmPipeError, PretrainedModule


class AutoencoderKL(TwoHalves, PretrainedModule):
    """Encode images to normalised latents and decode them (LDM, arXiv:2112.10752).

    Args:
        config: the fields that shape the network.
        extra: fields of a config file that are not ours; kept in `.config` and written again.
    """

    class_name = "AutoencoderKL"
    _fields: AutoencoderKLConfig

    def __init__(self, config: AutoencoderKLConfig, extra: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        shape = (config.block_out_channels, config.layers_per_block, config.norm_num_groups, config.act_fn)
        attention, channels = config.mid_block_add_attention, config.latent_channels
        self.encoder = Encoder(config.in_channels, 2 * channels, *shape, mid_attention=attention)
        self.decoder = Decoder(channels, config.out_channels, *shape, mid_attention=attention)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.use_post_quant_conv else None
        self._set_config(config, extra or {})
        self._halves = Halves(self.factor, config.force_upcast)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> AutoencoderKL:
        """Build an autoencoder with random weights from a diffusers config.

        A missing `scaling_factor` is 0.18215, as in the files that were written before the field existed.
        Raises: LdmPipeError naming the field and what is allowed.
        """
        known, extra = read_fields(config, AutoencoderKLConfig)
        return cls(AutoencoderKLConfig(**known), extra)

    # What the config says

    @property
    def latent_channels(self) -> int:
        """Return the channels of z."""
        return self._fields.latent_channels

    @property
    def shift_factor(self) -> float:
        """Return the config's shift of the raw latents, 0 where it has none."""
        return self._fields.shift_factor or 0.0

    # The two ways

    def encode_moments(self, image: Tensor) -> DiagonalGaussian:
        """Return q(raw latents | image), before normalisation.

        Args:
            image: (B, 3, H, W) in [-1, 1]; sides are multiples of the factor.
        Returns: Gaussian of shape (B, C, H / f, W / f).
        Raises: LdmPipeError if the size does not fit, or if numbers overflow and float32 does not cure it.
        """
        check_image(image, self._fields.in_channels, self.factor)
        build = self._halves.encoder(self.encoder, self.quant_conv)
        moments = self._halves.run(build, image, "the encoded image", self.dtype, training=self.training)
        return DiagonalGaussian.from_moments(moments)

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Map an image to normalised latents z = (raw - shift) * scale (LDM, arXiv:2112.10752, appendix G).

        Args:
            image: (B, 3, H, W) in [-1, 1]; sides are multiples of the factor.
            noise: unit Gaussian of z's shape to sample the posterior with; None takes its mode.
        Returns: z, (B, C, H / f, W / f), in the dtype of the image.
        """
        posterior = self.encode_moments(image)
        raw = posterior.mode() if noise is None else posterior.sample(noise)
        scale, shift = self._scale_shift(raw)
        return ((raw.float() - shift) * scale).to(image.dtype)

    def decode(self, z: Tensor) -> Tensor:
        """Map normalised latents to an image: decoder(z / scale + shift).

        Args:
            z: (B, C, h, w), normalised.
        Returns: image (B, 3, f h, f w), about [-1, 1] but not clipped, in the dtype of z.
        Raises: LdmPipeError if z has another shape, or if numbers overflow and float32 does not cure it.
        """
        check_latents(z, self.latent_channels)
        scale, shift = self._scale_shift(z)
        raw = z.float() / scale + shift
        build = self._halves.decoder(self.decoder, self.post_quant_conv)
        return self._halves.run(build, raw, "the decoded image", self.dtype, training=self.training).to(z.dtype)

    def forward(self, image: Tensor, noise: Tensor | None = None, shrink: int = 1) -> tuple[Tensor, DiagonalGaussian]:
        """Reconstruct an image, for training (wrappers such as DDP see only this).

        Args:
            shrink: average the latents over squares of this side before they are decoded (scale equivariance).
        Returns: the reconstruction (B, 3, H / shrink, W / shrink) and the posterior it was decoded from;
            normalisation plays no part.
        """
        check_image(image, self._fields.in_channels, self.factor)
        encode = self._halves.encoder(self.encoder, self.quant_conv)(self.dtype)
        posterior = DiagonalGaussian.from_moments(encode(image.to(self.dtype)))
        raw = posterior.mode() if noise is None else posterior.sample(noise)
        raw = raw if shrink == 1 else F.avg_pool2d(raw, shrink)
        return self._halves.decoder(self.decoder, self.post_quant_conv)(self.dtype)(raw), posterior

    def _scale_shift(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        mean, std = self._fields.latents_mean, self._fields.latents_std
        if mean is None or std is None:
            return self.scaling_factor, self.shift_factor
        mean_c, std_c = (torch.tensor(v, device=like.device).view(1, -1, 1, 1) for v in (mean, std))
        return self.scaling_factor / std_c, mean_c

    # The latent statistics

    def set_latent_statistics(self, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        """Store measured statistics of the raw latents, so that z has mean 0 and variance 1 (LDM, appendix G).

        Args:
            mean: of the raw latents; a number, or one number per channel.
            std: the same for the standard deviation.
        """
        values: dict[str, Any] = dict.fromkeys(("latents_mean", "latents_std", "shift_factor"))
        values["scaling_factor"] = 1.0
        if isinstance(mean, Sequence) and isinstance(std, Sequence):
            values |= {"latents_mean": tuple(map(float, mean)), "latents_std": tuple(map(float, std))}
        elif not isinstance(mean, Sequence) and not isinstance(std, Sequence):
            check(is_positive(std), "std", std, "a positive number")
            values |= {"shift_factor": float(mean) or None, "scaling_factor": 1.0 / float(std)}
        else:
            fix = "Give two numbers or two lists."
            raise LdmPipeError("mean and std differ in kind", "set_latent_statistics", fix)
        self._set_config(AutoencoderKLConfig(**{**asdict(self._fields), **values}), self._extra)

    @torch.no_grad()
    def fold_latent_shift(self) -> None:
        """Move shift and per-channel statistics into the two 1x1 convolutions; only `scaling_factor` stays.

        diffusers' StableDiffusionPipeline knows `scaling_factor` and ignores the rest. With mean m and std s,

            raw' = (raw - m) / s:   W' = W / s, b' = (b - m) / s, log var' = log var - 2 log s   (quant_conv)
            raw = s raw' + m:       W' = W diag(s), b' = b + W m                            (post_quant_conv)

        which leaves `encode` and `decode` as they were, but for rounding.
        Raises: LdmPipeError if the config has no 1x1 convolutions.
        """
        if self.quant_conv is None or self.post_quant_conv is None:
            fix = "Build the autoencoder with use_quant_conv and use_post_quant_conv."
            raise LdmPipeError("there is no 1x1 convolution to fold the shift into", "fold_latent_shift", fix)
        channels, bias, inverse_bias = self.latent_channels, self.quant_conv.bias, self.post_quant_conv.bias
        assert bias is not None
        assert inverse_bias is not None
        double: dict[str, Any] = {"dtype": torch.float64, "device": bias.device}
        per_channel = self._fields.latents_mean, self._fields.latents_std
        mean = torch.tensor(per_channel[0] or (self.shift_factor,) * channels, **double)
        std = torch.tensor(per_channel[1] or (1.0,) * channels, **double)
        weight, inverse = self.quant_conv.weight, self.post_quant_conv.weight
        weight[:channels] = (weight[:channels].double() / std.view(-1, 1, 1, 1)).to(weight)
        bias[:channels] = ((bias[:channels].double() - mean) / std).to(bias)
        bias[channels:] = (bias[channels:].double() - 2.0 * std.log()).to(bias)
        inverse_bias += (inverse[:, :, 0, 0].double() @ mean).to(bias)
        inverse.copy_((inverse.double() * std.view(1, -1, 1, 1)).to(inverse))
        none = {"shift_factor": None, "latents_mean": None, "latents_std": None}
        self._set_config(AutoencoderKLConfig(**{**asdict(self._fields), **none}), self._extra)
