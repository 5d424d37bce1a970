"""Laws of guidance towards several conditions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conditioning import Condition
from ldm_pipe import guidance
from ldm_pipe.denoiser import Denoiser
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import NoiseSchedule

T = torch.tensor(321.0, dtype=torch.float64)


def net(x: Tensor, t: Tensor, tokens: Tensor, **_: Any) -> Tensor:
    """Be nonlinear in x, t and tokens."""
    return torch.tanh(x * tokens.mean((1, 2))[:, None, None, None] + (t / 1000).reshape(-1, 1, 1, 1))


DENOISER = Denoiser(net, NoiseSchedule(prediction="v"))
DRAW = torch.Generator().manual_seed(0)
A, B, NULL = (Condition(tokens=torch.randn(3, 5, 8, generator=DRAW)) for _ in range(3))
X = torch.randn(3, 4, 6, 6, generator=DRAW)
ONES = torch.ones(1, 3)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_one_condition_of_weight_one_is_classifier_free_guidance(rescale: float) -> None:
    ours = guidance.composed(DENOISER, [A], ONES, NULL, 5.0, rescale=rescale)(X, T).x0
    assert torch.allclose(ours, guidance.cfg(DENOISER, A, NULL, 5.0, rescale=rescale)(X, T).x0, atol=1e-5)


def test_weights_add_up_the_directions() -> None:
    weights = torch.tensor([[1.0, 0.0, 0.5], [0.5, -1.0, 0.0]])
    found = guidance.composed(DENOISER, [A, B], weights, NULL, 3.0)(X, T).x0
    base = DENOISER(X, T, NULL).x0
    first, second = DENOISER(X, T, A).x0 - base, DENOISER(X, T, B).x0 - base
    scaled = [3 * w.reshape(-1, 1, 1, 1) for w in weights]
    assert torch.allclose(found, base + scaled[0] * first + scaled[1] * second, atol=1e-4)


def test_the_same_condition_twice_at_half_weight_is_the_condition() -> None:
    halves = torch.full((2, 3), 0.5)
    found = guidance.composed(DENOISER, [A, A], halves, NULL, 4.0)(X, T).x0
    assert torch.allclose(found, guidance.cfg(DENOISER, A, NULL, 4.0)(X, T).x0, atol=1e-5)


def test_a_time_per_sample_goes_with_its_sample() -> None:
    t = torch.tensor([10.0, 400.0, 990.0])
    together = guidance.composed(DENOISER, [A, B], torch.ones(2, 3), NULL, 2.0)(X, t).x0
    rows = [c.select([1]) for c in (A, B, NULL)]
    alone = guidance.composed(DENOISER, rows[:2], torch.ones(2, 1), rows[2], 2.0)(X[1:2], t[1]).x0
    assert torch.allclose(together[1:2], alone, atol=1e-5)


def test_weights_of_another_shape_are_refused() -> None:
    with pytest.raises(LdmPipeError, match=r"weights \[1, 3\] for 2 conditions"):
        guidance.composed(DENOISER, [A, B], ONES, NULL, 2.0)
    with pytest.warns(UserWarning, match="no effect at guidance scale 1"):
        guidance.composed(DENOISER, [A], ONES, NULL, 1.0, rescale=0.5)
