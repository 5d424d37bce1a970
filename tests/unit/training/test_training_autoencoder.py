"""Laws of the autoencoder task: codebooks move and resume, and the latent statistics are those of samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("accelerate")

from autoencoder import VQTraining
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.training.run.config import build_config
from ldm_pipe.training.run.loop import Micro
from ldm_pipe.training.tasks.autoencoder import (
    REVIVE_EVERY,
    AutoencoderConfig,
    PreviewTrainConfig,
    StepLog,
    flip_some,
    follow_codebook,
    latent_statistics,
    shrink_of,
)
from ldm_pipe.training.tasks.preview import make_preview
from tests.autoencoders import RESOLUTION, make_autoencoder, make_pictures, make_trainer, make_vq, make_vq_trainer
from tests.training import assert_same_bits, whole_state


@pytest.mark.parametrize("ema", [True, False])
def test_a_codebook_resumes_bit_for_bit_across_a_revival(tmp_path: Path, ema: bool) -> None:
    unbroken = make_vq_trainer(tmp_path / "a", ema=ema)
    unbroken.fit()
    first = make_vq_trainer(tmp_path / "b", ema=ema)
    for _ in range(REVIVE_EVERY - 1):
        first.train_step()
    first.save()
    second = make_vq_trainer(tmp_path / "b", ema=ema, resume_from_checkpoint="latest")
    second.fit()
    assert_same_bits(whole_state(second), whole_state(unbroken))


@pytest.mark.parametrize("ema", [True, False])
def test_codes_move_and_dead_ones_come_back_in_the_average_too(tmp_path: Path, ema: bool) -> None:
    trainer = make_vq_trainer(tmp_path, ema=ema)
    training = trainer.raw["autoencoder"]
    assert isinstance(training, VQTraining)
    weight = training.autoencoder.quantize.weight
    with torch.no_grad():
        weight[4:] = 50.0  # out of reach
    trainer.train_step()
    assert (weight[4:].abs() < 40).all(), "revived after the first step"
    shadow = trainer.ema["autoencoder"].shadow["autoencoder.quantize.embedding.weight"]
    torch.testing.assert_close(shadow[4:], weight[4:].detach(), rtol=0, atol=0)
    before = weight.detach().clone()
    logs = trainer.train_step()
    assert not torch.equal(weight, before)
    assert logs["autoencoder/perplexity"] > 2.0
    assert 0.5 < logs["autoencoder/alive"] <= 1.0
    moments = trainer.optimizers["autoencoder"].state.get(weight, {})
    assert bool(moments) is not ema, "averages need no optimiser, gradients do"


def test_without_revival_codes_out_of_reach_stay_dead(tmp_path: Path) -> None:
    trainer = make_vq_trainer(tmp_path, dead_below=0.0)
    training = trainer.raw["autoencoder"]
    assert isinstance(training, VQTraining)
    with torch.no_grad():
        training.autoencoder.quantize.weight[4:] = 50.0
    for _ in range(REVIVE_EVERY + 1):
        trainer.train_step()
    assert (training.autoencoder.quantize.weight[4:] == 50.0).all()


def test_accumulated_counts_move_the_codebook_as_the_whole_batch(tmp_path: Path) -> None:
    whole = make_vq_trainer(tmp_path / "a")
    halves = make_vq_trainer(tmp_path / "b", train_batch_size=2, gradient_accumulation_steps=2)
    for trainer in (whole, halves):
        trainer.train_step()
    a, b = whole_state(whole), whole_state(halves)
    for name in a:
        tolerance = (
            1e-5 if "exp_avg" in name or "quantize" in name else 2.1e-3
        )  # Adam's first step is lr sign(gradient)
        torch.testing.assert_close(b[name], a[name], atol=tolerance, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_skipped_step_moves_no_code(tmp_path: Path) -> None:
    trainer = make_vq_trainer(tmp_path)
    trainer.train_step()
    before = whole_state(trainer)
    forward = trainer.raw["autoencoder"].forward
    trainer.raw["autoencoder"].forward = lambda *a: (forward(*a)[0] * math.nan, forward(*a)[1])  # type: ignore[method-assign]
    trainer.train_step()
    assert_same_bits(whole_state(trainer), before)
    trainer.raw["autoencoder"].forward = forward  # type: ignore[method-assign]
    trainer.train_step()
    usage = trainer.raw["autoencoder"].usage
    expected = before["autoencoder/usage"].sum() * 0.9 + 0.1 * 4 * 64
    assert float(usage.sum()) == pytest.approx(float(expected)), "what the skipped step saw is not counted"


def test_equivariance_halves_latents_and_target_in_its_share_of_steps(tmp_path: Path) -> None:
    config = make_trainer(tmp_path, objective={"equivariance": 0.5, "adversarial_weight": 0.0}).config
    assert isinstance(config, AutoencoderConfig)
    drawn = [shrink_of(config, step) for step in range(200)]
    assert 70 < drawn.count(2) < 130
    for kind in (make_trainer, make_vq_trainer):
        trainer = kind(tmp_path, objective={"equivariance": 1.0, "adversarial_weight": 0.0})
        seen: list[tuple[int, ...]] = []
        forward = trainer.raw["autoencoder"].forward

        def spy(*args: Any, call: Any = forward, found: Any = seen) -> Any:
            out = call(*args)
            found.append(tuple(out[0].shape[2:]))
            return out

        trainer.raw["autoencoder"].forward = spy  # type: ignore[method-assign]
        assert math.isfinite(trainer.train_step()["autoencoder/reconstruction"])
        assert seen == [(RESOLUTION // 2, RESOLUTION // 2)]


def test_the_loss_falls(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, start=1000, max_train_steps=120, optim={"learning_rate": 1e-2, "lr_warmup_steps": 5}
    )
    losses = [trainer.train_step()["autoencoder/reconstruction"] for _ in range(120)]
    assert sum(losses[-7:]) < 0.75 * sum(losses[:7]), "a network that learns nothing stays where it began"


def test_pictures_of_several_shapes_train_together(tmp_path: Path) -> None:
    """Aspect-ratio buckets: what gives the pictures frames them itself, and the posterior's noise has their shape."""
    shapes = [(16, 16), (16, 32), (8, 16)]
    data = {"resolution": RESOLUTION, "aspect_ratio_buckets": True, "random_flip": True}
    seen: list[tuple[int, ...]] = []

    def framed(micro: Micro) -> Tensor:
        height, width = shapes[micro.step % 3]
        seen.append((height, width))
        return torch.zeros(len(micro.indices), 3, height, width)

    for kind in (make_trainer, make_vq_trainer):
        trainer = kind(tmp_path, data=data, pictures=framed)
        logs = [trainer.train_step() for _ in range(3)]
        assert all(math.isfinite(log["autoencoder/loss"]) for log in logs)
    assert seen == shapes * 2


