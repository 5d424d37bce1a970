"""Laws of guidance by a classifier, on mixtures whose classifier is known exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm_pipe import guidance, samplers
from ldm_pipe.metrics.mixture import GaussianMixture
from ldm_pipe.noise import Noise
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import NoiseSchedule

LAW = NoiseSchedule()
CLASSES = [GaussianMixture([[-1.2]], [0.4]), GaussianMixture([[0.9]], [0.6])]
BOTH = GaussianMixture([[-1.2], [0.9]], [0.4, 0.6])


def classifier(x: Tensor, t: Tensor) -> Tensor:
    """Return log p(x_t | y), which are logits of p(y | x_t): both classes are as frequent."""
    assert t.shape == (len(x),)
    assert t.dtype == torch.float32
    alpha, sigma = LAW.alpha_sigma(t.double())
    return torch.stack([one.log_prob(x, alpha, sigma) for one in CLASSES], dim=1)


def states(count: int) -> Tensor:
    return torch.randn((count, 1), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("t", [20.0, 400.0, 900.0])
@pytest.mark.parametrize("label", [0, 1])
def test_the_true_classifier_at_scale_one_gives_the_denoiser_of_its_class(t: float, label: int) -> None:
    """Bayes: grad log p(x_t) + grad log p(y | x_t) = grad log p(x_t | y)."""
    x, time = states(16), torch.tensor(t, dtype=torch.float64)
    labels = torch.full((16,), label)
    guided = guidance.classifier_score(BOTH.denoiser(LAW), classifier, labels, 1.0, LAW)
    expected = CLASSES[label].denoiser(LAW)(x, time).x0
    torch.testing.assert_close(guided(x, time).x0, expected, rtol=0, atol=2e-5)  # logits are float32


def test_at_scale_zero_nothing_changes() -> None:
    steps, x, labels = LAW.steps(10), states(4), torch.zeros(4, dtype=torch.int64)
    denoise, t = BOTH.denoiser(LAW), LAW.steps(10).t[3]
    score = guidance.classifier_score(denoise, classifier, labels, 0.0, LAW)
    mean = guidance.classifier_mean(denoise, classifier, labels, 0.0, LAW, steps=steps)
    assert torch.equal(score(x, t).x0, denoise(x, t).x0)
    assert torch.equal(mean(x, t).x0, denoise(x, t).x0)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_mean_of_a_step_moves_by_the_scaled_variance_times_the_gradient(variance: str) -> None:
    """Algorithm 1, line for line: mu + s Sigma g, by running one step of ddpm with and without."""
    steps, labels, scale = LAW.steps(50), torch.tensor([0, 1, 1]), 2.5
    x = states(3)
    denoise = BOTH.denoiser(LAW)
    guided = guidance.classifier_mean(denoise, classifier, labels, scale, LAW, steps=steps, variance=variance)  # type: ignore[arg-type]
    seen: list[Tensor] = []
    for one in (denoise, guided):
        states_after: list[Tensor] = []

        def keep(i: int, t: Tensor, state: Tensor, x0: Tensor, kept: list[Tensor] = states_after) -> None:
            kept.append(state)

        samplers.ddpm(one, x, steps, noise=lambda shape: torch.zeros(tuple(shape)), callback=keep, variance=variance)  # type: ignore[arg-type]
        seen.append(states_after[0])
    _, alpha_t, sigma_t, alpha_s, sigma_s = next(steps.pairs())
    large = sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2
    spread = large if variance == "fixed_large" else large * sigma_s**2 / sigma_t**2
    of_class = torch.cat([CLASSES[int(y)].score(x[i : i + 1], alpha_t, sigma_t) for i, y in enumerate(labels)])
    gradient = of_class - BOTH.score(x, alpha_t, sigma_t)
    torch.testing.assert_close(seen[1] - seen[0], scale * spread * gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_guided_samples_are_those_of_the_class(sampler: str) -> None:
    """Both algorithms draw the class out of the mixture of both; 4000 samples, whose true error is 0.01."""
    count, steps = 4000, LAW.steps(200)
    labels = torch.ones(count, dtype=torch.int64)
    denoise = BOTH.denoiser(LAW)
    if sampler == "ddpm":
        guided = guidance.classifier_mean(denoise, classifier, labels, 1.0, LAW, steps=steps)
    else:
        guided = guidance.classifier_score(denoise, classifier, labels, 1.0, LAW)
    generator = torch.Generator().manual_seed(1)
    x = samplers.get(sampler)(guided, states(count), steps, noise=Noise.from_generator(generator))
    assert CLASSES[1].wasserstein(x) < 0.06
    assert BOTH.wasserstein(x) > 0.5


def test_a_learnt_variance_is_the_one_that_counts() -> None:
    """A network that says v = 1 everywhere steps with the large variance."""
    from ldm_pipe.denoiser import Denoised

    steps, labels, x = LAW.steps(20), torch.tensor([1]), states(1)

    def learnt(x_t: Tensor, t: Tensor) -> Denoised:
        return Denoised(BOTH.denoiser(LAW)(x_t, t).x0, torch.ones_like(x_t))

    common = {"labels": labels, "scale": 1.0, "schedule": LAW, "steps": steps}
    mixed = guidance.classifier_mean(learnt, classifier, **common)(x, steps.t[4]).x0  # type: ignore[arg-type]
    large = guidance.classifier_mean(BOTH.denoiser(LAW), classifier, **common, variance="fixed_large")  # type: ignore[arg-type]
    torch.testing.assert_close(mixed, large(x, steps.t[4]).x0)


def test_nothing_is_added_where_there_is_no_signal() -> None:
    law = NoiseSchedule(zero_terminal_snr=True, prediction="v")
    time, x = torch.tensor(999.0, dtype=torch.float64), states(2)
    guided = guidance.classifier_score(BOTH.denoiser(law), classifier, torch.tensor([0, 1]), 5.0, law)(x, time)
    assert torch.equal(guided.x0, BOTH.denoiser(law)(x, time).x0)


@pytest.mark.parametrize("logits", [torch.zeros(3), torch.zeros(2, 5), torch.zeros(3, 2)])
def test_what_is_no_classifier_of_these_classes_is_refused(logits: Tensor) -> None:
    labels = torch.tensor([0, 1, 2])
    guided = guidance.classifier_score(BOTH.denoiser(LAW), lambda x, t: logits, labels, 1.0, LAW)
    with pytest.raises(LdmPipeError, match=r"\(batch, classes\)"):
        guided(states(3), torch.tensor(300.0, dtype=torch.float64))
