"""Laws of the training loop: exact resume, accumulation, skipped steps, learning rate, EMA."""

from __future__ import annotations

import itertools
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

pytest.importorskip("accelerate")

from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.training.run.config import OptimConfig
from ldm_pipe.training.run.ema import Ema, ema_decay_at
from ldm_pipe.training.run.loop import Logs, Micro, Part, Trainer
from ldm_pipe.training.run.optim import lr_at, make_optimizer
from tests.training import assert_same_bits, make_config, make_trainer, run, saved_state, whole_state

Loss = Callable[[Micro], tuple[Tensor, Logs]]


# -- learning rate -----------------------------------------------------------------------------------------------


@given(
    warmup=st.integers(0, 50),
    more=st.integers(1, 200),
    kind=st.sampled_from(["constant", "linear", "cosine"]),
)
def test_the_learning_rate_warms_up_decays_and_ends_with_the_last_step(warmup: int, more: int, kind: Any) -> None:
    config = OptimConfig(learning_rate=0.5, lr_scheduler=kind, lr_warmup_steps=warmup)
    rates = [lr_at(step, config, warmup + more) for step in range(warmup + more + 1)]
    assert all(rates[i] == pytest.approx(0.5 * (i + 1) / warmup) for i in range(warmup))
    assert rates[warmup] == pytest.approx(0.5)
    assert all(a >= b for a, b in itertools.pairwise(rates[warmup:]))
    if kind == "constant":
        assert rates[-1] == 0.5
    else:
        assert all(rate > 0 for rate in rates[:-1])
        assert rates[-1] == pytest.approx(0.0, abs=1e-12)
        u = (more // 2) / more
        wanted = 0.5 * (1 - u) if kind == "linear" else 0.25 * (1 + math.cos(math.pi * u))
        assert rates[warmup + more // 2] == pytest.approx(wanted)


def used_rates(trainer: Trainer) -> list[float]:
    """Train to the end, noting the rate that the optimiser really used in each step."""
    rates, optimizer = [], trainer.optimizers["unet"]
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    trainer.fit()
    return rates


def test_the_lr_schedule_counts_optimiser_steps_whatever_the_accumulation(tmp_path: Path) -> None:
    plain = used_rates(make_trainer(make_config(tmp_path / "a")))
    halves = {"train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert used_rates(make_trainer(make_config(tmp_path / "b", **halves))) == plain
    assert plain == [lr_at(step, OptimConfig(learning_rate=2e-3, lr_warmup_steps=2), 6) for step in range(6)]


def test_norms_and_biases_are_not_decayed() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    decayed, free = make_optimizer(net, OptimConfig(adam_weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    assert [p.ndim for p in decayed["params"]] == [2]
    assert len(free["params"]) == 3


def test_a_gradient_longer_than_the_limit_is_scaled_down_to_it(tmp_path: Path) -> None:
    def norms(limit: float) -> tuple[float, float]:
        trainer, given = make_trainer(make_config(tmp_path, optim={"max_grad_norm": limit})), []
        weights = trainer.trained["unet"]
        trainer.optimizers["unet"].register_step_pre_hook(lambda *_: given.extend(p.grad.norm() for p in weights))
        return trainer.train_step()["unet/grad_norm"], math.hypot(*map(float, given))

    norm, free = norms(1e6)
    assert (norm, norm / 3) == pytest.approx((free, norms(norm / 3)[1]), rel=1e-4)


# -- resume ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [1, 2, 4, 5])  # 11 rows in batches of 4: the first epoch ends within step 2
def test_fault_9_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(tmp_path: Path, stop_at: int) -> None:
    unbroken = run(tmp_path / "unbroken")
    broken = make_trainer(make_config(tmp_path / "broken"))
    for _ in range(stop_at):
        broken.train_step()
    broken.save()
    torch.manual_seed(stop_at)  # global randomness has no say
    resumed = make_trainer(make_config(tmp_path / "broken", resume_from_checkpoint="latest"))
    resumed.fit()
    assert resumed.step == unbroken.step == 6
    assert_same_bits(whole_state(resumed), whole_state(unbroken))
    assert_same_bits(
        saved_state(tmp_path / "broken" / "checkpoint-6"), saved_state(tmp_path / "unbroken" / "checkpoint-6")
    )


def test_fault_7_the_data_order_does_not_restart_on_resume(tmp_path: Path) -> None:
    def rows_of(trainer: Trainer, steps: int) -> list[int]:
        seen = []
        for _ in range(steps):
            seen += trainer._micros()[0].indices
            trainer.train_step()
        return seen

    unbroken = rows_of(make_trainer(make_config(tmp_path / "a")), 6)
    first = make_trainer(make_config(tmp_path / "b"))
    rows = rows_of(first, 2)
    first.save()
    second = make_trainer(make_config(tmp_path / "b"))
    second.resume("latest")
    assert rows + rows_of(second, 4) == unbroken
    assert sorted(unbroken[:11]) == list(range(11))  # every picture once in the first epoch
    assert sorted(unbroken[11:22]) == list(range(11))


def test_fault_12_a_config_change_on_resume_is_refused_with_the_differences(tmp_path: Path) -> None:
    run(tmp_path, max_train_steps=2)
    changed = {"max_train_steps": 3, "caption_dropout": 0.2, "optim": {"learning_rate": 1e-3, "lr_warmup_steps": 2}}
    with pytest.raises(LdmPipeError) as error:
        run(tmp_path, resume_from_checkpoint="latest", **changed)
    for part in ("caption_dropout: 0.1 -> 0.2", "optim.learning_rate: 0.002 -> 0.001"):
        assert part in str(error.value)
    for part in ("train_batch_size", "max_train_steps"):  # that a run shall go on for longer is no change
        assert part not in str(error.value)
    resumed = run(tmp_path, resume_from_checkpoint="latest", allow_config_change=True, **changed)
    assert resumed.step == 3


def test_harmless_values_may_change_on_resume(tmp_path: Path) -> None:
    run(tmp_path, max_train_steps=2)
    harmless = {"checkpointing_steps": 1, "validation_steps": 5, "checkpoints_total_limit": 3, "max_nonfinite_steps": 2}
    assert run(tmp_path, max_train_steps=2, resume_from_checkpoint="latest", **harmless).step == 2


def test_another_global_batch_and_another_data_set_are_refused_even_when_changes_are_allowed(tmp_path: Path) -> None:
    run(tmp_path, max_train_steps=2)
    options = {"max_train_steps": 2, "resume_from_checkpoint": "latest", "allow_config_change": True}
    with pytest.raises(LdmPipeError, match="global batch is 8, the checkpoint's was 4"):
        make_trainer(make_config(tmp_path, train_batch_size=8, **options)).fit()
    with pytest.raises(LdmPipeError, match="data set changed"):
        make_trainer(make_config(tmp_path, **options), fingerprint="other").fit()


def test_fault_12_a_checkpoint_of_other_shapes_or_without_ema_is_one_clear_error(tmp_path: Path) -> None:
    run(tmp_path, max_train_steps=2, use_ema=False)
    with pytest.raises(LdmPipeError, match="does not fit the networks"):
        run(tmp_path, max_train_steps=2, resume_from_checkpoint="latest", allow_config_change=True)


def test_latest_needs_a_checkpoint_and_auto_does_not(tmp_path: Path) -> None:
    with pytest.raises(LdmPipeError, match="no whole checkpoint"):
        run(tmp_path, resume_from_checkpoint="latest")
    assert run(tmp_path, max_train_steps=1, resume_from_checkpoint="auto").step == 1


def test_a_new_run_does_not_mix_with_the_checkpoints_of_an_old_one(tmp_path: Path) -> None:
    old = run(tmp_path)
    with pytest.raises(LdmPipeError, match=r"earlier run, the last is checkpoint-6.*resume_from_checkpoint latest"):
        run(tmp_path, seed=1)
    assert_same_bits(saved_state(tmp_path / "checkpoint-6"), whole_state(old))


def test_an_older_checkpoint_is_not_resumed_beside_later_ones(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(LdmPipeError, match="later checkpoints lie: checkpoint-6"):
        run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    (tmp_path / "checkpoint-6").rename(tmp_path / "put-away")
    assert_same_bits(
        whole_state(run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))),
        saved_state(tmp_path / "put-away"),
    )


def test_a_run_killed_before_its_result_was_written_is_finished_by_resuming(tmp_path: Path) -> None:
    run(tmp_path)
    written: list[int] = []
    config = make_config(tmp_path, resume_from_checkpoint="latest")
    make_trainer(config, save_result=lambda: written.append(1)).fit()
    assert written == [1]


def test_fault_8_no_generator_state_is_saved(tmp_path: Path) -> None:
    run(tmp_path, max_train_steps=1)
    names = sorted(path.name for path in (tmp_path / "checkpoint-1").iterdir())
    weights = ["unet.ema.safetensors", "unet.optimizer.safetensors", "unet.safetensors"]
    assert names == ["manifest.json", "state.json", *weights]


# -- accumulation ------------------------------------------------------------------------------------------------


def test_accumulation_does_not_change_loss_data_or_noise(tmp_path: Path) -> None:
    def trained(folder: Path, size: int, num: int) -> tuple[list[float], list[list[int]], Trainer]:
        trainer = make_trainer(make_config(folder, train_batch_size=size, gradient_accumulation_steps=num))
        losses, rows = [], []
        for _ in range(6):
            rows.append([row for micro in trainer._micros() for row in micro.indices])
            losses.append(trainer.train_step()["unet/loss"])
        return losses, rows, trainer

    losses, rows, whole = trained(tmp_path / "a", 4, 1)
    for size, num in ((2, 2), (1, 4)):
        other_losses, other_rows, parts = trained(tmp_path / f"b{num}", size, num)
        assert other_rows == rows
        assert other_losses == pytest.approx(losses, abs=1e-6)
        for name, tensor in parts.ema["unet"].state_dict().items():
            # Adam's first steps turn rounding of gradients near 0 into steps of up to the learning rate
            torch.testing.assert_close(tensor, whole.ema["unet"].shadow[name], rtol=0, atol=2e-3)


def test_micro_positions_cover_the_global_batch_once(tmp_path: Path) -> None:
    trainer = make_trainer(make_config(tmp_path, train_batch_size=2, gradient_accumulation_steps=3))
    assert [i for micro in trainer._micros() for i in micro.positions] == list(range(6))


# -- bad numbers -------------------------------------------------------------------------------------------------


def poison(steps: set[int]) -> Callable[[Loss], Loss]:
    """Make the loss NaN at some steps."""

    def wrap(loss: Loss) -> Loss:
        def poisoned(micro: Micro) -> tuple[Tensor, Logs]:
            value, logs = loss(micro)
            return (value * float("nan") if micro.step in steps else value), logs

        return poisoned

    return wrap


def test_fault_11_a_nan_step_is_skipped_and_counted_and_leaves_no_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(make_config(tmp_path), wrap=poison({2}))
    for _ in range(2):
        trainer.train_step()
    before = whole_state(trainer)
    rows = trainer._micros()[0].indices
    trainer.train_step()
    assert_same_bits(whole_state(trainer), before)
    assert (trainer.step, trainer.skipped, trainer.skipped_in_a_row) == (3, 1, 1)
    told = "step 2: NaN or infinity in unet (loss=nan, grad_norm=nan), step skipped; rows"
    assert f"{told} {rows}" in capsys.readouterr().err
    trainer.train_step()
    assert (trainer.skipped, trainer.skipped_in_a_row) == (1, 0)
    assert all(torch.isfinite(t).all() for t in whole_state(trainer).values())


def test_fault_11_many_nan_steps_stop_the_run_with_a_saved_state(tmp_path: Path) -> None:
    trainer = make_trainer(make_config(tmp_path, max_nonfinite_steps=2), wrap=poison({1, 4, 5}))
    with pytest.raises(LdmPipeError, match=r"2 steps in a row .* last rows \["):
        trainer.fit()
    assert trainer.step == 6  # the single one at step 1 did not count
    assert_same_bits(saved_state(tmp_path / "checkpoint-6"), whole_state(trainer))
    for step in (3, 6):
        assert all(torch.isfinite(t).all() for t in saved_state(tmp_path / f"checkpoint-{step}").values())
    assert not (tmp_path / ".lock").exists()


def test_fault_11_nan_weights_are_never_written(tmp_path: Path) -> None:
    trainer = make_trainer(make_config(tmp_path))
    trainer.train_step()
    trainer.save()
    with torch.no_grad():
        next(trainer.raw["unet"].parameters()).fill_(float("inf"))
    trainer.step += 1
    with pytest.raises(LdmPipeError, match="NaN or infinity"):
        trainer.save()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_trainable_weights_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).to(dtype))
    part = Part("net", net, lambda _: (torch.zeros(()), {}), OptimConfig())
    with pytest.raises(LdmPipeError, match=r"2 trainable weights of net are not float32, for instance 1\.weight"):
        Trainer(make_config(tmp_path), [part], num_items=3)
    net[1].requires_grad_(False)
    Trainer(make_config(tmp_path), [part], num_items=3)


# -- EMA ---------------------------------------------------------------------------------------------------------


def test_ema_follows_its_recursion_and_warms_up() -> None:
    net = nn.Linear(2, 2)
    ema = Ema(net, 0.5)
    wanted = {name: t.detach().clone() for name, t in net.state_dict().items()}
    for step in range(20):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(step)))
        ema.update(net, step)
        d = min(0.5, (1 + step) / (10 + step))
        assert ema_decay_at(step, 0.5) == d
        wanted = {name: d * wanted[name] + (1 - d) * t for name, t in net.state_dict().items()}
    for name, tensor in wanted.items():
        torch.testing.assert_close(ema.shadow[name], tensor)
    assert ema_decay_at(0, 0.999) == pytest.approx(0.1)
    assert ema_decay_at(10**6, 0.999) == 0.999


