"""Laws of the diffusion task: times, perfect predictor, caption dropout, overfitting one batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

pytest.importorskip("accelerate")

from ldm_pipe.schedule import NoiseSchedule
from ldm_pipe.training.diffusion import DiffusionConfig, DiffusionData, diffusion_loss, stratified_t
from ldm_pipe.training.loop import Micro
from tests.training import make_config, make_data, make_trainer

CPU = torch.device("cpu")


# -- times -------------------------------------------------------------------------------------------------------


def test_stratified_times_are_uniform_per_sample_and_spread_over_the_batch() -> None:
    size, num_t, tries = 8, 40, 4000
    uniform = torch.rand(tries, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = torch.stack([stratified_t(u, range(size), size, num_t) for u in uniform])  # (tries, size)
    assert times.min() == 0
    assert times.max() == num_t - 1
    assert torch.equal(times, times.floor())
    for place in range(size):
        counts = torch.bincount(times[:, place].long(), minlength=num_t).double()
        expected = tries / num_t
        chi2 = ((counts - expected).square() / expected).sum()
        assert chi2 < 72.1  # 39 degrees of freedom, p = 0.001
    # every batch has one time in each eighth
    eighths = (times * size / num_t).floor().long().sort(dim=1).values
    assert torch.equal(eighths, torch.arange(size).expand(tries, size))


def test_stratified_times_do_not_depend_on_the_split_of_the_batch() -> None:
    u = torch.tensor(0.77, dtype=torch.float64)
    whole = stratified_t(u, range(6), 6, 1000)
    parts = [stratified_t(u, range(i, i + 2), 6, 1000) for i in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), whole)
    assert stratified_t(torch.tensor(1 - 2**-53, dtype=torch.float64), range(3), 3, 10).max() <= 9


# -- the loss ----------------------------------------------------------------------------------------------------


class Oracle:
    """The perfect predictor of a data set whose latents are all the same point."""

    def __init__(self, point: Tensor, schedule: NoiseSchedule) -> None:
        self.point, self.schedule = point, schedule
        self.seen: list[Tensor] = []
        self.times: list[Tensor] = []

    def __call__(self, x_t: Tensor, t: Tensor, *, tokens: Tensor) -> Tensor:
        self.seen.append(tokens)
        self.times.append(t)
        alpha, sigma = (c[:, None, None, None] for c in self.schedule.alpha_sigma(t))
        x0 = self.point.expand_as(x_t)
        eps = (x_t - alpha * x0) / sigma
        return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[self.schedule.prediction]


def one_point() -> DiffusionData:
    data = make_data()
    return replace(data, mean=data.mean[:1].expand_as(data.mean), std=torch.zeros_like(data.std))


def micro(step: int = 0, size: int = 8) -> Micro:
    return Micro(step, [i % 11 for i in range(size)], range(size))


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_loss_of_the_perfect_predictor_is_zero(
    tmp_path: Path, prediction: Literal["eps", "x0", "v"], gamma: float | None
) -> None:
    schedule, data = NoiseSchedule(prediction=prediction), one_point()
    config = make_config(tmp_path, snr_gamma=gamma)
    perfect = Oracle(data.mean[:1], schedule)
    loss = diffusion_loss(perfect, data, schedule, config, global_batch=8, device=CPU)
    wrong = diffusion_loss(Oracle(data.mean[:1] + 1, schedule), data, schedule, config, global_batch=8, device=CPU)
    for step in range(5):
        # at t = 0 sigma is 0.03, which enlarges fp32 rounding of eps by 34
        assert loss(micro(step))[0].item() < 1e-8
        assert wrong(micro(step))[0].item() > 1e-3


def caption_rows(config: DiffusionConfig, data: DiffusionData, steps: int) -> Tensor:
    """Return which row of the embeddings each sample saw, (steps, B)."""
    schedule = NoiseSchedule(prediction="v")
    oracle = Oracle(data.mean[:1], schedule)
    loss = diffusion_loss(oracle, data, schedule, config, global_batch=8, device=CPU)
    for step in range(steps):
        loss(micro(step))
    matches = (torch.stack(oracle.seen)[:, :, None] == data.tokens).flatten(3).all(3)  # (steps, B, V)
    assert (matches.sum(2) == 1).all()
    return matches.long().argmax(2)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_captions_are_dropped_in_the_share_asked_for(tmp_path: Path, share: float) -> None:
    data, steps = make_data(), 150
    rows = caption_rows(make_config(tmp_path, caption_dropout=share), data, steps)
    dropped = (rows == len(data.tokens) - 1).double().mean().item()
    assert abs(dropped - share) <= 4 * (share * (1 - share) / (8 * steps)) ** 0.5


def test_each_picture_is_seen_with_all_its_own_captions_and_no_other(tmp_path: Path) -> None:
    data, steps = make_data(), 100
    rows = caption_rows(make_config(tmp_path, caption_dropout=0.5), data, steps)
    null = len(data.tokens) - 1
    for i in range(8):
        assert set(rows[:, i].tolist()) == {*data.caption_rows[i].tolist(), null}
    first = rows[:, :8] == data.caption_rows[:8, 0]  # which caption is dropped has nothing to do with the drop
    differ = data.caption_rows[:8, 0] != data.caption_rows[:8, 1]
    assert first[:, differ].double().mean().item() == pytest.approx(
        0.25, abs=4 * (0.19 / (steps * int(differ.sum()))) ** 0.5
    )


def test_latents_are_sampled_from_their_posterior(tmp_path: Path) -> None:
    """The mode alone would train on less noise than the decoder was trained with."""
    data = replace(one_point(), std=torch.full((11, 2, 4, 4), 0.5))
    schedule = NoiseSchedule(prediction="x0")
    config = make_config(tmp_path, snr_gamma=None)
    loss = diffusion_loss(Oracle(data.mean[:1], schedule), data, schedule, config, global_batch=8, device=CPU)
    losses = [loss(micro(step))[0].item() for step in range(60)]
    # an x0 predictor that says the mean has the posterior's variance as its loss; 60 * 8 * 32 values
    assert sum(losses) / 60 == pytest.approx(0.25, rel=4 * (2 / (60 * 256)) ** 0.5)


def test_noise_offset_moves_whole_channels(tmp_path: Path) -> None:
    data, schedule = one_point(), NoiseSchedule(prediction="eps")

    def noise_of(offset: float) -> Tensor:
        caught: list[Tensor] = []

        def net(x_t: Tensor, t: Tensor, **_: Any) -> Tensor:
            alpha, sigma = (c[:, None, None, None] for c in schedule.alpha_sigma(t))
            caught.append((x_t - alpha * data.mean[:1]) / sigma)
            return x_t

        config = make_config(tmp_path, noise_offset=offset)
        diffusion_loss(net, data, schedule, config, global_batch=8, device=CPU)(micro())
        return caught[0]

    moved = noise_of(0.3) - noise_of(0.0)
    spread = moved - moved.mean((2, 3), keepdim=True)
    assert spread.abs().max() < 1e-4
    assert moved.abs().max() > 0.1


def test_the_loss_depends_on_the_step_alone_not_on_what_ran_before(tmp_path: Path) -> None:
    def losses(steps: list[int]) -> dict[int, float]:
        schedule, data = NoiseSchedule(prediction="v"), make_data()
        oracle = Oracle(data.mean[:1], schedule)
        loss: Callable[[Micro], Any] = diffusion_loss(
            oracle, data, schedule, make_config(tmp_path), global_batch=8, device=CPU
        )
        return {step: loss(micro(step))[0].item() for step in steps}

    assert losses([3, 1, 2]) == losses([1, 2, 3])


def test_one_batch_can_be_overfitted(tmp_path: Path) -> None:
    """The same pictures, times and noise in every step: after 150 steps at most a tenth of the loss is left."""
    optim = {"learning_rate": 1.0e-2, "lr_warmup_steps": 10}
    config = make_config(tmp_path, max_train_steps=150, snr_gamma=None, caption_dropout=0.0, optim=optim)

    def same_batch(loss: Callable[[Micro], Any]) -> Callable[[Micro], Any]:
        return lambda _: loss(Micro(0, [0, 1, 2, 3], range(4)))

    trainer = make_trainer(config, wrap=same_batch)
    losses = [trainer.train_step()["unet/loss"] for _ in range(150)]
    assert losses[-1] < losses[0] / 10, f"{losses[0]:.3f} -> {losses[-1]:.3f}"
