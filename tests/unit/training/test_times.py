"""Laws of the choice of times."""

from __future__ import annotations

import math

import pytest
import torch

from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.schedule import NoiseSchedule
from ldm_pipe.training.objectives import times
from ldm_pipe.training.objectives.times import SecondMoment, stratify

U = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000  # every quantile once


def schedule_of(num: int) -> NoiseSchedule:
    return NoiseSchedule(num_train_timesteps=num)


def test_stratified_times_are_uniform_per_sample_and_spread_over_the_batch() -> None:
    size, num_t, tries = 8, 40, 4000
    numbers = torch.rand(tries, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.stack([times.uniform(schedule_of(num_t), stratify(u, range(size), size)) for u in numbers])
    assert t.min() == 0
    assert t.max() == num_t - 1
    assert torch.equal(t, t.floor())
    for place in range(size):
        counts = torch.bincount(t[:, place].long(), minlength=num_t).double()
        expected = tries / num_t
        chi2 = ((counts - expected).square() / expected).sum()
        assert chi2 < 72.1  # 39 degrees of freedom, p = 0.001
    # every batch has one time in each eighth
    eighths = (t * size / num_t).floor().long().sort(dim=1).values
    assert torch.equal(eighths, torch.arange(size).expand(tries, size))


def test_stratified_numbers_do_not_depend_on_the_split_of_the_batch() -> None:
    u = torch.tensor(0.77, dtype=torch.float64)
    parts = [stratify(u, range(i, i + 2), 6) for i in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), stratify(u, range(6), 6))
    last = stratify(torch.tensor(1 - 2**-53, dtype=torch.float64), range(3), 3)
    assert times.uniform(schedule_of(10), last).max() <= 9


def test_logit_normal_times_have_the_density_of_the_paper() -> None:
    """exp(-(logit(t) - m)^2 / (2 s^2)) / (s sqrt(2 pi) t (1 - t)), arXiv:2403.03206, eq. 19."""
    num, mean, std = 50, 0.5, 0.8
    counts = torch.bincount(times.logit_normal(schedule_of(num), U, mean, std).long(), minlength=num)
    share = counts.double() / len(U)
    place = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    logit = torch.log(place / (1 - place))
    density = torch.exp(-0.5 * ((logit - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi) * place * (1 - place))
    assert torch.allclose(share * num, density, atol=0.02)


def test_second_moment_sampling_is_unbiased() -> None:
    """sum_t p_t L_t / (T p_t) is the mean of L, whatever the history; and draws come with frequency p_t."""
    num = 7
    loss = torch.tensor([9.0, 0.01, 3.0, 1.0, 0.0, 0.5, 20.0], dtype=torch.float64)
    sampler = SecondMoment(num, history_length=2)
    for _ in range(2):
        sampler.update(torch.arange(num), loss)
    p = sampler.probabilities()
    assert float(p.sum()) == pytest.approx(1)
    assert torch.allclose(p, 0.999 * loss / loss.sum() + 0.001 / num)
    t, weight = sampler.draw(U)
    assert float((weight * loss[t.long()]).mean()) == pytest.approx(float(loss.mean()), rel=1e-3)
    assert torch.allclose(torch.bincount(t.long(), minlength=num).double() / len(U), p, atol=1e-4)
    assert weight[0].dtype == torch.float64


def test_second_moment_sampling_has_less_variance_than_uniform_times() -> None:
    loss = torch.tensor([100.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    sampler = SecondMoment(4, history_length=1)
    sampler.update(torch.arange(4), loss)
    t, weight = sampler.draw(U)
    assert (weight * loss[t.long()]).var() < 0.01 * loss[(U * 4).long()].var()


def test_times_are_uniform_until_each_has_its_history() -> None:
    sampler = SecondMoment(3, history_length=2)
    sampler.update(torch.tensor([0, 0, 1, 1, 2]), torch.tensor([5.0, 5.0, 1.0, 1.0, 1.0]))
    assert torch.equal(sampler.draw(U)[1], torch.ones(len(U), dtype=torch.float64))
    sampler.update(torch.tensor([2]), torch.tensor([1.0]))
    assert sampler.probabilities()[0] > 0.6


def test_only_the_last_finite_losses_count() -> None:
    sampler = SecondMoment(1, history_length=3)
    sampler.update(torch.zeros(6), torch.tensor([1.0, 2.0, float("nan"), 3.0, float("inf"), 4.0]))
    assert sorted(sampler.losses[0].tolist()) == [2.0, 3.0, 4.0]


def test_the_state_survives_saving() -> None:
    sampler, other = SecondMoment(5), SecondMoment(5)
    sampler.update(torch.arange(5).repeat(12), torch.rand(60, generator=torch.Generator().manual_seed(1)))
    other.load_state_dict(sampler.state_dict())
    for one in (sampler, other):
        one.update(torch.tensor([3]), torch.tensor([9.0]))
    assert torch.equal(other.probabilities(), sampler.probabilities())


def test_losses_that_are_all_0_leave_the_times_uniform() -> None:
    sampler = SecondMoment(2, history_length=1)
    sampler.update(torch.arange(2), torch.zeros(2))
    assert sampler.probabilities().tolist() == [0.5, 0.5]


@pytest.mark.parametrize("numbers", [(0, 10, 0.1), (5, 0, 0.1), (5, 10, 0.0)])
def test_bad_sizes_are_refused(numbers: tuple[int, int, float]) -> None:
    with pytest.raises(LdmPipeError, match="times"):
        SecondMoment(*numbers)
