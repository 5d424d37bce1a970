"""Laws of the known answers: densities, scores, Tweedie's formula, moments, the flow, the distances."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ldm_pipe.metrics.mixture import GaussianMixture
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import NoiseSchedule

LEVELS = [(1.0, 0.0), (0.98, 0.2), (0.6, 0.8), (1.0, 30.0), (0.05, 0.95), (0.0, 1.0)]
LINE = GaussianMixture([[-1.5], [0.5], [2.0]], [0.3, 0.6, 0.2], [1, 2, 3])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(), dtype=torch.float64)


def mixture(dim: int = 4) -> GaussianMixture:
    return GaussianMixture(2 * normal(3, dim), [0.3, 0.5, 1.0], [1.0, 2.0, 5.0])


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_the_score_is_the_gradient_of_the_log_density(alpha: float, sigma: float) -> None:
    x = (alpha + sigma) * normal(8, 4)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(mixture().log_prob(x, alpha, sigma).sum(), x)
    assert torch.allclose(mixture().score(x, alpha, sigma), gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS[:-1])
def test_the_denoiser_obeys_tweedie(alpha: float, sigma: float) -> None:
    """alpha E[x0 | x_t] = x_t + sigma^2 score(x_t)  (Efron 2011)."""
    x = (alpha + sigma) * normal(8, 4)
    expected = (x + sigma**2 * mixture().score(x, alpha, sigma)) / alpha
    assert torch.allclose(mixture().x0(x, alpha, sigma), expected, atol=1e-10)


def test_the_density_has_the_mass_one_and_the_noised_mixture_is_the_mixture_of_the_noised() -> None:
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)[:, None]
    for alpha, sigma in LEVELS[:3]:
        density = LINE.log_prob(x, alpha, sigma).exp()
        assert float(torch.trapezoid(density, x[:, 0])) == pytest.approx(1, abs=1e-9)
        assert torch.allclose(LINE.noised(alpha, sigma).log_prob(x).exp(), density, atol=1e-12)
        slope = torch.autograd.functional.jacobian(lambda x, law=(alpha, sigma): LINE.noised(*law).cdf(x).sum(), x)
        assert torch.allclose(slope[:, 0], density, atol=1e-10)


def test_at_pure_noise_and_at_clean_data_the_denoiser_is_the_mean_and_the_identity() -> None:
    x = normal(8, 4)
    assert torch.allclose(mixture().x0(x, 0.0, 1.0), mixture().mean().expand(8, 4))
    assert torch.allclose(mixture().x0(x, 1.0, 0.0), x)


def test_the_denoiser_has_the_least_squared_error() -> None:
    """E[x0 | x_t] beats itself scaled or shifted, on samples (which differ by far more than the sampling error)."""
    data = mixture().sample(20_000, generator())
    x_t = 0.6 * data + 0.8 * torch.randn(data.shape, generator=generator(1), dtype=torch.float64)
    best = mixture().x0(x_t, 0.6, 0.8)
    error = float((best - data).square().mean())
    assert float((best - data).mean()) == pytest.approx(0, abs=0.02)  # unbiased
    for other in (1.05 * best, 0.95 * best, best + 0.1, x_t / 0.6):
        assert float((other - data).square().mean()) > error


def test_samples_have_the_moments() -> None:
    count = 40_000
    samples = mixture().sample(count, generator())
    scale = float(mixture().covariance().diagonal().max())
    assert torch.allclose(samples.mean(0), mixture().mean(), atol=5 * (scale / count) ** 0.5)
    assert torch.allclose(samples.T.cov(), mixture().covariance(), atol=10 * scale / count**0.5)


def test_one_level_per_sample_is_a_batch_of_levels() -> None:
    x = normal(3, 2, 2)  # D = 4 in any shape
    alpha, sigma = torch.tensor([1.0, 0.6, 0.0]), torch.tensor([0.3, 0.8, 1.0])
    together = mixture().x0(x, alpha, sigma)
    singles = [mixture().x0(x[i : i + 1], float(alpha[i]), float(sigma[i])) for i in range(3)]
    assert torch.allclose(together, torch.cat(singles), atol=1e-6)  # the levels above are float32


def test_the_denoiser_of_a_law_reads_its_levels() -> None:
    law, x = NoiseSchedule(), normal(5, 4).float()
    found = mixture().denoiser(law)(x, torch.tensor(700.0)).x0
    assert found.dtype == torch.float32
    assert torch.equal(found, mixture().x0(x, *law.alpha_sigma(700)))


def test_the_flow_of_a_gaussian_obeys_its_differential_equation() -> None:
    """d x / d sigma = eps in the frame alpha = 1 (arXiv:2206.00364, eq. 1), by central differences."""
    one = GaussianMixture(normal(1, 4), [0.4])
    for source, x in ((one, normal(6, 4)), (LINE, normal(6, 1))):
        near = [source.flow(x, (1.0, 0.7), (1.0, 0.7 + step)) for step in (-1e-4, 1e-4)]
        eps = (x - source.x0(x, 1.0, 0.7)) / 0.7
        assert torch.allclose((near[1] - near[0]) / 2e-4, eps, atol=1e-6)


def test_the_flow_goes_back_and_does_not_depend_on_the_frame() -> None:
    x = normal(20, 1)
    for there in ((0.6, 0.8), (1.0, 0.0), (1.0, 5.0)):
        end = LINE.flow(x, (0.3, 0.7), there)
        assert torch.allclose(LINE.flow(end, there, (0.3, 0.7)), x, atol=1e-8)
    assert torch.allclose(LINE.flow(2 * x, (0.6, 1.4), (1.0, 0.1)), LINE.flow(x, (0.3, 0.7), (1.0, 0.1)), atol=1e-10)


def test_a_flow_without_closed_form_is_refused() -> None:
    with pytest.raises(LdmPipeError, match="one dimension"):
        mixture().flow(normal(2, 4), (1.0, 1.0), (1.0, 0.0))


def test_quantiles_are_inverse_to_ranks() -> None:
    u = torch.linspace(1e-6, 1 - 1e-6, 101, dtype=torch.float64)
    assert torch.allclose(LINE.cdf(LINE.quantile(u)), u, atol=1e-12)


def test_distances_of_true_samples_are_sampling_errors_and_of_shifted_ones_the_shift() -> None:
    count = 10_000
    samples = LINE.sample(count, generator())
    floor = float(LINE.covariance()) ** 0.5 / math.sqrt(count)
    assert LINE.kolmogorov(samples) < 1.95 / math.sqrt(count)
    assert LINE.wasserstein(samples) < 3 * floor
    assert LINE.wasserstein(samples + 0.2) == pytest.approx(0.2, abs=3 * floor)
    assert LINE.kolmogorov(samples + 0.2) > 0.05
    assert LINE.kolmogorov(LINE.quantile(torch.tensor([0.5], dtype=torch.float64))) == pytest.approx(0.5)


def test_a_projection_has_the_distribution_of_the_projected_samples() -> None:
    direction = torch.tensor([1.0, -2.0, 0.5, 0.0])
    samples = mixture().sample(10_000, generator()) @ (direction / direction.norm()).double()
    assert mixture().project(direction).kolmogorov(samples) < 1.95 / 100


@pytest.mark.parametrize(
    ("means", "stds", "weights"),
    [([1.0, 2.0], [1.0], None), ([[1.0]], [1.0, 2.0], None), ([[1.0]], [0.0], None), ([[1.0]], [1.0], [-1.0])],
)
def test_what_is_no_mixture_is_refused(means: list, stds: list, weights: list | None) -> None:
    with pytest.raises(LdmPipeError, match="GaussianMixture"):
        GaussianMixture(means, stds, weights)
