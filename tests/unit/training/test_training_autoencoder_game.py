"""Two networks play against each other: each steps on its own loss, both accumulate, both resume, both survive NaN."""

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

from accelerate.state import AcceleratorState

from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.training.run.config import build_config
from ldm_pipe.training.tasks.autoencoder import AutoencoderConfig
from tests.autoencoders import changed, make_trainer
from tests.training import assert_same_bits, saved_state, whole_state

SIDES = ("real", "fake")


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


def test_the_averages_of_lecam_follow_every_step_and_resume_bit_for_bit(tmp_path: Path) -> None:
    lecam = {"lecam_weight": 0.3}
    unbroken = make_trainer(tmp_path / "a", start=1, objective=lecam)
    means = [unbroken.train_step() for _ in range(3)][1:]
    unbroken.fit()
    first = make_trainer(tmp_path / "b", start=1, objective=lecam)
    for _ in range(3):
        first.train_step()
    expected = [(0.5 * means[0][f"discriminator/{side}"] + means[1][f"discriminator/{side}"]) / 1.5 for side in SIDES]
    anchors = first.kept["logits"].anchors()  # type: ignore[operator]
    assert anchors.tolist() == pytest.approx(expected, rel=1e-5)
    first.save()
    second = make_trainer(tmp_path / "b", start=1, objective=lecam, resume_from_checkpoint="latest")
    second.fit()
    assert_same_bits(whole_state(second), whole_state(unbroken))
    plain = make_trainer(tmp_path / "c", start=1)
    plain.fit()
    assert changed(whole_state(plain), whole_state(unbroken)) >= {"autoencoder", "discriminator", "logits"}


def test_what_has_no_effect_without_a_discriminator_is_refused() -> None:
    for name in ("r1_weight", "lecam_weight"):
        objective = {"adversarial_weight": 0.0, name: 1.0}
        with pytest.raises(LdmPipeError, match="adversarial_weight is 0"):
            build_config(AutoencoderConfig, {"output_dir": "x", "objective": objective}, "test")


def test_accumulation_steps_both_networks_as_the_whole_batch(tmp_path: Path) -> None:
    """Before the game begins alike; in it the discriminator alike, while each slice has its own adaptive weight."""
    halves = {"train_batch_size": 2, "gradient_accumulation_steps": 2}
    for start in (0, 1):
        whole = make_trainer(tmp_path / f"whole-{start}", start=start, train_batch_size=4)
        parts = make_trainer(tmp_path / f"parts-{start}", start=start, **halves)
        logs = [trainer.train_step() for trainer in (whole, parts)]
        a, b = whole_state(whole), whole_state(parts)
        alike = ("discriminator.optimizer", *(("autoencoder.optimizer",) if start else ()))
        compared = [name for name in a if name.startswith(alike) and name.endswith("exp_avg")]
        assert bool(compared) is True
        for name in compared:  # Adam's first average is a tenth of the gradient
            torch.testing.assert_close(b[name], a[name], atol=1e-6, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
        for key in set(logs[0]) - {"autoencoder/adaptive_weight", "autoencoder/loss", "autoencoder/grad_norm"}:
            assert logs[1][key] == pytest.approx(logs[0][key], rel=1e-3, abs=1e-5), key


@pytest.fixture
def fresh_state() -> Iterator[None]:
    """Let a trainer choose its precision: accelerate holds one for the whole process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def test_mixed_precision_trains_both_networks_in_float32_weights(tmp_path: Path, fresh_state: None) -> None:
    mixed = make_trainer(tmp_path / "a", start=0, mixed_precision="bf16")
    before = whole_state(mixed)
    logs = [mixed.train_step()]
    AcceleratorState._reset_state()
    logs = [make_trainer(tmp_path / "b", start=0).train_step(), *logs]
    assert changed(before, whole_state(mixed)) >= {"autoencoder", "discriminator"}
    assert mixed.skipped == 0
    for module in mixed.raw.values():
        assert {p.dtype for p in module.parameters()} == {torch.float32}
    for key in ("autoencoder/reconstruction", "autoencoder/kl", "discriminator/loss"):
        assert logs[1][key] == pytest.approx(logs[0][key], rel=0.03), key
        assert logs[1][key] != logs[0][key], "bfloat16 was not used"


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


def test_nan_in_a_loss_is_named_and_stops_after_some_steps_with_both_networks_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault 11 in the autoencoder: the part, its value and the rows are named; the state before is what is saved."""
    trainer = make_trainer(tmp_path, start=0, max_train_steps=20, max_nonfinite_steps=3)
    forward = trainer.raw["autoencoder"].forward
    good: dict[str, Tensor] = {}

    def breaks(image: Tensor, *rest: Any) -> Any:
        if trainer.step < 2:
            return forward(image, *rest)
        good.update(whole_state(trainer) if not good else {})
        reconstruction, posterior = forward(image, *rest)
        return reconstruction * math.inf, posterior

    trainer.raw["autoencoder"].forward = breaks  # type: ignore[method-assign]
    with pytest.raises(LdmPipeError, match="3 steps in a row"):
        trainer.fit()
    said = capsys.readouterr().err
    assert said.count("step skipped") == 3
    assert "step 2: NaN or infinity in autoencoder (" in said
    assert "reconstruction=" in said
    assert "discriminator (" in said
    saved = saved_state(tmp_path / "checkpoint-5")
    assert_same_bits(saved, {name: good[name] for name in saved})
    assert {name.split("/")[0] for name in saved} >= {"autoencoder", "autoencoder.ema", "discriminator"}
