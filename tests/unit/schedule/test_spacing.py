"""Choices of times: ramps, respacing strings, numbers one by one."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule.spacing import Ramp, line, open_ramp, ramp, respace, whole_times

RAMPS = get_args(Ramp)


@given(kind=st.sampled_from(RAMPS), num=st.integers(2, 300), low=st.floats(1e-3, 1.0), ratio=st.floats(1.5, 1e5))
def test_ramps_fall_between_exact_ends(kind: Any, num: int, low: float, ratio: float) -> None:
    levels = ramp(kind, num, low * ratio, low)
    assert (float(levels[0]), float(levels[-1]), len(levels)) == (low * ratio, low, num)
    assert bool((levels.diff() < 0).all())


def test_each_ramp_is_a_line_after_its_own_map() -> None:
    """Karras: sigma^(1/7); exponential and log-SNR: log sigma; polynomial: its root."""
    low, high = 0.02, 80.0
    maps = {
        "karras": lambda s: s ** (1 / 7),
        "exponential": torch.log,
        "log_snr": torch.log,
        "polynomial": lambda s: (s / low).log().clamp_min(0).sqrt(),
    }
    for kind, straighten in maps.items():
        steps = straighten(ramp(kind, 12, high, low)).diff()  # type: ignore[arg-type]
        assert torch.allclose(steps, steps[0], rtol=1e-6), kind
    cubed = ramp("polynomial", 12, high, low, rho=3.0)
    assert torch.allclose(
        (cubed / low).log().clamp_min(0).pow(1 / 3).diff().diff(), torch.zeros(()).double(), atol=1e-4
    )


def test_the_beta_ramp_takes_quantiles_of_the_beta_distribution() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    expected = scipy_stats.beta.ppf([1 - i / 40 for i in range(41)], 0.6, 0.6)
    assert torch.allclose(ramp("beta", 41, 2.0, 1.0) - 1, torch.from_numpy(expected), atol=1e-7)


def test_one_step_is_at_the_largest_level() -> None:
    for kind in RAMPS:
        assert ramp(kind, 1, 80.0, 0.1).tolist() == [80.0]
        assert open_ramp(kind, 1, 80.0, 0.1).tolist() == [math.inf]
        assert open_ramp(kind, 2, 80.0, 0.1).tolist() == [math.inf, 0.1]


def test_a_ramp_to_zero_is_refused() -> None:
    with pytest.raises(LdmPipeError, match="above 0"):
        ramp("exponential", 5, 1.0, 0.0)


def test_ddim25_of_a_thousand_is_every_fortieth() -> None:
    """Improved DDPM: the smallest whole stride from 0 that gives exactly as many times."""
    assert respace("ddim25", 1000).tolist() == list(range(960, -1, -40))
    assert respace("ddim50", 4000).tolist() == list(range(3920, -1, -80))
    assert respace("ddim3", 10).tolist() == [8, 4, 0]


def test_sections_of_improved_ddpm() -> None:
    """The example of its docstring: 300 times, "10,15,20": 10, 15 and 20 evenly from each third, its ends included."""
    times = respace("10,15,20", 300).flip(0)
    assert len(times) == 45
    assert times[:10].tolist() == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    assert (times[10], times[24], times[25], times[44]) == (100, 199, 200, 299)
    assert respace("4", 10).tolist() == [9, 6, 3, 0]
    assert respace("1,1", 10).tolist() == [5, 0]
    assert respace("2,2", 5).flip(0).tolist() == [0, 2, 3, 4]  # the first section gets the rest


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 400))
def test_sections_give_as_many_times_as_they_say_or_refuse(counts: list[int], levels: int) -> None:
    sections = ",".join(map(str, counts))
    length = levels // len(counts)
    rest = levels % len(counts)
    if any(count > length + (i < rest) for i, count in enumerate(counts)):
        with pytest.raises(LdmPipeError, match="section"):
            respace(sections, levels)
        return
    times = respace(sections, levels)
    assert len(times) == sum(counts)
    assert bool((times.diff() < 0).all())
    assert 0 <= float(times[-1]) <= float(times[0]) < levels


@pytest.mark.parametrize(
    "text", ["ddim", "ddim7x", "karass", "10,,5", "", "10;5", "-3", "0", "ddim0", "ddim333", "3.5"]
)
def test_strings_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(LdmPipeError):
        respace(text, 1000)


def test_lcm_takes_every_so_many_of_fifty_times() -> None:
    assert whole_times(4, "lcm", "integer", 1000, 0).tolist() == [999, 759, 499, 259]
    assert whole_times(50, "lcm", "integer", 1000, 0).tolist() == list(range(999, 0, -20))


def test_continuous_lines() -> None:
    assert line(4, "trailing", "integer", 1.0, 0.1).tolist() == [1.0, 0.75, 0.5, 0.25]
    assert line(4, "linspace", "integer", 1.0, 0.25).tolist() == [1.0, 0.75, 0.5, 0.25]
    assert line(3, "linspace", "multistep", 1.0, 0.25).tolist() == [1.0, 0.75, 0.5]
    assert line(1, "linspace", "integer", 1.0, 0.25).tolist() == [1.0]
    with pytest.raises(LdmPipeError, match="leading"):
        line(4, "leading", "integer", 1.0, 0.1)
