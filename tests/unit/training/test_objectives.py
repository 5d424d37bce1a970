"""Laws of the training objectives."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import NoiseSchedule, Prediction
from ldm_pipe.schedule.process import Extras, extras, q_sample, to_x0
from ldm_pipe.training.objectives import objective as objectives
from ldm_pipe.training.objectives.objective import Objective, Weighting, level_weight

PREDICTIONS = get_args(Prediction)
WEIGHTINGS = tuple(name for name in get_args(Weighting) if name != "none")
SIGMA_DATA, GAMMA = 0.5, 5.0
T = torch.tensor([1, 30, 150, 400, 700, 999])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def extras_at(prediction: Any, t: Tensor) -> Extras:
    return Extras(sigma_data=SIGMA_DATA) if prediction == "edm" else extras(NoiseSchedule(), prediction, t)


def weight_on_x0(name: str, snr: Tensor) -> Tensor:
    """Return what each paper says, as a weight on the error of x0."""
    return {
        "snr": snr,
        "min_snr": snr.clamp_max(GAMMA),
        "soft_min_snr": snr * GAMMA / (snr + GAMMA),
        "p2": snr / (1 + snr) ** GAMMA,
        "edm": (1 / snr + SIGMA_DATA**2) / (SIGMA_DATA**2 / snr),  # (sigma^2 + data^2) / (sigma data)^2
    }[name]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_weighting_is_one_weight_on_the_error_of_x0_whatever_is_predicted(prediction: Any, weighting: Any) -> None:
    """min-SNR weights wrong for v (diffusers#5654): the weighted losses of all predictions are one loss of x0."""
    alpha, sigma = NoiseSchedule().alpha_sigma(T)
    extra = extras_at(prediction, T)
    x0, eps, wrong = (normal(6, 50, seed=seed).double() for seed in (1, 2, 3))
    x_t = q_sample(x0, eps, alpha, sigma)
    target = objectives.target(prediction, x0, eps, alpha, sigma, extra)
    output = target + 0.1 * wrong
    error_x0 = (to_x0(prediction, output, x_t, alpha, sigma, extra) - x0).square().mean(1)
    weight = level_weight(weighting, prediction, alpha, sigma, extra, gamma=GAMMA, sigma_data=SIGMA_DATA)
    assert weight is not None
    loss = (output - target).square().mean(1) * weight
    snr = (alpha / sigma).square()
    assert torch.allclose(loss, weight_on_x0(weighting, snr) * error_x0, rtol=1e-8)
    assert snr.min() < GAMMA < snr.max()  # both branches of min_snr were taken


def test_weights_of_v_are_right_where_the_variance_is_not_preserved() -> None:
    """On the straight path alpha + sigma = 1, and alpha^2 + sigma^2 is not."""
    alpha = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    sigma = 1 - alpha
    x0, eps = normal(3, 50, seed=1).double(), normal(3, 50, seed=2).double()
    for prediction in ("v", "flow", "x0", "eps"):
        output = objectives.target(prediction, x0, eps, alpha, sigma) + 0.1
        x_t = q_sample(x0, eps, alpha, sigma)
        error_x0 = (to_x0(prediction, output, x_t, alpha, sigma) - x0).square().mean(1)
        weight = level_weight("min_snr", prediction, alpha, sigma)
        assert weight is not None
        assert torch.allclose(0.01 * weight, (alpha / sigma).square().clamp_max(5) * error_x0)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow", "score", "edm"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_are_finite_and_continuous_at_both_ends(prediction: Any, weighting: Any) -> None:
    """diffusers#9451: division by 0 at a zero terminal SNR."""
    tiny = 1e-8
    alpha = torch.tensor([0.0, tiny, 1.0, (1 - tiny**2) ** 0.5], dtype=torch.float64)
    sigma = torch.tensor([1.0, (1 - tiny**2) ** 0.5, 0.0, tiny], dtype=torch.float64)
    weight = level_weight(weighting, prediction, alpha, sigma, Extras(sigma_data=SIGMA_DATA), gamma=GAMMA)
    assert weight is not None
    assert weight.isfinite().all()
    told = weight.clamp_max(1e9)  # unbounded weights: snr on x0 without noise, edm on eps without signal
    assert torch.allclose(told[[0, 2]], told[[1, 3]], rtol=1e-6, atol=1e-7)


def test_min_snr_has_its_known_limits() -> None:
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    limits = {"eps": [1, 0], "x0": [0, 5], "v": [0, 0], "flow": [0, 0]}
    for prediction, wanted in limits.items():
        got = level_weight("min_snr", prediction, ends, 1 - ends)  # type: ignore[arg-type]
        assert got is not None
        assert got.tolist() == pytest.approx(wanted, abs=1e-30)


def test_every_weighting_bounds_what_a_network_of_its_own_kind_is_trained_with() -> None:
    """snr leaves eps alone, edm leaves F alone: L_simple is the special case."""
    alpha, sigma = NoiseSchedule().alpha_sigma(T)
    eps = level_weight("snr", "eps", alpha, sigma)
    f = level_weight("edm", "edm", alpha, sigma, Extras(sigma_data=0.3), sigma_data=0.3)
    v = level_weight("edm", "v", alpha, sigma)  # with unit data, F is v but for its sign
    for weight in (eps, f, v):
        assert weight is not None
        assert torch.allclose(weight, torch.ones(6, dtype=torch.float64))
    assert level_weight("none", "v", alpha, sigma) is None


def test_snr_weighted_scores_are_denoising_score_matching() -> None:
    """sigma^2 |s + (x_t - x0) / sigma^2|^2 at alpha = 1 (arXiv:1907.05600, eq. 5, lambda = sigma^2, twice)."""
    sigma = torch.tensor([0.01, 1.0, 30.0], dtype=torch.float64)
    alpha = torch.ones_like(sigma)
    x0, eps, s = (normal(3, 40, seed=seed).double() for seed in (1, 2, 3))
    x_t = q_sample(x0, eps, alpha, sigma)
    weight = level_weight("snr", "score", alpha, sigma)
    loss = objectives.error(s, objectives.target("score", x0, eps, alpha, sigma), weight)
    paper = sigma**2 * (s + (x_t - x0) / sigma[:, None] ** 2).square().mean(1)
    assert torch.allclose(loss, paper.float(), rtol=1e-5)


@pytest.mark.parametrize("gamma", [0, -1, float("nan")])
def test_gamma_must_be_positive(gamma: float) -> None:
    with pytest.raises(LdmPipeError, match="gamma"):
        level_weight("min_snr", "eps", torch.ones(1), torch.ones(1), gamma=gamma)


# -- one sample's loss -------------------------------------------------------------------------------------------


def test_simple_loss_is_the_mean_square_of_each_sample() -> None:
    output = torch.tensor([[[1.0, 3.0]], [[0.0, 0.0]]])
    assert objectives.error(output, torch.zeros(2, 1, 2), torch.tensor([1.0, 7.0])).tolist() == [5.0, 0.0]


def test_half_precision_does_not_overflow_the_loss() -> None:
    output = torch.full((1, 4), 300.0, dtype=torch.float16)  # 300^2 is more than float16 holds
    assert float(objectives.error(output, torch.zeros(1, 4))) == 90_000


def test_shapes_that_differ_are_refused_instead_of_broadcast() -> None:
    with pytest.raises(LdmPipeError, match="shape"):
        objectives.error(torch.zeros(2, 4, 8, 8), torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize("loss_type", ["huber", "pseudo_huber"])
def test_huber_losses_are_square_near_0_and_straight_far_away(loss_type: Any) -> None:
    def rho(e: float, c: float) -> float:
        return float(objectives.error(torch.tensor([[e]]), torch.zeros(1, 1), None, loss_type, c))

    assert rho(0.01, 10.0) == pytest.approx(1e-4, rel=1e-5)
    assert rho(-200.0, 0.1) - rho(-100.0, 0.1) == pytest.approx(2 * 0.1 * 100, rel=1e-4)
    assert rho(3.0, 1e6) == pytest.approx(9.0)  # l2 is the limit of a large c
    assert rho(0.0, 0.1) == 0


# -- objectives --------------------------------------------------------------------------------------------------


def losses(objective: Objective, output: Tensor, prediction: Any = "eps", t: Tensor = T) -> Tensor:
    schedule = NoiseSchedule(prediction=prediction)
    x0, eps = normal(len(t), 2, 5, seed=1), normal(len(t), 2, 5, seed=2)
    x_t = q_sample(x0, eps, *schedule.alpha_sigma(t))
    return objectives.losses(objective, schedule, output, x0, eps, x_t, t)


def perfect(prediction: Any, t: Tensor = T) -> Tensor:
    schedule = NoiseSchedule(prediction=prediction)
    x0, eps = normal(len(t), 2, 5, seed=1), normal(len(t), 2, 5, seed=2)
    return objectives.target(prediction, x0, eps, *schedule.alpha_sigma(t), extras(schedule, prediction, t))


@pytest.mark.parametrize("prediction", [p for p in PREDICTIONS if p != "edm"])
@pytest.mark.parametrize("kind", ["simple", "huber", "hybrid", "vlb"])
def test_the_loss_of_the_perfect_predictor_is_0(prediction: Any, kind: str) -> None:
    """With the posterior's own variance (v = 0, which is -1 as a channel) the bound's steps vanish too."""
    output = perfect(prediction)
    if kind in ("simple", "huber"):
        objective = Objective(weighting="min_snr", loss_type="huber" if kind == "huber" else "l2")
        assert losses(objective, output, prediction).tolist() == [0] * 6
        assert (losses(objective, output + 0.1, prediction) > 0).all()
        return
    objective = Objective(kind=kind, variance="learned")  # type: ignore[arg-type]
    # at t = 999 alpha is 0.07 and x0 from eps in float32 is exact to 1e-6; the bound divides by 1e-3 and counts 1000 t
    assert losses(objective, torch.cat([output, -torch.ones_like(output)], dim=1), prediction).abs().max() < 1e-3
    assert losses(objective, torch.cat([output, 0 * output], dim=1), prediction)[0] > 0.01


def test_hybrid_trains_the_mean_by_l_simple_alone_and_the_variance_by_the_bound_alone() -> None:
    """The stop-gradient of arXiv:2102.09672, section 3.1."""
    raw: Any = normal(6, 4, 5, seed=4).requires_grad_()
    t = torch.tensor([0, 1, 150, 400, 700, 999])

    def gradient(objective: Objective, output: Tensor) -> Tensor:
        return torch.autograd.grad(losses(objective, output, "v", t).sum(), raw)[0]

    hybrid = gradient(Objective(kind="hybrid", variance="learned"), raw)
    simple = gradient(Objective(), raw[:, :2])
    bound = gradient(Objective(kind="vlb", variance="learned"), raw)
    assert torch.equal(hybrid[:, :2], simple[:, :2])
    assert torch.allclose(hybrid[:, 2:], 0.001 * bound[:, 2:], rtol=1e-5)
    assert (bound[:, 2:] != 0).all()
    assert (bound[:, :2] != 0).any()
    assert hybrid.isfinite().all()


def test_the_bound_weighs_x0_as_ho_et_al_derive_it() -> None:
    """With fixed variances L_{t-1} = |mu - mu_hat|^2 / (2 sigma_t^2) (arXiv:2006.11239, eq. 8), here times T / ln 2."""
    schedule, t = NoiseSchedule(prediction="eps"), T[1:]
    output = perfect("eps", t) + 0.1
    beta = 1 - (schedule.alpha(t) / schedule.alpha(t - 1)) ** 2
    noise, before = schedule.sigma(t) ** 2, schedule.sigma(t - 1) ** 2
    small = beta * before / noise
    of_eps = beta**2 / (2 * small * (1 - beta) * noise)  # eq. 12
    wanted = 1000 * of_eps * 0.01 / torch.log(torch.tensor(2.0)).double()
    assert torch.allclose(losses(Objective(kind="vlb"), output, "eps", t).double(), wanted, rtol=2e-3)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kind": "l1"}, "kind"),
        ({"weighting": "snr5"}, "weighting"),
        ({"loss_type": "l1"}, "loss_type"),
        ({"variance": "large", "kind": "vlb"}, "variance"),
        ({"huber_c": 0.0}, "huber_c"),
        ({"vlb_weight": -1.0}, "vlb_weight"),
        ({"kind": "hybrid"}, "learned"),
        ({"variance": "learned"}, "L_simple"),
    ],
)
def test_objectives_that_mean_nothing_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(LdmPipeError, match=named):
        Objective(**changes)


