"""The patch discriminator of the autoencoder's adversarial loss.

An image enters, one logit per patch leaves (positive: real). Source: PatchGAN (Isola et al. 2017, arXiv:1611.07004,
section 3.2.2), as in VQGAN (arXiv:2012.09841). No batch norm: its statistics would depend on batch size, accumulation
and number of processes.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ldm_pipe.pretrained import LdmPipeError

MAX_WIDTH_FACTOR = 8


class PatchDiscriminator(nn.Module):
    """Judge each patch of an image as real (positive) or reconstructed (negative).

    Args:
        in_channels: channels of the image.
        width: channels after the first convolution; doubled per layer up to eight times.
        num_layers: layers of stride 2; three see patches of 70 pixels.
        norm: "group" or "none".
    """

    def __init__(
        self, in_channels: int = 3, width: int = 64, num_layers: int = 3, norm: Literal["group", "none"] = "group"
    ) -> None:
        super().__init__()
        if norm not in ("group", "none"):
            raise LdmPipeError(f"norm {norm!r}", "PatchDiscriminator", "Give 'group' or 'none'.")
        if min(in_channels, width, num_layers) < 1:
            what = f"in_channels {in_channels}, width {width}, num_layers {num_layers}"
            raise LdmPipeError(what, "PatchDiscriminator", "All must be at least 1.")
        widths = [width * min(2**i, MAX_WIDTH_FACTOR) for i in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, num_layers + 1):
            stride = 2 if i < num_layers else 1
            layers.append(nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=norm == "none"))
            if norm == "group":
                layers.append(nn.GroupNorm(math.gcd(32, widths[i]), widths[i]))
            layers.append(nn.LeakyReLU(0.2))
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        self.smallest = 3 * 2**num_layers  # pixels a side that leave one logit
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)  # arXiv:1611.07004, appendix 6.2
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, in, H, W) to logits (B, 1, h, w).

        Raises: LdmPipeError if the image is too small to leave a logit.
        """
        if min(image.shape[2:]) < self.smallest:
            size = "x".join(map(str, image.shape[2:]))
            fix = f"Give sides of at least {self.smallest}, or fewer layers."
            raise LdmPipeError(f"image size {size} leaves no patch", "PatchDiscriminator", fix)
        return self.layers(image)


class LogitAverages(nn.Module):
    """Keep moving averages of a discriminator's mean logits, for pictures and for reconstructions.

    They are the anchors of LeCam's term (Tseng et al. 2021, arXiv:2104.03310, section 3.2); what resuming needs lies in
    buffers. The first steps are averaged without the zeros that the averages start from (as in Adam, arXiv:1412.6980,
    section 3).

    Args:
        decay: per step of the discriminator; the paper: 0.99.
    """

    sums: Tensor
    weight: Tensor

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("sums", torch.zeros(2))
        self.register_buffer("weight", torch.zeros(()))

    @torch.no_grad()
    def update(self, means: Tensor) -> None:
        """Follow one step; means (2,): of the logits of pictures and of reconstructions."""
        self.sums.lerp_(means.to(self.sums), 1.0 - self.decay)
        self.weight.lerp_(torch.ones_like(self.weight), 1.0 - self.decay)

    def anchors(self) -> Tensor | None:
        """Return both averages, (2,), or None before the first step."""
        return self.sums / self.weight if float(self.weight) > 0 else None
