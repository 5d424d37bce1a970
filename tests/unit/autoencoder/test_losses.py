"""Laws of the autoencoder's objective."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoencoder import (
    AutoencoderKL,
    AutoencoderLossConfig,
    DiagonalGaussian,
    LogitAverages,
    PatchDiscriminator,
    Quantised,
    adaptive_weight,
    adversarial_loss,
    autoencoder_loss,
    discriminator_loss,
    perceptual_distance,
    reconstruction_loss,
)
from ldm_pipe.pretrained import LdmPipeError

STANDARD = DiagonalGaussian(torch.zeros(2, 4, 4, 4), torch.zeros(2, 4, 4, 4))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def judge_loss(*args: Any, **options: Any) -> Tensor:
    return discriminator_loss(*args, **options)[0]


class Features(nn.Module):
    """Stand in for a perceptual network: two frozen convolutions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3, stride=2)
        self.requires_grad_(False)

    def forward(self, image: Tensor) -> list[Tensor]:
        first = self.first(image).relu()
        return [first, self.second(first)]


@pytest.fixture
def model() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL.from_config(
        {
            "block_out_channels": [8, 8],
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
            "norm_num_groups": 4,
        }
    )


@pytest.fixture
def discriminator() -> PatchDiscriminator:
    torch.manual_seed(1)
    return PatchDiscriminator(width=8, num_layers=1)


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_perfect_reconstruction_costs_nothing(kind: Any) -> None:
    image = randn(2, 3, 16, 16)
    assert float(reconstruction_loss(image, image.clone(), kind)) == 0.0
    assert torch.equal(perceptual_distance(Features(), image, image.clone()), torch.zeros(2))
    config = AutoencoderLossConfig(reconstruction=kind, kl_weight=1.0)
    loss, parts = autoencoder_loss(image, image.clone(), STANDARD, config, perceptual=Features())
    assert float(loss) == 0.0
    assert set(parts) == {"reconstruction", "perceptual", "kl", "loss"}


def test_reconstruction_loss_is_per_pixel() -> None:
    image = randn(2, 3, 8, 8)
    assert float(reconstruction_loss(image, image + 0.5, "l1")) == pytest.approx(0.5)
    assert float(reconstruction_loss(image, image + 0.5, "l2")) == pytest.approx(0.25)


def test_the_parts_add_up_to_ldms_objective_per_pixel(model: AutoencoderKL, discriminator: PatchDiscriminator) -> None:
    image, features = randn(2, 3, 16, 16), Features()
    reconstruction, posterior = model(image, randn(2, 4, 8, 8))
    config = AutoencoderLossConfig(perceptual_weight=0.7, kl_weight=1e-3, adversarial_weight=0.3)
    loss, parts = autoencoder_loss(
        image,
        reconstruction,
        posterior,
        config,
        perceptual=features,
        discriminator=discriminator,
        last_layer=model.last_layer,
    )
    # LDM sums over pixels: |x - r| + p d for each, and the whole divergence once.
    distance = perceptual_distance(features, image, reconstruction).view(2, 1, 1, 1)
    summed = ((image - reconstruction).abs() + 0.7 * distance).sum() / 2 + 1e-3 * posterior.kl().mean()
    expected = summed / (3 * 16 * 16) - 0.3 * parts["adaptive_weight"] * discriminator(reconstruction).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(parts["loss"], loss.detach())
    assert not any(part.requires_grad for part in parts.values())


def test_perceptual_distance_is_that_of_lpips() -> None:
    features, image, other = Features(), randn(2, 3, 16, 16), randn(2, 3, 16, 16, seed=1)
    expected = torch.zeros(2)
    for x, y in zip(features(image), features(other), strict=True):
        x, y = nn.functional.normalize(x, dim=1), nn.functional.normalize(y, dim=1)
        expected = expected + (x - y).square().sum(1).mean((1, 2))
    distance = perceptual_distance(features, image, other)
    torch.testing.assert_close(distance, expected)
    torch.testing.assert_close(distance, perceptual_distance(features, other, image))
    assert float(distance.min()) > 0.0


def test_perceptual_loss_has_a_gradient_to_the_reconstruction_only() -> None:
    image = randn(1, 3, 16, 16).requires_grad_()
    reconstruction = randn(1, 3, 16, 16, seed=1).requires_grad_()
    perceptual_distance(Features(), image, reconstruction).sum().backward()
    assert reconstruction.grad is not None
    assert float(reconstruction.grad.abs().max()) > 0.0
    assert image.grad is None


def test_perceptual_gradient_is_finite_on_flat_drawings() -> None:
    reconstruction = torch.zeros(1, 3, 16, 16, requires_grad=True)
    perceptual_distance(lambda x: [x, x.relu()], randn(1, 3, 16, 16), reconstruction).sum().backward()
    assert reconstruction.grad is not None
    assert torch.isfinite(reconstruction.grad).all()


