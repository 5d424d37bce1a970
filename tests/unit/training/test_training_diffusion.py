"""Laws of the diffusion task: perfect predictor, objectives, times, caption dropout, overfitting one batch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("accelerate")

from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import Law, NoiseSchedule
from ldm_pipe.schedule.laws import EDM, Flow
from ldm_pipe.schedule.process import edm_spread, eps_from_x0, expand, extras, from_x0_eps
from ldm_pipe.training.run.config import build_config, read_yaml
from ldm_pipe.training.run.loop import Micro
from ldm_pipe.training.run.rng import batch_normal, batch_uniform
from ldm_pipe.training.tasks.diffusion import (
    DiffusionConfig,
    DiffusionData,
    build_importance,
    build_objective,
    choose_times,
    diffusion_loss,
)
from tests.source import ROOT
from tests.training import assert_same_bits, make_config, make_data, make_trainer, whole_state

CPU = torch.device("cpu")


# -- the loss ----------------------------------------------------------------------------------------------------


class Oracle:
    """The perfect predictor of a data set whose latents are all the same point."""

    def __init__(self, point: Tensor, schedule: Law) -> None:
        self.point, self.schedule = point, schedule
        self.seen: list[Tensor] = []

    def __call__(self, x_t: Tensor, t: Tensor, *, tokens: Tensor) -> Tensor:
        self.seen.append(tokens)
        law, t = self.schedule, t.double()
        t = (4 * t).exp() if isinstance(law, EDM) else t / float(law.network_time(torch.ones(())))  # told -> law's
        alpha, sigma = law.alpha_sigma(t)
        extra = extras(law, law.prediction, t)
        if extra.sigma_data is not None:
            x_t = x_t * expand(edm_spread(alpha, sigma, extra.sigma_data), x_t)
        x0 = self.point.expand_as(x_t)
        return from_x0_eps(law.prediction, x0, eps_from_x0(x_t, x0, alpha, sigma), alpha, sigma, extra)


def one_point() -> DiffusionData:
    data = make_data()
    return replace(data, mean=data.mean[:1].expand_as(data.mean), std=torch.zeros_like(data.std))


def micro(step: int = 0, size: int = 8) -> Micro:
    return Micro(step, [i % 11 for i in range(size)], range(size))


SCHEDULES = [
    *({"prediction_type": name} for name in ("epsilon", "sample", "v_prediction", "score", "posterior_mean")),
    {"prediction_type": "v_prediction", "zero_terminal_snr": True, "beta_schedule": "squaredcos_cap_v2"},
    {"kind": "vp", "prediction_type": "epsilon"},
    {"kind": "flow", "prediction_type": "flow_prediction"},
    {"kind": "ve", "prediction_type": "score"},
    {"kind": "edm", "prediction_type": "edm", "sigma_max": 20.0},
]


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: "-".join(str(v) for v in s.values()))
def test_the_loss_of_the_perfect_predictor_is_zero(
    tmp_path: Path, schedule: dict[str, Any], gamma: float | None
) -> None:
    config, data = make_config(tmp_path, snr_gamma=gamma, schedule=schedule), one_point()
    law = config.schedule.build()
    perfect = Oracle(data.mean[:1], law)
    loss = diffusion_loss(perfect, data, law, config, global_batch=8, device=CPU)
    wrong = diffusion_loss(Oracle(data.mean[:1] + 1, law), data, law, config, global_batch=8, device=CPU)
    # fp32 rounding of x_t and of the time told is enlarged by 1 / sigma in eps and by 1 / sigma^2 in the score
    for step in range(4):
        assert loss(micro(step))[0].item() < 1e-4 * wrong(micro(step))[0].item()
        assert wrong(micro(step))[0].item() > 1e-6


def test_the_config_of_the_shipped_model_still_means_the_same_loss() -> None:
    """L_simple of v with stratified times, written out as it was when the shipped model was trained: equal bits."""
    path = ROOT / "configs" / "emoji" / "diffusion.yaml"
    config, data = build_config(DiffusionConfig, read_yaml(path), str(path)), make_data()
    law = config.schedule.build()
    assert law == NoiseSchedule(prediction="v")
    net = lambda x, t, *, tokens: 0.3 * x + t[:, None, None, None] / 1000 + tokens.mean()  # noqa: E731
    for step in range(3):
        ours = diffusion_loss(net, data, law, config, global_batch=8, device=CPU)(micro(step))[0]
        rows, places = torch.tensor(micro(step).indices), range(8)
        draws = batch_uniform(2, 0, "caption", step, positions=places)
        text = data.caption_rows[rows, (draws[:, 0] * 2).long()]
        tokens = data.tokens[torch.where(draws[:, 1] < 0.1, 4, text)].float()
        x0 = data.mean[rows] + data.std[rows] * batch_normal((2, 4, 4), 0, "posterior", step, positions=places)
        eps = batch_normal((2, 4, 4), 0, "noise", step, positions=places)
        u = batch_uniform(1, 0, "t", step, positions=range(1))[0, 0]
        t = (((u + torch.arange(8).double() / 8).remainder(1.0)) * 1000).floor().float()
        alpha, sigma = (c.float()[:, None, None, None] for c in law.alpha_sigma(t))
        output = net(alpha * x0 + sigma * eps, t, tokens=tokens)
        assert torch.equal(ours, (output - (alpha * eps - sigma * x0)).square().flatten(1).mean(1).mean())


def test_the_default_config_is_min_snr_weighted_v(tmp_path: Path) -> None:
    objective = build_objective(make_config(tmp_path), NoiseSchedule())
    assert (objective.kind, objective.weighting, objective.gamma, objective.loss_type) == ("simple", "min_snr", 5, "l2")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"objective": "hybrid"}, "learned"),
        ({"learn_variance": True}, "L_simple"),
        ({"objective": "vlb", "schedule": {"kind": "flow"}}, "schedule.kind flow"),
        ({"time_sampling": "importance", "schedule": {"kind": "edm"}}, "schedule.kind edm"),
    ],
)
def test_settings_that_mean_nothing_together_are_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    config = make_config(tmp_path, **changes)
    with pytest.raises(LdmPipeError, match=named):
        build_objective(config, NoiseSchedule() if config.schedule.kind == "discrete" else Flow())


@pytest.mark.parametrize("kind", ["hybrid", "vlb"])
def test_a_learned_variance_is_trained(tmp_path: Path, kind: str) -> None:
    config, data = make_config(tmp_path, objective=kind, learn_variance=True), make_data()
    channel: Any = torch.zeros((), requires_grad=True)

    def net(x: Tensor, t: Tensor, **_: Any) -> Tensor:
        return torch.cat([0.5 * x, channel.expand_as(x)], dim=1)

    diffusion_loss(net, data, NoiseSchedule(prediction="v"), config, global_batch=8, device=CPU)(micro())[0].backward()
    assert channel.grad.isfinite()
    assert channel.grad != 0


@pytest.mark.parametrize(("changes", "mean", "std"), [({}, -1.2, 1.2), ({"time_mean": 0.0, "time_std": 0.5}, 0.0, 0.5)])
def test_edm_times_are_log_normal_by_themselves(
    tmp_path: Path, changes: dict[str, Any], mean: float, std: float
) -> None:
    config = make_config(tmp_path, schedule={"kind": "edm", "prediction_type": "edm"}, **changes)
    t, weight = choose_times(config, config.schedule.build(), micro(0, 1024), 1024, None)
    assert weight is None
    assert float(t.log().mean()) == pytest.approx(mean, abs=0.03)
    assert float(t.log().std()) == pytest.approx(std, abs=0.05)


def test_importance_sampling_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Its history lies in the checkpoint; with 3 times each has its 10 losses after some 15 steps."""
    changes: dict[str, Any] = {
        "time_sampling": "importance",
        "schedule": {"num_train_timesteps": 3, "beta_start": 0.2, "beta_end": 0.7},
        "max_train_steps": 22,
        "checkpointing_steps": 18,
    }
    whole = make_trainer(make_config(tmp_path, **changes))
    whole.fit()
    counts = whole.kept["importance"].state_dict()["counts"]
    assert int(counts.min()) > 10
    assert int(counts.sum()) == 22 * 4
    shutil.rmtree(tmp_path / "checkpoint-22")
    half = make_trainer(make_config(tmp_path, **changes))
    half.resume(str(tmp_path / "checkpoint-18"))
    for _ in range(4):
        half.train_step()
    assert_same_bits(whole_state(half), whole_state(whole))


