"""What stands beside the captions of a training: maps and class labels of each picture, read off its records.

What enters: records with a column of masks or of classes. What leaves: tensors in memory, one row per picture. This
file knows no network and no loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conditioning import Condition, LabelInput, SpatialInput
from conditioning.joined import drop_each
from ldm_pipe.data.dataset import Records
from ldm_pipe.data.images import open_image, resize, to_tensor
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.training.run.config import DataConfig


@dataclass(frozen=True)
class Beside:
    """Maps and labels of all pictures, and what the model is to know of them.

    Args:
        maps: as the network sees them, at the size of the latents, shape (N, K, h, w).
        labels: numbers of classes, shape (N,).
    """

    spatial: SpatialInput | None = None
    maps: Tensor | None = None
    classes: LabelInput | None = None
    labels: Tensor | None = None

    @classmethod
    def read(cls, records: Records, config: DataConfig, size: tuple[int, int]) -> Beside:
        """Read the columns that a config names.

        Args:
            size: of the latents, rows and columns.
        Raises: LdmPipeError naming the row that has no mask or no class.
        """
        spatial, maps, classes, labels = None, None, None, None
        if config.mask_column is not None:
            if config.random_flip or not config.center_crop or config.aspect_ratio_buckets:
                what = "masks are cut out of the middle of the square, pictures are not"
                advice = "With mask_column, leave random_flip, center_crop and aspect_ratio_buckets alone."
                raise LdmPipeError(what, "data.mask_column", advice)
            spatial = SpatialInput(1)
            maps = torch.cat([spatial.condition(mask, size).slots()["spatial"] for mask in read_masks(records, config)])
        if config.label_column is not None:
            classes, labels = read_labels(records, config.label_column)
        return cls(spatial, maps, classes, labels)

    def slots(self, rows: Tensor, dropped: Tensor, device: torch.device) -> dict[str, Tensor]:
        """Return what stands beside some pictures, left out where it is dropped.

        Args:
            rows: of the pictures, (B,).
            dropped: booleans (B, 2): the map, the label.
        """
        conds, nulls, masks = [], [], []
        if self.spatial is not None and self.maps is not None:
            conds.append(Condition(spatial=self.maps[rows]))
            nulls.append(self.spatial.null(conds[-1]))
            masks.append(dropped[:, 0])
        if self.classes is not None and self.labels is not None:
            conds.append(Condition(labels=self.labels[rows]))
            nulls.append(self.classes.null(conds[-1]))
            masks.append(dropped[:, 1])
        return drop_each(conds, nulls, torch.stack(masks, dim=1)).to(device).slots() if conds else {}


def read_masks(records: Records, config: DataConfig, rows: Sequence[int] | None = None) -> list[Tensor]:
    """Read the masks of some pictures (None: all), framed as the pictures are: (1, 1, R, R) each.

    A mask goes from 0 (nothing is drawn there: black) to 1 (white).
    Raises: LdmPipeError naming the row that has none, or one of another size than its picture.
    """
    column = str(config.mask_column)
    sources, masks = records.column(column), []
    for index in range(len(records)) if rows is None else rows:
        where = records.where(index)
        if sources[index] is None:
            raise LdmPipeError("there is no mask", where, f"Fill the column {column!r}, or leave the row out.")
        mask, size = open_image(sources[index], name=where), records.image(index).size
        if mask.size != size:
            what = f"the mask is {mask.width}x{mask.height}, the picture {size[0]}x{size[1]}"
            raise LdmPipeError(what, where, "Give a mask of the picture's size.")
        masks.append((to_tensor(resize(mask, config.resolution))[None, :1] + 1) / 2)
    return masks


def read_labels(records: Records, column: str) -> tuple[LabelInput, Tensor]:
    """Number the classes of a column in the order of their names.

    Returns: the classes, and the number of each row, (N,).
    Raises: LdmPipeError naming the row that has none.
    """
    names = records.column(column)
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            what = f"{column} is {name!r:.80}"
            raise LdmPipeError(what, records.where(index), "Give each row the name of its class.")
    classes = LabelInput(tuple(sorted(set(names))))
    return classes, classes.condition(names).slots()["labels"]