def test_crops_that_would_be_ignored_or_doubled_are_refused() -> None:
    crop = {"random": True, "zoom_max": 2.0}
    for values, named in (
        ({"data": {"num_crops": 3}}, "num_crops"),
        ({"data": {"center_crop": False}, "crop": crop}, "crops already"),
        ({"data": {"aspect_ratio_buckets": True}, "crop": crop}, "crops already"),
    ):
        with pytest.raises(LdmPipeError, match=named):
            build_config(AutoencoderConfig, {"output_dir": "x", **values}, "test")


def test_a_sharded_codebook_is_refused(tmp_path: Path) -> None:
    trainer = make_vq_trainer(tmp_path)
    trainer.sharded = True
    with pytest.raises(LdmPipeError, match="FSDP cannot train a codebook"):
        follow_codebook(trainer, StepLog())


def test_mirrored_pictures_are_those_whose_draw_says_so() -> None:
    image = make_pictures(2)
    flipped = flip_some(image, torch.tensor([0.49, 0.5]))
    assert torch.equal(flipped[0], image[0].flip(-1))
    assert torch.equal(flipped[1], image[1])


class Source:
    """What a preview is fitted to: pictures in batches."""

    def batches(self, size: int) -> Iterator[Tensor]:
        yield from make_pictures(40).split(size)