def test_importance_weights_undo_the_choice_of_times(tmp_path: Path) -> None:
    """With a history that prefers one time, the mean weighted loss over many batches is that of uniform times."""
    changes: dict[str, Any] = {"schedule": {"num_train_timesteps": 2, "beta_start": 0.1, "beta_end": 0.9}}
    data, law = one_point(), make_config(tmp_path, **changes).schedule.build()

    def mean_loss(time_sampling: str) -> tuple[float, float]:
        config = make_config(tmp_path, time_sampling=time_sampling, snr_gamma=None, **changes)
        importance = build_importance(config)
        if importance is not None:
            importance.update(torch.tensor([0, 1]).repeat(10), torch.tensor([0.1, 0.9]).repeat(10))
            importance.update = lambda t, losses: None  # type: ignore[method-assign]  # stays as it is
        net = lambda x, t, *, tokens: t[:, None, None, None].expand_as(x)  # noqa: E731
        loss = diffusion_loss(net, data, law, config, global_batch=64, device=CPU, importance=importance)
        values = torch.stack([loss(micro(step, 64))[0] for step in range(40)])
        return float(values.mean()), float(values.std() / 40**0.5)

    (uniform, error), (weighted, other) = mean_loss("uniform"), mean_loss("importance")
    assert abs(uniform - weighted) < 4 * (error**2 + other**2) ** 0.5


