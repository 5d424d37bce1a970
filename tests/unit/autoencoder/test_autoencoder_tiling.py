"""Tiled is untiled: no seams, no other tone, less memory held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from autoencoder import AutoencoderKL
from autoencoder.tiling import Strips
from ldm_pipe.pretrained import LdmPipeError

# Float32 sums in another order; measured 4e-6 at most for values of order 1.
TOLERANCE = 2e-5


def build(levels: int = 3, **changes: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    config = {
        "block_out_channels": [8, 16, 16][:levels],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": 4,
        "layers_per_block": 1,
    }
    return AutoencoderKL.from_config({**config, **changes}).eval()


def uneven(channels: int, height: int, width: int) -> Tensor:
    """Make a map whose parts differ much in mean and contrast, where norms of single tiles go astray."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(2, channels, 3, 4, generator=generator)
    noise = torch.randn(2, channels, height, width, generator=generator)
    return F.interpolate(coarse, size=(height, width), mode="bicubic") + 0.3 * noise * torch.linspace(0, 2, width)


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("tile_size", [16, 23, 40])
@torch.no_grad()
def test_tiled_is_untiled(levels: int, tile_size: int) -> None:
    model = build(levels)
    z, image = uneven(4, 18, 22), uneven(3, 60, 76)
    decoded, posterior = model.decode(z), model.encode_moments(image)
    model.enable_tiling(tile_size)
    torch.testing.assert_close(model.decode(z), decoded, atol=TOLERANCE * float(decoded.abs().max()), rtol=0)
    tiled = model.encode_moments(image)
    torch.testing.assert_close(tiled.mean, posterior.mean, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(tiled.log_var, posterior.log_var, atol=TOLERANCE, rtol=0)
    model.disable_tiling()
    assert torch.equal(model.decode(z), decoded)


@torch.no_grad()
def test_tiled_decoding_shows_no_seams() -> None:
    model, z = build(), uneven(4, 24, 24)
    decoded = model.decode(z)
    model.enable_tiling(32)
    steps = model.decode(z).diff(dim=2).abs().mean((0, 1, 3))  # from each row to the next
    expected = decoded.diff(dim=2).abs().mean((0, 1, 3))
    rows = 32 * 32 // 96 // 2 * 2
    borders = torch.arange(rows, 96, rows) - 1
    assert len(borders) > 5
    torch.testing.assert_close(steps[borders], expected[borders], atol=1e-5, rtol=0)
    # The same measure finds the seams of tiles that are decoded alone, so it can fail.
    model.disable_tiling()
    pasted = torch.cat([model.decode(part) for part in z.split(8, dim=2)], dim=2).diff(dim=2).abs().mean((0, 1, 3))
    assert float((pasted - expected)[31::32].abs().max()) > 1e-2


@torch.no_grad()
def test_small_images_are_not_tiled() -> None:
    model, z = build(), uneven(4, 8, 8)
    decoded = model.decode(z)
    model.enable_tiling(32)
    assert torch.equal(model.decode(z), decoded)


@torch.no_grad()
def test_slices_and_tiles_together() -> None:
    model, z = build(), uneven(4, 16, 20)
    decoded = model.decode(z)
    model.enable_tiling(24)
    model.enable_slicing()
    torch.testing.assert_close(model.decode(z), decoded, atol=TOLERANCE * float(decoded.abs().max()), rtol=0)


def test_gradients_flow_through_tiles() -> None:
    model, z = build(2), uneven(4, 16, 20)
    model.decode(z).square().mean().backward()
    expected = [parameter.grad for parameter in model.decoder.parameters()]
    model.zero_grad(set_to_none=True)
    model.enable_tiling(16)
    model.decode(z).square().mean().backward()
    for parameter, gradient in zip(model.decoder.parameters(), expected, strict=True):
        assert gradient is not None
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_no_strip_is_larger_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model, z = build(), uneven(4, 32, 32)
    seen: list[int] = []
    original = torch.nn.Conv2d.forward

    def spy(self: torch.nn.Conv2d, x: Tensor) -> Tensor:
        seen.append(x.shape[2] * x.shape[3])
        return original(self, x)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", spy)
    model.enable_tiling(64)
    model.decode(z)
    assert max(seen) <= 64 * 64 + 4 * 128  # a row more on both sides, two where it is upsampled


@torch.no_grad()
def test_statistics_of_strips_do_not_cancel() -> None:
    x = torch.randn(1, 4, 64, 16, generator=torch.Generator().manual_seed(0)) * 1e-2 + 100.0
    norm = torch.nn.GroupNorm(2, 4)
    whole = torch.nn.functional.group_norm(x.double(), 2)
    strips = Strips(64, x.device)._normaliser(norm, x)(x)
    torch.testing.assert_close(strips.double(), whole, atol=2e-3, rtol=0)


def test_a_tile_must_have_a_size() -> None:
    with pytest.raises(LdmPipeError, match="tile_size"):
        build().enable_tiling(0)
