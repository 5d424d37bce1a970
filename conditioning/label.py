"""Class labels -> Condition, with a learned "no class".

What enters: class numbers, or names of classes. What leaves: a token, a vector or the number itself.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from conditioning.condition import Condition
from conditioning.framing import FramedTokenizer, Pieces
from conditioning.text import Reading, encode_prompts
from ldm_pipe.pretrained import FrozenConfig, LdmPipeError, PretrainedModule, atomic_write

LabelSlot = Literal["tokens", "pooled", "labels"]


class ClassNames(FramedTokenizer):
    """A tokenizer whose words are whole class names; the empty text is no class.

    Args:
        names: of class 0, 1, 2, ...
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Number the names."""
        self.names = list(names)
        self._numbers = {name: number for number, name in enumerate(self.names)}
        self.start_ids, self.end_ids, self.pad_id, self.max_length = (), (), len(self.names), 1

    def __len__(self) -> int:
        """Return the number of classes, the null included."""
        return len(self.names) + 1

    def pieces(self, text: str) -> Pieces:
        """Look a name up.

        Raises: LdmPipeError naming the classes that are spelled alike.
        """
        if not text.strip():
            return Pieces([], lambda _: "")
        if text not in self._numbers:
            near = difflib.get_close_matches(text, self.names, n=3) or self.names[:3]
            raise LdmPipeError(f"there is no class {text!r:.80}", "LabelEncoder", f"Known are {near} and others.")
        return Pieces([self._numbers[text]], lambda _: "")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the names; the encoder's config holds them too."""
        atomic_write(Path(folder) / "classes.json", json.dumps(self.names, ensure_ascii=False, indent=1) + "\n")


@dataclass(frozen=True)
class LabelInput:
    """The classes that a U-Net knows beside the text, in a table of its own; stored with the model.

    The table (`num_class_embeds` of its config) has a row more, the learned "no class".

    Args:
        classes: names of class 0, 1, 2, ...
    """

    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if not self.classes or not all(isinstance(name, str) and name.strip() for name in self.classes):
            raise LdmPipeError(f"the classes are {self.classes!r:.80}", "label input", "Give one name per class.")
        if len(set(self.classes)) < len(self.classes):
            what = f"{len(set(self.classes))} different names for {len(self.classes)} classes"
            raise LdmPipeError(what, "label input", "Give each class its own name.")

    @classmethod
    def read(cls, stored: Any, where: str) -> LabelInput:
        """Read what `stored` wrote.

        Raises: LdmPipeError for anything but a list of names.
        """
        if not isinstance(stored, list):
            raise LdmPipeError(f"the classes are {stored!r:.80}", where, "Give a list of names.")
        return cls(tuple(stored))

    def stored(self) -> list[str]:
        """Return what JSON holds of it."""
        return list(self.classes)

    @property
    def null_label(self) -> int:
        """Return the number that means no class."""
        return len(self.classes)

    def condition(self, labels: Sequence[int | str | None]) -> Condition:
        """Turn B names or numbers into labels, (B,); None and "" are no class.

        Raises: LdmPipeError naming the label that is out of range or the name that is not known.
        """
        names, numbers = ClassNames(self.classes), []
        for position, label in enumerate(labels):
            if label is None or isinstance(label, str):
                numbers.append((names.pieces(label or "").ids or [self.null_label])[0])
                continue
            numbers.append(_checked_number(label, position, self.null_label))
        return Condition(labels=torch.tensor(numbers, dtype=torch.int64))

    def null(self, condition: Condition) -> Condition:
        """Return what stands in the unconditional evaluation: no class."""
        return Condition(labels=torch.full_like(condition.slots()["labels"], self.null_label))


def _checked_number(label: Any, position: int, null: int) -> int:
    """Refuse what is no number of a class (or the null)."""
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label <= null:
        what = f"label {position} is {label!r}, expected 0 to {null - 1}, or None for no class"
        raise LdmPipeError(what, "labels", f"The model knows {null} classes.")
    return label


class LabelEncoder(PretrainedModule):
    """An embedding per class and one for none (Rombach et al. 2022, arXiv:2112.10752, sec. 4.4; Ho & Salimans 2022).

    Args:
        config: `num_classes`; `width` of the embedding; `slot`: "tokens" (one token, as LDM's ImageNet model reads it),
            "pooled" (a vector) or "labels" (the number, for a U-Net with a table of num_classes + 1 rows of its own);
            `classes`: their names, where prompts are class names.
    """

    max_length = 1

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
        names = config.get("classes")
        if names is not None and (len(names) != num or len(set(names)) != num):
            what = f"{len(set(names))} different names for {num} classes"
            raise LdmPipeError(what, "label encoder config", "Give one name per class.")
        self.tokenizer = None if names is None else ClassNames(names)
        self.reading = Reading()
        self.config = FrozenConfig({**config, "slot": slot, "hidden_size": width, "vocab_size": num + 1})
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

    def encode_ids(self, ids: Tensor, mask: Tensor, *, clip_skip: int | None = None) -> Condition:
        """Encode rows of one class number each, (B, 1); the mask says nothing here."""
        if clip_skip or mask.shape != ids.shape:
            raise LdmPipeError(f"clip_skip {clip_skip}: a table has no layers", "LabelEncoder", "Leave clip_skip out.")
        return self(ids[:, 0].to(self.device))

    def encode(self, labels: Sequence[int | str | None] | Tensor, *, clip_skip: int | None = None) -> Condition:
        """Encode B class numbers or names; None and "" are no class.

        Raises: LdmPipeError naming the label that is out of range or the name that is not known.
        """
        if not isinstance(labels, Tensor) and any(isinstance(label, str) for label in labels):
            return encode_prompts(self, ["" if label is None else label for label in labels], clip_skip)  # type: ignore[misc]
        rows = labels.tolist() if isinstance(labels, Tensor) else list(labels)
        found = [
            self.null if label is None else _checked_number(label, position, self.null)
            for position, label in enumerate(rows)
        ]
        if not found:
            raise LdmPipeError("no labels", "LabelEncoder", "Give at least one.")
        return self(torch.tensor(found, dtype=torch.int64, device=self.device))
