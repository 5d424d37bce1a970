"""Laws of the variants of classifier-free guidance."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from conditioning import Condition
from ldm_pipe import guidance, samplers
from ldm_pipe.denoiser import Denoiser
from ldm_pipe.guidance.pair import inner
from ldm_pipe.metrics.mixture import GaussianMixture
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import NoiseSchedule

T = torch.tensor(321.0, dtype=torch.float64)
ONE = torch.ones(1, 3)


class Net:
    """A nonlinear function of x, t and tokens that counts its calls' batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, tokens: Tensor, **_: Any) -> Tensor:
        self.batches.append(len(x))
        pattern = tokens.flatten(1)[:, : x[0].numel()].reshape(x.shape)
        return torch.tanh(x * pattern + (t / 1000).reshape(-1, 1, 1, 1))


def setup(prediction: Any = "v") -> tuple[Net, Denoiser, Condition, Condition, Tensor]:
    generator = torch.Generator().manual_seed(0)
    net = Net()
    cond, uncond = (Condition(tokens=torch.randn(3, 18, 8, generator=generator)) for _ in range(2))
    return net, Denoiser(net, NoiseSchedule(prediction=prediction)), cond, uncond, torch.randn(3, 4, 6, 6)


def both(denoiser: Denoiser, cond: Condition, uncond: Condition, x: Tensor) -> tuple[Tensor, Tensor]:
    return denoiser(x, T, cond).x0, denoiser(x, T, uncond).x0


EQUAL_TO_CFG = {
    "classifier_free": lambda w: guidance.classifier_free(w),
    "apg with everything, no momentum": lambda w: guidance.apg(w, eta=1.0, momentum=0.0),
    "magnitude aware without damping": lambda w: guidance.magnitude_aware(w, damping=0.0),
}


@pytest.mark.parametrize("name", EQUAL_TO_CFG)
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
def test_neutral_options_are_classifier_free_guidance(name: str, prediction: Any) -> None:
    _, denoiser, cond, uncond, x = setup(prediction)
    for w in (0.5, 3.0, 7.5):
        guided = EQUAL_TO_CFG[name](w)(denoiser, [cond], ONE, uncond)(x, T).x0
        assert torch.allclose(guided, guidance.cfg(denoiser, cond, uncond, w)(x, T).x0, atol=2e-4)


ALL = {
    "classifier_free": guidance.classifier_free,
    "apg": guidance.apg,
    "tangential": guidance.tangential,
    "magnitude_aware": guidance.magnitude_aware,
    "cfg_zero": lambda w: guidance.cfg_zero(w, zero_init=0),
}


@pytest.mark.parametrize("name", ALL)
def test_scale_1_is_the_conditional_model_and_skips_the_other_evaluation(name: str) -> None:
    net, denoiser, cond, uncond, x = setup("flow")
    guided = ALL[name](1.0)(denoiser, [cond], ONE, uncond)(x, T).x0
    assert net.batches == [3]
    assert torch.equal(guided, denoiser(x, T, cond).x0)
    net.batches.clear()
    ALL[name](2.0)(denoiser, [cond], ONE, uncond)(x, T)
    assert net.batches == [6]


