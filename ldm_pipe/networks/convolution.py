"""3x3 convolutions written as matrix products, where the library's own are slower: large weights, repeated positions.

What enters: features (B, C, H, W), fastest with channels last in memory. What leaves: the same sums as the plain
convolutions, up to rounding. This file knows no config.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGE = 2**23  # numbers in a weight; oneDNN's rearranged copy of it is then fresh memory at every call
MAX_POSITIONS = 1024  # positions whose neighbourhoods lie in memory at once
MAX_FROZEN = 256  # positions where gradients flow through a frozen weight: scattering them back costs more beyond
MAX_TRAINED = 64  # positions where the weight learns: the neighbourhoods, nine times the features, are kept until then


def neighbourhoods(x: Tensor, side: int) -> Tensor:
    """View features (B, C, H, W), padded by one, as windows (B, H + 3 - side, W + 3 - side, side, side, C)."""
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    return padded.unfold(1, side, 1).unfold(2, side, 1).permute(0, 1, 2, 4, 5, 3)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution that keeps the size.

    On a CPU weights of more than 8 million numbers are multiplied as one matrix: 50 instead of 82 ms for 1280 channels
    at 8x8, 5 instead of 48 at 1x1 (batch 2, one thread), 590 instead of 940 for 1920 to 640 channels at 32x32; forwards
    and backwards 60 instead of 140 ms at 8x8, 120 instead of 260 with the weight's gradient (batch 1). Smaller weights
    gain nothing.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        """Build it with a padding of one."""
        super().__init__(in_channels, out_channels, 3, padding=1)

    def _is_product(self, x: Tensor) -> bool:
        w, most = self.weight, MAX_POSITIONS
        if torch.is_grad_enabled():
            most = MAX_TRAINED if w.requires_grad else MAX_FROZEN
        plain = x.device.type == "cpu" and x.dtype == w.dtype == torch.float32
        return plain and w.numel() >= LARGE and x.shape[2] * x.shape[3] <= most

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H, W)."""
        if not self._is_product(x):
            return super().forward(x)
        last = self.weight.is_contiguous(memory_format=torch.channels_last)
        matrix = (self.weight.permute(0, 2, 3, 1) if last else self.weight).flatten(1)
        order = (0, 1, 2, 3, 4, 5) if last else (0, 1, 2, 5, 3, 4)  # of the numbers in a row of the matrix
        some = max(1, MAX_POSITIONS // (x.shape[2] * x.shape[3]))
        rows = [
            F.linear(neighbourhoods(part, 3).permute(order).flatten(3), matrix, self.bias) for part in x.split(some)
        ]
        return (rows[0] if len(rows) == 1 else torch.cat(rows)).permute(0, 3, 1, 2)


def doubling_kernel(weight: Tensor) -> Tensor:
    """Join the repetition of every position to the 3x3 convolution after it.

    Each of the four pixels that a position becomes sees 2x2 positions: taps that fall onto one position are added.
    16 instead of 36 products per position and pair of channels, the same sums up to rounding.

    Args:
        weight: shape (O, I, 3, 3).
    Returns: for each pixel of the four a matrix over its 2x2 positions, shape (2, 2, O, 4 I).
    """
    w = weight.permute(0, 2, 3, 1)  # (O, row, column, I)
    kernel = w.new_empty(2, 2, w.shape[0], 2, 2, w.shape[3])
    taps = ((slice(0, 1), slice(1, 3)), (slice(0, 2), slice(2, 3)))  # of the first and of the second pixel
    for pixel, rows in enumerate(taps):
        for row, some in enumerate(rows):
            of_row = w[:, some].sum(1)  # (O, column, I)
            for other, columns in enumerate(taps):
                for column, few in enumerate(columns):
                    kernel[pixel, other, :, row, column] = of_row[:, few].sum(1)
    return kernel.flatten(3)


def doubling_convolution(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """Repeat every position of features (B, I, H, W) and convolve: (B, O, 2 H, 2 W), with a `doubling_kernel`."""
    batch, _, height, width = x.shape
    out = x.new_empty(batch, 2 * height, 2 * width, kernel.shape[2])
    windows = neighbourhoods(x, 2)  # (B, H + 1, W + 1, 2, 2, I)
    for row in range(2):
        for column in range(2):
            seen = windows[:, row : row + height, column : column + width].flatten(3)
            out[:, row::2, column::2] = F.linear(seen, kernel[row, column], bias)
    return out.permute(0, 3, 1, 2)


def doubling_transposed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Do the same with gradients: one transposed convolution of stride 2, which oneDNN also runs backwards.

    Its kernel is the full convolution of the 3x3 kernel with ones(2, 2). At 16 pictures of 128 channels at 8x8 forward
    and backward take 36 instead of 85 ms, 16 instead of 57 with frozen weights (one thread). For fewer than 256
    positions in all, the larger kernel costs more than the products saved.

    Args:
        x: shape (B, I, H, W).
        weight: shape (O, I, 3, 3).
        bias: shape (O,).
    Returns: shape (B, O, 2 H, 2 W).
    """
    num_out, num_in = weight.shape[:2]
    line = torch.eye(4, 3) + torch.eye(4, 3).roll(1, 0)  # repetition, then three taps, as four taps; turned below
    full = torch.kron(line, line).flip(0).to(weight)  # (16, 9): rows and columns at once
    taps = weight.permute(1, 2, 3, 0).reshape(num_in, 9, num_out)
    kernel = (full @ taps).reshape(num_in, 4, 4, num_out).permute(0, 3, 1, 2)  # (I, O, 4, 4)
    return F.conv_transpose2d(x, kernel, bias, stride=2, padding=1)
