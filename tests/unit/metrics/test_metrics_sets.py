"""Metrics of two sets of features: against formulas written here in another way, and by their laws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import linalg, stats
from torch import Tensor

from ldm_pipe.metrics.estimate import of_share
from ldm_pipe.metrics.frechet import frechet_distance, frechet_estimate, frechet_of_moments
from ldm_pipe.metrics.kernels import cmmd, gaussian, kid, median_distance, mmd_squared, polynomial
from ldm_pipe.metrics.moments import Moments, MomentSum
from ldm_pipe.metrics.neighbours import adm_squared, exact_squared, manifolds, memorisation, squared_radii
from ldm_pipe.metrics.scores import clip_score, inception_score, vendi_score
from ldm_pipe.metrics.sliced import couple, directions, mind
from ldm_pipe.pretrained import LdmPipeError


def normal(num: int, dim: int, seed: int = 0, *, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)) * scale + shift


def clusters(num: int, kept: list[int], seed: int, *, noise: float = 0.1, dim: int = 6) -> Tensor:
    """Draw from some of eight narrow, far apart modes, each sample by itself: equal shares would not be independent."""
    centres = normal(8, dim, seed=99, scale=4)
    which = torch.randint(len(kept), (num,), generator=torch.Generator().manual_seed(1000 + seed))
    return centres[torch.tensor(kept)[which]] + normal(num, dim, seed, scale=noise)


# -- moments and the Frechet distance ------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[50], [1, 49], [7, 1, 30, 12], [1] * 50])
def test_streamed_moments_are_those_of_all_at_once_in_any_order_and_division(sizes: list[int]) -> None:
    x = normal(50, 6, shift=1000.0)  # a mean far from 0: sums of squares in float32 would lose the covariance
    parts = list(x.split(sizes))
    halves = [MomentSum(), MomentSum()]
    for number, part in enumerate(reversed(parts)):
        halves[number % 2].add(part)
    halves[0].merge(halves[1])
    found = halves[0].moments()
    torch.testing.assert_close(found.mean.numpy(), x.double().numpy().mean(0), rtol=1e-12, atol=0, check_dtype=False)
    expected = np.cov(x.double().numpy(), rowvar=False)
    np.testing.assert_allclose(found.covariance.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert (found.num, found.dim) == (50, 6)


@pytest.mark.parametrize(("num", "dim", "rank"), [(5, 20, 4), (20, 20, 19), (21, 20, 20), (300, 20, 20), (2, 20, 1)])
def test_the_rank_is_what_the_samples_carry(num: int, dim: int, rank: int) -> None:
    found = Moments.of(normal(num, dim, shift=30.0))
    assert found.rank == rank
    assert found.told() == f"N = {num}, rank {rank} of {dim}"


@pytest.mark.parametrize(("n", "m", "dim"), [(200, 150, 12), (10, 150, 40), (10, 12, 40)])
def test_frechet_distance_is_the_formula_with_a_matrix_root(n: int, m: int, dim: int) -> None:
    a, b = normal(n, dim, 0), normal(m, dim, 1, shift=0.3, scale=1.5)
    (mean_a, cov_a), (mean_b, cov_b) = ((x.double().numpy().mean(0), np.cov(x.double().numpy().T)) for x in (a, b))
    # eigenvalues of the product itself: accurate to the root of the rounding error where it is singular
    cross = np.sqrt(np.maximum(linalg.eigvals(cov_a @ cov_b).real, 0)).sum()
    expected = np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    full = min(n, m) > dim
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10 if full else 1e-5)


def test_frechet_distance_of_known_gaussians() -> None:
    a = Moments(torch.tensor([1.0, 2.0]).double(), torch.diag(torch.tensor([4.0, 9.0])).double())
    b = Moments(torch.tensor([0.0, 2.0]).double(), torch.diag(torch.tensor([1.0, 16.0])).double())
    assert frechet_of_moments(a, b) == pytest.approx(1 + (2 - 1) ** 2 + (3 - 4) ** 2)


def test_frechet_distance_of_a_low_rank_set_with_itself_is_zero_to_rounding() -> None:
    x = normal(50, 400, shift=3.0)
    assert frechet_distance(x, x) < 1e-10


def test_the_frechet_interval_holds_the_value_and_shrinks_with_samples() -> None:
    widths = []
    for num in (100, 1600):
        found = frechet_estimate(normal(num, 4, 0), normal(num, 4, 1, shift=1.0), num_bootstraps=50)
        assert found.low is not None and found.high is not None
        assert found.low < found.value < found.high
        widths.append(found.high - found.low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.5)


# -- kernels ---------------------------------------------------------------------------------------------------------


def loop_mmd(x: Tensor, y: Tensor, k: Callable[[np.ndarray, np.ndarray], float], unbiased: bool) -> float:
    """Sum over pairs one by one, as the definition is written."""
    a, b = x.double().numpy(), y.double().numpy()

    def within(points: np.ndarray) -> float:
        pairs = [(i, j) for i, j in itertools.product(range(len(points)), repeat=2) if i != j or not unbiased]
        return float(np.mean([k(points[i], points[j]) for i, j in pairs]))

    return within(a) + within(b) - 2 * float(np.mean([k(p, q) for p in a for q in b]))


@pytest.mark.parametrize("unbiased", [True, False])
def test_mmd_is_the_sum_over_pairs(unbiased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm_pipe.metrics.kernels.BLOCK", 7)
    x, y = normal(23, 5, 0), normal(18, 5, 1, shift=0.4)
    expected = loop_mmd(x, y, lambda p, q: (p @ q / 5 + 1) ** 3, unbiased)
    assert mmd_squared(x, y, polynomial, unbiased=unbiased).value == pytest.approx(expected, rel=1e-12)
    expected = loop_mmd(x, y, lambda p, q: math.exp(-((p - q) ** 2).sum() / (2 * 1.7**2)), unbiased)
    assert mmd_squared(x, y, gaussian(1.7), unbiased=unbiased).value == pytest.approx(expected, rel=1e-12)
    assert cmmd(x, y, sigma=1.7, unbiased=unbiased).value == pytest.approx(1000 * expected, rel=1e-12)


def test_a_bootstrap_draw_is_the_resampled_set_without_pairs_of_one_sample() -> None:
    from ldm_pipe.metrics.kernels import _within

    x, counts = normal(9, 3), torch.tensor([2, 0, 1, 1, 3, 0, 0, 1, 1]).double()
    again = torch.repeat_interleave(torch.arange(9), counts.long())
    pairs = [(i, j) for i, j in itertools.product(again.tolist(), repeat=2) if i != j]
    expected = np.mean([float(polynomial(x[i : i + 1].double(), x[j : j + 1].double())) for i, j in pairs])
    assert float(_within(x.double(), counts[:, None], polynomial, True)) == pytest.approx(expected, rel=1e-12)


def test_kid_is_right_on_average_and_its_interval_holds_the_truth() -> None:
    # k = (x.y / D + 1)^3 in one dimension: E k(x, y) = 1 + 3 m m' + 3 s s' + t t' with the raw moments m, s, t.
    def moments(shift: float) -> tuple[float, float, float]:
        return shift, 1 + shift**2, 3 * shift + shift**3

    truth = sum(w * (a - b) ** 2 for w, a, b in zip((3, 3, 1), moments(0.0), moments(0.7), strict=True))
    found = [kid(normal(150, 1, 2 * s), normal(150, 1, 2 * s + 1, shift=0.7), num_bootstraps=200) for s in range(60)]
    values = np.array([one.value for one in found])
    assert abs(values.mean() - truth) < 3 * values.std() / math.sqrt(len(values))
    assert np.mean([one.low < truth < one.high for one in found if one.low is not None and one.high is not None]) > 0.85


# -- sliced Wasserstein ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(20, 20), (20, 30), (7, 30), (31, 8)])
def test_mind_is_the_mean_over_directions_of_the_transport_along_them(n: int, m: int) -> None:
    x, y = normal(n, 5, 0).double(), normal(m, 5, 1, shift=1.0).double()
    along = directions(40, 5, seed=0)
    expected = []
    for line in along:  # repeated until both sets have n m points: sorting is then the best transport
        p, q = ((points @ line).sort().values.repeat_interleave(k) for points, k in ((x, m), (y, n)))
        expected.append(float((p - q).square().mean()))
    assert mind(x, y, num_projections=40).value == pytest.approx(3 * 5 * np.mean(expected), rel=1e-12)
    if n == m:
        line = along[0]
        p, q = (x @ line).numpy(), (y @ line).numpy()
        assert expected[0] >= stats.wasserstein_distance(p, q) ** 2  # W_2 is at least W_1
        assert float(couple(n, m)[2].sum()) == pytest.approx(1)


def test_mind_of_a_shift_is_three_times_its_square() -> None:
    x = normal(100, 8)
    assert mind(x, x + 0.5, num_projections=4000).value == pytest.approx(3 * 8 * 0.25, rel=0.05)


# -- neighbours ----------------------------------------------------------------------------------------------------


def loop_manifolds(real: np.ndarray, drawn: np.ndarray, k: int) -> list[float]:
    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))

    radii_real, radii_drawn = (np.sort(distances(x, x), axis=1)[:, k] for x in (real, drawn))
    across = distances(real, drawn)
    precision = np.mean([(across[:, j] <= radii_real).any() for j in range(len(drawn))])
    recall = np.mean([(across[i] <= radii_drawn).any() for i in range(len(real))])
    density = np.mean([(across[:, j] <= radii_real).sum() for j in range(len(drawn))]) / k
    coverage = np.mean([across[i].min() <= radii_real[i] for i in range(len(real))])
    return [float(value) for value in (precision, recall, density, coverage)]


@pytest.mark.parametrize(("n", "m", "k"), [(60, 45, 3), (45, 60, 5), (10, 10, 1)])
def test_precision_recall_density_coverage_are_the_definitions(
    n: int, m: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm_pipe.metrics.neighbours.BLOCK", 13)
    real, drawn = normal(n, 4, 0), normal(m, 4, 1, shift=0.8)
    found = manifolds(real, drawn, k=k)
    values = [one.value for one in (found.precision, found.recall, found.density, found.coverage)]
    np.testing.assert_allclose(values, loop_manifolds(real.double().numpy(), drawn.double().numpy(), k), atol=1e-15)


def test_adms_distances_are_rounded_to_half_precision_term_by_term() -> None:
    x, y = normal(30, 64, 0), normal(20, 64, 1)
    a, b = x.numpy().astype(np.float16), y.numpy().astype(np.float16)
    lengths = [(part.astype(np.float32) ** 2).astype(np.float16).astype(np.float32) for part in (a, b)]
    u, v = (part.sum(1).astype(np.float16) for part in lengths)
    products = (a.astype(np.float32) @ b.astype(np.float32).T).astype(np.float16)
    expected = np.maximum(((u[:, None] - np.float16(2) * products).astype(np.float16) + v[None]).astype(np.float16), 0)
    found = adm_squared(x, y)
    assert found.dtype == torch.float32
    # the order of a sum in float32 may tip a rounding to the next half: 1 part in 1024 of the larger terms
    np.testing.assert_allclose(
        found.numpy(), expected.astype(np.float32), atol=2 * float(lengths[0].sum(1).max()) / 1024
    )
    assert np.mean(found.numpy() == expected.astype(np.float32)) > 0.95
    assert not torch.equal(found.double(), exact_squared(x, y))


def test_adms_distances_fall_back_to_float32_where_half_overflows() -> None:
    x = normal(5, 64, scale=100.0)
    assert torch.isfinite(adm_squared(x, x)).all()
    torch.testing.assert_close(adm_squared(x, x[:2]), exact_squared(x, x[:2]).float(), rtol=1e-4, atol=1.0)


def test_equal_vectors_are_at_distance_zero_however_long() -> None:
    x = normal(40, 300, shift=50.0)
    doubled = torch.cat([x, x])
    assert torch.equal(squared_radii(doubled, 1), torch.zeros(80, dtype=torch.float64))


def test_a_learnt_set_is_told_from_a_new_one() -> None:
    training, new = normal(200, 8, 0), normal(200, 8, 1)
    fresh = memorisation(training, new)
    assert fresh.nearer.low is not None and fresh.nearer.high is not None
    assert fresh.nearer.low < 0.05 < fresh.nearer.high + 0.03
    assert fresh.ratio == pytest.approx(1, abs=0.1)
    copied = memorisation(training, torch.cat([training[:50] + 1e-3 * normal(50, 8, 2), new[:150]]))
    assert copied.nearer.value > 0.2
    assert copied.authenticity.value < fresh.authenticity.value - 0.1
    assert copied.nearest[:50].tolist() == list(range(50))
    assert copied.distances[:50].max() < 0.01


def test_memorisation_is_the_definition_and_takes_equal_training_pictures_for_one() -> None:
    training, drawn = normal(30, 3, 0).double(), normal(20, 3, 1).double()
    across = torch.cdist(drawn, training)
    among = torch.cdist(training, training).fill_diagonal_(math.inf).min(1).values
    nearest = across.argmin(1)
    found = memorisation(torch.cat([training, training[:10]]), drawn)
    assert found.authenticity.value == pytest.approx(float((across.min(1).values > among[nearest]).double().mean()))
    assert found.nearest.tolist() == nearest.tolist()
    assert found.ratio == pytest.approx(float(across.min(1).values.median() / among.median()))


# -- scores --------------------------------------------------------------------------------------------------------


def test_inception_score_is_its_formula_with_parts_in_order() -> None:
    logits = normal(25, 7, scale=3.0)
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    scores = []
    for part in (p[:10], p[10:20], p[20:]):
        scores.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
    assert inception_score(logits, split_size=10).value == pytest.approx(np.mean(scores), rel=1e-12)
    sure = torch.eye(7).repeat(10, 1) * 1000
    assert inception_score(sure).value == pytest.approx(7)
    assert inception_score(torch.ones(10, 7)).value == pytest.approx(1)
    found = inception_score(normal(300, 7, scale=3.0), num_bootstraps=100)
    assert found.low is not None and found.high is not None and found.low < found.high


@pytest.mark.parametrize("num", [5, 60])
def test_vendi_score_is_the_entropy_of_the_similarities(num: int) -> None:
    x = normal(num, 20)
    unit = x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True)
    values = np.linalg.eigvalsh(unit @ unit.T / num)
    assert vendi_score(x) == pytest.approx(np.exp(stats.entropy(np.maximum(values, 0))), rel=1e-9)
    assert vendi_score(torch.eye(6)) == pytest.approx(6)
    assert vendi_score(torch.ones(9, 4)) == pytest.approx(1)
    assert vendi_score(torch.eye(6).repeat(5, 1)) == pytest.approx(6)


def test_clip_score_is_the_mean_cosine_without_negatives() -> None:
    images = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    texts = torch.tensor([[1.0, 0.0], [3.0, 3.0], [1.0, 0.0]])
    assert clip_score(images, texts).value == pytest.approx(100 * (1 + math.sqrt(0.5) + 0) / 3)


def test_wilsons_interval() -> None:
    found = of_share(torch.tensor([True] * 0 + [False] * 20))
    assert (found.low, found.high) == (0.0, pytest.approx(0.1611, abs=1e-4))
    found = of_share(torch.tensor([True] * 5 + [False] * 15))
    assert (found.low, found.high) == (pytest.approx(0.1119, abs=1e-4), pytest.approx(0.4687, abs=1e-4))


# -- laws ----------------------------------------------------------------------------------------------------------

Distance = Callable[[Tensor, Tensor], float]
DISTANCES: dict[str, Distance] = {
    "frechet": frechet_distance,
    "kid, pairs with themselves kept": lambda a, b: mmd_squared(a, b, polynomial, unbiased=False).value,
    "kid": lambda a, b: kid(a, b).value,
    "cmmd": lambda a, b: cmmd(a, b, sigma=5.0, unbiased=False).value,
    "mind": lambda a, b: mind(a, b, num_projections=100).value,
}


@pytest.mark.parametrize("name", [name for name in DISTANCES if name != "kid"])
def test_a_set_is_at_distance_zero_from_itself_in_any_order(name: str) -> None:
    x = normal(80, 10, shift=2.0)
    other = x[torch.randperm(80, generator=torch.Generator().manual_seed(1))]
    assert DISTANCES[name](x, other) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("name", DISTANCES)
def test_distances_are_symmetric_and_grow_with_noise_shift_and_dropped_classes(name: str) -> None:
    distance = DISTANCES[name]
    real, again = clusters(2000, list(range(8)), 0), clusters(2000, list(range(8)), 1)
    assert distance(real, again) == pytest.approx(distance(again, real), rel=1e-9, abs=1e-9)
    noisy = [distance(real, again + normal(2000, 6, 2, scale=noise)) for noise in (0.0, 1.0, 2.0, 4.0)]
    shifted = [distance(real, again + shift) for shift in (0.0, 1.0, 2.0, 4.0)]
    dropped = [distance(real, clusters(2000, list(range(kept)), 1)) for kept in (8, 6, 4, 2)]
    for rising in (noisy, shifted, dropped):
        assert rising == sorted(rising) and rising[0] < 0.2 * rising[-1]


def test_recall_falls_with_dropped_modes_and_precision_with_noise() -> None:
    real = clusters(1600, list(range(8)), 0)
    few = [manifolds(real, clusters(1600, list(range(kept)), 1)) for kept in (8, 4, 2)]
    noisy = [manifolds(real, clusters(1600, list(range(8)), 1, noise=noise)) for noise in (0.1, 0.3, 1.0)]
    # Equal distributions: density 1, coverage 1 - 2^-k (Naeem et al. 2020, sec. 3.3 for N = M).
    assert few[0].density.value == pytest.approx(1, abs=0.1)
    assert few[0].coverage.value == pytest.approx(1 - 2**-3, abs=0.03)
    for kept, found in zip((4, 2), few[1:], strict=True):
        assert found.recall.value / few[0].recall.value == pytest.approx(kept / 8, abs=0.06)
        assert found.coverage.value <= kept / 8 + 0.03
        assert found.precision.value == pytest.approx(few[0].precision.value, abs=0.05)
    falling = [one.precision.value for one in noisy]
    assert falling == sorted(falling, reverse=True) and falling[-1] < 0.1 < 0.7 < falling[0]


def test_few_samples_bias_the_frechet_distance_most_and_kid_not() -> None:
    def mean(distance: Distance, num: int) -> float:
        return float(np.mean([distance(normal(num, 16, 2 * s), normal(num, 16, 2 * s + 1)) for s in range(12)]))

    for name in ("frechet", "mind"):
        assert mean(DISTANCES[name], 20) > 3 * mean(DISTANCES[name], 200) > 0
    values = [kid(normal(20, 16, 2 * s), normal(20, 16, 2 * s + 1)).value for s in range(100)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 10


# -- bad input -----------------------------------------------------------------------------------------------------

TWO_SETS: dict[str, Callable[[Tensor, Tensor], object]] = {
    **DISTANCES,
    "manifolds": manifolds,
    "memorisation": memorisation,
    "frechet with interval": frechet_estimate,
}


@pytest.mark.parametrize("name", TWO_SETS)
@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (normal(20, 4), normal(20, 5), "5"),
        (normal(20, 4), normal(1, 4), "1"),
        (normal(20, 4), torch.full((20, 4), math.nan), "NaN"),
        (torch.full((20, 4), math.inf), normal(20, 4), "infinity"),
        (normal(20, 4)[0], normal(20, 4), r"\[4\]"),
    ],
)
def test_bad_sets_are_refused_in_one_sentence(name: str, a: Tensor, b: Tensor, words: str) -> None:
    with pytest.raises(LdmPipeError, match=words) as error:
        TWO_SETS[name](a, b)
    assert error.value.how_to_fix


def test_the_median_distance_is_that_of_all_pairs() -> None:
    assert median_distance(torch.tensor([[0.0], [1.0], [3.0]])) == 2.0


def test_other_bad_input() -> None:
    x = normal(20, 4)
    bad = x.clone()
    bad[7, 2] = math.nan
    with pytest.raises(LdmPipeError, match="number 7"):
        Moments.of(bad)
    total = MomentSum()
    total.add(x)
    for call in (
        lambda: total.add(normal(3, 5)),
        lambda: Moments.of(x[:1]),
        lambda: manifolds(x, x[:3]),
        lambda: manifolds(x, x, k=0),
        lambda: gaussian(0.0),
        lambda: mind(x, x, num_projections=0),
        lambda: inception_score(x, split_size=1),
        lambda: clip_score(x, x[:3]),
        lambda: clip_score(x, normal(20, 5)),
        lambda: memorisation(torch.ones(5, 4), x),
        lambda: Moments(torch.zeros(3).double(), torch.eye(4).double()),
        lambda: Moments(torch.full((3,), math.nan).double(), torch.eye(3).double()),
    ):
        with pytest.raises(LdmPipeError):
            call()
