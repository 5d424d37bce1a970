"""Laws of the variational bound; parity with the papers' formulas is in tests/parity/test_variational.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe.denoiser import Denoise, Denoised
from ldm_pipe.noise import Noise
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.samplers import ddpm
from ldm_pipe.schedule import NoiseSchedule, Steps
from ldm_pipe.schedule.process import Posterior, posterior
from ldm_pipe.training.objectives.variational import (
    Decoder,
    bits,
    bits_per_dim,
    discretised_log_likelihood,
    kl_normal,
    log_density,
    log_variance,
    step_term,
    vlb,
    vlb_term,
)

MEAN, STD = 0.3, 0.5
SHAPE = (128, 512)


def draw(shape: Any, seed: int = 0) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noise_of(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(tuple(shape), generator=generator, dtype=torch.float64)


def exact(steps: Steps) -> Denoise:
    """Return E[x0 | x_t] for data N(MEAN, STD^2)."""
    levels = {float(t): (a, s) for t, a, s, *_ in steps.pairs()}

    def denoise(x: Tensor, t: Tensor) -> Denoised:
        alpha, sigma = levels[float(t)]
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        return Denoised(MEAN + gain * (x - alpha * MEAN))

    return denoise


def ladder(law: str, num: int) -> Steps:
    """Return levels of a VP, a flow and a VE law, evenly spaced in log(alpha / sigma)."""
    t = torch.linspace(4, -4, num, dtype=torch.float64)
    edm = t.exp()  # sigma / alpha
    match law:
        case "vp":
            alpha, sigma = (1 + edm**2).rsqrt(), (1 + edm**-2).rsqrt()
        case "flow":
            alpha, sigma = 1 / (1 + edm), 1 / (1 + 1 / edm)
        case _:
            alpha, sigma = torch.ones_like(t), edm
    end = torch.tensor([[-5.0], [1.0], [0.0]], dtype=torch.float64)
    rows = [torch.cat([row, last]) for row, last in zip((t, alpha, sigma), end, strict=True)]
    return Steps(*rows, init_scale=float(sigma[0]))


def gap(denoise: Denoise, steps: Steps) -> float:
    """Return L_vlb minus the differential entropy, both on the same samples, in bits/dim."""
    x0 = MEAN + STD * draw(SHAPE)
    log_var = torch.tensor(2 * math.log(STD), dtype=torch.float64)
    entropy = -bits(log_density(x0, torch.full_like(x0, MEAN), log_var))  # 1/2 log2(2 pi e STD^2) = 1.05
    return float((bits_per_dim(denoise, x0, steps, noise_of(1)).total - entropy).mean())


@pytest.mark.parametrize("law", ["vp", "flow", "ve"])
def test_the_bound_of_an_exact_model_tends_to_the_entropy(law: str) -> None:
    """The posterior's variance is too small by an amount that falls with the length of the steps."""
    coarse, fine = (gap(exact(ladder(law, num)), ladder(law, num)) for num in (80, 320))
    assert 3 < coarse / fine < 5
    assert (4 * fine - coarse) / 3 == pytest.approx(0, abs=0.03)  # the limit of ever finer steps


@pytest.mark.parametrize("law", ["vp", "flow", "ve"])
def test_with_the_true_variance_the_bound_is_the_entropy_for_few_steps_too(law: str) -> None:
    steps = ladder(law, 20)
    assert gap(with_true_variance(steps), steps) == pytest.approx(0, abs=0.02)


def test_a_wrong_model_needs_more_bits() -> None:
    steps = ladder("vp", 100)
    right = exact(steps)
    x0 = MEAN + STD * draw(SHAPE)

    def bound(shift: float) -> float:
        model = lambda x, t: Denoised(right(x, t).x0 + shift)  # noqa: E731
        return float(bits_per_dim(model, x0, steps, noise_of(1)).total.mean())

    assert bound(0.3) > bound(0.1) > bound(0.0)


def test_with_fine_bins_the_code_is_as_long_as_the_density_says() -> None:
    """Bins of width w cost -log2(w) bits more than the density."""
    x0, mean, log_var, width = draw((500,), 1), draw((500,), 2), draw((500,), 3) - 3, 1e-4
    code = discretised_log_likelihood(x0, mean, log_var, Decoder(width))
    assert torch.allclose(code, log_density(x0, mean, log_var) + math.log(width), atol=1e-3)


