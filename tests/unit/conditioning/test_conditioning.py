"""Laws of Condition: dropping, repeating, stacking, joining."""

from __future__ import annotations

import pytest
import torch

from conditioning import Condition
from ldm_pipe.pretrained import LdmPipeError


def make(batch: int, seed: int = 0, mask: bool = False) -> Condition:
    draw = torch.Generator().manual_seed(seed)
    return Condition(
        tokens=torch.randn(batch, 4, 6, generator=draw),
        token_mask=torch.rand(batch, 4, generator=draw) > 0.5 if mask else None,
        pooled=torch.randn(batch, 3, generator=draw),
        spatial=torch.randn(batch, 2, 5, 5, generator=draw),
        labels=torch.randint(0, 9, (batch,), generator=draw),
    )


def same(a: Condition, b: Condition) -> bool:
    left, right = a.slots(), b.slots()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_repeat_puts_copies_side_by_side() -> None:
    cond = make(2, mask=True)
    assert same(cond.repeat(3), cond.select([0, 0, 0, 1, 1, 1]))


def test_cat_then_select_gives_the_parts_back() -> None:
    a, b = make(2), make(3, seed=1)
    both = Condition.cat([a, b])
    assert both.batch_size == 5
    assert same(both.select(slice(0, 2)), a)
    assert same(both.select(slice(2, 5)), b)


def test_cat_counts_a_missing_mask_as_all_visible() -> None:
    masked, plain = make(2, mask=True), make(1, seed=1)
    mask = Condition.cat([masked, plain]).token_mask
    assert mask is not None
    assert torch.equal(mask, torch.cat([masked.token_mask, torch.ones(1, 4, dtype=torch.bool)]))


@pytest.mark.parametrize("null_rows", [1, 3])
def test_drop_replaces_the_masked_rows_and_no_other(null_rows: int) -> None:
    cond, null = make(3), make(null_rows, seed=1)
    dropped = cond.drop(torch.tensor([True, False, True]), null)
    assert same(dropped.select([1]), cond.select([1]))
    assert same(dropped.select([0, 2]), null.select([0, 0] if null_rows == 1 else [0, 2]))


def test_drop_none_is_identity_and_drop_all_is_null() -> None:
    cond, null = make(3, mask=True), make(1, seed=1, mask=True)
    assert same(cond.drop(torch.zeros(3, dtype=torch.bool), null), cond)
    assert same(cond.drop(torch.ones(3, dtype=torch.bool), null), null.repeat(3))


def test_drop_keeps_slots_that_null_leaves_empty() -> None:
    cond = make(2)
    dropped = cond.drop(torch.tensor([True, True]), Condition(tokens=torch.zeros(1, 4, 6)))
    assert torch.equal(dropped.spatial, cond.spatial)
    assert torch.count_nonzero(dropped.tokens) == 0


def test_drop_passes_gradient_to_a_learned_null() -> None:
    null = torch.zeros(1, 4, 6, requires_grad=True)
    dropped = Condition(tokens=torch.randn(2, 4, 6)).drop(torch.tensor([True, False]), Condition(tokens=null))
    dropped.tokens.sum().backward()
    assert torch.equal(null.grad, torch.ones(1, 4, 6))


def test_drop_unions_the_masks() -> None:
    cond, null = make(2), make(1, seed=1, mask=True)
    mask = cond.drop(torch.tensor([True, False]), null).token_mask
    assert torch.equal(mask[0], null.token_mask[0])
    assert mask[1].all()


def test_join_lays_channels_side_by_side() -> None:
    a = Condition(tokens=torch.randn(2, 4, 6))
    b = Condition(tokens=torch.randn(2, 4, 5), pooled=torch.randn(2, 3))
    joined = a.join(b)
    assert torch.equal(joined.tokens, torch.cat([a.tokens, b.tokens], dim=2))
    assert torch.equal(joined.pooled, b.pooled)


def test_to_changes_floats_only() -> None:
    cond = make(2, mask=True).to("cpu", torch.bfloat16)
    assert cond.tokens.dtype == cond.spatial.dtype == torch.bfloat16
    assert cond.token_mask.dtype == torch.bool
    assert cond.labels.dtype == torch.int64


@pytest.mark.parametrize(
    "slots",
    [
        {"tokens": torch.zeros(2, 3)},
        {"tokens": torch.zeros(2, 3, 4), "pooled": torch.zeros(3, 4)},
        {"tokens": torch.zeros(2, 3, 4), "token_mask": torch.ones(2, 4, dtype=torch.bool)},
        {"token_mask": torch.ones(2, 4, dtype=torch.bool)},
    ],
)
def test_slots_that_disagree_are_refused(slots: dict[str, torch.Tensor]) -> None:
    with pytest.raises(LdmPipeError, match="Condition"):
        Condition(**slots)


def test_mismatches_are_refused() -> None:
    cond = make(2)
    with pytest.raises(LdmPipeError, match="tokens cannot be stacked"):
        Condition.cat([cond, Condition(tokens=torch.zeros(1, 5, 6))])
    with pytest.raises(LdmPipeError, match="pooled cannot be stacked"):
        Condition.cat([Condition(pooled=torch.zeros(1, 3)), Condition(tokens=torch.zeros(1, 5, 6))])
    with pytest.raises(LdmPipeError, match="expected bool"):
        cond.drop(torch.tensor([1, 0]), cond)
    with pytest.raises(LdmPipeError, match="does not fit"):
        cond.drop(torch.tensor([True, False]), Condition(pooled=torch.zeros(1, 9)))
    with pytest.raises(LdmPipeError, match="labels"):
        cond.join(cond)
    with pytest.raises(LdmPipeError, match="empty"):
        _ = Condition().batch_size