def test_fault_9_ema_is_fp32_whatever_the_models_dtype() -> None:
    net = nn.Linear(4, 4).to(torch.bfloat16)
    ema = Ema(net, 0.999)
    assert {t.dtype for t in ema.state_dict().values()} == {torch.float32}
    start = ema.shadow["weight"].clone()
    with torch.no_grad():
        net.weight.add_(2.0**-6)
    ema.update(net, 10**6)  # the change of about 1e-5 is below bfloat16's resolution at most weights
    assert (ema.shadow["weight"] != start).float().mean() > 0.9
    with ema.applied(net):
        assert net.weight.dtype == torch.bfloat16


def test_fault_9_ema_weights_leave_the_model_again_also_when_sampling_throws(tmp_path: Path) -> None:
    trainer = make_trainer(make_config(tmp_path))
    for _ in range(3):
        trainer.train_step()
    before = whole_state(trainer)
    weights, averaged = trainer.raw["unet"].state_dict(), trainer.ema["unet"].shadow
    assert any(not torch.equal(weights[name], averaged[name]) for name in averaged)

    def look_and_fail() -> None:
        assert not trainer.raw["unet"].training
        for name, tensor in trainer.raw["unet"].state_dict().items():
            assert torch.equal(tensor, averaged[name])
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.with_ema(look_and_fail)
    assert trainer.raw["unet"].training
    assert_same_bits(whole_state(trainer), before)


