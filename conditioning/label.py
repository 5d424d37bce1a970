"""Class labels -> Condition, with a learned "no class".

What enters: class numbers. What leaves: a token, a vector or the number itself. This file knows no names of classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from conditioning.condition import Condition
from ldm_pipe.pretrained import FrozenConfig, LdmPipeError, PretrainedModule

LabelSlot = Literal["tokens", "pooled", "labels"]


class LabelEncoder(PretrainedModule):
    """An embedding per class and one for none (Rombach et al. 2022, arXiv:2112.10752, sec. 4.4; Ho & Salimans 2022).

    Args:
        config: `num_classes`; `width` of the embedding; `slot`: "tokens" (one token, as LDM's ImageNet model reads it),
            "pooled" (a vector) or "labels" (the number, for a U-Net with a table of num_classes + 1 rows of its own).
    """

    weights_name = "model"
    class_name = "LabelEncoder"

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Make the table; its last row is the learned null."""
        super().__init__()
        num, width, slot = config.get("num_classes"), config.get("width"), config.get("slot", "tokens")
        if slot not in get_args(LabelSlot):
            raise LdmPipeError(f"slot is {slot!r}", "label encoder config", f"Known: {get_args(LabelSlot)}.")
        for name, value in (("num_classes", num), ("width", width)):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 22:
                raise LdmPipeError(
                    f"{name} is {value!r}, expected a whole number of at least 1", "label encoder config"
                )
        self.config = FrozenConfig({**config, "slot": slot})
        self.class_embedding = nn.Embedding(self.config.num_classes + 1, self.config.width)
        nn.init.normal_(self.class_embedding.weight, std=0.02)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LabelEncoder:
        """Build the encoder with random weights."""
        return cls(config)

    @property
    def null(self) -> int:
        """Return the number that means no class."""
        return self.config.num_classes

    def forward(self, labels: Tensor) -> Condition:
        """Encode numbers from 0 to num_classes (the null), shape (B,)."""
        if self.config.slot == "labels":
            return Condition(labels=labels)
        vectors = self.class_embedding(labels)  # (B, D)
        return Condition(pooled=vectors) if self.config.slot == "pooled" else Condition(tokens=vectors[:, None])

    def encode(self, labels: Sequence[int | None] | Tensor) -> Condition:
        """Encode B class numbers; None is no class.

        Raises: LdmPipeError naming the label that is out of range.
        """
        rows = labels.tolist() if isinstance(labels, Tensor) else list(labels)
        found = [self.null if label is None else label for label in rows]
        for position, label in enumerate(found):
            if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label <= self.null:
                what = f"label {position} is {label!r}, expected 0 to {self.null - 1}, or None for no class"
                raise LdmPipeError(what, "LabelEncoder", f"The model knows {self.null} classes.")
        if not found:
            raise LdmPipeError("no labels", "LabelEncoder", "Give at least one.")
        return self(torch.tensor(found, dtype=torch.int64, device=self.device))
