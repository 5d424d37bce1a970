"""Laws of the continuous noise laws, and the round trip of all laws through diffusers' files."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import Law, NoiseSchedule
from ldm_pipe.schedule import read as schedule_config
from ldm_pipe.schedule.laws import EDM, VE, ContinuousVP, Flow, ResolutionShift, shift_times
from ldm_pipe.schedule.spacing import Ramp

LAWS: dict[str, Law] = {
    "discrete": NoiseSchedule(),
    "discrete zero SNR": NoiseSchedule(prediction="v", spacing="trailing", zero_terminal_snr=True),
    "1/T": NoiseSchedule(beta_schedule="jsd", prediction="v", spacing="trailing"),
    "VP": ContinuousVP(),
    "VP cosine": ContinuousVP(kind="cosine", prediction="v"),
    "VE": VE(),
    "EDM": EDM(),
    "flow": Flow(),
    "shifted flow": Flow(shift=3.0),
}
CONTINUOUS = ["VP", "VP cosine", "VE", "EDM", "flow", "shifted flow"]
SPACINGS = ("trailing", "linspace", *get_args(Ramp))


@given(name=st.sampled_from(sorted(LAWS)), u=st.just(0.0) | st.floats(1e-9, 1))
def test_t_of_is_inverse_to_alpha_sigma(name: str, u: float) -> None:
    law = LAWS[name]
    low, high = law.t_range
    t = torch.tensor(low + u * (high - low), dtype=torch.float64)
    half = law.log_snr(t) / 2
    back = law.t_of(half)
    if math.isfinite(float(half)):
        assert float(back) == pytest.approx(float(t), rel=1e-7, abs=1e-7 * high)
        if abs(float(half)) < 18:  # beyond, 1 - t has no digits left
            assert float(law.log_snr(back)) == pytest.approx(float(half) * 2, rel=1e-6, abs=1e-6)
    else:
        assert float(back) == float(t)


@pytest.mark.parametrize("name", LAWS)
def test_log_snr_falls_strictly_and_levels_are_exact(name: str) -> None:
    law = LAWS[name]
    t = torch.linspace(*law.t_range, 3001, dtype=torch.float64)
    assert bool((law.log_snr(t).diff() < 0).all())
    alpha, sigma = law.alpha_sigma(t)
    assert alpha.dtype == sigma.dtype == torch.float64
    assert torch.equal(law.alpha(t), alpha)
    assert torch.equal(law.sigma(t), sigma)


def test_ends_are_exact() -> None:
    assert [float(v) for v in Flow().alpha_sigma(1.0)] == [0.0, 1.0]
    assert [float(v) for v in Flow().alpha_sigma(0.0)] == [1.0, 0.0]
    assert float(LAWS["VP cosine"].alpha(1.0)) == 0
    assert [float(v) for v in ContinuousVP().alpha_sigma(0.0)] == [1.0, 0.0]
    assert [float(v) for v in VE().sigma(torch.tensor([0.0, 1.0]))] == pytest.approx([0.01, 50.0], rel=1e-14)


def test_vp_keeps_the_variance_and_equals_its_formulas() -> None:
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    for kind in ("linear", "cosine"):
        alpha, sigma = ContinuousVP(kind=kind, prediction="v").alpha_sigma(t)
        assert torch.allclose(alpha.square() + sigma.square(), torch.ones_like(t), atol=1e-13)
    log_alpha = -0.25 * t**2 * 19.9 - 0.5 * t * 0.1  # arXiv:2011.13456, eq. 33
    assert torch.allclose(ContinuousVP().alpha(t).log(), log_alpha, atol=1e-12)
    cosine = torch.cos((t + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)
    assert torch.allclose(ContinuousVP(kind="cosine", prediction="v").alpha(t), cosine, atol=1e-14)


def test_the_discrete_law_tends_to_the_continuous_one() -> None:
    """Betas beta(t) / T of T levels: the two differ by about the sum of beta^2 / 4."""
    discrete = NoiseSchedule("linear", 0.1 / 10_000, 20 / 10_000, 10_000)
    t = torch.arange(99, 10_000, 900)
    assert torch.allclose(discrete.alpha(t), ContinuousVP().alpha((t + 1) / 10_000), rtol=6e-3)


def test_the_ve_ladder_has_a_constant_ratio() -> None:
    """NCSN's levels are a geometric sequence (arXiv:1907.05600, section 4.1)."""
    steps = VE(sigma_min=0.01, sigma_max=1.0).steps(10)
    ratios = steps.sigma[:-2] / steps.sigma[1:-1]
    assert torch.allclose(ratios, torch.tensor(100 ** (1 / 9), dtype=torch.float64), rtol=1e-12)
    assert [float(s) for s in steps.sigma[[0, -2, -1]]] == pytest.approx([1.0, 0.01, 0.0], rel=1e-12)


