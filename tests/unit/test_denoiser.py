"""Laws of the denoiser: every prediction becomes x0 at one border."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm_pipe.denoiser import Denoiser
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import Law, NoiseSchedule
from ldm_pipe.schedule.laws import EDM, VE, ContinuousVP, Flow
from ldm_pipe.schedule.process import extras, from_x0_eps, q_sample

SLOTS = ("tokens", "token_mask", "pooled", "spatial", "labels")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow", "score", "mean"])
@pytest.mark.parametrize("t", [torch.tensor([2, 300, 800]), torch.tensor(300.0)])
def test_a_perfect_network_gives_x0(prediction: Any, t: Tensor) -> None:
    schedule = NoiseSchedule(prediction=prediction)
    x0, eps = normal(3, 4, 6, 6, seed=1).double(), normal(3, 4, 6, 6, seed=2).double()
    alpha, sigma = schedule.alpha_sigma(t)
    extra = extras(schedule, prediction, t)
    denoiser = Denoiser(lambda x, t: from_x0_eps(prediction, x0, eps, alpha, sigma, extra), schedule)
    assert torch.allclose(denoiser(q_sample(x0, eps, alpha, sigma), t).x0, x0, atol=1e-5)


@pytest.mark.parametrize(
    "law",
    [
        Flow(),
        VE(),
        VE(prediction="x0"),
        VE(prediction="edm", sigma_data=0.7),
        ContinuousVP(prediction="v"),
        EDM(sigma_data=0.7),
    ],
)
@pytest.mark.parametrize("place", [torch.tensor([0.1, 0.5, 0.9]), torch.tensor(0.5)])
def test_a_perfect_network_gives_x0_on_continuous_laws(law: Law, place: Tensor) -> None:
    """The network is told the law's own time; EDM's is shown an input of unit variance."""
    low, high = law.t_range
    t = low + place.double() * (high - low)
    x0, eps = normal(3, 4, 50, seed=1).double(), normal(3, 4, 50, seed=2).double()
    alpha, sigma = law.alpha_sigma(t)
    x_t = q_sample(0.7 * x0, eps, alpha, sigma)

    def net(x: Tensor, told: Tensor) -> Tensor:
        assert torch.allclose(told, law.network_time(t).float())
        if law.prediction == "edm":
            assert torch.allclose(x.std((1, 2)), torch.ones(3).double(), atol=0.2)
        else:
            assert torch.equal(x, x_t)
        return from_x0_eps(law.prediction, 0.7 * x0, eps, alpha, sigma, extras(law, law.prediction, t))

    assert torch.allclose(Denoiser(net, law)(x_t, t).x0, 0.7 * x0, atol=1e-6)


def test_twice_the_channels_are_a_prediction_and_a_variance() -> None:
    """The channel -1 is the small bound (0), +1 the large one (1), as in the code of arXiv:2102.09672."""
    x = normal(2, 3, 4)
    raw = torch.cat([0.5 * x, torch.linspace(-1, 1, 24).reshape(2, 3, 4)], dim=1)
    denoised = Denoiser(lambda x, t: raw, NoiseSchedule(), "x0")(x, torch.tensor(5))
    assert torch.equal(denoised.x0, 0.5 * x)
    assert denoised.var_mix is not None
    assert torch.allclose(denoised.var_mix, torch.linspace(0, 1, 24).reshape(2, 3, 4), atol=1e-6)
    assert Denoiser(lambda x, t: x, NoiseSchedule(), "x0")(x, torch.tensor(5)).var_mix is None


def test_predictions_without_a_meaning_on_the_law_are_refused_at_construction() -> None:
    with pytest.raises(LdmPipeError, match="sigma_data"):
        Denoiser(lambda x, t: x, NoiseSchedule(), "edm")
    with pytest.raises(LdmPipeError, match="continuous"):
        Denoiser(lambda x, t: x, Flow(), "mean")
    with pytest.raises(LdmPipeError, match="zero terminal SNR"):
        Denoiser(lambda x, t: x, Flow(), "score")


def test_eps_on_a_schedule_that_reaches_alpha_0_is_refused_at_construction() -> None:
    schedule = NoiseSchedule(prediction="v", zero_terminal_snr=True)
    with pytest.raises(LdmPipeError, match="zero terminal SNR"):
        Denoiser(lambda x, t: x, schedule, "eps")
    Denoiser(lambda x, t: x, schedule)


@pytest.mark.parametrize("prediction", ["x0", "v", "flow"])
def test_finite_at_alpha_0(prediction: Any) -> None:
    schedule = NoiseSchedule(prediction=prediction, zero_terminal_snr=True)
    x0 = Denoiser(lambda x, t: 0.5 * x, schedule)(normal(2, 3), torch.tensor(999)).x0
    assert x0.isfinite().all()


def test_the_condition_reaches_the_network_slot_by_slot() -> None:
    seen: dict[str, Any] = {}

    def net(x: Tensor, t: Tensor, **slots: Any) -> Tensor:
        seen.update(slots, t=t)
        return x

    cond: Any = SimpleNamespace(**{name: object() for name in SLOTS})
    Denoiser(net, NoiseSchedule())(normal(2, 3), torch.tensor(7, dtype=torch.float64), cond)
    assert {name: seen[name] for name in SLOTS} == vars(cond)
    assert seen["t"].dtype == torch.float32
    assert float(seen["t"]) == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_frame_is_float32_whatever_the_network_runs_in(dtype: torch.dtype) -> None:
    """x0 from eps divides by alpha = 0.07: in half precision the error of x0 would be visible."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones((), dtype=dtype))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            assert x.dtype == dtype
            return x * self.gain

    schedule, x = NoiseSchedule(), normal(2, 500)
    x0 = Denoiser(Net(), schedule)(x.to(dtype).float(), torch.tensor(999)).x0
    alpha, sigma = schedule.alpha_sigma(999)
    assert x0.dtype == torch.float32
    assert torch.allclose(x0.double(), x.to(dtype).double() * (1 - sigma) / alpha, rtol=1e-3, atol=1e-4)


