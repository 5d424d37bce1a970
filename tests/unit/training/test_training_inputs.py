"""What a training's batch is made of, and that scripts only start what the package holds."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldm_pipe.schedule.process import q_sample
from ldm_pipe.training.run.loop import Micro
from ldm_pipe.training.tasks.diffusion import Texts, draw_condition, draw_x_t
from tests.source import ROOT, tree
from tests.training import make_config, make_data

CPU = torch.device("cpu")
MICRO = Micro(2, [3, 7, 1, 10], range(4))


@pytest.mark.parametrize("name", ["finetune", "train_diffusion", "train_autoencoder"])
def test_a_training_script_holds_its_main_and_nothing_to_import(name: str) -> None:
    path = ROOT / "scripts" / f"{name}.py"
    defined = [node.name for node in ast.walk(tree(path)) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert defined == ["main"]
    assert len(path.read_text().splitlines()) <= 40


def test_every_caption_or_none_is_dropped(tmp_path: Path) -> None:
    data = replace(make_data(), second=Texts(torch.arange(5.0).reshape(5, 1, 1).expand(5, 3, 4)))
    rows = torch.tensor(MICRO.indices)
    first, second = slice(0, 8), slice(8, 12)
    none = draw_condition(data, make_config(tmp_path, caption_dropout=0, caption_dropout_2=0), MICRO, CPU)["tokens"]
    for i, row in enumerate(rows):
        own = [int(number) for number in data.caption_rows[row]]
        shown = int(none[i, 0, 8])
        assert shown in own
        assert torch.equal(none[i, :, first], data.tokens[shown])
    empty = draw_condition(data, make_config(tmp_path, caption_dropout=1, caption_dropout_2=0), MICRO, CPU)["tokens"]
    assert torch.equal(empty[..., first], data.tokens[[4] * 4])
    assert torch.equal(empty[..., second], none[..., second]), "each encoder's captions are dropped by themselves"


def test_x_t_mixes_what_is_predicted_but_for_perturbed_input(tmp_path: Path) -> None:
    data, t = make_data(), torch.tensor([0, 10, 500, 999])
    config = make_config(tmp_path, noise_offset=0.2)
    schedule = config.schedule.build()
    levels = schedule.alpha_sigma(t)
    x0, eps, x_t = draw_x_t(data, schedule, config, MICRO, t, CPU)
    assert torch.equal(x_t, q_sample(x0, eps, *levels))
    again = draw_x_t(data, schedule, make_config(tmp_path, input_perturbation=0.3), MICRO, t, CPU)
    assert torch.equal(again[0], x0)
    assert not torch.equal(again[2], q_sample(again[0], again[1], *levels))


def test_what_is_drawn_does_not_depend_on_the_slice(tmp_path: Path) -> None:
    data, t, config = make_data(), torch.tensor([0, 10, 500, 999]), make_config(tmp_path, noise_offset=0.2)
    schedule = config.schedule.build()
    whole = draw_x_t(data, schedule, config, MICRO, t, CPU)
    half = draw_x_t(data, schedule, config, Micro(2, MICRO.indices[2:], range(2, 4)), t[2:], CPU)
    assert all(torch.equal(a[2:], b) for a, b in zip(whole, half, strict=True))
    cond = draw_condition(data, config, MICRO, CPU)
    assert torch.equal(
        cond["tokens"][2:], draw_condition(data, config, Micro(2, MICRO.indices[2:], range(2, 4)), CPU)["tokens"]
    )
