"""Laws of classifier-free guidance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conditioning import Condition
from ldm_pipe import guidance
from ldm_pipe.denoiser import Denoiser
from ldm_pipe.guidance.classifier_free import rescale_std
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import NoiseSchedule

T = torch.tensor(321.0, dtype=torch.float64)


class CountingNet:
    """A nonlinear function of x, t and tokens that keeps the batch sizes it was called with."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, tokens: Tensor, **_: Any) -> Tensor:
        self.batches.append(len(x))
        level = (t / 1000).reshape(-1, 1, 1, 1)
        return torch.tanh(x * tokens.mean((1, 2))[:, None, None, None] + level)


def setup(prediction: Any = "v") -> tuple[CountingNet, Denoiser, Condition, Condition, Tensor]:
    generator = torch.Generator().manual_seed(0)
    net = CountingNet()
    cond, uncond = (Condition(tokens=torch.randn(3, 5, 8, generator=generator)) for _ in range(2))
    x = torch.randn(3, 4, 6, 6, generator=generator)
    return net, Denoiser(net, NoiseSchedule(prediction=prediction)), cond, uncond, x


def test_cfg_1_is_the_conditional_model_at_one_evaluation() -> None:
    net, denoiser, cond, uncond, x = setup()
    guided = guidance.cfg(denoiser, cond, uncond, 1.0)(x, T).x0
    assert net.batches == [3]
    assert torch.equal(guided, denoiser(x, T, cond).x0)
    assert torch.equal(guidance.cfg(denoiser, cond, None, 1.0)(x, T).x0, guided)


def test_cfg_0_is_the_unconditional_model_at_one_evaluation() -> None:
    net, denoiser, cond, uncond, x = setup()
    guided = guidance.cfg(denoiser, cond, uncond, 0.0)(x, T).x0
    assert net.batches == [3]
    assert torch.equal(guided, denoiser(x, T, uncond).x0)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
@pytest.mark.parametrize("scale", [-1.0, 0.5, 7.5])
def test_cfg_is_the_line_through_both_in_one_batched_evaluation(scale: float, prediction: Any) -> None:
    net, denoiser, cond, uncond, x = setup(prediction)
    guided = guidance.cfg(denoiser, cond, uncond, scale)(x, T).x0
    assert net.batches == [6]
    with_, without = denoiser(x, T, cond).x0, denoiser(x, T, uncond).x0
    assert torch.allclose(guided, without + scale * (with_ - without), atol=1e-4)


def test_equal_conditions_leave_nothing_to_guide() -> None:
    _, denoiser, cond, _, x = setup()
    assert torch.allclose(guidance.cfg(denoiser, cond, cond, 9.0)(x, T).x0, denoiser(x, T, cond).x0, atol=1e-6)


def test_a_time_per_sample_is_doubled_with_the_batch() -> None:
    _, denoiser, cond, uncond, x = setup()
    t = torch.tensor([10.0, 400.0, 990.0])
    together = guidance.cfg(denoiser, cond, uncond, 3.0)(x, t).x0
    for i in range(3):
        given, without = (Condition(tokens=c.tokens[i : i + 1]) for c in (cond, uncond) if c.tokens is not None)
        assert torch.allclose(
            guidance.cfg(denoiser, given, without, 3.0)(x[i : i + 1], t[i]).x0[0], together[i], atol=1e-5
        )


def test_rescale_1_gives_each_sample_the_spread_of_the_conditional_prediction() -> None:
    """arXiv:2305.08891, eq. 15, in the space of the network's own prediction."""
    _, denoiser, cond, uncond, x = setup("x0")
    spread = guidance.cfg(denoiser, cond, uncond, 8.0, rescale=1.0)(x, T).x0.std((1, 2, 3))
    assert torch.allclose(spread, denoiser(x, T, cond).x0.std((1, 2, 3)), rtol=1e-5)
    plain = guidance.cfg(denoiser, cond, uncond, 8.0)(x, T).x0.std((1, 2, 3))
    assert bool((plain > 1.1 * spread).all())


def test_rescale_is_linear_in_its_strength() -> None:
    _, denoiser, cond, uncond, x = setup()
    none, half, full = (guidance.cfg(denoiser, cond, uncond, 8.0, rescale=phi)(x, T).x0 for phi in (0.0, 0.5, 1.0))
    assert torch.allclose(half, (none + full) / 2, atol=1e-5)


def test_rescaling_a_constant_prediction_is_not_nan() -> None:
    out = rescale_std(torch.full((1, 4), 2.0), torch.full((1, 4), 1.0), 0.7)
    assert out.tolist() == [[2.0] * 4]


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_rescale_without_effect_warns(scale: float) -> None:
    _, denoiser, cond, uncond, _ = setup()
    with pytest.warns(UserWarning, match="no effect"):
        guidance.cfg(denoiser, cond, uncond, scale, rescale=0.5)


@pytest.mark.parametrize(
    "settings", [{"scale": float("nan")}, {"scale": 2.0, "rescale": 1.5}, {"scale": 2.0, "rescale": -1}]
)
def test_settings_outside_their_range_are_refused(settings: dict[str, float]) -> None:
    _, denoiser, cond, uncond, _ = setup()
    with pytest.raises(LdmPipeError, match="guidance"):
        guidance.cfg(denoiser, cond, uncond, **settings)


def test_a_missing_condition_is_named() -> None:
    _, denoiser, cond, uncond, _ = setup()
    with pytest.raises(LdmPipeError, match="unconditional condition"):
        guidance.cfg(denoiser, cond, None, 5.0)
    with pytest.raises(LdmPipeError, match="without a condition"):
        guidance.cfg(denoiser, None, uncond, 5.0)


def test_a_learnt_variance_is_the_conditional_one() -> None:
    _, _, cond, uncond, x = setup()
    plain = CountingNet()

    def net(x: Tensor, t: Tensor, tokens: Tensor, **_: Any) -> Tensor:
        mean = plain(x, t, tokens)
        return torch.cat([mean, 0.1 * mean], dim=1)

    denoiser = Denoiser(net, NoiseSchedule(prediction="v"))
    for rescale in (0.0, 0.7):
        guided = guidance.cfg(denoiser, cond, uncond, 7.5, rescale=rescale)(x, T)
        only_mean = guidance.cfg(Denoiser(plain, NoiseSchedule(prediction="v")), cond, uncond, 7.5, rescale=rescale)
        assert torch.allclose(guided.x0, only_mean(x, T).x0, atol=1e-5)
        assert guided.var_mix is not None
        assert torch.allclose(guided.var_mix, denoiser(x, T, cond).var_mix, atol=1e-6)  # type: ignore[arg-type]
