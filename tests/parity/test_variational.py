"""The variational bound and learned variances against the papers' formulas, and ddpm's variances against diffusers.

The formulas are written here in the words of the papers, beta and alpha_bar, from arXiv:2006.11239 (DDPM) and
arXiv:2102.09672 (improved DDPM), in float64; tolerance 1e-6 as asked for, 1e-9 is reached. The last test compares with
diffusers 0.42 in float32.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm_pipe.denoiser import Denoised
from ldm_pipe.samplers import ddpm
from ldm_pipe.schedule import NoiseSchedule
from ldm_pipe.schedule.process import level_below, posterior, q_sample
from ldm_pipe.training.objectives import objective as objectives
from ldm_pipe.training.objectives.objective import Objective
from ldm_pipe.training.objectives.times import SecondMoment
from ldm_pipe.training.objectives.variational import Bound, Decoder, bits_per_dim, vlb_term

NUM = 60
SCHEDULES = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-3, "beta_end": 0.2},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 2e-3, "beta_end": 0.3},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
PIXELS = Decoder(2 / 255, (-1.0, 1.0))
TOLERANCE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}


def betas_of(name: str) -> np.ndarray:
    """Write the betas as the papers do; the index is t - 1 of the papers, t of the code."""
    i = np.arange(NUM)
    if name == "cosine":  # eq. 17 of improved DDPM
        f = np.cos((np.arange(NUM + 1) / NUM + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - f[1:] / f[:-1], 0.999)
    low, high = SCHEDULES[name]["beta_start"], SCHEDULES[name]["beta_end"]
    if name == "linear":
        return low + (high - low) * i / (NUM - 1)  # type: ignore[operator]
    return (low**0.5 + (high**0.5 - low**0.5) * i / (NUM - 1)) ** 2  # type: ignore[operator]


def mass(lower: float, upper: float) -> float:
    """Return Phi(upper) - Phi(lower), from the tail that both lie in."""
    if lower > 0:
        lower, upper = -upper, -lower
    return 0.5 * (math.erfc(-upper / math.sqrt(2)) - math.erfc(-lower / math.sqrt(2)))


class Paper:
    """Quantities of section 2 of DDPM and section 2-3 of improved DDPM."""

    def __init__(self, name: str) -> None:
        self.beta = betas_of(name)
        self.alpha_bar = np.cumprod(1 - self.beta)
        self.before = np.append(1.0, self.alpha_bar[:-1])
        self.beta_tilde = (1 - self.before) / (1 - self.alpha_bar) * self.beta  # eq. 7
        self.of_x0 = np.sqrt(self.before) * self.beta / (1 - self.alpha_bar)
        self.of_x_t = np.sqrt(1 - self.beta) * (1 - self.before) / (1 - self.alpha_bar)
        # beta_tilde_1 is 0: improved DDPM takes beta_tilde_2 in its place
        self.clipped = np.append(self.beta_tilde[1], self.beta_tilde[1:])

    def variance(self, kind: str, t: int, v: np.ndarray) -> np.ndarray:
        if kind == "learned":  # eq. 15
            return np.exp(v * np.log(self.beta[t]) + (1 - v) * np.log(self.clipped[t]))
        fixed = self.beta[t] if kind == "fixed_large" and t > 0 else self.clipped[t]
        return np.full_like(v, fixed)

    def term(self, t: int, x0: np.ndarray, x0_hat: np.ndarray, v: np.ndarray, kind: str) -> np.ndarray:
        """L_{t-1} or, at t = 0, the discretised L_0 of eq. 13, in bits/dim."""
        x_t = np.random.default_rng(t).normal(size=x0.shape)  # any: it is in both means
        variance = self.variance(kind, t, v)
        if t == 0:
            upper = np.where(x0 > 0.999, np.inf, (x0 + 1 / 255 - x0_hat) / np.sqrt(variance))
            lower = np.where(x0 < -0.999, -np.inf, (x0 - 1 / 255 - x0_hat) / np.sqrt(variance))
            nats = -np.log(np.vectorize(mass)(lower, upper))
        else:
            true = self.of_x_t[t] * x_t + self.of_x0[t] * x0
            model = self.of_x_t[t] * x_t + self.of_x0[t] * x0_hat
            ratio = self.beta_tilde[t] / variance
            nats = 0.5 * (ratio - 1 - np.log(ratio) + (true - model) ** 2 / variance)
        return nats.reshape(len(x0), -1).mean(1) / np.log(2)

    def prior(self, x0: np.ndarray) -> np.ndarray:
        last = self.alpha_bar[-1]
        nats = 0.5 * ((1 - last) + last * x0**2 - 1 - np.log(1 - last))
        return nats.reshape(len(x0), -1).mean(1) / np.log(2)


@pytest.fixture(params=SCHEDULES)
def pair(request: pytest.FixtureRequest) -> tuple[Paper, NoiseSchedule]:
    settings: Any = SCHEDULES[request.param]
    return Paper(request.param), NoiseSchedule(num_train_timesteps=NUM, prediction="eps", **settings)


def data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels with both extremes, an estimate of them, and v in and a little beyond [0, 1]."""
    rng = np.random.default_rng(0)
    x0 = rng.integers(0, 256, (4, 3, 5)) / 127.5 - 1
    x0[:, 0, 0], x0[:, 1, 0] = -1, 1
    return x0, np.clip(x0 + 0.02 * rng.normal(size=x0.shape), -1, 1), rng.uniform(-0.1, 1.1, x0.shape)


