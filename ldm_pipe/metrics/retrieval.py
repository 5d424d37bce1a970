"""Concept retrieval: is the drawing that a picture resembles most a drawing of what was asked for?

Generated pictures, reference drawings and their concepts enter; ranks and hit rates leave. This file knows no model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_pipe.pretrained import LdmPipeError

THUMBNAIL_SIDE = 16


def chosen_by_hash(ids: Sequence[str], num: int) -> list[int]:
    """Return the positions of the `num` ids with the lowest sha256, in that order: a choice nobody made."""
    digests = [hashlib.sha256(name.encode("utf-8")).hexdigest() for name in ids]
    return sorted(range(len(ids)), key=lambda i: (digests[i], i))[:num]


def thumbnails(images: Tensor, side: int = THUMBNAIL_SIDE) -> Tensor:
    """Average the pixels of an image in side x side boxes.

    Args:
        images: (B, 3, H, W), H and W multiples of `side`.
    Returns: float64, shape (B, 3 * side * side).
    Raises: LdmPipeError if the boxes would not be whole.
    """
    height, width = images.shape[-2:]
    if height % side or width % side:
        raise LdmPipeError(f"images of {height}x{width}: sides must be multiples of {side}")
    return F.avg_pool2d(images.double(), (height // side, width // side)).flatten(1)


def concept_ranks(
    pictures: Tensor, concepts: Sequence[Hashable], drawings: Tensor, drawing_concepts: Sequence[Hashable]
) -> Tensor:
    """Rank all drawings by their Euclidean distance from each picture and return the best place of the right concept.

    Drawings that are equal as vectors are one drawing, which then shows several concepts. A wrong drawing at the same
    distance as the best right one is placed before it, so that a metric of constant distances earns nothing.

    Args:
        pictures: vectors of the generated pictures, shape (P, D).
        concepts: what was asked for, P names.
        drawings: vectors of the references, shape (N, D).
        drawing_concepts: what they show, N names.
    Returns: 0 where the nearest drawing shows the right concept; int64, shape (P,).
    Raises: LdmPipeError if numbers differ, a value is not finite, or a concept has no drawing.
    """
    if len(pictures) != len(concepts) or len(drawings) != len(drawing_concepts):
        numbers = f"{len(pictures)}, {len(concepts)}; {len(drawings)}, {len(drawing_concepts)}"
        raise LdmPipeError(f"as many pictures as concepts, as many drawings as concepts are needed, not {numbers}")
    if not (torch.isfinite(pictures).all() and torch.isfinite(drawings).all()):
        raise LdmPipeError("a picture holds NaN or infinity")
    distinct, group = torch.unique(drawings.double(), dim=0, return_inverse=True)
    shown: dict[Hashable, set[int]] = {}
    for concept, place in zip(drawing_concepts, group.tolist(), strict=True):
        shown.setdefault(concept, set()).add(place)
    missing = sorted({str(concept) for concept in concepts if concept not in shown})
    if missing:
        raise LdmPipeError(f"no drawing shows {missing[:10]}")
    ranks = []
    for picture, concept in zip(pictures.double(), concepts, strict=True):
        distance = (distinct - picture).square().sum(1)  # exact for equal vectors, unlike the product form
        right = torch.zeros(len(distinct), dtype=torch.bool, device=distinct.device)
        right[list(shown[concept])] = True
        ranks.append(int((distance[~right] <= distance[right].min()).sum()))
    return torch.tensor(ranks)


def hit_rate(ranks: Tensor, first: int) -> float:
    """Return the share of ranks below `first`: how often the right concept is among the first so many."""
    return float((ranks < first).double().mean())


def standard_error(rate: float, num: int) -> float:
    """Return the standard error of a share seen among `num` independent prompts, sqrt(p (1 - p) / n)."""
    return (rate * (1 - rate) / num) ** 0.5