def test_networks_are_told_their_own_time() -> None:
    t = torch.tensor([0.5], dtype=torch.float64)
    assert float(Flow().network_time(t)) == 500
    assert float(EDM().network_time(t)) == pytest.approx(math.log(0.5) / 4)
    assert float(ContinuousVP().network_time(t)) == 499.5
    assert float(VE().network_time(t)) == 499.5
    assert float(VE(told="sigma").network_time(t)) == pytest.approx(math.sqrt(0.5))
    assert float(NoiseSchedule().network_time(t)) == 0.5


@given(t=st.floats(0, 1), shift=st.floats(0.1, 20))
def test_flow_shift_is_equation_23(t: float, shift: float) -> None:
    time = torch.tensor(t, dtype=torch.float64)
    shifted = float(shift_times(time, shift))
    assert shifted == pytest.approx(shift * t / (1 + (shift - 1) * t), abs=1e-12)
    assert float(shift_times(torch.ones(()).double(), shift)) == 1
    law = Flow()
    if 1e-6 < t < 1 - 1e-6:  # it moves the log SNR by a constant
        moved = float(law.log_snr(shifted) - law.log_snr(t)) / 2
        assert moved == pytest.approx(-math.log(shift), abs=1e-6)


def test_the_shift_of_a_resolution() -> None:
    flux = ResolutionShift()
    assert (flux.mu(256), flux.mu(4096)) == pytest.approx((0.5, 1.15))
    assert flux.shift(4096) == pytest.approx(math.exp(1.15))
    assert replace(flux, kind="linear").shift(256) == pytest.approx(0.5)
    law = Flow(resolution=flux)
    with pytest.raises(LdmPipeError, match="at_resolution"):
        law.steps(4)
    with pytest.raises(LdmPipeError, match="does not depend"):
        Flow(shift=2.0).at_resolution(256)
    steps = law.at_resolution(4096).steps(4, spacing="trailing")
    even = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0], dtype=torch.float64)
    assert torch.allclose(steps.t, shift_times(even, math.exp(1.15)), atol=1e-12)


def test_a_terminal_time_is_reached() -> None:
    t = Flow(shift=2.0, terminal=0.1).steps(8).t
    assert (float(t[0]), float(t[-1])) == (1.0, 0.0)
    assert float(t[-2]) == pytest.approx(0.1)


@given(name=st.sampled_from(CONTINUOUS), spacing=st.sampled_from(SPACINGS), num=st.integers(1, 120))
def test_steps_fall_without_repeats_and_end_clean(name: str, spacing: Any, num: int) -> None:
    law = LAWS[name]
    for grid in ("integer", "multistep"):
        steps = law.steps(num, spacing=spacing, grid=grid)  # type: ignore[arg-type]
        assert steps.num_steps == num
        assert bool(torch.stack([steps.t, steps.alpha, steps.sigma]).isfinite().all())
        assert bool((steps.t.diff() < 0).all())
        assert bool((steps.sigma.diff() < 0).all())
        assert float(steps.t[0]) == law.t_range[1]
        assert (float(steps.alpha[-1]), float(steps.sigma[-1])) == (1.0, 0.0)


@pytest.mark.parametrize("name", LAWS)
def test_steps_tell_the_levels_between_and_above_their_rows(name: str) -> None:
    law = LAWS[name]
    steps = law.steps(10, spacing="linspace")
    halves = (steps.alpha.log() - steps.sigma.log())[1:-1]
    for first, second in itertools.pairwise(halves.tolist()):
        t, alpha, sigma = steps.at((first + second) / 2)
        assert math.log(alpha / sigma) == pytest.approx((first + second) / 2, abs=1e-6)
        assert [float(v) for v in law.alpha_sigma(t)] == pytest.approx([alpha, sigma], rel=1e-6)
    above = float(halves[0]) - 30
    t, alpha, sigma = steps.at(above)
    assert math.log(alpha / sigma) == pytest.approx(above)
    assert float(t) <= law.t_range[1] or name in ("VE", "EDM")  # whose frames have no largest level


def test_the_first_row_starts_from_noise_of_its_own_size() -> None:
    assert EDM().steps(5).init_scale == 80
    assert VE().steps(5).init_scale == pytest.approx(50)
    assert Flow().steps(5).init_scale == ContinuousVP().steps(5).init_scale == 1


def test_edm_defaults_are_the_papers() -> None:
    """arXiv:2206.00364, eq. 5 with rho 7, between 80 and 0.002."""
    i = torch.arange(18, dtype=torch.float64)
    sigma = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert torch.allclose(EDM().steps(18).sigma[:-1], sigma, rtol=1e-12)
    assert not torch.allclose(EDM(rho=3.0).steps(18).sigma[:-1], sigma)
    assert torch.equal(EDM(rho=3.0).steps(18).t, EDM().steps(18, rho=3.0).t)


