"""Laws of the diffusion process and its predictions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldm_pipe.process import eps_from_x0, expand, from_x0_eps, q_sample, to_x0, x0_from_eps
from ldm_pipe.schedule import NoiseSchedule

PREDICTIONS = ("eps", "x0", "v", "flow")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("t", [0, 400, 999])
def test_q_sample_moments(t: int) -> None:
    """x_t has mean alpha x0 and standard deviation sigma."""
    schedule = NoiseSchedule()
    alpha, sigma = schedule.alpha_sigma(t)
    x_t = q_sample(torch.full((200_000, 1), 3.0, dtype=torch.float64), normal(200_000, 1), alpha, sigma)
    error = float(sigma) / 200_000**0.5
    assert abs(float(x_t.mean()) - 3 * float(alpha)) < 4 * error
    assert float(x_t.std()) == pytest.approx(float(sigma), rel=0.01)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_round_trips(prediction: Any, zero_snr: bool) -> None:
    """x0, eps -> prediction -> x0 -> eps, at every level the prediction can express, including alpha = 0."""
    schedule = NoiseSchedule(prediction="v", zero_terminal_snr=zero_snr)
    last = 998 if prediction == "eps" else 999  # eps says nothing about x0 at alpha = 0
    t = torch.tensor([0, 10, 500, last])
    alpha, sigma = schedule.alpha_sigma(t)
    x0, eps = normal(4, 3, 5, 5, seed=1), normal(4, 3, 5, 5, seed=2)
    x_t = q_sample(x0, eps, alpha, sigma)
    back = to_x0(prediction, from_x0_eps(prediction, x0, eps, alpha, sigma), x_t, alpha, sigma)
    assert torch.allclose(back, x0, atol=1e-9)
    assert torch.allclose(eps_from_x0(x_t, back, alpha, sigma), eps, atol=1e-9)


def test_v_is_the_velocity_along_the_angle() -> None:
    """With alpha = cos(phi), sigma = sin(phi): v = d x_t / d phi (arXiv:2202.00512, appendix D)."""
    x0, eps, phi, step = normal(5, seed=1), normal(5, seed=2), torch.tensor(0.7, dtype=torch.float64), 1e-6

    def at(angle: torch.Tensor) -> torch.Tensor:
        return q_sample(x0, eps, angle.cos(), angle.sin())

    slope = (at(phi + step) - at(phi - step)) / (2 * step)
    assert torch.allclose(from_x0_eps("v", x0, eps, phi.cos(), phi.sin()), slope, atol=1e-8)


def test_flow_is_the_velocity_of_the_straight_path() -> None:
    x0, eps = normal(5, seed=1), normal(5, seed=2)
    slope = (q_sample(x0, eps, 1 - 0.6, 0.6) - q_sample(x0, eps, 1 - 0.2, 0.2)) / 0.4
    assert torch.allclose(from_x0_eps("flow", x0, eps, 0.4, 0.6), slope)


def test_coefficients_of_one_sample_do_not_touch_the_next() -> None:
    alpha, sigma = NoiseSchedule().alpha_sigma(torch.tensor([3, 700]))
    x_t, eps = normal(2, 4, 3, 3, seed=1), normal(2, 4, 3, 3, seed=2)
    whole = x0_from_eps(x_t, eps, alpha, sigma)
    for i in range(2):
        assert torch.allclose(whole[i], x0_from_eps(x_t[i], eps[i], alpha[i], sigma[i]))
    assert expand(torch.tensor([1.0, 2.0]), x_t).shape == (2, 1, 1, 1)


def test_float32_stays_float32() -> None:
    alpha, sigma = NoiseSchedule().alpha_sigma(torch.tensor([3, 700]))
    x = normal(2, 4).float()
    for a, s in ((alpha, sigma), (alpha[0], sigma[0])):
        assert q_sample(x, x, a, s).dtype == torch.float32
