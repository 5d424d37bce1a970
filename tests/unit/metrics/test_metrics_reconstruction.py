"""Known answers of the autoencoder's report: distances of Gaussians, spectra of waves, usage of codes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from autoencoder import AutoencoderKL, VQModel
from ldm_pipe.metrics.frechet import frechet_distance
from ldm_pipe.metrics.images import psnr
from ldm_pipe.metrics.reconstruction import latent_spectrum, report_reconstruction
from ldm_pipe.pretrained import LdmPipeError

SHAPE: dict[str, Any] = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whitened(num: int, dim: int) -> Tensor:
    """Draw rows whose mean is exactly 0 and whose covariance is exactly the identity."""
    x = randn(num, dim).double()
    x = x - x.mean(0)
    cov = x.T @ x / (num - 1)
    return x @ torch.linalg.inv(torch.linalg.cholesky(cov)).T


def test_frechet_distance_of_known_gaussians() -> None:
    x = whitened(50, 4)
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(x, x + 2.0) == pytest.approx(16.0)
    scale = torch.tensor([1.0, 2.0, 3.0, 0.5], dtype=torch.float64)
    assert frechet_distance(x, x * scale) == pytest.approx(float((scale - 1).square().sum()))
    a, b = randn(60, 4, seed=1) * scale, randn(70, 4, seed=2) + 1
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))


def test_fewer_samples_than_features_still_have_a_distance() -> None:
    a, b = randn(5, 20), randn(6, 20, seed=1)
    assert math.isfinite(frechet_distance(a, b))
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(LdmPipeError, match="two rows"):
        frechet_distance(a, b[:1])


@pytest.mark.parametrize(("cycles", "band"), [(1, 0), (4, 2), (15, 7), (16, 7)])
def test_a_wave_lies_in_its_band(cycles: int, band: int) -> None:
    x = torch.arange(32) * (2 * math.pi * cycles / 32)
    shares = latent_spectrum(torch.cos(x).expand(2, 3, 32, 32) + 5.0)
    assert float(shares[band]) == pytest.approx(1.0)
    assert float(shares.sum()) == pytest.approx(1.0)


def test_white_noise_is_spread_like_the_areas_of_the_rings() -> None:
    shares = latent_spectrum(randn(64, 4, 32, 32))
    areas = torch.arange(1, 8).double().square().diff(prepend=torch.zeros(1)) * math.pi / 256
    torch.testing.assert_close(shares[:7], areas, atol=0.01, rtol=0)
    smooth = torch.nn.functional.avg_pool2d(randn(8, 4, 34, 34), 3, 1)
    assert float(latent_spectrum(smooth)[:3].sum()) > 2 * float(shares[:3].sum())


@torch.no_grad()
def test_the_report_of_each_kind_measures_what_it_says() -> None:
    images = torch.tanh(randn(6, 3, 16, 16))
    torch.manual_seed(0)
    vq = VQModel.from_config({**SHAPE, "num_vq_embeddings": 6}).eval()
    vq.quantize.weight[3:] = 100.0
    report, shown = report_reconstruction(vq, images.split(4), embed=lambda x: x.flatten(1)[:, :5], num_shown=2)
    assert report.codebook_usage in (1 / 6, 2 / 6, 3 / 6)
    assert report.codebook_perplexity is not None
    assert 1.0 <= report.codebook_perplexity <= 3.0 + 1e-9
    assert report.kl is None
    assert report.frechet is not None
    rebuilt = vq.decode(vq.encode(images)).clamp(-1, 1)
    assert report.psnr == pytest.approx(float(psnr(images, rebuilt).mean()))
    assert len(shown) == 4
    torch.testing.assert_close(torch.stack(shown[1::2]), rebuilt[:2], atol=1e-5, rtol=0)
    kl = AutoencoderKL.from_config(SHAPE).eval()
    report, shown = report_reconstruction(kl, images.split(4), features=lambda x: [x])
    assert report.codebook_usage is None
    assert report.kl == pytest.approx(float(kl.encode_moments(images).kl().mean()))
    assert report.perceptual is not None
    assert report.latent_mean == pytest.approx(kl.encode(images).mean((0, 2, 3)).tolist(), abs=1e-6)
    assert shown == []
    assert "frechet" not in report.to_json()