def test_explicit_times_and_levels() -> None:
    assert Flow().steps(sigmas=[1.0, 0.5]).t.tolist() == [1.0, 0.5, 0.0]
    assert VE().steps(sigmas=[50.0, 0.5]).sigma.tolist() == pytest.approx([50.0, 0.5, 0.0])
    assert EDM().steps(times=[80, 3.0]).sigma.tolist() == [80.0, 3.0, 0.0]
    for bad in ({"times": [90.0, 1]}, {"sigmas": [3.0, 3.0]}, {"times": []}, {}, {"num_steps": 3, "times": [3.0]}):
        with pytest.raises(LdmPipeError):
            EDM().steps(**bad)


@pytest.mark.parametrize("num_steps", [0, -1, 2.5, True])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_bad_numbers_of_steps_are_refused(name: str, num_steps: Any) -> None:
    with pytest.raises(LdmPipeError, match="num_steps"):
        LAWS[name].steps(num_steps)


@pytest.mark.parametrize(
    ("law", "fields"),
    [
        (Flow, {"prediction": "eps"}),
        (Flow, {"prediction": "score"}),
        (ContinuousVP, {"kind": "cosine", "prediction": "eps"}),
        (ContinuousVP, {"kind": "sine"}),
        (ContinuousVP, {"t_min": 0.0}),
        (ContinuousVP, {"beta_min": 30.0}),
        (VE, {"prediction": "mean"}),
        (VE, {"prediction": "edm"}),
        (VE, {"sigma_min": 60.0}),
        (VE, {"told": "t"}),
        (EDM, {"sigma_data": float("nan")}),
        (EDM, {"spacing": "leading"}),
        (EDM, {"prediction": "epsilon"}),
        (Flow, {"shift": 0.0}),
        (Flow, {"ends": (0.0, 1.0)}),
        (Flow, {"terminal": 1.0}),
    ],
)
def test_what_means_nothing_is_refused(law: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(LdmPipeError, match=next(reversed(fields)) if "eps" not in fields.values() else "alpha = 0"):
        law(**fields)


@pytest.mark.parametrize(("law", "t"), [(Flow(), 1.01), (Flow(), -0.1), (EDM(), -1.0), (ContinuousVP(), float("nan"))])
def test_times_outside_a_law_are_refused(law: Law, t: float) -> None:
    with pytest.raises(LdmPipeError, match="times go from"):
        law.alpha_sigma(t)


def test_eps_with_a_cosine_that_stops_before_no_signal() -> None:
    assert float(ContinuousVP(kind="cosine", t_max=0.9946).alpha(0.9946)) > 0


DISCRETE = NoiseSchedule("linear", 1e-3, 0.03, 500, prediction="v", spacing="trailing")
EVEN = ("ddim", "ddpm", "plms", "euler_ancestral")
RAMPED = ("euler", "heun", "lms", "dpm2", "dpm2_ancestral", "dpmpp_sde", "dpmpp_2m", "dpmpp_3m", "unipc")
ZERO_SNR = ("ddim", "ddpm", "euler", "euler_ancestral", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "unipc")
WRITTEN: list[tuple[Law, str]] = [
    *((DISCRETE, name) for name in (*EVEN, *RAMPED, "dpmpp_2m_sde", "dpmpp_3m_sde")),
    *((replace(DISCRETE, prediction="eps", spacing="leading"), name) for name in (*EVEN, *RAMPED)),
    *((replace(DISCRETE, ramp="karras"), name) for name in RAMPED),
    *((replace(DISCRETE, ramp="beta", spacing="leading"), name) for name in RAMPED),
    *((replace(DISCRETE, zero_terminal_snr=True), name) for name in ZERO_SNR),
    *((replace(DISCRETE, noisy_end=(name,)), name) for name in ("ddim", "euler", "dpmpp_2m", "unipc", "deis")),
    *((replace(DISCRETE, beta_schedule=kind), "ddpm") for kind in ("sigmoid", "sqrt", "quadratic", "jsd")),
    (replace(DISCRETE, beta_schedule="sqrt"), "dpmpp_2m"),
    (replace(DISCRETE, ramp="log_snr"), "dpmpp_2m"),
    (replace(DISCRETE, spacing="linspace"), "dpmpp_2s"),
    (replace(DISCRETE, spacing="lcm"), "lcm"),
    (EDM(sigma_max=60.0, rho=5.0), "euler"),
    (EDM(spacing="exponential", noisy_end=("dpmpp_2m",)), "dpmpp_2m"),
    (EDM(), "dpmpp_3m_sde"),
    (Flow(), "unipc"),
    (Flow(shift=3.0), "euler"),
    (Flow(shift=3.0), "heun"),
    (Flow(spacing="karras", terminal=0.1), "lcm"),
    (Flow(resolution=ResolutionShift(max_shift=1.3, kind="linear")), "euler"),
    (Flow(resolution=ResolutionShift()), "unipc"),
    (Flow(shift=5.0, ends=(1.0, 0.001), terminal=0.05), "unipc"),
    (Flow(shift=3.0, ends=(0.999, 0.0), prediction="x0"), "dpmpp_2m"),
    (Flow(ends=(0.999, 0.0)), "dpmpp_2s"),
    (VE(sigma_max=1348.0, told="sigma"), "predictor_corrector"),
    (ContinuousVP(beta_max=12.0, t_min=1e-4), "predictor_corrector"),
]


@pytest.mark.parametrize(("law", "sampler"), WRITTEN)
def test_config_round_trip(law: Law, sampler: str) -> None:
    config = law.to_config(sampler)
    assert schedule_config.read(config) == law
    assert schedule_config.sampler_name(config) == sampler
    assert law.final(sampler) == schedule_config.read(config).final(sampler)


@pytest.mark.parametrize(
    ("law", "sampler"),
    [
        (Flow(), "deis"),
        (Flow(), "dpmpp_2m"),  # which starts at 0.999 there
        (Flow(spacing="trailing"), "euler"),
        (Flow(terminal=0.1), "heun"),
        (EDM(), "heun"),
        (EDM(prediction="eps"), "euler"),
        (VE(), "predictor_corrector"),
        (ContinuousVP(kind="cosine", prediction="v"), "predictor_corrector"),
        (DISCRETE, "lcm"),
        (DISCRETE, "deis"),
        (DISCRETE, "dpmpp_2s"),
        (replace(DISCRETE, ramp="karras"), "ddim"),
        (replace(DISCRETE, ramp="polynomial"), "dpmpp_2m"),
        (replace(DISCRETE, zero_terminal_snr=True), "heun"),
        (replace(DISCRETE, zero_terminal_snr=True, ramp="karras"), "euler"),
        (replace(DISCRETE, beta_schedule="jsd"), "euler"),
        (replace(DISCRETE, noisy_end=("heun",)), "heun"),
        (replace(DISCRETE, prediction="x0"), "euler_ancestral"),
    ],
)
def test_what_diffusers_cannot_represent_is_refused(law: Law, sampler: str) -> None:
    with pytest.raises(LdmPipeError, match=r"diffusers|known|use|set"):
        law.to_config(sampler)


@pytest.mark.parametrize(
    ("law", "sampler", "changes"),
    [
        (Flow(), "euler", {"invert_sigmas": True}),
        (Flow(), "unipc", {"use_karras_sigmas": True}),
        (Flow(), "unipc", {"prediction_type": "epsilon"}),
        (EDM(), "euler", {"prediction_type": "v_prediction"}),
        (EDM(), "euler", {"sigma_schedule": "lu"}),
        (DISCRETE, "euler", {"timestep_type": "continuous"}),
        (DISCRETE, "heun", {"use_karras_sigmas": True, "use_beta_sigmas": True}),
        (replace(DISCRETE, spacing="lcm"), "lcm", {"original_inference_steps": 100}),
        (DISCRETE, "ddim", {"_class_name": "VQDiffusionScheduler"}),
    ],
)
def test_files_that_mean_what_no_law_here_does_are_refused(law: Law, sampler: str, changes: dict[str, Any]) -> None:
    with pytest.raises(LdmPipeError):
        schedule_config.read({**law.to_config(sampler), **changes})


def test_a_continuous_file_is_no_noise_schedule() -> None:
    with pytest.raises(LdmPipeError, match="Flow law"):
        NoiseSchedule.from_config(Flow().to_config("euler"))


def test_settings_choose_the_sampler() -> None:
    dpm = DISCRETE.to_config("dpmpp_2m")
    assert schedule_config.sampler_name({**dpm, "algorithm_type": "dpmsolver"}) is None
    assert schedule_config.sampler_name({**dpm, "solver_order": 1}) is None
    assert schedule_config.sampler_name({**dpm, "algorithm_type": "sde-dpmsolver++"}) == "dpmpp_2m_sde"
    assert schedule_config.sampler_name({"beta_start": 0.1}) is None
    unipc = {**DISCRETE.to_config("unipc"), "solver_order": 3}
    assert schedule_config.sampler_options(unipc, "unipc") == {"order": 3}
    assert schedule_config.sampler_options(unipc, "deis") == schedule_config.sampler_options(dpm, "dpmpp_2m") == {}