def test_a_preview_is_the_best_linear_map_and_its_convolutions_help() -> None:
    autoencoder, source, pictures = make_autoencoder().eval(), Source(), make_pictures(40)
    autoencoder.set_latent_statistics(*latent_statistics(autoencoder, batches(pictures, 16)))
    with torch.no_grad():
        z = autoencoder.encode(pictures)
    linear, deep = (
        make_preview(autoencoder, source, config, seed=0)  # type: ignore[arg-type]
        for config in (PreviewTrainConfig(), PreviewTrainConfig(width=8, num_steps=60))
    )
    constant = pictures.mean((0, 2, 3), keepdim=True)
    assert float((linear(z) - pictures).square().mean()) < float((constant - pictures).square().mean())
    torch.testing.assert_close(linear.linear.weight, deep.linear.weight)
    assert float((deep(z) - pictures).abs().mean()) < float((linear(z) - pictures).abs().mean())


@torch.no_grad()
def test_statistics_of_a_vq_autoencoder_have_no_spread_of_a_posterior() -> None:
    autoencoder, pictures = make_vq().eval(), make_pictures(40)
    mean, std = latent_statistics(autoencoder, batches(pictures, 16))
    raw = autoencoder.encode_moments(pictures).mean
    assert mean == pytest.approx(raw.mean((0, 2, 3)).tolist(), abs=1e-6)
    assert std == pytest.approx(raw.std((0, 2, 3), correction=0).tolist(), rel=1e-4)


# -- latent statistics -------------------------------------------------------------------------------------------


def batches(pictures: Tensor, size: int) -> Iterator[Tensor]:
    yield from pictures.split(size)


@torch.no_grad()
def test_latent_statistics_are_those_of_sampled_latents() -> None:
    autoencoder, pictures = make_autoencoder().eval(), make_pictures(40)
    autoencoder.encoder.conv_out.bias += torch.tensor([0.5, -1.0, 0.0, -1.0, 0.0, 1.0])  # means and log variances
    mean, std = latent_statistics(autoencoder, batches(pictures, 16))
    assert latent_statistics(autoencoder, batches(pictures, 7)) == (pytest.approx(mean), pytest.approx(std))
    posterior = autoencoder.encode_moments(pictures)
    generator = torch.Generator().manual_seed(0)
    samples = [posterior.sample(torch.randn(posterior.mean.shape, generator=generator)).double() for _ in range(30)]
    drawn = torch.cat(samples).transpose(0, 1).flatten(1)  # (C, values)
    # posterior samples of one picture share its mean: the noise alone is averaged over 30 * 40 * 64 values
    assert drawn.mean(1).tolist() == pytest.approx(mean, abs=0.02)
    assert drawn.std(1).tolist() == pytest.approx(std, rel=0.01)
    mode_only = posterior.mean.transpose(0, 1).flatten(1).std(1)
    assert (mode_only < 0.9 * torch.tensor(std)).any(), "the spread of the posterior counts"


@torch.no_grad()
def test_normalised_latents_have_mean_zero_and_unit_deviation() -> None:
    """Which scale factor for my own autoencoder? (stable-diffusion#821): the measured one, stored with it."""
    autoencoder, pictures = make_autoencoder(), make_pictures(40)
    autoencoder.encoder.conv_out.bias += 0.7
    mean, std = latent_statistics(autoencoder, batches(pictures, 16))
    autoencoder.set_latent_statistics(mean, std)
    noise = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    z = autoencoder.encode(pictures, noise)
    assert z.mean().abs() < 0.05
    assert z.std().item() == pytest.approx(1.0, rel=0.05)
    before = autoencoder.decode(z)
    autoencoder.fold_latent_shift()
    torch.testing.assert_close(autoencoder.decode(autoencoder.encode(pictures, noise)), before, rtol=0, atol=1e-4)


def test_no_picture_is_no_statistics() -> None:
    with pytest.raises(ValueError, match="at least one picture"):
        latent_statistics(make_autoencoder(), iter([]))