def test_perturbed_inputs_are_noisier_than_the_target_says(tmp_path: Path) -> None:
    data, schedule = one_point(), NoiseSchedule(prediction="eps")
    caught: list[Tensor] = []

    def net(x_t: Tensor, t: Tensor, **_: Any) -> Tensor:
        alpha, sigma = schedule.alpha_sigma(t)
        caught.append(eps_from_x0(x_t, data.mean[:1].expand_as(x_t), alpha, sigma))
        return caught[0]  # the noise without perturbation, which is still what is asked for

    for strength in (0.0, 0.5):
        config = make_config(tmp_path, input_perturbation=strength, snr_gamma=None)
        loss = diffusion_loss(net, data, schedule, config, global_batch=64, device=CPU)(micro(0, 64))[0]
        assert float(loss) < 1e-8
    assert float((caught[1] - caught[0]).std()) == pytest.approx(0.5, rel=0.06)


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


TWO_RANKS = """
import sys, torch
from pathlib import Path
from ldm_pipe.training.tasks.diffusion import build_importance, diffusion_loss
from ldm_pipe.training.run.loop import Micro
from tests.training import make_config, make_data
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
schedule = {"num_train_timesteps": 3, "beta_start": 0.2, "beta_end": 0.7}
config = make_config(Path("unused"), time_sampling="importance", schedule=schedule)
importance, law = build_importance(config), config.schedule.build()
net = lambda x, t, *, tokens: 0.5 * x
loss = diffusion_loss(
    net, make_data(), law, config, global_batch=8, device=torch.device("cpu"), importance=importance
)
values = []
for step in range(12):
    value, _ = loss(Micro(step, list(range(4 * rank, 4 * rank + 4)), range(4 * rank, 4 * rank + 4)))
    values.append(float(value))
torch.save({**importance.state_dict(), "values": torch.tensor(values)}, f"{sys.argv[1]}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_importance_sampling_stays_alike_in_two_processes_and_equals_one(tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(TWO_RANKS)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29583"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, str(tmp_path / "ranks.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(first["losses"], second["losses"])
    assert int(first["counts"].sum()) == 12 * 8
    assert int(first["counts"].min()) > 10  # the history decides by now
    config = make_config(
        tmp_path, time_sampling="importance", schedule={"num_train_timesteps": 3, "beta_start": 0.2, "beta_end": 0.7}
    )
    importance, law = build_importance(config), config.schedule.build()
    assert importance is not None
    net = lambda x, t, *, tokens: 0.5 * x  # noqa: E731
    loss = diffusion_loss(net, make_data(), law, config, global_batch=8, device=CPU, importance=importance)
    whole = torch.tensor([float(loss(Micro(step, list(range(8)), range(8)))[0]) for step in range(12)])
    assert torch.equal(importance.losses, first["losses"])
    torch.testing.assert_close((first["values"] + second["values"]) / 2, whole)
