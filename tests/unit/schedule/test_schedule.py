"""Laws of the noise schedules, their steps, and the scheduler files they are read from."""

from __future__ import annotations

import itertools
import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import NoiseSchedule
from ldm_pipe.schedule.betas import BetaSchedule, make_betas
from ldm_pipe.schedule.spacing import Ramp
from ldm_pipe.schedule.steps import Steps
from tests.samplers import stride

LAWS = get_args(BetaSchedule)
SPACINGS = ("leading", "trailing", "linspace")
RAMPS = get_args(Ramp)
GRIDS = ("integer", "fractional", "multistep")
TIMES = torch.arange(1000)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_log_snr_falls_strictly(law: Any, zero_snr: bool) -> None:
    schedule = NoiseSchedule(beta_schedule=law, prediction="v", zero_terminal_snr=zero_snr)
    t = torch.linspace(0, 999, 4321, dtype=torch.float64)
    assert bool((schedule.log_snr(t).diff() < 0).all())


@pytest.mark.parametrize("law", LAWS)
def test_alpha_and_sigma_are_the_product_of_betas_in_float64(law: Any) -> None:
    schedule = NoiseSchedule(beta_schedule=law, prediction="v")
    alpha, sigma = schedule.alpha_sigma(TIMES)
    product, expected = 1.0, []
    for beta in make_betas(law, 0.00085, 0.012, 1000).tolist():
        product *= 1 - beta
        expected.append(product)
    assert alpha.dtype == sigma.dtype == torch.float64
    assert torch.allclose(alpha.square(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12)
    assert torch.allclose(alpha.square() + sigma.square(), torch.ones(1000, dtype=torch.float64), atol=1e-14)


def test_ends_are_those_of_the_papers() -> None:
    linear = make_betas("linear", 1e-4, 0.02, 1000)
    assert (float(linear[0]), float(linear[-1])) == (1e-4, 0.02)
    scaled = make_betas("scaled_linear", 0.00085, 0.012, 1000)
    assert torch.allclose(scaled[[0, -1]], torch.tensor([0.00085, 0.012], dtype=torch.float64), rtol=1e-14)
    assert torch.allclose(scaled.sqrt().diff(), scaled.sqrt().diff()[0], rtol=1e-9)
    cosine = make_betas("squaredcos_cap_v2", 0, 0, 1000)
    assert float(cosine.max()) == 0.999
    assert torch.equal(make_betas("quadratic", 1e-4, 0.02, 50), make_betas("scaled_linear", 1e-4, 0.02, 50))
    sigmoid = make_betas("sigmoid", 1e-4, 0.02, 1001)
    assert float(sigmoid[500]) == pytest.approx((1e-4 + 0.02) / 2)
    assert float(make_betas("sqrt", 1e-4, 0.02, 1000)[0]) == pytest.approx(0.01)
    # 1/T: alpha_bar falls by the same amount at every time, and reaches 0
    alpha_bar = NoiseSchedule(beta_schedule="jsd", prediction="v", num_train_timesteps=40).alpha(TIMES[:40]).square()
    assert torch.allclose(alpha_bar, 1 - torch.arange(1, 41, dtype=torch.float64) / 40, atol=1e-14)
    # half way alpha_bar is cos^2(pi/4), up to the offset of 0.008
    half = NoiseSchedule(beta_schedule="squaredcos_cap_v2").alpha(499).square()
    assert (
        abs(
            float(half)
            - math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        )
        < 1e-9
    )


def test_zero_terminal_snr_ends_at_exactly_no_signal_and_keeps_the_first_level() -> None:
    plain, shifted = NoiseSchedule(prediction="v"), NoiseSchedule(prediction="v", zero_terminal_snr=True)
    assert [float(v) for v in shifted.alpha_sigma(999)] == [0.0, 1.0]
    assert float(shifted.alpha(0)) == pytest.approx(float(plain.alpha(0)), rel=1e-14)


def test_fractional_times_lie_on_the_line_between_their_neighbours() -> None:
    schedule = NoiseSchedule()
    alpha, sigma = schedule.alpha_sigma(torch.tensor([41.0, 41.25, 42.0]))
    edm = sigma / alpha
    assert float(edm[1]) == pytest.approx(0.75 * float(edm[0]) + 0.25 * float(edm[2]), rel=1e-12)


@pytest.mark.parametrize("t", [-1, 1000, float("nan")])
def test_times_outside_the_schedule_are_refused(t: float) -> None:
    with pytest.raises(LdmPipeError, match="0 to 999"):
        NoiseSchedule().alpha_sigma(t)


@given(
    num_steps=st.integers(1, 499), spacing=st.sampled_from(SPACINGS), grid=st.sampled_from(GRIDS), zero=st.booleans()
)
@pytest.mark.filterwarnings("ignore:.*which is not noise")
def test_steps_fall_without_repeats_and_end_clean(num_steps: int, spacing: Any, grid: Any, zero: bool) -> None:
    """Duplicate times and a last sigma above 0 leave visible noise (diffusers#5687, #5689, #6068)."""
    schedule = NoiseSchedule(prediction="v", zero_terminal_snr=zero)
    steps = schedule.steps(num_steps, spacing=spacing, grid=grid)
    assert steps.num_steps == num_steps
    assert bool((steps.t.diff() < 0).all())
    assert bool((steps.sigma.diff() < 0).all())
    assert (float(steps.alpha[-1]), float(steps.sigma[-1])) == (1.0, 0.0)
    alpha, sigma = schedule.alpha_sigma(steps.t[:-1])
    assert torch.equal(alpha, steps.alpha[:-1])
    assert torch.equal(sigma, steps.sigma[:-1])
    assert {v.dtype for v in (steps.t, steps.alpha, steps.sigma)} == {torch.float64}


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("num_steps", [1, 4, 30, 1000])
def test_trailing_and_linspace_start_at_the_last_level(spacing: Any, num_steps: int) -> None:
    """Sampling that starts below the noisiest level never makes dark or bright pictures (arXiv:2305.08891)."""
    assert float(NoiseSchedule().steps(num_steps, spacing=spacing).t[0]) == 999


def test_a_start_that_is_not_noise_warns() -> None:
    with pytest.warns(UserWarning, match="not noise"):
        NoiseSchedule().steps(1, spacing="leading")


def test_trailing_previous_time_is_the_next_row() -> None:
    """diffusers#9261: stepping to t - 1000 // n instead of the next time of trailing spacing."""
    schedule = NoiseSchedule()
    steps = schedule.steps(30, spacing="trailing")
    rows = list(steps.pairs())
    for here, after in itertools.pairwise(rows):
        assert here[3:] == after[1:3]
    strided = list(stride(steps, schedule).pairs())
    assert any(here[3:] != after[1:3] for here, after in itertools.pairwise(strided))


@pytest.mark.parametrize("num_steps", [0, -1, 1001, 2.5, True])
def test_bad_numbers_of_steps_are_refused(num_steps: Any) -> None:
    with pytest.raises(LdmPipeError, match="1 to 1000"):
        NoiseSchedule().steps(num_steps)


def test_steps_that_do_not_fit_are_refused() -> None:
    with pytest.raises(LdmPipeError, match="do not fit"):
        NoiseSchedule().steps(1000, spacing="leading")
    with pytest.raises(LdmPipeError, match="do not fit"):
        NoiseSchedule().steps(1000, spacing="linspace", grid="multistep")


def test_repeated_times_are_refused() -> None:
    row = torch.tensor([5.0, 5.0, -1.0], dtype=torch.float64)
    with pytest.raises(LdmPipeError, match="repeats"):
        Steps(row, row, row)


@given(num_steps=st.integers(2, 200), strength=st.floats(0.01, 1.0))
def test_strength_keeps_the_last_rows(num_steps: int, strength: float) -> None:
    steps = NoiseSchedule().steps(num_steps)
    if int(num_steps * strength) == 0:
        with pytest.raises(LdmPipeError, match="nothing to do"):
            steps.from_strength(strength)
        return
    rest = steps.from_strength(strength)
    assert rest.num_steps == int(num_steps * strength)
    assert torch.equal(rest.t, steps.t[-rest.num_steps - 1 :])
    assert float(rest.sigma[-1]) == 0


@pytest.mark.parametrize("zero", [False, True])
def test_levels_are_inverse_to_the_law_and_go_on_beyond_its_ends(zero: bool) -> None:
    schedule = NoiseSchedule(prediction="v", zero_terminal_snr=zero)
    steps = schedule.steps(20, spacing="trailing")
    for t in (0.0, 0.3, 41.75, 500.0, 998.4, 999.0):
        half = float(schedule.log_snr(t)) / 2
        time, alpha, sigma = steps.at(half)
        assert time.dtype == torch.float64
        assert float(time) == pytest.approx(t, abs=1e-6)
        assert (alpha, sigma) == pytest.approx(tuple(float(v) for v in schedule.alpha_sigma(t)), abs=1e-12)
    for half, end in ((9.0, 0.0), (-9.0, 999.0)):
        time, alpha, sigma = steps.at(half)
        assert zero or float(time) == end
        assert alpha**2 + sigma**2 == pytest.approx(1, abs=1e-14)
        assert math.log(alpha / sigma) == pytest.approx(half)


def test_steps_built_by_hand_do_not_know_between_their_rows() -> None:
    row = torch.tensor([5.0, -1.0], dtype=torch.float64)
    with pytest.raises(LdmPipeError, match="between"):
        Steps(row, row, row).at(0.0)


@pytest.mark.parametrize("strength", [0, -0.1, 1.01, float("nan")])
def test_strength_outside_its_range_is_refused(strength: float) -> None:
    with pytest.raises(LdmPipeError, match="strength"):
        NoiseSchedule().steps(10).from_strength(strength)


def test_strength_keeps_the_strides() -> None:
    steps = stride(NoiseSchedule().steps(30, spacing="linspace"), NoiseSchedule())
    assert next(steps.from_strength(0.5).pairs())[1:] == list(steps.pairs())[15][1:]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta_schedule", "laplace"),
        ("ramp", "trailing"),
        ("prediction", "epsilon"),
        ("spacing", "karras"),
        ("num_train_timesteps", 1),
        ("num_train_timesteps", 2**31),
        ("beta_start", -0.1),
        ("beta_end", float("nan")),
        ("beta_end", "0.02"),
        ("trained_betas", (0.1, 0.2)),
        ("trained_betas", (0.0,) * 1000),
        ("steps_offset", -1),
    ],
)
def test_what_means_nothing_is_refused(field: str, value: Any) -> None:
    with pytest.raises(LdmPipeError, match=r"beta|prediction|spacing|ramp|num_train|offset"):
        NoiseSchedule(**{field: value})