def test_lpips_under_no_grad_is_noticed() -> None:
    features = Features()
    reconstruction = randn(1, 3, 16, 16).requires_grad_()
    with pytest.raises(LdmPipeError, match="cut the gradient"):
        perceptual_distance(torch.no_grad()(features.forward), randn(1, 3, 16, 16), reconstruction)
    with torch.no_grad():  # validation is not training
        perceptual_distance(features, randn(1, 3, 16, 16), reconstruction)


@pytest.mark.parametrize("factor", [1e-4, 1.0, 1e3])
def test_adaptive_weight_is_the_ratio_of_gradient_norms(factor: float) -> None:
    layer = randn(5, 4).requires_grad_()
    reconstruction_term, adversarial_term = factor * layer.square().sum(), layer.sin().sum()
    expected = (2 * factor * layer).norm() / layer.cos().norm()
    weight = adaptive_weight(reconstruction_term, adversarial_term, layer)
    torch.testing.assert_close(weight, expected.detach())
    assert not weight.requires_grad
    assert layer.grad is None


def test_weighted_adversarial_gradient_is_as_long_as_the_other(
    model: AutoencoderKL, discriminator: PatchDiscriminator
) -> None:
    image = randn(2, 3, 16, 16)
    reconstruction, _ = model(image)
    term, adversarial = reconstruction_loss(image, reconstruction), adversarial_loss(discriminator, reconstruction)
    weight = adaptive_weight(term, adversarial, model.last_layer)
    lengths = [
        torch.autograd.grad(loss, model.last_layer, retain_graph=True)[0].norm()
        for loss in (term, weight * adversarial)
    ]
    torch.testing.assert_close(lengths[0], lengths[1])


def test_adaptive_weight_is_bounded_where_the_discriminator_is_flat() -> None:
    layer = randn(5).requires_grad_()
    assert float(adaptive_weight(layer.sum(), 0.0 * layer.sum(), layer, max_weight=7.0)) == 7.0


def test_hinge_loss_of_known_logits() -> None:
    class Mean(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return image.mean((1, 2, 3))

    def constant(value: float) -> Tensor:
        return torch.full((2, 3, 4, 4), float(value))

    hinge = [float(judge_loss(Mean(), constant(real), constant(fake))) for real, fake in ((0, 0), (2, -2), (-1, 1))]
    assert hinge == [1.0, 0.0, 2.0]
    assert float(adversarial_loss(Mean(), constant(0.25))) == -0.25
    # Vanilla: the entropy of a coin where nothing is known, and the autoencoder's side does not saturate.
    coin = math.log(2)
    assert float(judge_loss(Mean(), constant(0), constant(0), "vanilla")) == pytest.approx(coin)
    assert float(adversarial_loss(Mean(), constant(0), "vanilla")) == pytest.approx(coin)
    expected = 0.5 * (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)))
    assert float(judge_loss(Mean(), constant(2), constant(-1), "vanilla")) == pytest.approx(expected)
    lost = torch.full((1, 3, 4, 4), -50.0, requires_grad=True)
    adversarial_loss(Mean(), lost, "vanilla").backward()
    assert lost.grad is not None
    assert float(lost.grad.sum()) == pytest.approx(-1.0)


def test_r1_is_half_the_squared_slope_at_real_pictures() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope = nn.Parameter(randn(3, 4, 4))

        def forward(self, image: Tensor) -> Tensor:
            return (image * self.slope).sum((1, 2, 3), keepdim=True)

    judge, real, fake = Linear(), randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    plain = judge_loss(judge, real, fake, "vanilla")
    penalised = judge_loss(judge, real, fake, "vanilla", r1_weight=3.0)
    torch.testing.assert_close(penalised - plain, 1.5 * judge.slope.square().sum())
    (gradient,) = torch.autograd.grad(penalised - plain, judge.slope)
    torch.testing.assert_close(gradient, 3.0 * judge.slope)


def test_lecam_pulls_each_side_to_the_average_of_the_other() -> None:
    """Tseng et al. 2021: zero where the logits are the other side's averages, and squared beyond."""
    judge, real, fake = nn.Conv2d(3, 1, 1), randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    plain, means = discriminator_loss(judge, real, fake)
    torch.testing.assert_close(means["real"], judge(real).mean())
    torch.testing.assert_close(means["fake"], judge(fake).mean())
    anchors = torch.tensor([0.7, -0.4])
    added = judge_loss(judge, real, fake, lecam_weight=2.0, anchors=anchors) - plain
    expected = 2.0 * ((judge(real) + 0.4).square().mean() + (judge(fake) - 0.7).square().mean())
    torch.testing.assert_close(added, expected)
    assert torch.equal(judge_loss(judge, real, fake, lecam_weight=2.0), plain), "no average yet, no pull"
    level = torch.full((2, 3, 4, 4), 0.5)
    same = judge(level).mean().detach().expand(2)
    unchanged = judge_loss(judge, level, level, lecam_weight=2.0, anchors=same) - judge_loss(judge, level, level)
    assert float(unchanged.detach()) == pytest.approx(0.0, abs=1e-6)


