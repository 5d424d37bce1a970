"""Metrics of two sets against torchmetrics, torch-fidelity and prdc, where they are installed."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch
from torch import Tensor, nn

from ldm_pipe.metrics.frechet import frechet_distance
from ldm_pipe.metrics.kernels import kid
from ldm_pipe.metrics.neighbours import manifolds
from ldm_pipe.metrics.scores import clip_score, inception_score
from ldm_pipe.metrics.sliced import directions, mind

DIM = 48


def features(num: int, seed: int, *, shift: float = 0.0) -> Tensor:
    """Draw positive, correlated features, as Inception's are."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(num, DIM, generator=generator) @ torch.randn(DIM, DIM, generator=generator.manual_seed(9))
    return torch.relu(mixed / 7 + shift).double()


REAL, DRAWN = features(300, 0), features(260, 1, shift=0.1)


class Same(nn.Module):
    """Give features that came as pictures back."""

    num_features = DIM

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_frechet_distance_and_kid_are_those_of_torchmetrics() -> None:
    pytest.importorskip("torchmetrics")
    pytest.importorskip("torch_fidelity")
    from torchmetrics.image.fid import _compute_fid
    from torchmetrics.image.kid import poly_mmd

    (m1, s1), (m2, s2) = ((x.mean(0), torch.cov(x.T)) for x in (REAL, DRAWN))
    assert frechet_distance(REAL, DRAWN) == pytest.approx(float(_compute_fid(m1, s1, m2, s2)), rel=1e-6)
    expected = float(poly_mmd(REAL[:260], DRAWN))  # torchmetrics takes sets of one size
    assert kid(REAL[:260], DRAWN).value == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_kid_precision_and_inception_score_are_those_of_torch_fidelity() -> None:
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    fid = fid_statistics_to_metric(*(fid_features_to_statistics(x) for x in (REAL, DRAWN)), verbose=False)
    assert frechet_distance(REAL, DRAWN) == pytest.approx(fid["frechet_inception_distance"], rel=1e-6)
    call = {"kid_subsets": 1, "kid_subset_size": 260, "rng_seed": 0, "verbose": False}
    theirs = kid_features_to_metric(REAL[:260], DRAWN, **call)["kernel_inception_distance_mean"]
    assert kid(REAL[:260], DRAWN).value == pytest.approx(theirs, rel=1e-6)
    theirs = prc_features_to_metric(
        DRAWN, REAL, prc_neighborhood=3, prc_batch_size=100, save_cpu_ram=False, verbose=False
    )
    ours = manifolds(REAL, DRAWN, k=3)
    assert ours.precision.value == pytest.approx(theirs["precision"], abs=1e-7)  # they average in float32
    assert ours.recall.value == pytest.approx(theirs["recall"], abs=1e-7)
    assert 0 < ours.precision.value < 1 and 0 < ours.recall.value < 1
    theirs = isc_features_to_metric(REAL, splits=3, shuffle=False)["inception_score_mean"]
    assert inception_score(REAL, split_size=100).value == pytest.approx(theirs, rel=1e-6)


def test_mind_is_torch_fidelitys() -> None:
    pytest.importorskip("torch_fidelity")
    metric = pytest.importorskip("torch_fidelity.metric_mind", reason="this torch-fidelity has no MIND yet")
    call = {"mind_num_projections": 4000, "rng_seed": 0, "verbose": False, "cuda": False}
    theirs = metric.mind_features_to_metric(REAL[:260], DRAWN, **call)["monge_inception_distance"]
    # other directions: two means over 4,000 differ by their standard errors
    assert mind(REAL[:260], DRAWN, num_projections=4000).value == pytest.approx(theirs, rel=0.02)


def test_mind_is_the_formula_torch_fidelity_states() -> None:
    # alpha / (n M) sum_i sum_j |sort(u_i X)_j - sort(u_i Y)_j|^2 with alpha = 3 D
    x, y, lines = REAL[:260].numpy(), DRAWN.numpy(), directions(50, DIM, 3).numpy()
    total = 0.0
    for line in lines:
        total += sum((a - b) ** 2 for a, b in zip(sorted(x @ line), sorted(y @ line), strict=True))
    assert mind(REAL[:260], DRAWN, num_projections=50, seed=3).value == pytest.approx(
        3 * DIM * total / (260 * 50), rel=1e-10
    )


@pytest.mark.parametrize("k", [3, 5])
def test_precision_recall_density_coverage_are_those_of_prdc(k: int) -> None:
    prdc = pytest.importorskip("prdc")
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = prdc.compute_prdc(REAL.numpy(), DRAWN.numpy(), nearest_k=k)
    found = manifolds(REAL, DRAWN, k=k)
    for name in ("precision", "recall", "coverage"):
        assert getattr(found, name).value == theirs[name], name
        assert 0 < theirs[name] < 1
    assert found.density.value == pytest.approx(theirs["density"], rel=1e-12)


def test_clip_score_is_that_of_torchmetrics() -> None:
    multimodal = pytest.importorskip("torchmetrics.functional.multimodal")
    assert multimodal is not None
    images, texts = REAL[:260], DRAWN
    score = 100 * torch.nn.functional.cosine_similarity(images, texts)  # its formula, whose network is not here
    assert clip_score(images, texts).value == pytest.approx(float(torch.maximum(score, torch.zeros(())).mean()))
