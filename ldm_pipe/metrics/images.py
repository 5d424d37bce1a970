"""Likeness of two images: PSNR and SSIM.

Pairs of images in [-1, 1] enter, one number per pair leaves. The perceptual distance is the training loss's own
function, `autoencoder.losses.perceptual_distance`. This file knows no networks and no files.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW_RADIUS = 5
WINDOW_SIGMA = 1.5
K1, K2 = 0.01, 0.03


def psnr(image: Tensor, other: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each pair in dB; infinite for equal images.

        PSNR = -10 log10 mean((a - b)^2),   a, b in [0, 1]

    Args:
        image, other: in [-1, 1], shape (B, 3, H, W); values beyond are clipped, as they are when a picture is written.
    Returns: float64, shape (B,).
    """
    difference = _unit(image) - _unit(other)
    return -10.0 * difference.square().mean((1, 2, 3)).log10()


def ssim(image: Tensor, other: Tensor) -> Tensor:
    """Return the structural similarity of each pair (Wang et al. 2004, doi:10.1109/TIP.2003.819861, eq. 13).

        SSIM = (2 m_a m_b + c1) (2 s_ab + c2) / ((m_a^2 + m_b^2 + c1) (s_a^2 + s_b^2 + c2)),   c_i = (K_i L)^2, L = 1

    Means, variances and covariance are weighted by a Gaussian of 11x11 pixels and standard deviation 1.5; the map is
    averaged over channels and over the places where the window lies inside the image.

    Args:
        image, other: in [-1, 1], shape (B, 3, H, W), sides at least 11.
    Returns: float64, at most 1, shape (B,).
    Raises: ValueError if the images are smaller than the window.
    """
    side = 2 * WINDOW_RADIUS + 1
    if min(image.shape[-2:]) < side:
        raise ValueError(f"images of {image.shape[-2]}x{image.shape[-1]}: SSIM needs sides of at least {side}")
    a, b = _unit(image), _unit(other)
    mean_a, mean_b = _blur(a), _blur(b)
    var_a = _blur(a * a) - mean_a.square()
    var_b = _blur(b * b) - mean_b.square()
    covariance = _blur(a * b) - mean_a * mean_b
    c1, c2 = K1**2, K2**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return (luminance * structure).mean((1, 2, 3))


def _unit(image: Tensor) -> Tensor:
    return (image.double().clamp(-1, 1) + 1.0) / 2.0  # float64: the variances are differences of squares


def _blur(x: Tensor) -> Tensor:
    """Weight each pixel's neighbours by the Gaussian window, first down the columns, then along the rows."""
    places = torch.arange(-WINDOW_RADIUS, WINDOW_RADIUS + 1, dtype=x.dtype, device=x.device)
    window = torch.exp(-0.5 * (places / WINDOW_SIGMA).square())
    window = window / window.sum()
    flat = x.flatten(0, 1)[:, None]  # (B * C, 1, H, W)
    rows = F.conv2d(F.conv2d(flat, window[None, None, :, None]), window[None, None, None, :])
    return rows[:, 0].unflatten(0, x.shape[:2])  # (B, C, H - 10, W - 10)