def test_validation_sees_ema_weights_and_does_not_change_the_run(tmp_path: Path) -> None:
    seen = []

    def validate(step: int, trainer: Trainer) -> None:
        same = [torch.equal(t, trainer.ema["unet"].shadow[n]) for n, t in trainer.raw["unet"].state_dict().items()]
        seen.append((step, all(same)))
        torch.randn(3)  # draws from the global generator, as careless code does

    watched = make_trainer(make_config(tmp_path / "a", validation_steps=2), validate=validate)
    watched.fit()
    assert seen == [(2, True), (4, True), (6, True)]
    assert_same_bits(whole_state(watched), whole_state(run(tmp_path / "b")))


# -- the end of a run --------------------------------------------------------------------------------------------


def test_fault_6_a_stop_signal_saves_after_the_step_at_hand_and_the_run_goes_on_from_there(tmp_path: Path) -> None:
    def stop_at_4(loss: Loss) -> Loss:
        def wrapped(micro: Micro) -> tuple[Tensor, Logs]:
            if micro.step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return loss(micro)

        return wrapped

    handler = signal.getsignal(signal.SIGTERM)
    stopped = make_trainer(make_config(tmp_path / "a"), wrap=stop_at_4)
    stopped.fit()
    assert signal.getsignal(signal.SIGTERM) is handler
    assert stopped.step == 5
    assert (tmp_path / "a" / "checkpoint-5" / "manifest.json").is_file()
    resumed = run(tmp_path / "a", resume_from_checkpoint="latest")
    assert_same_bits(whole_state(resumed), whole_state(run(tmp_path / "b")))


def test_a_run_keeps_its_config_and_what_it_was_made_with(tmp_path: Path) -> None:
    import json

    import yaml

    trainer = run(tmp_path, max_train_steps=1)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == trainer.config.model_dump(mode="json")
    facts = json.loads((tmp_path / "run.json").read_text())
    assert torch.__version__.startswith(facts["versions"]["torch"])
    assert facts["parameters"] == {"unet": sum(p.numel() for p in trainer.raw["unet"].parameters())}


def test_a_machine_without_git_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    run(tmp_path / "run", max_train_steps=1)
    assert '"commit": null' in (tmp_path / "run" / "run.json").read_text()
