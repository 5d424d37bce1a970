"""Numbers of one set of pictures: Inception Score, Vendi score, CLIP score.

Logits or feature vectors enter, an estimate leaves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_pipe.metrics.estimate import Estimate, between_quantiles, bootstrap_counts, of_mean
from ldm_pipe.metrics.moments import check_vectors
from ldm_pipe.pretrained import LdmPipeError

SPLIT_SIZE = 5000


def inception_score(
    logits: Tensor, *, split_size: int = SPLIT_SIZE, num_bootstraps: int = 0, seed: int = 0
) -> Estimate:
    """Return the Inception Score (Salimans et al. 2016, arXiv:1606.03498, sec. 4).

        mean over parts of exp(mean_i KL(p(y | x_i) || mean_j p(y | x_j)))

    Parts are the set in its order cut after every 5,000, the last one shorter, as guided-diffusion's evaluator does. It
    grows with the number of pictures in a part, so that sets of unequal size do not compare.

    Args:
        logits: (N, K); guided-diffusion's are Inception's without the bias of the last layer.
        num_bootstraps: resampled sets for the 95 % interval.
    """
    check_vectors(logits, "inception score", least=2)
    if split_size < 2:
        raise LdmPipeError(f"split_size is {split_size}", "inception score", "Use a whole number from 2.")
    log_p = logits.double().log_softmax(dim=1)
    generator = torch.Generator().manual_seed(seed)
    scores = []
    for part in log_p.split(split_size):
        p = part.exp()
        counts = bootstrap_counts(len(part), num_bootstraps, generator)
        weights = torch.cat([torch.ones(len(part), 1, dtype=torch.float64), counts], dim=1).to(p.device) / len(part)
        mean = weights.T @ p  # (1 + num_bootstraps, K)
        negative_entropy = weights.T @ (p * part).sum(1)
        scores.append((negative_entropy - torch.special.xlogy(mean, mean).sum(1)).exp())
    found = torch.stack(scores).mean(0).cpu()
    return between_quantiles(float(found[0]), found[1:])


def vendi_score(x: Tensor) -> float:
    """Return the Vendi score: as many quite different pictures would be as diverse (Friedman & Dieng 2023,
    arXiv:2210.02410, def. 3.1).

        exp(- sum_i lambda_i log lambda_i),   lambda the eigenvalues of K / N,   K_ij = cos(x_i, x_j)

    The eigenvalues are those of the smaller of X X^T and X^T X.

    Args:
        x: features, (N, D).
    """
    check_vectors(x, "vendi score")
    unit = F.normalize(x.double(), dim=1)
    matrix = unit @ unit.T if len(unit) < unit.shape[1] else unit.T @ unit
    values = torch.linalg.eigvalsh(matrix / len(unit)).clamp_min(0)
    return float(torch.exp(-torch.special.xlogy(values, values).sum()))


def clip_score(images: Tensor, texts: Tensor) -> Estimate:
    """Return 100 times the mean of max(cos(image, text), 0) (Hessel et al. 2021, arXiv:2104.08718, with 2.5 for 100).

    Args:
        images, texts: vectors of pictures and of what was asked for, (N, D) each.
    """
    if len(images) != len(texts):
        raise LdmPipeError(f"{len(images)} pictures, {len(texts)} texts", "clip score", "Give one text per picture.")
    for part in (images, texts):
        check_vectors(part, "clip score")
    if images.shape[1] != texts.shape[1]:
        what = f"vectors of width {images.shape[1]} and {texts.shape[1]}"
        raise LdmPipeError(what, "clip score", "Take both towers of one model.")
    return of_mean(100 * F.cosine_similarity(images.double(), texts.double()).clamp_min(0))
