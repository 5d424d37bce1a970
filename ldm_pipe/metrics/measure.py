"""All numbers of a set of pictures against a reference, each with its features, its N and what N cannot carry.

Two (or three) `Described` sets enter, rows of a table leave.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ldm_pipe.metrics.described import Described
from ldm_pipe.metrics.estimate import Estimate
from ldm_pipe.metrics.features import FeatureNet
from ldm_pipe.metrics.frechet import frechet_estimate, frechet_of_moments
from ldm_pipe.metrics.kernels import cmmd, kid, median_distance
from ldm_pipe.metrics.moments import Moments
from ldm_pipe.metrics.neighbours import Arithmetic, manifolds, memorisation
from ldm_pipe.metrics.scores import clip_score, inception_score, vendi_score
from ldm_pipe.metrics.sliced import mind
from ldm_pipe.pretrained import LdmPipeError

WIDE = 512  # features wider than this have no interval for the Frechet distance: 100 eigenvalue problems
K_PRECISION, K_COVERAGE = 3, 5  # of the papers


@dataclass(frozen=True)
class Number:
    """One row: a metric's value, and everything it must be published with.

    Attributes:
        metric: its name, with its own settings.
        features: their name.
        num, num_reference: pictures on both sides; None where there is no reference or it does not tell.
        note: what the number cannot carry.
    """

    metric: str
    estimate: Estimate
    features: str
    num: int
    num_reference: int | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def cells(self) -> list[str]:
        """Return the cells of a row of a table."""
        one = self.estimate
        interval = "-" if one.low is None or one.high is None else f"{one.low:.4g} to {one.high:.4g}"
        reference = "-" if self.num_reference is None else str(self.num_reference)
        return [self.metric, f"{one.value:.4g}", interval, self.features, str(self.num), reference, self.note]


HEADER = "| metric | value | 95 % interval | features | N | reference N | note |\n|---|---|---|---|---|---|---|"


def measure(
    samples: Described,
    reference: Described,
    net: FeatureNet,
    *,
    training: Described | None = None,
    texts: Tensor | None = None,
    num_bootstraps: int = 1000,
    arithmetic: Arithmetic = "exact",
) -> list[Number]:
    """Measure everything that the sets allow, unbiased numbers first.

    Args:
        training: pictures that the model has seen, for memorisation; None: the reference.
        texts: vectors of what each picture was asked for, for CLIP score.
        num_bootstraps: for the intervals; the costlier ones take a tenth.
        arithmetic: of the distances of precision and recall.
    Raises: LdmPipeError if the sets are of different features, or too small.
    """
    for other in (reference, training):
        if other is not None and other.features != samples.features:
            what = f"{other.name} is of the features {other.features!r}, not {samples.features!r}"
            raise LdmPipeError(what, "metrics", "Compute both with the same features.")
    if samples.vectors is None:
        raise LdmPipeError("the samples are statistics only", samples.name, "Give pictures.")
    if samples.vectors.shape[1] != reference.moments.dim:
        what = f"features of width {samples.vectors.shape[1]}, the reference has {reference.moments.dim}"
        raise LdmPipeError(what, reference.name, "Compute both with the same features.")
    num = len(samples.vectors)
    rows = [*_distances(samples, reference, net, num_bootstraps), *_neighbours(samples, reference, arithmetic)]
    rows += _memorised(samples, training or reference)
    rows += _alone(samples, texts, num_bootstraps)
    return [Number(metric, estimate, net.name, num, other, note) for metric, estimate, other, note in rows]


Row = tuple[str, Estimate, int | None, str]


def _distances(samples: Described, reference: Described, net: FeatureNet, num_bootstraps: int) -> Iterator[Row]:
    x, y = samples.vectors, reference.vectors
    assert x is not None
    if y is not None:
        yield "KID x 1000", kid(x, y, num_bootstraps=num_bootstraps).times(1000), len(y), ""
        is_clip = net.texts is not None
        sigma = 10.0 if is_clip else median_distance(y)
        a, b = (F.normalize(part, dim=1) if is_clip else part for part in (x, y))
        name = "CMMD" if is_clip else f"MMD x 1000, Gaussian of width {sigma:.3g}"
        yield name, cmmd(a, b, sigma=sigma, num_bootstraps=num_bootstraps), len(y), ""
        yield "MIND", mind(x, y, num_bootstraps=num_bootstraps // 10), len(y), _unequal(len(x), len(y))
    pairs = [("FID" if net.is_inception else "Frechet distance", samples.moments, reference.moments)]
    if samples.spatial_moments is not None and reference.spatial_moments is not None:
        pairs.append(("sFID", samples.spatial_moments, reference.spatial_moments))
    for name, first, second in pairs:
        estimate = Estimate(frechet_of_moments(first, second))
        if name != "sFID" and y is not None and reference.given is None and first.dim <= WIDE:
            estimate = frechet_estimate(x, y, num_bootstraps=num_bootstraps // 10)
        yield name, estimate, second.num, carried(first, second)


def carried(*sides: Moments) -> str:
    """Say which covariances their N cannot carry: with a rank below D the distance is that of N, not of the model."""
    low = [one.told() for one in sides if one.rank < one.dim]
    return f"covariance not carried: {'; '.join(low)}" if low else f"ranks {' and '.join(str(s.rank) for s in sides)}"


def _unequal(n: int, m: int) -> str:
    return "" if n == m else "sets of unequal size"


def _neighbours(samples: Described, reference: Described, arithmetic: Arithmetic) -> Iterator[Row]:
    x, y = samples.vectors, reference.vectors
    assert x is not None
    if y is None:
        return
    found = manifolds(y, x, k=K_PRECISION, arithmetic=arithmetic)
    half = "distances in half precision, as guided-diffusion" if arithmetic == "adm" else ""
    yield f"precision, k = {K_PRECISION}", found.precision, len(y), half
    yield f"recall, k = {K_PRECISION}", found.recall, len(y), half
    if min(len(x), len(y)) > K_COVERAGE:
        found = manifolds(y, x, k=K_COVERAGE)
        yield f"density, k = {K_COVERAGE}", found.density, len(y), ""
        yield f"coverage, k = {K_COVERAGE}", found.coverage, len(y), ""


def _memorised(samples: Described, training: Described) -> Iterator[Row]:
    if training.vectors is None or samples.vectors is None:
        return
    found, num = memorisation(training.vectors, samples.vectors), len(training.vectors)
    yield "memorised: nearer than 95 % of training pictures", found.nearer, num, "0.05 where nothing is"
    yield "memorised: median distance / among training", Estimate(found.ratio), num, "1 where nothing is"
    yield "authenticity", found.authenticity, num, ""


def _alone(samples: Described, texts: Tensor | None, num_bootstraps: int) -> Iterator[Row]:
    assert samples.vectors is not None
    yield "Vendi score", Estimate(vendi_score(samples.vectors)), None, "at most N"
    if samples.logits is not None:
        name = "Inception Score, parts of 5000"
        yield name, inception_score(samples.logits, num_bootstraps=num_bootstraps), None, ""
    if texts is not None:
        yield "CLIP score", clip_score(samples.vectors, texts), None, ""
