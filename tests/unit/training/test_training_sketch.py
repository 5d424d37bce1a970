"""The text tower that predicts drawings: shapes, what the U-Net is shown, that it learns, and that it says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conditioning import CLIPTextEncoder
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.training.tasks.sketch import (
    SketchHead,
    SketchSettings,
    hidden_states,
    measure_sketch,
    patches,
    train_sketch,
)
from tests.text_encoders import TOKENIZER, clip_fields

NAMES = ["red apple", "green apple", "grinning face", "smiling eyes", "red eyes", "green face"]


def encoder() -> CLIPTextEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CLIPTextEncoder(clip_fields(hidden_act="quick_gelu"), TOKENIZER)


def latents(seed: int = 0, num: int = 6) -> Tensor:
    return torch.randn((num, 2, 8, 12), generator=torch.Generator().manual_seed(seed))


def settings(**changes: Any) -> SketchSettings:
    given: dict[str, Any] = {"num_steps": 80, "batch_size": 6, "learning_rate": 3e-3}
    return SketchSettings(**{**given, "weight_decay": 0.0, "lr_warmup_steps": 5, **changes})


def train(tower: CLIPTextEncoder, **changes: Any) -> SketchHead:
    rows = torch.ones(6)
    return train_sketch(tower, TOKENIZER, latents(), torch.arange(6), rows, NAMES.__getitem__, settings(**changes))


def test_patches_are_squares_row_by_row() -> None:
    z = latents()
    cut = patches(z)
    assert cut.shape == (6, 6, 32)
    assert torch.equal(cut[:, 1].reshape(6, 2, 4, 4), z[:, :, :4, 4:8])
    assert torch.equal(cut[:, 3].reshape(6, 2, 4, 4), z[:, :, 4:, :4])


def test_the_target_is_the_drawing_less_the_mean_drawing() -> None:
    head = SketchHead(latents(), 48, 24)
    assert head.target(latents()).mean(dim=0).abs().max() < 1e-6
    assert head(torch.zeros(3, 24, 48)).shape == (3, 6, 32)


def test_the_head_reads_the_last_positions_of_what_the_u_net_is_shown() -> None:
    """Padding included: the condition of a pipeline has all positions and no mask."""
    tower = encoder()
    shown = tower.encode(NAMES)
    hidden = hidden_states(tower, TOKENIZER, NAMES)
    assert shown.token_mask is None
    assert shown.tokens is not None
    assert torch.equal(shown.tokens, hidden)
    head = SketchHead(latents(), 48, 24)
    torch.nn.init.normal_(head.linear.weight, generator=torch.Generator().manual_seed(0))
    changed = hidden.clone()
    changed[:, :18] += 1  # six patches: positions 18 to 23
    assert torch.equal(head(changed), head(hidden))
    assert not torch.equal(head(hidden + torch.linspace(0, 1, 48)), head(hidden))


@pytest.mark.parametrize("shape", [(6, 2, 8, 10), (6, 2, 6, 8), (6, 2, 16, 16)])
def test_latents_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    """The last has sixteen patches, more than half of 24 positions."""
    with pytest.raises(LdmPipeError, match="latents of"):
        SketchHead(torch.zeros(shape), 48, 24)


def test_it_learns_its_drawings_and_says_so() -> None:
    tower = encoder()
    before = measure_sketch(SketchHead(latents(), 48, 24), tower, TOKENIZER, NAMES, latents(), latents())
    head = train(tower)
    found = measure_sketch(head, tower, TOKENIZER, NAMES, latents(), latents())
    assert found.first == 1
    assert found.explained > 0.8 > 0.2 > before.explained
    assert found.nearest.tolist() == list(range(6))


def test_drawings_it_never_saw_are_looked_for_beside_those_it_saw() -> None:
    """The training's drawings are nearer to what it says of their names, so that none of the others comes first."""
    tower = encoder()
    head = train(tower)
    found = measure_sketch(head, tower, TOKENIZER, NAMES[:3], latents(seed=1, num=3), latents())
    assert found.first == 0
    assert found.ten == 1  # nine drawings in all
    assert found.explained < 0
    assert found.nearest.tolist() == [0, 1, 2]


def test_two_runs_are_alike_and_leave_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    first, second = encoder(), encoder()
    heads = [train(tower, num_steps=3) for tower in (first, second)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(heads[0].linear.weight, heads[1].linear.weight)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_steps_are_told_to_whoever_saves() -> None:
    told: list[int] = []
    rows = torch.ones(6)
    train_sketch(
        encoder(),
        TOKENIZER,
        latents(),
        torch.arange(6),
        rows,
        NAMES.__getitem__,
        settings(num_steps=3),
        save=told.append,
    )
    assert told == [1, 2, 3]


def test_a_loss_that_is_not_finite_stops_it() -> None:
    tower = encoder()
    with torch.no_grad():
        tower.text_model.final_layer_norm.weight.fill_(torch.inf)
    with pytest.raises(LdmPipeError, match="loss is"):
        train(tower)