@pytest.mark.parametrize("std", [1e-3, 0.05, 3.0])
def test_the_bins_of_pixels_share_all_probability(std: float) -> None:
    pixels = torch.arange(256, dtype=torch.float64) * (2 / 255) - 1
    log_var = torch.full_like(pixels, 2 * math.log(std))
    for mean in (-1.0, 0.013, 0.99, 2.0):
        logp = discretised_log_likelihood(pixels, torch.full_like(pixels, mean), log_var, Decoder(2 / 255, (-1.0, 1.0)))
        assert float(logp.exp().sum()) == pytest.approx(1, abs=1e-9)
        assert logp.isfinite().all()


def test_far_away_bins_have_finite_likelihoods_and_gradients() -> None:
    """50 standard deviations off, Phi itself is 0 in float64."""
    mean: Any = torch.tensor([-1.0, 1.0, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    x0 = torch.tensor([1.0, -1.0, 0.5, 1.0], dtype=torch.float64)
    log_var: Any = torch.full((4,), 2 * math.log(0.02), dtype=torch.float64, requires_grad=True)
    logp = discretised_log_likelihood(x0, mean, log_var, Decoder(2 / 255, (-1.0, 1.0)))
    logp.sum().backward()
    for values in (logp, mean.grad, log_var.grad):
        assert values.isfinite().all()
    assert mean.grad[0] > 0 > mean.grad[1]


def test_kl_is_that_of_torch_and_0_for_equals() -> None:
    a, b, log_var, other = draw((50,), 1), draw((50,), 2), draw((50,), 3), draw((50,), 4)
    normals = [torch.distributions.Normal(m, (0.5 * v).exp()) for m, v in ((a, log_var), (b, other))]
    assert torch.allclose(kl_normal(a - b, log_var, other), torch.distributions.kl_divergence(*normals))
    assert (kl_normal(torch.zeros(50), log_var, log_var) == 0).all()


def test_the_terms_of_single_times_add_up_to_the_trajectory() -> None:
    """A model whose estimate does not depend on x_t has the same terms on any path."""
    schedule = NoiseSchedule(num_train_timesteps=40, beta_schedule="squaredcos_cap_v2")
    x0, guess = draw((3, 2, 5), 1), draw((3, 2, 5), 2)
    for variance, mix in (("fixed_small", None), ("fixed_large", None), ("learned", draw((3, 2, 5), 3))):
        model = Denoised(guess, mix)
        whole = vlb(lambda x, t, m=model: m, x0, schedule.steps(40, spacing="trailing"), noise_of(1), variance=variance)  # type: ignore[arg-type]
        single = [vlb_term(schedule, x0, model, torch.full((3,), float(t)), variance=variance) for t in range(40)]  # type: ignore[arg-type]
        assert torch.allclose(whole.decoder, single[0])
        assert torch.allclose(whole.levels, torch.stack(single[:0:-1]))
        assert torch.allclose(whole.total - whole.prior, 40 * torch.stack(single).mean(0))


def test_the_best_variance_is_that_of_the_true_reverse_process() -> None:
    """For Gaussian data p(x_s | x_t) has the variance small + of_x0^2 Var[x0 | x_t]: the bound is least there."""
    levels = (0.6, 0.8, 0.8, 0.6)
    back = posterior(*levels)
    best = true_mix(back, *levels[:2])
    x0 = MEAN + STD * draw(SHAPE)
    x_t = levels[0] * x0 + levels[1] * draw(SHAPE, 5)
    gain = levels[0] * STD**2 / (levels[0] ** 2 * STD**2 + levels[1] ** 2)
    x0_hat = MEAN + gain * (x_t - levels[0] * MEAN)

    def term(mix: float) -> float:
        return float(step_term(x0, Denoised(x0_hat, torch.full_like(x0, mix)), back, back.small, "learned").mean())

    assert 0 < best < 1
    assert term(best) < min(term(best - 0.1), term(best + 0.1))


def true_mix(back: Posterior, alpha_t: float, sigma_t: float) -> float:
    """Return where the variance of p(x_s | x_t), for Gaussian data, lies between small and large."""
    left_open = STD**2 * sigma_t**2 / (alpha_t**2 * STD**2 + sigma_t**2)
    small, large = float(back.small), float(back.large)
    return math.log((small + float(back.of_x0) ** 2 * left_open) / small) / math.log(large / small)


def with_true_variance(steps: Steps) -> Denoise:
    """Return the exact model with the exact variance of the reverse process."""
    right = exact(steps)
    rows = {float(t): (posterior(*levels), levels) for t, *levels in steps.pairs()}

    def denoise(x: Tensor, t: Tensor) -> Denoised:
        back, levels = rows[float(t)]
        mix = true_mix(back, levels[0], levels[1]) if back.small > 0 else 1.0
        return Denoised(right(x, t).x0, torch.full_like(x, mix))

    return denoise


def test_with_the_true_variance_ten_steps_of_ddpm_are_exact() -> None:
    """Ancestral sampling of a Gaussian makes no error at all but in the last step, which draws no noise."""
    steps = ladder("vp", 10)

    def std_of(variance: Any) -> float:
        x = ddpm(with_true_variance(steps), draw((200_000, 1), 7), steps, noise=noise_of(8), variance=variance)
        return float(x.std())

    assert std_of("learned") == pytest.approx(STD, rel=0.008)
    assert std_of("fixed_small") < 0.97 * STD < 1.03 * STD < std_of("fixed_large")


def test_ddpm_takes_the_bounds_at_mix_0_and_1_and_learned_by_itself() -> None:
    steps = NoiseSchedule().steps(6, spacing="trailing")

    def run(mix: float | None, variance: Any) -> Tensor:
        def model(x: Tensor, t: Tensor) -> Denoised:
            return Denoised(0.1 * x, None if mix is None else torch.full_like(x, mix))

        return ddpm(model, draw((2, 3), 1), steps, noise=Noise([1, 2]), variance=variance)

    assert torch.allclose(run(1.0, "learned"), run(None, "fixed_large"))
    assert torch.allclose(run(0.0, "learned"), run(None, "fixed_small"))
    assert torch.equal(run(0.7, None), run(0.7, "learned"))
    assert torch.equal(run(None, None), run(0.7, "fixed_small"))
    with pytest.raises(LdmPipeError, match="gives none"):
        run(None, "learned")
    with pytest.raises(LdmPipeError, match="fixed_large"):
        run(None, "large")


def test_gradients_pass_through_the_whole_trajectory() -> None:
    steps = NoiseSchedule(num_train_timesteps=10, beta_schedule="squaredcos_cap_v2").steps(10, spacing="trailing")
    gain: Any = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    bound = vlb(lambda x, t: Denoised(gain * x, gain * x), draw((4, 2)), steps, noise_of(1))
    bound.total.mean().backward()
    assert gain.grad.isfinite()
    assert gain.grad != 0
    assert not bits_per_dim(lambda x, t: Denoised(gain * x), draw((4, 2)), steps, noise_of(1)).total.requires_grad


def test_pure_noise_costs_no_prior() -> None:
    zero = NoiseSchedule(prediction="v", zero_terminal_snr=True).steps(5, spacing="trailing")
    bound = bits_per_dim(lambda x, t: Denoised(0 * x), draw((4, 2)), zero, noise_of(1))
    assert bound.prior.abs().max() < 1e-12
    assert bound.total.isfinite().all()


def test_bad_steps_bins_and_variances_are_refused() -> None:
    steps = NoiseSchedule().steps(5, spacing="trailing", final="first")
    with pytest.raises(LdmPipeError, match="clean"):
        vlb(lambda x, t: Denoised(x), draw((4, 2)), steps, noise_of(1))
    with pytest.raises(LdmPipeError, match="bin_width"):
        Decoder(0.0)
    with pytest.raises(LdmPipeError, match="gives none"):
        log_variance(posterior(0.6, 0.8, 0.8, 0.6), 0.1, Denoised(draw((2, 2))), "learned")
