"""Several encoders at once: their conditions joined, each dropped by itself for classifier-free guidance.

What enters: one condition per encoder, of the same batch. What leaves: one Condition. This file encodes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from conditioning.condition import Condition
from ldm_pipe.pretrained import LdmPipeError


def join_all(conditions: Sequence[Condition]) -> Condition:
    """Join what several encoders say of the same batch, along the channels."""
    return reduce(Condition.join, conditions)


def drop_masks(uniforms: Tensor, rates: Sequence[float], together: float = 0.0) -> Tensor:
    """Decide what is dropped in training, so that guidance can leave out one encoder or all.

    Args:
        uniforms: in [0, 1), shape (B, N + 1): one draw per encoder, and one for all together.
        rates: probability that encoder n is dropped by itself.
        together: probability that all are dropped at once (the plain unconditional model).
    Returns: booleans (B, N).
    Raises: LdmPipeError for rates outside [0, 1] or too few draws.
    """
    if not all(0 <= rate <= 1 for rate in (*rates, together)):
        raise LdmPipeError(f"drop rates {list(rates)}, together {together}", "drop_masks", "Use numbers from 0 to 1.")
    if uniforms.ndim != 2 or uniforms.shape[1] != len(rates) + 1:
        what = f"draws {list(uniforms.shape)} for {len(rates)} encoders, expected (B, {len(rates) + 1})"
        raise LdmPipeError(what, "drop_masks")
    alone = uniforms[:, :-1] < torch.tensor(rates, dtype=uniforms.dtype, device=uniforms.device)
    return alone | (uniforms[:, -1:] < together)


def drop_each(conditions: Sequence[Condition], nulls: Sequence[Condition], masks: Tensor) -> Condition:
    """Drop each encoder's condition where its mask says so, then join (Ho & Salimans 2022, arXiv:2207.12598, alg. 1).

    Args:
        conditions: one per encoder, B rows each.
        nulls: what each says of nothing, one row or B rows.
        masks: booleans, shape (B, N), see `drop_masks`.
    """
    if masks.shape != (conditions[0].batch_size, len(conditions)) or len(nulls) != len(conditions):
        what = f"masks {list(masks.shape)} and {len(nulls)} nulls for {len(conditions)} encoders"
        raise LdmPipeError(what, "drop_each", f"Masks are ({conditions[0].batch_size}, {len(conditions)}).")
    rows = zip(conditions, nulls, masks.unbind(1), strict=True)
    return join_all([condition.drop(mask, null) for condition, null, mask in rows])
