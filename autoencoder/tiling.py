"""Run the encoder and the decoder piece by piece, with the result they have at once.

Customary tiling cuts the latents, decodes each tile alone and blends: every tile then has group norm statistics and
attention of its own, its tone differs from its neighbour's, and seams show. Here each convolution runs over strips of
rows that overlap by what the kernel sees, while the statistics of each norm are those of the whole map. There is no
seam to hide, and no work is done twice but for the overlaps. What it saves is memory: at any time one or two feature
maps, which lie in main memory where the work is done on another device, and the work space of one strip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from autoencoder.networks import Decoder, Encoder, Level, ResnetBlock

STORE = torch.device("cpu")


class Strips:
    """Apply parts of a network to maps in strips.

    Args:
        area: positions of a map that are worked on at once.
        device: where the work is done.
    """

    def __init__(self, area: int, device: torch.device) -> None:
        self.area, self.device = area, device

    def decode(self, decoder: Decoder, z: Tensor) -> Tensor:
        """Map (B, in, h, w) to (B, out, f h, f w), as the decoder does."""
        x = decoder.mid_block(decoder.conv_in(z)).to(STORE)
        for level in decoder.up_blocks:
            x = self._level(level, x)
        return self._head(decoder, x)

    def encode(self, encoder: Encoder, image: Tensor) -> Tensor:
        """Map (B, in, H, W) to (B, out, H / f, W / f), as the encoder does."""
        x = self._map(encoder.conv_in, image.to(STORE))
        for level in encoder.down_blocks:
            x = self._level(level, x)
        return self._head(encoder, encoder.mid_block(x.to(self.device)).to(STORE))

    def _head(self, network: Encoder | Decoder, x: Tensor) -> Tensor:
        normalise = self._normaliser(network.conv_norm_out, x)
        return self._map(lambda part: network.conv_out(network.act(normalise(part))), x).to(self.device)

    def _level(self, level: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(level, Level)
        for resnet in level.resnets:
            x = self._resnet(resnet, x)
        for downsample in level.downsamplers:
            # Strips begin at even rows; the module pads below, which only the last strip may keep.
            x = self._map(downsample, x, halo=2, shrink=2)
        for upsample in level.upsamplers:
            x = self._map(upsample, x, grow=2)
        return x

    def _resnet(self, block: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(block, ResnetBlock)
        normalise1 = self._normaliser(block.norm1, x)
        h = self._map(lambda part: block.conv1(block.act(normalise1(part))), x)
        if block.conv_shortcut is not None:
            x = self._map(block.conv_shortcut, x, halo=0)
        elif torch.is_grad_enabled():
            x = x.clone()
        normalise2 = self._normaliser(block.norm2, h)
        return self._map(lambda part: block.conv2(block.act(normalise2(part))), h, add_to=x)

    def _spans(self, x: Tensor, grow: int = 1) -> Iterator[tuple[int, int]]:
        """Yield where each strip starts and stops; it has an even number of rows."""
        rows = max(self.area // (grow**2 * x.shape[3]) // 2, 1) * 2
        for start in range(0, x.shape[2], rows):
            yield start, min(start + rows, x.shape[2])

    def _map(
        self,
        function: Callable[[Tensor], Tensor],
        x: Tensor,
        *,
        halo: int = 1,
        grow: int = 1,
        shrink: int = 1,
        add_to: Tensor | None = None,
    ) -> Tensor:
        """Apply a function that sees `halo` rows around and scales both sides by grow / shrink."""
        out = add_to
        for start, stop in self._spans(x, grow):
            low, high = max(start - halo, 0), min(stop + halo, x.shape[2])
            y = function(x[:, :, low:high].to(self.device))
            first, count = (start - low) * grow // shrink, (stop - start) * grow // shrink
            y = y[:, :, first : first + count].to(STORE)
            if out is None:
                shape = (*y.shape[:2], x.shape[2] * grow // shrink, y.shape[3])
                # Channels last: the rows of a strip lie together.
                out = torch.empty(shape, dtype=y.dtype, device=STORE, memory_format=torch.channels_last)
            at = slice(start * grow // shrink, start * grow // shrink + count)
            if add_to is None:
                out[:, :, at] = y
            else:
                out[:, :, at] += y
        assert out is not None
        return out

    def _normaliser(self, norm: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the group norm of a strip under the statistics of the whole map."""
        assert isinstance(norm, nn.GroupNorm)
        count, mean, deviations = 0, torch.zeros(()), torch.zeros(())
        for start, stop in self._spans(x):
            part = x[:, :, start:stop].to(self.device, torch.float32)
            values = part.flatten(2).unflatten(1, (norm.num_groups, -1)).flatten(2)  # (B, groups, positions)
            # Two passes, then strips are joined as in Chan, Golub & LeVeque 1979, eq. 2.1: no sum of squares that
            # cancels. (var_mean would do the first step, several times slower on a CPU.)
            part_mean = values.mean(2)
            var = (values - part_mean[:, :, None]).square().mean(2)
            size = values.shape[2]
            if count == 0:
                count, mean, deviations = size, part_mean, var * size
                continue
            delta = part_mean - mean
            deviations = deviations + var * size + delta.square() * (count * size / (count + size))
            mean = mean + delta * (size / (count + size))
            count += size
        each = norm.num_channels // norm.num_groups
        scale = torch.rsqrt(deviations / count + norm.eps).repeat_interleave(each, 1) * norm.weight  # (B, C)
        shift = norm.bias - mean.repeat_interleave(each, 1) * scale
        scale, shift = scale[:, :, None, None], shift[:, :, None, None]

        def normalise(part: Tensor) -> Tensor:
            return torch.addcmul(shift, part.float(), scale).to(part.dtype)

        return normalise
