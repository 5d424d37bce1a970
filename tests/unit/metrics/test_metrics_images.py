"""Laws of PSNR and SSIM, and their parity with scikit-image."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from ldm_pipe.metrics.images import psnr, ssim


def pair(seed: int = 0, noise: float = 0.2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.nn.functional.interpolate(torch.rand(3, 3, 6, 5, generator=generator), (36, 30), mode="bilinear")
    image = smooth * 2 - 1
    return image, (image + noise * torch.randn(image.shape, generator=generator)).clamp(-1, 1)


def test_equal_images_have_infinite_psnr_and_ssim_one() -> None:
    image, _ = pair()
    assert torch.isinf(psnr(image, image)).all()
    torch.testing.assert_close(ssim(image, image), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_metrics_are_symmetric_per_pair_and_fall_with_the_noise(metric: Callable[..., torch.Tensor]) -> None:
    image, noisy = pair()
    torch.testing.assert_close(metric(image, noisy), metric(noisy, image))
    torch.testing.assert_close(metric(image, noisy)[1:2], metric(image[1:2], noisy[1:2]))
    more = (image + 2 * (noisy - image)).clamp(-1, 1)
    assert (metric(image, more) < metric(image, noisy)).all()


def test_psnr_of_a_known_error() -> None:
    image = torch.zeros(2, 3, 4, 4)
    # 0.2 of the range [-1, 1] is 0.1 of [0, 1]: -10 log10(0.01) = 20 dB
    assert psnr(image, image + 0.2).tolist() == pytest.approx([20.0, 20.0])


def test_psnr_clips_as_a_written_picture_does() -> None:
    white = torch.ones(1, 3, 4, 4)
    assert psnr(white, white * 1.5).item() == math.inf


def test_ssim_refuses_images_smaller_than_its_window() -> None:
    with pytest.raises(ValueError, match="10x20"):
        ssim(torch.zeros(1, 3, 10, 20), torch.zeros(1, 3, 10, 20))


def test_ssim_and_psnr_agree_with_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    image, noisy = pair(1)
    ours_ssim, ours_psnr = ssim(image, noisy), psnr(image, noisy)
    for i in range(len(image)):
        a, b = (((x[i].double() + 1) / 2).permute(1, 2, 0).numpy() for x in (image, noisy))
        window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        wanted = metrics.structural_similarity(a, b, data_range=1.0, channel_axis=2, **window)
        assert ours_ssim[i].item() == pytest.approx(wanted, abs=1e-10)  # both float64
        assert ours_psnr[i].item() == pytest.approx(metrics.peak_signal_noise_ratio(a, b, data_range=1.0), abs=1e-9)
