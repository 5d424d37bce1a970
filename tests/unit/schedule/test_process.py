"""Laws of the diffusion process and its predictions."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import NoiseSchedule, Prediction
from ldm_pipe.schedule.process import (
    Extras,
    eps_from_x0,
    expand,
    extras,
    from_x0_eps,
    level_below,
    posterior,
    q_sample,
    q_step,
    to_x0,
    x0_from_eps,
)

PREDICTIONS = get_args(Prediction)
NO_X0_IN_NOISE = ("eps", "score")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def extras_of(schedule: NoiseSchedule, prediction: Any, t: torch.Tensor) -> Extras:
    return Extras(sigma_data=0.7) if prediction == "edm" else extras(schedule, prediction, t)


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
    last = 998 if prediction in NO_X0_IN_NOISE else 999  # they say nothing about x0 at alpha = 0
    t = torch.tensor([0, 10, 500, last])
    alpha, sigma = schedule.alpha_sigma(t)
    extra = extras_of(schedule, prediction, t)
    x0, eps = normal(4, 3, 5, 5, seed=1), normal(4, 3, 5, 5, seed=2)
    x_t = q_sample(x0, eps, alpha, sigma)
    back = to_x0(prediction, from_x0_eps(prediction, x0, eps, alpha, sigma, extra), x_t, alpha, sigma, extra)
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


def test_score_is_the_gradient_of_the_log_density_given_x0() -> None:
    """The target of denoising score matching (arXiv:1907.05600, eq. 5): -(x_t - alpha x0) / sigma^2."""
    x0, eps, alpha, sigma = normal(5, seed=1), normal(5, seed=2), 0.8, 0.3
    x_t: Any = q_sample(x0, eps, alpha, sigma).requires_grad_()
    torch.distributions.Normal(alpha * x0, sigma).log_prob(x_t).sum().backward()
    assert torch.allclose(from_x0_eps("score", x0, eps, alpha, sigma), x_t.grad)


def test_edm_equals_its_paper_where_alpha_is_1() -> None:
    """Table 1 of arXiv:2206.00364, written out for x = x0 + sigma eps."""
    x0, output, sigma, data = normal(5, seed=1), normal(5, seed=2), 1.7, 0.5
    x = x0 + sigma * normal(5, seed=3)
    c_skip, c_out = data**2 / (sigma**2 + data**2), sigma * data / (sigma**2 + data**2) ** 0.5
    assert torch.allclose(to_x0("edm", output, x, 1.0, sigma, Extras(sigma_data=data)), c_skip * x + c_out * output)


def test_edm_targets_have_unit_variance_at_every_level() -> None:
    """The condition that c_out and c_skip are made for (arXiv:2206.00364, appendix B.6)."""
    x0, eps = 0.5 * normal(100_000, seed=1), normal(100_000, seed=2)
    for alpha, sigma in ((1.0, 0.01), (1.0, 80.0), (0.6, 0.8), (0.0, 1.0)):
        assert float(from_x0_eps("edm", x0, eps, alpha, sigma, Extras(sigma_data=0.5)).var()) == pytest.approx(
            1, rel=0.02
        )


def test_predictions_that_mean_nothing_on_a_law_are_refused() -> None:
    with pytest.raises(LdmPipeError, match="sigma_data"):
        extras(NoiseSchedule(), "edm", torch.tensor(3))


def test_the_level_below_the_first_is_clean_data() -> None:
    schedule = NoiseSchedule()
    alpha, sigma = level_below(schedule, torch.tensor([0, 1, 999]))
    assert (float(alpha[0]), float(sigma[0])) == (1.0, 0.0)
    assert torch.equal(alpha[1:], schedule.alpha(torch.tensor([0, 998])))
    assert torch.equal(sigma[1:], schedule.sigma(torch.tensor([0, 998])))


@pytest.mark.parametrize("levels", [(0.5, 3.0**0.5 / 2, 0.8, 0.6), (0.3, 0.7, 0.6, 0.4), (1.0, 9.0, 1.0, 2.0)])
def test_posterior_is_bayes_rule(levels: tuple[float, float, float, float]) -> None:
    """q(x_s | x_t, x0) ~ q(x_t | x_s) q(x_s | x0) on VP, flow and VE levels, by the conjugate Gaussian formula."""
    alpha_t, sigma_t, alpha_s, sigma_s = levels
    r = alpha_t / alpha_s
    large = sigma_t**2 - r**2 * sigma_s**2
    precision = 1 / sigma_s**2 + r**2 / large
    back = posterior(*levels)
    assert back.large == pytest.approx(large)
    assert back.small == pytest.approx(1 / precision)
    assert back.of_x0 == pytest.approx(alpha_s / sigma_s**2 / precision)
    assert back.of_x_t == pytest.approx(r / large / precision)


def test_two_steps_of_the_process_are_one() -> None:
    """q_step from s to t after q_sample to s has the moments of q_sample to t."""
    x0, size = torch.full((200_000,), 2.0, dtype=torch.float64), 200_000
    x_s = q_sample(x0, normal(size, seed=1), 0.8, 0.6)
    x_t = q_step(x_s, normal(size, seed=2), 0.8, 0.6, 0.5, 0.75**0.5)
    assert float(x_t.mean()) == pytest.approx(1.0, abs=4 * 0.87 / size**0.5)
    assert float(x_t.var()) == pytest.approx(0.75, rel=0.02)


def test_coefficients_of_one_sample_do_not_touch_the_next() -> None:
    alpha, sigma = NoiseSchedule().alpha_sigma(torch.tensor([3, 700]))
    x_t, eps = normal(2, 4, 3, 3, seed=1), normal(2, 4, 3, 3, seed=2)
    whole = x0_from_eps(x_t, eps, alpha, sigma)
    for i in range(2):
        assert torch.allclose(whole[i], x0_from_eps(x_t[i], eps[i], alpha[i], sigma[i]))
    assert expand(torch.tensor([1.0, 2.0]), x_t).shape == (2, 1, 1, 1)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_float32_stays_float32(prediction: Any) -> None:
    schedule, t = NoiseSchedule(), torch.tensor([3, 700])
    x = normal(2, 4).float()
    for times in (t, t[0]):
        alpha, sigma = schedule.alpha_sigma(times)
        extra = extras_of(schedule, prediction, times)
        assert q_sample(x, x, alpha, sigma).dtype == torch.float32
        assert from_x0_eps(prediction, x, x, alpha, sigma, extra).dtype == torch.float32
        assert to_x0(prediction, x, x, alpha, sigma, extra).dtype == torch.float32