def test_averages_of_logits_do_not_start_from_zero() -> None:
    averages = LogitAverages(decay=0.9)
    assert averages.anchors() is None
    averages.update(torch.tensor([2.0, -1.0]))
    torch.testing.assert_close(averages.anchors(), torch.tensor([2.0, -1.0]))
    averages.update(torch.tensor([4.0, -3.0]))
    torch.testing.assert_close(averages.anchors(), torch.tensor([0.9 * 2 + 4, -0.9 * 1 - 3]) / 1.9)


def test_r1_trains_the_patch_discriminator_alone(discriminator: PatchDiscriminator) -> None:
    image = randn(2, 3, 16, 16)
    reconstruction = randn(2, 3, 16, 16, seed=1).requires_grad_()
    judge_loss(discriminator, image, reconstruction, r1_weight=10.0).backward()
    assert reconstruction.grad is None
    assert image.grad is None
    assert not image.requires_grad
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in discriminator.parameters())


def test_the_quantisers_loss_takes_the_place_of_the_divergence() -> None:
    image, raw = randn(2, 3, 8, 8), randn(2, 4, 2, 2)
    codes = (raw + 0.1).requires_grad_()
    quantised = Quantised(raw, codes, torch.zeros(2, 2, 2, dtype=torch.int64))
    config = AutoencoderLossConfig(codebook_weight=2.0, commitment_weight=0.5)
    loss, parts = autoencoder_loss(image, image + 0.5, quantised, config)
    assert set(parts) == {"reconstruction", "quantiser", "loss"}
    assert float(parts["quantiser"]) == pytest.approx(1.5 * 0.01)
    assert float(loss.detach()) == pytest.approx(0.5 + 2.0 * 1.5 * 0.01)


def test_fake_not_detached(model: AutoencoderKL, discriminator: PatchDiscriminator) -> None:
    image = randn(2, 3, 16, 16)
    reconstruction, _ = model(image)
    judge_loss(discriminator, image, reconstruction).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, parameter in discriminator.named_parameters():
        assert parameter.grad is not None, name
    # The last bias is moved by both halves alike and may cancel; some weight must move.
    assert any(float(p.grad.abs().max()) > 0 for p in discriminator.parameters() if p.grad is not None)


def test_autoencoder_step_leaves_no_gradient_in_the_discriminator(
    model: AutoencoderKL, discriminator: PatchDiscriminator
) -> None:
    image = randn(2, 3, 16, 16)
    reconstruction, posterior = model(image, randn(2, 4, 8, 8))
    config = AutoencoderLossConfig(kl_weight=1.0)
    loss, _ = autoencoder_loss(
        image, reconstruction, posterior, config, discriminator=discriminator, last_layer=model.last_layer
    )
    loss.backward()
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert all(parameter.requires_grad for parameter in discriminator.parameters())


def test_discriminator_is_stepped_and_learns(discriminator: PatchDiscriminator) -> None:
    real, fake = randn(4, 3, 16, 16), 0.2 * randn(4, 3, 16, 16, seed=1)
    optimiser = torch.optim.Adam(discriminator.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = judge_loss(discriminator, real, fake)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(1.0, abs=0.3)
    assert losses[-1] < 0.2


def test_accumulated_halves_are_the_whole_batch(model: AutoencoderKL, discriminator: PatchDiscriminator) -> None:
    image = randn(4, 3, 16, 16)
    reconstruction = model(image)[0].detach()
    judge_loss(discriminator, image, reconstruction).backward()
    whole = [p.grad.clone() for p in discriminator.parameters() if p.grad is not None]
    discriminator.zero_grad(set_to_none=True)
    for x, r in zip(image.split(2), reconstruction.split(2), strict=True):
        (judge_loss(discriminator, x, r) / 2).backward()
    for parameter, gradient in zip(discriminator.parameters(), whole, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)


def test_discriminator_without_last_layer_is_refused(model: AutoencoderKL, discriminator: PatchDiscriminator) -> None:
    image = randn(2, 3, 16, 16)
    reconstruction, posterior = model(image)
    with pytest.raises(LdmPipeError, match="last_layer"):
        autoencoder_loss(image, reconstruction, posterior, AutoencoderLossConfig(), discriminator=discriminator)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reconstruction", "huber"),
        ("game", "wasserstein"),
        ("commitment_weight", -1.0),
        ("kl_weight", -1.0),
        ("perceptual_weight", float("nan")),
    ],
)
def test_bad_weights_are_refused(field: str, value: Any) -> None:
    with pytest.raises(LdmPipeError, match=field):
        AutoencoderLossConfig(**{field: value})
