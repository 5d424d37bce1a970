"""The one thing every encoder makes and the U-Net reads: a Condition with named slots.

What enters: tensors of one batch. What leaves: the same tensors joined, repeated, dropped or moved together. This file
does not know where the tensors come from (text, labels, images) nor what the network does with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_pipe.pretrained import LdmPipeError

_NDIM = {"tokens": (3,), "token_mask": (2,), "pooled": (2,), "spatial": (4,), "labels": (1, 2)}


@dataclass(frozen=True, eq=False)
class Condition:
    """What the network is told about each picture of a batch; every slot is a tensor or None.

    Args:
        tokens: sequence for cross-attention, shape (B, L, D).
        token_mask: True where a token may be attended to, shape (B, L).
        pooled: one vector per picture, shape (B, P).
        spatial: channels laid beside the noisy latents, shape (B, K, h, w).
        labels: class indices or noise levels, shape (B,), or SDXL's sizes and crops, shape (B, 6).
    Raises: LdmPipeError if the slots disagree about the batch size or have another number of axes.
    """

    tokens: Tensor | None = None
    token_mask: Tensor | None = None
    pooled: Tensor | None = None
    spatial: Tensor | None = None
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the shapes once, where the Condition is made."""
        slots = self.slots()
        for name, value in slots.items():
            if value.ndim not in _NDIM[name]:
                axes = " or ".join(map(str, _NDIM[name]))
                raise LdmPipeError(f"{name} has shape {list(value.shape)}, expected {axes} axes", "Condition")
        if len({value.shape[0] for value in slots.values()}) > 1:
            shapes = {name: list(value.shape) for name, value in slots.items()}
            raise LdmPipeError(f"the slots have different batch sizes: {shapes}", "Condition")
        if self.token_mask is not None and (self.tokens is None or self.token_mask.shape != self.tokens.shape[:2]):
            found = None if self.tokens is None else list(self.tokens.shape)
            raise LdmPipeError(f"token_mask {list(self.token_mask.shape)} does not fit tokens {found}", "Condition")

    def slots(self) -> dict[str, Tensor]:
        """Return the slots that are filled, by name: the keyword arguments of the network."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in values if value is not None}

    @property
    def batch_size(self) -> int:
        """Return B.

        Raises: LdmPipeError if no slot is filled.
        """
        for value in self.slots().values():
            return value.shape[0]
        raise LdmPipeError("an empty Condition has no batch size", "Condition")

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Condition:
        """Move every slot; dtype touches floating-point slots only."""
        return self._map(lambda value: value.to(device=device, dtype=dtype if value.is_floating_point() else None))

    def repeat(self, num: int) -> Condition:
        """Repeat each row num times, copies side by side: rows a, b become a, a, b, b."""
        return self._map(lambda value: value.repeat_interleave(num, dim=0))

    def zeros(self) -> Condition:
        """Return zeros for tokens and pooled vectors, which is how SDXL says nothing; other slots stay."""
        names = [name for name in ("tokens", "pooled") if getattr(self, name) is not None]
        return replace(self, **{name: torch.zeros_like(getattr(self, name)) for name in names})

    def select(self, rows: slice | Tensor | Sequence[int]) -> Condition:
        """Take some rows of the batch."""
        index = rows if isinstance(rows, (slice, Tensor)) else list(rows)
        return self._map(lambda value: value[index])

    def drop(self, mask: Tensor, null: Condition) -> Condition:
        """Replace the rows where mask is True by the null condition (Ho & Salimans 2022, arXiv:2207.12598, alg. 1).

        Slots that null leaves empty are kept as they are, so a caption is dropped while a depth map stays.

        Args:
            mask: booleans, shape (B,).
            null: condition of the empty prompt, one row or B rows.
        """
        batch = self.batch_size
        if mask.shape != (batch,) or mask.dtype != torch.bool:
            raise LdmPipeError(f"mask is {mask.dtype} {list(mask.shape)}, expected bool [{batch}]", "Condition.drop")
        if extra := null.slots().keys() - self.slots().keys() - {"token_mask"}:
            raise LdmPipeError(f"the null condition fills {sorted(extra)}, the condition does not", "Condition.drop")
        mine, other = self, null
        if null.tokens is not None and (self.token_mask is not None or null.token_mask is not None):
            mine, other = self._with_mask(), null._with_mask()
        changed = {}
        for name, new in other.slots().items():
            old = mine.slots()[name]
            if new.shape[1:] != old.shape[1:] or new.shape[0] not in (1, batch):
                raise LdmPipeError(f"{name}: null {list(new.shape)} does not fit {list(old.shape)}", "Condition.drop")
            where = mask.to(old.device).reshape(batch, *[1] * (old.ndim - 1))
            changed[name] = torch.where(where, new.to(device=old.device, dtype=old.dtype), old)
        return replace(mine, **changed)

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """Stack several conditions along the batch; all must fill the same slots.

        A token mask that only some have counts as all True in the others.
        Raises: LdmPipeError if the slots or their shapes differ.
        """
        if any(condition.token_mask is not None for condition in conditions):
            conditions = [condition._with_mask() for condition in conditions]
        all_slots = [condition.slots() for condition in conditions]
        joined = {}
        for name in dict.fromkeys(name for slots in all_slots for name in slots):
            values = [slots.get(name) for slots in all_slots]
            present = [value for value in values if value is not None]
            if len(present) < len(values) or len({value.shape[1:] for value in present}) > 1:
                shapes = [None if value is None else list(value.shape) for value in values]
                raise LdmPipeError(f"{name} cannot be stacked along the batch: {shapes}", "Condition.cat")
            joined[name] = torch.cat(present)
        return Condition(**joined)

    def join(self, other: Condition) -> Condition:
        """Put what another encoder says of the same batch beside this: tokens, pooled and spatial along channels.

        A slot that only one of the two fills is taken from it; a token is visible only where both masks allow it.
        Raises: LdmPipeError if both carry labels, or if lengths or sizes differ.
        """
        mine, theirs = self.slots(), other.slots()
        if "labels" in mine and "labels" in theirs:
            raise LdmPipeError("both conditions carry labels", "Condition.join")
        joined = {**theirs, **mine}
        for name, axis in (("tokens", 2), ("pooled", 1), ("spatial", 1)):
            if name in mine and name in theirs:
                left, right = mine[name], theirs[name]
                if [*left.shape[:axis], *left.shape[axis + 1 :]] != [*right.shape[:axis], *right.shape[axis + 1 :]]:
                    what = f"{name} {list(left.shape)} and {list(right.shape)} cannot be joined along axis {axis}"
                    raise LdmPipeError(what, "Condition.join")
                joined[name] = torch.cat([left, right], dim=axis)
        if "token_mask" in mine and "token_mask" in theirs:
            joined["token_mask"] = mine["token_mask"] & theirs["token_mask"]
        return Condition(**joined)

    def pad(self, length: int) -> Condition:
        """Lengthen the tokens with zeros that the mask hides, so that conditions of unequal length can be stacked."""
        if self.tokens is None or self.tokens.shape[1] == length:
            return self
        masked = self._with_mask()
        assert masked.tokens is not None and masked.token_mask is not None
        more = length - self.tokens.shape[1]
        tokens, mask = F.pad(masked.tokens, (0, 0, 0, more)), F.pad(masked.token_mask, (0, more))
        return replace(masked, tokens=tokens, token_mask=mask)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Condition:
        return Condition(**{name: change(value) for name, value in self.slots().items()})

    def _with_mask(self) -> Condition:
        if self.token_mask is not None or self.tokens is None:
            return self
        return replace(self, token_mask=torch.ones(self.tokens.shape[:2], dtype=torch.bool, device=self.tokens.device))


class TextEncoder(Protocol):
    """What the pipeline asks of every text encoder, whatever its library."""

    def encode(self, prompts: Sequence[str], *, clip_skip: int | None = None) -> Condition:
        """Turn B prompts into a Condition of B rows."""
        ...
