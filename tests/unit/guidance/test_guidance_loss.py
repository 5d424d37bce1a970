"""Laws of guidance by a loss, on Gaussians whose tilted law is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from conditioning import Condition
from ldm_pipe import guidance
from ldm_pipe.denoiser import Denoised, Denoiser
from ldm_pipe.guidance.loss import cutouts, spherical_distance
from ldm_pipe.metrics.mixture import GaussianMixture
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule()
TIMES = [torch.tensor(t, dtype=torch.float64) for t in (5.0, 200.0, 700.0, 990.0)]


def exact(x: Tensor, t: Tensor, mean: float = 0.4, std: float = 0.7) -> Denoised:
    """E[x0 | x_t] of N(mean, std^2), by operations that have a gradient."""
    alpha, sigma = (float(level) for level in SCHEDULE.alpha_sigma(t))
    return Denoised(mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean))


@pytest.mark.parametrize("scale", [-1.0, 0.5, 3.0])
def test_a_linear_loss_samples_the_tilted_gaussian_exactly(scale: float) -> None:
    """p(x) exp(-s c x) is N(mean - s c std^2, std^2) for p = N(mean, std^2)."""
    guided = guidance.loss_score(exact, lambda x0: 2.0 * x0[:, 0], scale, SCHEDULE)
    tilted = GaussianMixture([[0.4 - scale * 2.0 * 0.49]], [0.7])
    x = 2 * torch.randn(500, 1, dtype=torch.float64)
    for t in TIMES:
        assert torch.allclose(guided(x, t).x0, tilted.x0(x, *SCHEDULE.alpha_sigma(t)), atol=1e-9)


def test_without_the_network_the_gradient_is_that_at_fixed_noise() -> None:
    guided = guidance.loss_score(exact, lambda x0: x0[:, 0] ** 2, 0.3, SCHEDULE, through_network=False)
    x = torch.randn(50, 1, dtype=torch.float64)
    for t in TIMES:
        alpha, sigma = (float(level) for level in SCHEDULE.alpha_sigma(t))
        x0 = exact(x, t).x0
        assert torch.allclose(guided(x, t).x0, x0 - 0.3 * (sigma / alpha) ** 2 * 2 * x0)


def test_scale_0_and_pure_noise_leave_the_denoiser_as_it_is() -> None:
    x = torch.randn(5, 1, dtype=torch.float64)
    assert torch.equal(
        guidance.loss_score(exact, lambda x0: x0[:, 0], 0.0, SCHEDULE)(x, TIMES[1]).x0, exact(x, TIMES[1]).x0
    )

    class Noise(NoiseSchedule):
        def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
            return torch.tensor(0.0), torch.tensor(1.0)

    assert torch.equal(
        guidance.loss_score(lambda x, t: Denoised(x), lambda x0: x0[:, 0], 3.0, Noise())(x, TIMES[0]).x0, x
    )


def test_loss_and_classifier_work_in_the_form_of_a_call() -> None:
    """A classifier of p(y | x_t) as logits, and its log probability as a loss of x_t, are one guidance."""
    denoiser = Denoiser(lambda x, t, **_: torch.tanh(x), NoiseSchedule(prediction="v"))
    cond, weights = Condition(), torch.ones(1, 4)
    x = torch.randn(4, 2, 3, 3)
    labels = torch.tensor([0, 1, 1, 0])

    def classifier(x_t: Tensor, t: Tensor) -> Tensor:
        return torch.stack([x_t.mean((1, 2, 3)), -x_t.mean((1, 2, 3))], dim=1)

    base = guidance.classifier_free(1.0)
    guided = guidance.by_classifier(classifier, labels, 2.0, base)(denoiser, [cond], weights, None)
    wanted = guidance.classifier_score(lambda a, b: denoiser(a, b, cond), classifier, labels, 2.0, denoiser.schedule)
    assert torch.equal(guided(x, TIMES[1]).x0, wanted(x, TIMES[1]).x0)
    lowered = guidance.by_loss(lambda x0: x0.square().mean((1, 2, 3)), 5.0, base)(denoiser, [cond], weights, None)
    with torch.no_grad():
        assert not lowered(x, TIMES[1]).x0.requires_grad
        before, after = base(denoiser, [cond], weights, None)(x, TIMES[1]).x0, lowered(x, TIMES[1]).x0
    assert float(after.square().mean()) < float(before.square().mean())


def test_clip_guidance_turns_the_picture_towards_the_text_whatever_its_neighbours() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 2), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.LazyLinear(12))
    net(torch.zeros(1, 3, 16, 16))
    targets = torch.randn(3, 12)
    x = torch.randn(3, 3, 24, 24)

    def angles(seeds: list[int], which: slice) -> Tensor:
        loss = guidance.clip_loss(net, targets[which], seeds, num_cutouts=4, size=16, range_weight=0.1)
        with torch.no_grad():
            guided = guidance.loss_score(lambda a, b: Denoised(a * 1.0), loss, 40.0, SCHEDULE)(x[which], TIMES[1]).x0
        return guided

    together = angles([1, 2, 3], slice(0, 3))
    assert torch.allclose(angles([2], slice(1, 2))[0], together[1], atol=1e-5)
    loss = guidance.clip_loss(net, targets, [1, 2, 3], num_cutouts=4, size=16)
    with torch.no_grad():
        assert bool((loss(together) < loss(x)).all())


def test_cutouts_are_views_of_their_own_picture() -> None:
    image = torch.arange(2.0)[:, None, None, None].expand(2, 3, 20, 30)
    views = cutouts(image, 5, 8, [3, 4])
    assert views.shape == (10, 3, 8, 8)
    assert torch.allclose(views.reshape(5, 2, -1).mean(2), torch.tensor([0.0, 1.0]).expand(5, 2))
    assert cutouts(torch.rand(1, 3, 4, 4), 2, 8, [3]).shape == (2, 3, 8, 8)


def test_spherical_distance_is_half_the_squared_angle() -> None:
    for angle in (0.0, 0.3, 1.5, 3.0):
        u, v = torch.tensor([[2.0, 0.0]]), torch.tensor([[math.cos(angle), math.sin(angle)]])
        assert abs(float(spherical_distance(u, v)) - angle**2 / 2) < 1e-3


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda x0: x0.mean(), "loss of shape"),
        (lambda x0: x0.detach()[:, 0], "does not depend on x0"),
        (lambda x0: (x0[:, 0] * 0).sqrt() * x0[:, 0], "NaN or infinite at t = 200"),
    ],
)
def test_losses_that_cannot_guide_are_refused(loss: Any, words: str) -> None:
    with pytest.raises(LdmPipeError, match=words):
        guidance.loss_score(exact, loss, 1.0, SCHEDULE)(torch.randn(4, 1, dtype=torch.float64), TIMES[1])


def test_settings_of_losses_that_do_not_fit_are_refused() -> None:
    with pytest.raises(LdmPipeError, match="scale of a loss"):
        guidance.loss_score(exact, lambda x0: x0[:, 0], math.inf, SCHEDULE)
    with pytest.raises(LdmPipeError, match="3 texts and 2 seeds"):
        guidance.clip_loss(lambda image: image, torch.randn(3, 4), [1, 2])
    loss = guidance.clip_loss(lambda image: image.flatten(1), torch.randn(1, 4), [1], size=8)
    with pytest.raises(LdmPipeError, match="same CLIP"):
        loss(torch.randn(1, 3, 8, 8))