@pytest.mark.parametrize("prediction", ["eps", "score"])
@pytest.mark.parametrize("law", [{"zero_terminal_snr": True}, {"beta_schedule": "jsd"}])
def test_eps_without_signal_is_refused(prediction: Any, law: dict[str, Any]) -> None:
    with pytest.raises(LdmPipeError, match="zero terminal SNR"):
        NoiseSchedule(prediction=prediction, **law)


@given(num_steps=st.integers(1, 200), kind=st.sampled_from(RAMPS), zero=st.booleans(), grid=st.sampled_from(GRIDS))
def test_ramps_neither_repeat_times_nor_leave_noise(num_steps: int, kind: Any, zero: bool, grid: Any) -> None:
    """diffusers rounds the times of Karras sigmas, so that neighbours meet (PR#6477), and may end above 0 (#5687)."""
    schedule = NoiseSchedule(prediction="v", zero_terminal_snr=zero, spacing="trailing")
    steps = schedule.steps(num_steps, spacing=kind, grid=grid)
    assert steps.num_steps == num_steps
    assert float(steps.t[0]) == 999
    assert num_steps == 1 or float(steps.t[-2]) == pytest.approx(0, abs=1e-9)
    assert (float(steps.alpha[-1]), float(steps.sigma[-1])) == (1.0, 0.0)
    assert bool((steps.sigma.diff() < 0).all())
    assert bool(torch.stack([steps.t, steps.alpha, steps.sigma]).isfinite().all())