def tensors(*arrays: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(array) for array in arrays]


def test_posterior_quantities(pair: tuple[Paper, NoiseSchedule]) -> None:
    paper, schedule = pair
    t = torch.arange(NUM)
    back = posterior(*schedule.alpha_sigma(t), *level_below(schedule, t))
    wanted = {"of_x_t": paper.of_x_t, "of_x0": paper.of_x0, "small": paper.beta_tilde, "large": paper.beta}
    for name, values in wanted.items():
        torch.testing.assert_close(getattr(back, name), torch.from_numpy(values), **TOLERANCE)


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large", "learned"])
def test_every_term_of_the_bound(pair: tuple[Paper, NoiseSchedule], kind: Any) -> None:
    paper, schedule = pair
    x0, x0_hat, v = data()
    ours = Denoised(*tensors(x0_hat, v if kind == "learned" else np.zeros(0)))
    ours = ours if kind == "learned" else Denoised(ours.x0)
    for t in range(NUM):
        got = vlb_term(schedule, torch.from_numpy(x0), ours, torch.full((4,), t), variance=kind, decoder=PIXELS)
        wanted = torch.from_numpy(paper.term(t, x0, x0_hat, v, kind))
        torch.testing.assert_close(got, wanted, **TOLERANCE, msg=lambda m, t=t: f"t = {t}: {m}")


def test_the_whole_bound_of_a_model_that_looks_at_x_t(pair: tuple[Paper, NoiseSchedule]) -> None:
    """Prior, all steps and decoder, with the model's estimate at the x_t that the same noise makes."""
    paper, schedule = pair
    x0, _, v = data()
    drawn = np.random.default_rng(1).normal(size=(NUM, *x0.shape))
    queue = iter(torch.from_numpy(drawn))

    def model(x: Tensor, t: Tensor) -> Denoised:
        return Denoised(x + 0.01 * torch.sin(x + 0.1 * t), torch.from_numpy(v))

    steps = schedule.steps(NUM, spacing="trailing")
    bound: Bound = bits_per_dim(model, torch.from_numpy(x0), steps, lambda _: next(queue), decoder=PIXELS)
    wanted = paper.prior(x0)
    for eps, t in zip(drawn, reversed(range(NUM)), strict=True):
        x_t = np.sqrt(paper.alpha_bar[t]) * x0 + np.sqrt(1 - paper.alpha_bar[t]) * eps
        wanted = wanted + paper.term(t, x0, x_t + 0.01 * np.sin(x_t + 0.1 * t), v, "learned")
    torch.testing.assert_close(bound.total, torch.from_numpy(wanted), **TOLERANCE)


