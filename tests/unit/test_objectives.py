"""Laws of the training objectives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldm_pipe import objectives
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.process import q_sample, to_x0
from ldm_pipe.schedule import NoiseSchedule

PREDICTIONS = ("eps", "x0", "v", "flow")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_perfect_predictor_has_loss_0(prediction: Any) -> None:
    """Whoever outputs the target has no loss, and its x0 is the x0."""
    alpha, sigma = NoiseSchedule().alpha_sigma(torch.tensor([5, 400, 900]))
    x0, eps = normal(3, 4, 8, 8, seed=1), normal(3, 4, 8, 8, seed=2)
    target = objectives.target(prediction, x0, eps, alpha, sigma)
    weight = objectives.min_snr_weight(prediction, alpha, sigma)
    assert objectives.squared_error(target, target, weight).tolist() == [0, 0, 0]
    assert torch.allclose(to_x0(prediction, target, q_sample(x0, eps, alpha, sigma), alpha, sigma), x0, atol=1e-4)


def test_simple_loss_is_the_mean_square_of_each_sample() -> None:
    output = torch.tensor([[[1.0, 3.0]], [[0.0, 0.0]]])
    loss = objectives.squared_error(output, torch.zeros(2, 1, 2), torch.tensor([1.0, 7.0]))
    assert loss.tolist() == [5.0, 0.0]


def test_half_precision_does_not_overflow_the_loss() -> None:
    output = torch.full((1, 4), 300.0, dtype=torch.float16)  # 300^2 is more than float16 holds
    assert float(objectives.squared_error(output, torch.zeros(1, 4))) == 90_000


def test_shapes_that_differ_are_refused_instead_of_broadcast() -> None:
    with pytest.raises(LdmPipeError, match="shape"):
        objectives.squared_error(torch.zeros(2, 4, 8, 8), torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weighs_the_error_of_x0_by_min_snr_gamma(prediction: Any) -> None:
    """min-SNR weights wrong for v (diffusers#5654): the weighted losses of all predictions are one loss of x0."""
    alpha, sigma = NoiseSchedule().alpha_sigma(torch.tensor([1, 30, 150, 400, 700, 999]))
    alpha, sigma = alpha.clone(), sigma.clone()
    x0, eps, wrong = (normal(6, 50, seed=seed).double() for seed in (1, 2, 3))
    x_t = q_sample(x0, eps, alpha, sigma)
    target = objectives.target(prediction, x0, eps, alpha, sigma)
    output = target + 0.1 * wrong
    error_x0 = (to_x0(prediction, output, x_t, alpha, sigma) - x0).square().mean(1)
    snr = (alpha / sigma).square()
    loss = (output - target).square().mean(1) * objectives.min_snr_weight(prediction, alpha, sigma, gamma=5.0)
    assert torch.allclose(loss, snr.clamp_max(5.0) * error_x0, rtol=1e-8)
    assert snr.min() < 5 < snr.max()  # both branches were taken


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_is_finite_and_continuous_at_both_ends(prediction: Any) -> None:
    """diffusers#9451: division by 0 at a zero terminal SNR."""
    tiny = 1e-6
    alpha = torch.tensor([0.0, tiny, 1.0, (1 - tiny**2) ** 0.5], dtype=torch.float64)
    sigma = torch.tensor([1.0, (1 - tiny**2) ** 0.5, 0.0, tiny], dtype=torch.float64)
    weight = objectives.min_snr_weight(prediction, alpha, sigma)
    assert weight.isfinite().all()
    assert torch.allclose(weight[[0, 2]], weight[[1, 3]], atol=1e-9)
    limits = {"eps": [1, 0], "x0": [0, 5], "v": [0, 0], "flow": [0, 0]}
    assert weight[[0, 2]].tolist() == limits[prediction]


@pytest.mark.parametrize("gamma", [0, -1, float("nan")])
def test_gamma_must_be_positive(gamma: float) -> None:
    with pytest.raises(LdmPipeError, match="gamma"):
        objectives.min_snr_weight("eps", torch.ones(1), torch.ones(1), gamma)


def test_offset_noise_shifts_whole_channels() -> None:
    eps, offset = normal(2, 3, 4, 4, seed=1), normal(2, 3, seed=2)
    shift = objectives.offset_noise(eps, offset, 0.1) - eps
    assert torch.allclose(shift, 0.1 * offset[:, :, None, None].expand_as(eps), atol=1e-6)