@pytest.mark.parametrize("kind", RAMPS)
def test_a_ramp_of_the_schedule_spans_its_even_times_for_euler_and_all_levels_for_multistep(kind: Any) -> None:
    schedule = NoiseSchedule(spacing="leading", ramp=kind)
    plain = NoiseSchedule(spacing="leading")
    even, ramped = plain.steps(10, grid="fractional"), schedule.steps(10, grid="fractional")
    assert torch.allclose(ramped.t[[0, 9]], even.t[[0, 9]], atol=1e-9)
    assert ramped.init_scale == even.init_scale == 1.0
    assert torch.equal(schedule.steps(10, grid="multistep").t, plain.steps(10, spacing=kind).t)
    assert torch.equal(schedule.steps(10, spacing="trailing").t, plain.steps(10, spacing="trailing").t)


def test_explicit_times_and_levels() -> None:
    schedule = NoiseSchedule()
    steps = schedule.steps(times=[999, 500.5, 3])
    assert steps.t.tolist() == [999, 500.5, 3, -1]
    edm = (steps.sigma / steps.alpha)[:-1]
    assert torch.allclose(schedule.steps(sigmas=edm).t, steps.t, atol=1e-9)
    assert torch.equal(schedule.steps(times=steps.t[:-1]).alpha, steps.alpha)
    for bad in ([1000.0, 3], [5, -1], [3, 5], [5, 5], [], [[5, 3]], "nonsense", [float("nan")]):
        with pytest.raises(LdmPipeError):
            schedule.steps(times=bad)  # type: ignore[arg-type]
    for bad in ([99.0, 3], [3, 0], [3, 5]):
        with pytest.raises(LdmPipeError, match="sigmas"):
            schedule.steps(sigmas=bad)