def test_an_output_of_another_shape_is_refused() -> None:
    with pytest.raises(LdmPipeError, match="shape"):
        Denoiser(lambda x, t: x.repeat(1, 3), NoiseSchedule())(normal(2, 3), torch.tensor(5))


class KeepingNet:
    """A network that sums its tokens, and counts how often it was given new ones to keep."""

    def __init__(self) -> None:
        self.num_kept = 0

    def keep_tokens(self, tokens: Tensor) -> Tensor:
        self.num_kept += 1
        return tokens.sum()

    def __call__(self, x: Tensor, t: Tensor, *, tokens: Tensor, **slots: Any) -> Tensor:
        return x + tokens.sum()


def test_tokens_are_kept_until_they_change() -> None:
    net = KeepingNet()
    denoiser, x, t = Denoiser(net, NoiseSchedule(), "x0"), torch.zeros(1, 2), torch.tensor(3.0)
    cond: Any = SimpleNamespace(**dict.fromkeys(SLOTS))
    cond.tokens = torch.ones(1, 4)
    with torch.no_grad():
        assert [float(denoiser(x, t, cond).x0[0, 0]) for _ in range(3)] == [4.0] * 3
        assert net.num_kept == 1
        cond.tokens += 1  # in place, as a callback may
        assert float(denoiser(x, t, cond).x0[0, 0]) == 8.0
        cond.tokens = torch.full((1, 4), 3.0)
        assert float(denoiser(x, t, cond).x0[0, 0]) == 12.0
    assert net.num_kept == 3


def test_gradients_pass_to_x_and_tokens() -> None:
    cond: Any = SimpleNamespace(**dict.fromkeys(SLOTS))
    cond.tokens = torch.ones(1, 4, requires_grad=True)
    x: Any = torch.zeros(1, 2, requires_grad=True)
    net = KeepingNet()
    Denoiser(net, NoiseSchedule(), "x0")(x, torch.tensor(3.0), cond).x0.sum().backward()
    assert net.num_kept == 0
    assert cond.tokens.grad.tolist() == [[2.0] * 4]
    assert x.grad.tolist() == [[1.0] * 2]


def test_an_estimate_may_be_changed_in_place() -> None:
    layer = nn.Linear(3, 3)
    denoiser = Denoiser(lambda x, t, **_: layer(x), NoiseSchedule(), "x0")
    with torch.no_grad():
        x0 = denoiser(normal(2, 3), torch.tensor(3.0)).x0
        x0.mul_(2)
    (x0 * torch.ones(3, requires_grad=True)).sum().backward()
