"""Laws of the autoencoder task: both networks step, both resume, and the latent statistics are those of samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("accelerate")

from autoencoder import AutoencoderKL, PatchDiscriminator, VQModel, VQTraining
from ldm_pipe.training.autoencoder import (
    REVIVE_EVERY,
    AutoencoderConfig,
    CodebookLog,
    PreviewTrainConfig,
    autoencoder_parts,
    flip_some,
    follow_codebook,
    latent_statistics,
    shrink_of,
)
from ldm_pipe.training.config import build_config
from ldm_pipe.training.loop import Trainer
from ldm_pipe.training.preview import make_preview
from tests.training import assert_same_bits, whole_state

RESOLUTION = 16
SHAPE = {
    "block_out_channels": [4, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 3,
    "norm_num_groups": 2,
    "mid_block_add_attention": False,
}


def make_pictures(num: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(num, 3, 4, 4, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3) * 2 - 1


def make_autoencoder(seed: int = 0) -> AutoencoderKL:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoencoderKL.from_config(SHAPE)


def make_vq(seed: int = 0) -> VQModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VQModel.from_config({**SHAPE, "num_vq_embeddings": 8})


def make_vq_trainer(folder: Path, *, ema: bool = True, dead_below: float = 0.03, **changes: Any) -> Trainer:
    """Train a VQ autoencoder on the same pictures, without a discriminator."""
    codebook = {"num_vq_embeddings": 8, "ema": ema, "dead_below": dead_below, "decay": 0.9}
    values = {
        "output_dir": str(folder),
        "max_train_steps": 13,
        "train_batch_size": 4,
        "checkpointing_steps": 100,
        "report_to": "none",
        "num_threads": 1,
        "perceptual": None,
        "network": {"regularisation": "vq"},
        "codebook": codebook,
        "data": {"resolution": RESOLUTION},
        "optim": {"learning_rate": 1e-3, "lr_warmup_steps": 0},
    }
    config = build_config(AutoencoderConfig, {**values, **changes}, "test")
    pictures, log = make_pictures(), CodebookLog()
    network = VQTraining(make_vq(), ema=ema, decay=0.9, dead_below=dead_below)
    parts = autoencoder_parts(config, network, None, lambda rows: pictures[rows], None, torch.device("cpu"), log=log)
    trainer = Trainer(config, parts, num_items=len(pictures), fingerprint="pictures")
    follow_codebook(trainer, log)
    return trainer


def make_trainer(folder: Path, start: int = 2, **changes: Any) -> Trainer:
    values = {
        "output_dir": str(folder),
        "max_train_steps": 5,
        "train_batch_size": 3,
        "checkpointing_steps": 100,
        "report_to": "none",
        "num_threads": 1,
        "perceptual": None,
        "objective": {"adversarial_start": start},
        "data": {"resolution": RESOLUTION, "random_flip": True},
        "optim": {"learning_rate": 1e-3, "lr_warmup_steps": 0},
        "discriminator_optim": {"learning_rate": 1e-3, "lr_warmup_steps": 0},
    }
    config = build_config(AutoencoderConfig, {**values, **changes}, "test")
    pictures = make_pictures()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        judge = PatchDiscriminator(width=4, num_layers=1)
    parts = autoencoder_parts(config, make_autoencoder(), judge, lambda rows: pictures[rows], None, torch.device("cpu"))
    return Trainer(config, parts, num_items=len(pictures), fingerprint="pictures")


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name.split("/")[0] for name in after if name not in before or not torch.equal(before[name], after[name])}


def test_the_discriminator_rests_until_its_start_and_then_both_networks_step(tmp_path: Path) -> None:
    """diffusers' example never stepped it (PR 11113)."""
    trainer = make_trainer(tmp_path)
    states, logs = [whole_state(trainer)], []
    for _ in range(4):
        logs.append(trainer.train_step())
        states.append(whole_state(trainer))
    own = {"autoencoder", "autoencoder.ema", "autoencoder.optimizer"}
    both = own | {"discriminator", "discriminator.optimizer"}
    assert [changed(a, b) for a, b in pairwise(states)] == [own, own, both, both]
    assert "discriminator/loss" not in logs[1]
    assert "autoencoder/adversarial" not in logs[1]
    assert math.isfinite(logs[2]["discriminator/loss"])
    assert math.isfinite(logs[2]["autoencoder/adversarial"])


def test_each_network_learns_from_its_own_loss_only(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, start=0)
    autoencoder, judge = trainer.raw["autoencoder"], trainer.raw["discriminator"]
    caught: dict[str, list[bool]] = {}

    def catch(name: str) -> None:
        def hook(*_: Any) -> None:
            caught[name] = [any(p.grad is not None for p in net.parameters()) for net in (autoencoder, judge)]

        trainer.optimizers[name].register_step_pre_hook(hook)

    for name in trainer.optimizers:
        catch(name)
    trainer.train_step()
    assert caught == {"autoencoder": [True, False], "discriminator": [False, True]}


@pytest.mark.parametrize("stop_at", [1, 3])
def test_both_networks_resume_bit_for_bit(tmp_path: Path, stop_at: int) -> None:
    unbroken = make_trainer(tmp_path / "a")
    unbroken.fit()
    first = make_trainer(tmp_path / "b")
    for _ in range(stop_at):
        first.train_step()
    first.save()
    second = make_trainer(tmp_path / "b", resume_from_checkpoint="latest")
    second.fit()
    assert_same_bits(whole_state(second), whole_state(unbroken))


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
    half = {"objective": {"equivariance": 0.5, "adversarial_weight": 0.0}}
    config = make_trainer(tmp_path, **half).config
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


def test_a_nan_picture_reaches_neither_network(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, start=0)
    trainer.train_step()
    before = whole_state(trainer)
    forward = trainer.raw["autoencoder"].forward
    trainer.raw["autoencoder"].forward = lambda *a: tuple(
        x * math.nan if i == 0 else x for i, x in enumerate(forward(*a))
    )  # type: ignore[method-assign]
    trainer.train_step()
    assert_same_bits(whole_state(trainer), before)
    assert trainer.skipped == 1


def test_the_loss_falls(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, start=1000, max_train_steps=120, optim={"learning_rate": 1e-2, "lr_warmup_steps": 5}
    )
    losses = [trainer.train_step()["autoencoder/reconstruction"] for _ in range(120)]
    assert sum(losses[-7:]) < 0.75 * sum(losses[:7]), "a network that learns nothing stays where it began"


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