def test_the_rows_are_named_in_exactly_one_way() -> None:
    schedule = NoiseSchedule()
    for ways in (
        {},
        {"num_steps": 3, "times": [3]},
        {"num_steps": 25, "spacing": "ddim25"},
        {"times": [3], "sigmas": [3]},
    ):
        with pytest.raises(LdmPipeError, match="one of num_steps"):
            schedule.steps(**ways)
    assert schedule.steps(spacing="ddim25").num_steps == 25


def config(*dropped: str, **changes: Any) -> dict[str, Any]:
    """Return a DDIM scheduler file with some keys changed and some dropped."""
    file = {**NoiseSchedule().to_config("ddim"), **changes}
    return {key: value for key, value in file.items() if key not in dropped}


def test_trained_betas_survive_the_config() -> None:
    schedule = NoiseSchedule(num_train_timesteps=3, trained_betas=(0.1, 0.2, 0.3))
    again = NoiseSchedule.from_config(schedule.to_config("euler"))
    assert again == schedule
    assert float(again.alpha(2)) ** 2 == pytest.approx(0.9 * 0.8 * 0.7, rel=1e-14)


def test_unknown_keys_are_kept() -> None:
    schedule = NoiseSchedule.from_config(config(colour="red"))
    assert schedule.config["colour"] == "red"