def test_l_hybrid(pair: tuple[Paper, NoiseSchedule]) -> None:
    """Eq. 16: L_simple + 0.001 L_vlb, with eps predicted, v = (channel + 1) / 2, and L_vlb summed over T terms."""
    paper, schedule = pair
    x0, _, v = data()
    x0 = x0 / 2  # inside the bounds: the decoder of training is the density
    eps, output = (np.random.default_rng(seed).normal(size=x0.shape) for seed in (2, 3))
    t = torch.tensor([1, 7, 30, NUM - 1])
    tensor_x0, tensor_eps, mean, channel = tensors(x0, eps, output, 2 * v - 1)
    x_t = q_sample(tensor_x0, tensor_eps, *schedule.alpha_sigma(t))
    objective = Objective(kind="hybrid", variance="learned")
    got = objectives.losses(objective, schedule, torch.cat([mean, channel], dim=1), tensor_x0, tensor_eps, x_t, t)
    for i, time in enumerate(t.tolist()):
        root = np.sqrt(paper.alpha_bar[time])
        noisy = root * x0[i] + np.sqrt(1 - paper.alpha_bar[time]) * eps[i]
        x0_hat = (noisy - np.sqrt(1 - paper.alpha_bar[time]) * output[i]) / root
        bound = NUM * paper.term(time, x0[i : i + 1], x0_hat[None], v[i : i + 1], "learned")[0]
        wanted = ((eps[i] - output[i]) ** 2).mean() + 0.001 * bound
        assert float(got[i]) == pytest.approx(wanted, rel=1e-6)  # L_simple is summed in float32


def test_importance_sampling_of_times() -> None:
    """Eq. 18: p_t ~ sqrt(E[L_t^2]) over the last 10 losses, mixed with 0.1 % of the uniform, weight 1 / (T p_t)."""
    rng = np.random.default_rng(0)
    losses = rng.gamma(2.0, size=(12, NUM))
    sampler = SecondMoment(NUM)
    for row in losses:
        sampler.update(torch.arange(NUM), torch.from_numpy(row))
    p = np.sqrt((losses[-10:] ** 2).mean(0))
    p = 0.999 * p / p.sum() + 0.001 / NUM
    torch.testing.assert_close(sampler.probabilities(), torch.from_numpy(p), **TOLERANCE)
    t, weight = sampler.draw(torch.tensor([0.0, 0.3, 0.999]).double())
    torch.testing.assert_close(weight, torch.from_numpy(1 / (NUM * p[t.long().numpy()])), **TOLERANCE)


@pytest.mark.parametrize("variance", ["fixed_large", "learned"])
def test_ddpm_variances_equal_those_of_diffusers(variance: Any) -> None:
    """Ten strided steps of DDPMScheduler with the same noise; both work in float32, states are of size 1 to 3."""
    diffusers = pytest.importorskip("diffusers")
    schedule = NoiseSchedule(steps_offset=0, prediction="v")
    config = {**schedule.to_config("ddpm", for_stable_diffusion=False)}
    config["variance_type"] = "learned_range" if variance == "learned" else "fixed_large"
    theirs = diffusers.DDPMScheduler.from_config(config)
    theirs.set_timesteps(10)
    drawn = torch.randn(11, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def output(x: Tensor, t: float) -> Tensor:
        mean = torch.tanh(x + t / 1000)
        return torch.cat([mean, torch.sin(3 * x)], dim=1) if variance == "learned" else mean

    x, queue = drawn[10], iter(drawn)
    from diffusers.schedulers import scheduling_ddpm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: next(queue))
        for t in theirs.timesteps:
            x = theirs.step(output(x, float(t)), t, x).prev_sample

    from ldm_pipe.denoiser import Denoiser

    again = iter(drawn)
    denoiser = Denoiser(lambda x, t: output(x, float(t)), schedule)
    ours = ddpm(denoiser, drawn[10], schedule.steps(10), noise=lambda _: next(again), variance=variance)
    torch.testing.assert_close(ours, x, rtol=0, atol=2e-5)
