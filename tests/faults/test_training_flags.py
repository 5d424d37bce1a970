"""Flags of diffusers' training examples were unknown, and a run without data trained on our own emoji."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

pytest.importorskip("accelerate")

from ldm_pipe.cli import main
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.training.run import state
from ldm_pipe.training.run.config import DataConfig, OptimConfig, parse_config
from ldm_pipe.training.run.optim import warn_of_long_warmup
from ldm_pipe.training.tasks.finetune.config import (
    COUNTERPARTS,
    FinetuneConfig,
    check_config,
    flat_flags,
    help_text,
    resolve,
)
from ldm_pipe.training.tasks.pictures import open_records
from tests.source import ROOT

DATA = ["--train_data_dir", "my_pictures"]


def read(*words: str) -> FinetuneConfig:
    return parse_config(FinetuneConfig, flat_flags([*DATA, *words]), help_text())


@pytest.mark.parametrize("name", COUNTERPARTS)
def test_a_flag_that_is_not_here_names_its_counterpart(name: str) -> None:
    for word in (f"--{name}", f"--{name}=4", f"--{name.replace('_', '-')}"):
        with pytest.raises(LdmPipeError, match=name) as error:
            flat_flags([*DATA, word])
        assert error.value.how_to_fix


@pytest.mark.parametrize(("rows", "processes", "steps"), [(100, 1, 3 * 13), (96, 1, 36), (100, 2, 21), (1, 1, 3)])
def test_epochs_and_scaled_rates_are_those_of_the_examples(rows: int, processes: int, steps: int) -> None:
    config = read("--num_train_epochs", "3", "--scale_lr", "--train_batch_size", "4", "--learning_rate", "1e-5",
                  "--gradient_accumulation_steps", "2")  # fmt: skip
    resolved = resolve(config, rows, processes)
    assert resolved.max_train_steps == steps
    assert resolved.optim.learning_rate == pytest.approx(8e-5 * processes)
    assert resolve(read(), rows, processes) == read()


def test_epochs_that_mean_nothing_are_refused() -> None:
    with pytest.raises(LdmPipeError, match="streaming"):
        resolve(read("--num_train_epochs", "3"), 0, 1)
    with pytest.raises(LdmPipeError, match="Give one of them"):
        flat_flags(["--num_train_epochs", "3", "--max_train_steps=7"])


@pytest.mark.parametrize("folder", ["", "  "])
def test_no_run_trains_on_pictures_that_nobody_named(folder: str) -> None:
    with pytest.raises(LdmPipeError, match="no pictures are named"):
        check_config(FinetuneConfig(data=DataConfig(train_data_dir=folder)))
    with pytest.raises(LdmPipeError, match="no pictures are named"):
        check_config(FinetuneConfig())
    with pytest.raises(LdmPipeError, match="no pictures are named"):
        open_records(DataConfig(train_data_dir=folder))


def facts(steps: int, **optim: Any) -> dict[str, Any]:
    config = {"max_train_steps": steps, "allow_config_change": False, "optim": optim}
    return {"config": config, "fingerprint": "", "global_batch": 1, "frozen": {}}


def test_a_longer_run_is_no_changed_config() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state.refuse_other_run(facts(2, lr_scheduler="constant"), facts(5, lr_scheduler="constant"), {}, "x")
    with pytest.warns(UserWarning, match="falls towards the new end"):
        state.refuse_other_run(facts(2, lr_scheduler="cosine"), facts(5, lr_scheduler="cosine"), {}, "x")
    with pytest.raises(LdmPipeError, match="max_train_steps: 5 -> 2"):
        state.refuse_other_run(facts(5), facts(2), {}, "x")


@pytest.mark.parametrize(("warmup", "steps", "told"), [(100, 50, True), (100, 100, True), (100, 101, False),
                                                       (0, 1, False), (1, 1, True), (500, 20, True)])  # fmt: skip
def test_a_run_within_its_warm_up_is_told(warmup: int, steps: int, told: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_long_warmup(OptimConfig(lr_warmup_steps=warmup), steps)
    assert [f"of {steps} steps" in str(one.message) for one in caught] == [True] * told


@pytest.mark.parametrize("name", ["diffusion", "diffusion_transformer", "objective-eps"])
def test_a_plan_needs_no_first_stage(name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["plan", f"configs/emoji/{name}.yaml", "--no-measure"]) == 0
    assert "unet: " in capsys.readouterr().out