@pytest.mark.parametrize("name", ALL)
def test_equal_conditions_leave_nothing_to_guide(name: str) -> None:
    _, denoiser, cond, _, x = setup("flow")
    guided = ALL[name](9.0)(denoiser, [cond], ONE, cond)(x, T).x0
    assert torch.allclose(guided, denoiser(x, T, cond).x0, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_a_guided_picture_does_not_depend_on_its_neighbours(name: str) -> None:
    _, denoiser, cond, uncond, x = setup("flow")
    together = ALL[name](6.0)(denoiser, [cond], ONE, uncond)(x, T).x0
    assert cond.tokens is not None and uncond.tokens is not None
    for i in range(3):
        single, none = (Condition(tokens=c.tokens[i : i + 1]) for c in (cond, uncond))
        alone = ALL[name](6.0)(denoiser, [single], ONE[:, :1], none)(x[i : i + 1], T).x0
        assert torch.allclose(alone[0], together[i], atol=1e-4)


def test_several_conditions_are_joined_as_in_composed_guidance() -> None:
    _, denoiser, cond, uncond, x = setup()
    other = Condition(tokens=torch.randn(3, 18, 8))
    weights = torch.tensor([[1.0, 0.5, 2.0], [0.3, -1.0, 0.0]])
    joined = guidance.classifier_free(4.0)(denoiser, [cond, other], weights, uncond)(x, T).x0
    assert torch.allclose(joined, guidance.composed(denoiser, [cond, other], weights, uncond, 4.0)(x, T).x0, atol=1e-4)


def test_apg_adds_nothing_along_the_conditional_x0() -> None:
    """arXiv:2410.02416, eq. 8: with eta = 0 the update is orthogonal to the conditional x0."""
    _, denoiser, cond, uncond, x = setup()
    with_, _ = both(denoiser, cond, uncond, x)
    update = guidance.apg(8.0)(denoiser, [cond], ONE, uncond)(x, T).x0 - with_
    assert float(update.abs().max()) > 0.1
    cosine = inner(update, with_) / (inner(update, update) * inner(with_, with_)).sqrt()
    assert float(cosine.abs().max()) < 1e-5


def test_apg_bounds_the_length_of_its_update() -> None:
    _, denoiser, cond, uncond, x = setup()
    with_, _ = both(denoiser, cond, uncond, x)
    for bound in (0.5, 2.0):
        rule = guidance.apg(3.0, eta=1.0, max_norm=bound, momentum=0.0)
        update = rule(denoiser, [cond], ONE, uncond)(x, T).x0 - with_
        assert torch.allclose(inner(update, update).sqrt().flatten(), torch.full((3,), 2 * bound), rtol=1e-4)


def test_apg_momentum_is_a_geometric_sum_of_directions() -> None:
    """A constant direction d becomes d (1 + m + m^2 + ...) after as many evaluations; a new sampling begins anew."""
    _, denoiser, cond, uncond, x = setup()
    with_, without = both(denoiser, cond, uncond, x)
    for momentum in (-0.5, 0.4):
        rule = guidance.apg(2.0, eta=1.0, momentum=momentum)
        denoise = rule(denoiser, [cond], ONE, uncond)
        for total in (1, 1 + momentum, 1 + momentum + momentum**2):
            assert torch.allclose(denoise(x, T).x0, with_ + total * (with_ - without), atol=1e-4)
        again = rule(denoiser, [cond], ONE, uncond)
        assert torch.allclose(again(x, T).x0, with_ + (with_ - without), atol=1e-4)


def test_cfg_zero_leaves_parallel_predictions_at_the_conditional_one() -> None:
    """arXiv:2503.18886, eq. 11: what is parallel to the unconditional flow is not amplified, at any w."""

    def net(x: Tensor, t: Tensor, tokens: Tensor, **_: Any) -> Tensor:
        return tokens.mean((1, 2))[:, None, None, None] * torch.tanh(x)

    denoiser = Denoiser(net, NoiseSchedule(prediction="flow"))
    cond, uncond = Condition(tokens=torch.full((3, 2, 2), 3.0)), Condition(tokens=torch.full((3, 2, 2), 2.0))
    x = torch.randn(3, 4, 6, 6)
    for w in (0.0, 2.0, 12.0):
        guided = guidance.cfg_zero(w, zero_init=0)(denoiser, [cond], ONE, uncond)(x, T).x0
        assert torch.allclose(guided, denoiser(x, T, cond).x0, atol=1e-4)


def test_cfg_zero_stands_still_in_its_first_evaluations() -> None:
    _, denoiser, cond, uncond, x = setup("flow")
    steps = denoiser.schedule.steps(6)  # type: ignore[attr-defined]
    denoise = guidance.cfg_zero(3.0, zero_init=2)(denoiser, [cond], ONE, uncond)
    first, second, third = (denoise(x, t) for t in steps.t[:3])
    zero = denoiser.to_denoised(torch.zeros_like(x), x, steps.t[0]).x0
    assert torch.allclose(first.x0, zero)
    assert torch.allclose(second.x0, denoiser.to_denoised(torch.zeros_like(x), x, steps.t[1]).x0)
    assert not torch.allclose(third.x0, denoiser.to_denoised(torch.zeros_like(x), x, steps.t[2]).x0)


def test_tangential_damping_is_the_projection_of_the_singular_value_decomposition() -> None:
    _, denoiser, cond, uncond, x = setup()
    with_, without = denoiser.predict(x, T, cond), denoiser.predict(x, T, uncond)
    _, _, right = torch.linalg.svd(torch.stack([with_.flatten(1), without.flatten(1)], 1), full_matrices=False)
    first = right[:, 0]
    damped = ((without.flatten(1) * first).sum(1, keepdim=True) * first).reshape(x.shape)
    wanted = denoiser.to_denoised(damped + 5.0 * (with_ - damped), x, T).x0
    guided = guidance.tangential(5.0)(denoiser, [cond], ONE, uncond)(x, T).x0
    assert torch.allclose(guided, wanted, atol=1e-4)


def test_magnitude_aware_guidance_shrinks_with_the_difference() -> None:
    _, denoiser, cond, uncond, x = setup()
    with_, without = denoiser.predict(x, T, cond), denoiser.predict(x, T, uncond)
    ratio = (with_ - without).flatten(1).norm(dim=1) / without.flatten(1).norm(dim=1)
    w = (1 + 9 * torch.exp(-8 * ratio)).reshape(-1, 1, 1, 1)
    wanted = denoiser.to_denoised(without + w * (with_ - without), x, T).x0
    assert torch.allclose(guidance.magnitude_aware(10.0)(denoiser, [cond], ONE, uncond)(x, T).x0, wanted, atol=1e-4)


def test_autoguidance_is_the_line_through_both_models() -> None:
    net, denoiser, cond, uncond, x = setup()
    weak_net = Net()
    weaker = Denoiser(lambda x, t, tokens, **_: 0.5 * weak_net(x, t, tokens), NoiseSchedule(prediction="v"))
    strong, weak = denoiser(x, T, cond).x0, weaker(x, T, cond).x0
    guided = guidance.autoguidance(weaker, 2.5)(denoiser, [cond], ONE, uncond)(x, T).x0
    assert torch.allclose(guided, weak + 2.5 * (strong - weak), atol=1e-5)
    weak_net.batches.clear()
    assert torch.equal(guidance.autoguidance(weaker, 1.0)(denoiser, [cond], ONE, uncond)(x, T).x0, strong)
    assert not weak_net.batches and net.batches


def test_autoguidance_names_a_weaker_model_of_other_latents() -> None:
    _, denoiser, cond, uncond, x = setup()
    layer = torch.nn.Conv2d(3, 3, 1)
    weaker = Denoiser(lambda x, t, **_: layer(x), NoiseSchedule(prediction="v"))
    with pytest.raises(LdmPipeError, match="weaker model does not take latents"):
        guidance.autoguidance(weaker)(denoiser, [cond], ONE, uncond)(x, T)


def gaussian_pair(std: float = 0.6) -> tuple[Denoiser, Condition, Condition]:
    """Exact x0 of N(1.5, std^2) with the condition and N(-0.5, std^2) without, in one dimension."""
    schedule = NoiseSchedule(prediction="x0")
    modes = {1.0: GaussianMixture([[1.5]], [std]), 0.0: GaussianMixture([[-0.5]], [std])}

    def net(x: Tensor, t: Tensor, tokens: Tensor, **_: Any) -> Tensor:
        alpha, sigma = schedule.alpha_sigma(t.double())
        exact = {which: law.x0(x, alpha, sigma) for which, law in modes.items()}
        chosen = tokens[:, :1, 0] > 0.5
        return torch.where(chosen, exact[1.0], exact[0.0])

    return Denoiser(net, schedule), Condition(tokens=torch.ones(4000, 1, 1)), Condition(tokens=torch.zeros(4000, 1, 1))


def drawn(rule: guidance.Guidance, denoiser: Denoiser, cond: Condition, uncond: Condition, num: int = 60) -> Tensor:
    steps = denoiser.schedule.steps(num, spacing="trailing")  # type: ignore[attr-defined]
    x = torch.randn(4000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    denoise = rule(denoiser, [cond], torch.ones(1, 4000), uncond)
    return samplers.ddim(denoise, steps.init_scale * x, steps)


@pytest.mark.parametrize("w", [1.0, 2.0, 5.0])
def test_guidance_between_gaussians_of_equal_variance_moves_the_mean_and_keeps_the_variance(w: float) -> None:
    """x0_cond - x0_uncond is then a constant, so the guided x0 is the exact one of N(m_u + w (m_c - m_u), std^2)."""
    denoiser, cond, uncond = gaussian_pair()
    guided_law = GaussianMixture([[-0.5 + 2.0 * w]], [0.6])
    denoise = guidance.classifier_free(w)(denoiser, [cond], torch.ones(1, 4000), uncond)
    x = 3 * torch.randn(4000, 1, dtype=torch.float64)
    for t in (999, 700, 200, 5):
        level = denoiser.schedule.alpha_sigma(torch.tensor(float(t), dtype=torch.float64))
        assert torch.allclose(denoise(x, torch.tensor(float(t), dtype=torch.float64)).x0, guided_law.x0(x, *level))
    steps = denoiser.schedule.steps(30)  # type: ignore[attr-defined]
    start = steps.init_scale * x
    assert torch.allclose(
        samplers.ddim(denoise, start, steps), samplers.ddim(guided_law.denoiser(denoiser.schedule), start, steps)
    )


def test_a_scale_schedule_of_mean_w_lies_between_none_and_twice_w() -> None:
    denoiser, cond, uncond = gaussian_pair()
    means = [float(drawn(guidance.classifier_free(s), denoiser, cond, uncond).mean())
             for s in (1.0, guidance.linear(3.0), guidance.cosine(3.0), 5.0)]  # fmt: skip
    assert means[0] < min(means[1:3]) and max(means[1:3]) < means[3]
    level = guidance.NoiseLevel
    for schedule in (guidance.linear(3.0), guidance.cosine(3.0)):
        values = [schedule(level(f, f, 1.0)) for f in torch.linspace(0, 1, 1001).tolist()]  # type: ignore[operator]
        assert abs(sum(values) / len(values) - 3) < 1e-3 and abs(values[-1] - 1) < 1e-9 and abs(values[0] - 5) < 1e-9


def test_an_interval_is_exact_and_skips_the_evaluations_outside() -> None:
    net, denoiser, cond, uncond, x = setup()
    scale = guidance.interval(4.0, 0.5, 5.0)
    denoise = guidance.classifier_free(scale)(denoiser, [cond], ONE, uncond)
    always = guidance.classifier_free(4.0)(denoiser, [cond], ONE, uncond)
    inside = outside = 0
    for t in torch.linspace(1, 999, 41, dtype=torch.float64):
        alpha, sigma = denoiser.schedule.alpha_sigma(t)
        net.batches.clear()
        z = denoise(x, t).x0
        if 0.5 < float(sigma / alpha) <= 5.0:
            inside += 1
            assert net.batches == [6] and torch.equal(z, always(x, t).x0)
        else:
            outside += 1
            assert net.batches == [3] and torch.equal(z, denoiser(x, t, cond).x0)
    assert inside > 5 and outside > 5


def test_cfgpp_is_ddim_that_renoises_with_the_unconditional_noise() -> None:
    """arXiv:2406.08070, algorithm 2, written out beside DDIM with the scale that stands for it."""
    _, denoiser, cond, uncond, x = setup()
    steps = denoiser.schedule.steps(8, spacing="trailing")  # type: ignore[attr-defined]
    z = wanted = x.double()
    for t, alpha, sigma, next_alpha, next_sigma in steps.pairs():
        with_, without = (denoiser(wanted, t, c).x0 for c in (cond, uncond))
        noise = (wanted - alpha * without) / sigma
        wanted = next_alpha * (without + 0.6 * (with_ - without)) + next_sigma * noise
    scale = guidance.cfgpp(0.6, steps)
    z = samplers.ddim(guidance.classifier_free(scale)(denoiser, [cond], ONE, uncond), x.double(), steps)
    assert torch.allclose(z, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: guidance.interval(3.0, 2.0, 2.0), "contains no noise level"),
        (lambda: guidance.interval(3.0, -1.0, 2.0), "contains no noise level"),
        (lambda: guidance.apg(3.0, momentum=1.5), "momentum"),
        (lambda: guidance.apg(3.0, max_norm=0.0), "max_norm"),
        (lambda: guidance.magnitude_aware(3.0, damping=-1.0), "damping"),
        (lambda: guidance.cfg_zero(3.0, zero_init=-1), "zero_init"),
        (lambda: guidance.classifier_free(3.0, rescale=2.0), "rescale"),
        (lambda: guidance.cfgpp(1.5, NoiseSchedule().steps(4)), r"strength is 1\.5"),
    ],
)
def test_options_out_of_range_are_refused(build: Any, words: str) -> None:
    with pytest.raises(LdmPipeError, match=words):
        build()


def test_what_does_not_fit_is_refused_when_it_is_called() -> None:
    _, denoiser, cond, uncond, x = setup()
    with pytest.raises(LdmPipeError, match="CFG-Zero"):
        guidance.cfg_zero()(denoiser, [cond], ONE, uncond)
    with pytest.raises(LdmPipeError, match="without an unconditional"):
        guidance.apg(3.0)(denoiser, [cond], ONE, None)(x, T)
    with pytest.raises(LdmPipeError, match="scale is nan"):
        guidance.apg(math.nan)(denoiser, [cond], ONE, uncond)(x, T)
    with pytest.raises(LdmPipeError, match="other steps"):
        guidance.classifier_free(guidance.cfgpp(0.5, NoiseSchedule().steps(7)))(denoiser, [cond], ONE, uncond)(x, T)