def test_a_learned_variance_needs_twice_the_channels() -> None:
    with pytest.raises(LdmPipeError, match="gives 3 channels for 2"):
        losses(Objective(kind="vlb", variance="learned"), torch.zeros(6, 3, 5), "eps")
    with pytest.raises(LdmPipeError, match="gives none"):
        losses(Objective(kind="vlb", variance="learned"), torch.zeros(6, 2, 5), "eps")


# -- noise -------------------------------------------------------------------------------------------------------


def test_offset_noise_shifts_whole_channels() -> None:
    eps, offset = normal(2, 3, 4, 4, seed=1), normal(2, 3, seed=2)
    shift = objectives.offset_noise(eps, offset, 0.1) - eps
    assert torch.allclose(shift, 0.1 * offset[:, :, None, None].expand_as(eps), atol=1e-6)


def test_perturbed_noise_is_wider_than_what_is_asked_for() -> None:
    """x_t has the noise variance sigma^2 (1 + gamma^2) of arXiv:2301.11706, and eps is still correlated with it."""
    eps, other = normal(200_000, seed=1), normal(200_000, seed=2)
    moved = objectives.perturb_input(eps, other, 0.5)
    assert float(moved.var()) == pytest.approx(1.25, rel=0.02)
    assert float((moved * eps).mean()) == pytest.approx(1.0, rel=0.02)