@pytest.mark.parametrize("key", ["beta_start", "beta_end", "beta_schedule", "prediction_type", "num_train_timesteps"])
def test_a_missing_key_that_shapes_the_maths_is_named(key: str) -> None:
    with pytest.raises(LdmPipeError, match=key):
        NoiseSchedule.from_config(config(key))
    with pytest.raises(LdmPipeError, match=key):
        NoiseSchedule.from_config(config(key, "_class_name"))


def test_only_files_older_than_a_key_may_lack_it() -> None:
    for version, key in (("0.8.1", "prediction_type"), ("0.17.0.dev0", "timestep_spacing")):
        old = NoiseSchedule.from_config(config(key, _diffusers_version=version))
        assert old == NoiseSchedule()
        with pytest.raises(LdmPipeError, match=key):
            NoiseSchedule.from_config(config(key, _diffusers_version="0.19.0"))
        with pytest.raises(LdmPipeError, match=key):
            NoiseSchedule.from_config(config(key, "_diffusers_version"))


def test_a_plain_dict_without_spacing_must_be_told() -> None:
    plain = config("_class_name", "timestep_spacing")
    with pytest.raises(LdmPipeError, match="spacing"):
        NoiseSchedule.from_config(plain).steps(10)
    assert NoiseSchedule.from_config(plain).steps(10, spacing="trailing").num_steps == 10


@pytest.mark.parametrize(
    "changes",
    [
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        {"beta_schedule": "laplace"},
        {"prediction_type": "eps"},
        {"timestep_spacing": "karras"},
        {"beta_start": "0.1"},
        {"rescale_betas_zero_snr": True},
    ],
)
def test_unknown_values_in_a_config_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(LdmPipeError):
        NoiseSchedule.from_config(config(**changes))


@pytest.mark.parametrize("setting", [{"solver_type": "heun"}, {"lambda_min_clipped": -5.1}])
def test_a_setting_without_effect_warns(setting: dict[str, Any]) -> None:
    file = {**NoiseSchedule().to_config("dpmpp_2m"), **setting}
    with pytest.warns(UserWarning, match="ignored"):
        NoiseSchedule.from_config(file)


def test_set_alpha_to_one_counts_only_for_the_sampler_that_has_it() -> None:
    """SDXL's Euler file says set_alpha_to_one=false: DDIM must not leave noise for it (diffusers#6068)."""
    assert NoiseSchedule.from_config(config(set_alpha_to_one=False)).final("ddim") == "first"
    assert NoiseSchedule.from_config(config(set_alpha_to_one=False)).final("dpmpp_2m") == "clean"
    sdxl = {**NoiseSchedule().to_config("euler"), "set_alpha_to_one": False}
    assert NoiseSchedule.from_config(sdxl).final("ddim") == "clean"


def test_what_diffusers_cannot_represent_is_refused() -> None:
    with pytest.raises(LdmPipeError, match="thresholding"):
        NoiseSchedule().to_config("euler", thresholding=True)
    with pytest.raises(LdmPipeError, match="flow"):
        NoiseSchedule(prediction="flow").to_config("ddim")
    with pytest.raises(LdmPipeError, match="restart"):
        NoiseSchedule().to_config("restart")
    with pytest.raises(LdmPipeError, match="rewrites"):
        NoiseSchedule(steps_offset=0).to_config("ddim")
    assert NoiseSchedule(steps_offset=0).to_config("ddim", for_stable_diffusion=False)["steps_offset"] == 0


def test_flow_levels_are_those_of_rectified_flow() -> None:
    """sigma / alpha = t / (1 - t) at even times t, whatever the scale of the mixture."""
    law = NoiseSchedule(beta_schedule="flow_levels", num_train_timesteps=9, prediction="v")
    alpha, sigma = law.alpha_sigma(torch.arange(9))
    t = torch.arange(1, 10, dtype=torch.float64) / 10
    assert torch.allclose(sigma / alpha, t / (1 - t), rtol=1e-12)
