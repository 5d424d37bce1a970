"""Laws of the diagonal Gaussian."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoencoder import DiagonalGaussian


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=200, deadline=None)
@given(st.floats(-50, 50), st.floats(-40, 30))
def test_kl_is_never_negative(mean: float, log_var: float) -> None:
    gaussian = DiagonalGaussian.from_moments(torch.tensor([mean, log_var]).view(1, 2, 1, 1))
    assert float(gaussian.kl()) >= 0.0


@pytest.mark.parametrize("log_var", [1e-3, -1e-3, 1e-4, -1e-4, 1e-6])
def test_kl_does_not_cancel_near_the_standard_normal(log_var: float) -> None:
    kl = DiagonalGaussian(torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), log_var)).kl()
    assert float(kl) == pytest.approx(0.5 * (math.expm1(log_var) - log_var), abs=1e-10)
    assert float(kl) >= 0.0


def test_kl_of_the_standard_normal_is_zero() -> None:
    assert torch.equal(DiagonalGaussian(torch.zeros(3, 4, 2, 2), torch.zeros(3, 4, 2, 2)).kl(), torch.zeros(3))


def test_kl_is_that_of_torch_and_per_image() -> None:
    gaussian = DiagonalGaussian(randn(3, 4, 5, 6), randn(3, 4, 5, 6, seed=1))
    theirs = torch.distributions.kl_divergence(
        torch.distributions.Normal(gaussian.mean, (0.5 * gaussian.log_var).exp()), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(gaussian.kl(), theirs.sum((1, 2, 3)))


def test_samples_come_from_the_noise_alone() -> None:
    gaussian = DiagonalGaussian(randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1))
    noise = randn(2, 4, 3, 3, seed=2)
    assert torch.equal(gaussian.sample(noise), gaussian.sample(noise))
    torch.testing.assert_close(gaussian.sample(noise), gaussian.mean + (0.5 * gaussian.log_var).exp() * noise)
    assert torch.equal(gaussian.sample(torch.zeros_like(noise)), gaussian.mode())


def test_samples_have_the_moments() -> None:
    mean, log_var = torch.tensor(1.5), torch.tensor(-1.0)
    gaussian = DiagonalGaussian(mean.expand(200_000), log_var.expand(200_000))
    samples = gaussian.sample(randn(200_000))
    assert float(samples.mean()) == pytest.approx(1.5, abs=0.01)
    assert float(samples.var()) == pytest.approx(math.exp(-1.0), rel=0.01)


def test_extreme_log_variances_stay_finite_also_in_the_gradient() -> None:
    moments = torch.tensor([0.0, 0.0, 1e4, -1e4]).view(1, 4, 1, 1).requires_grad_()
    gaussian = DiagonalGaussian.from_moments(moments)
    assert gaussian.log_var.flatten().tolist() == [20.0, -30.0]
    (gaussian.kl().sum() + gaussian.sample(torch.ones(1, 2, 1, 1)).sum()).backward()
    assert moments.grad is not None
    assert torch.isfinite(moments.grad).all()


def test_noise_of_another_shape_is_refused_not_broadcast() -> None:
    with pytest.raises(ValueError, match=r"noise of shape \[1, 4, 3, 3\]"):
        DiagonalGaussian(torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 3, 3)).sample(torch.zeros(1, 4, 3, 3))
