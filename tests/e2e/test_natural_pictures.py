"""On photographs, too: a short training of either kind of autoencoder makes it rebuild parts it never saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("skimage", reason="scikit-image brings the photographs")
pytest.importorskip("accelerate")

from benchmarks.photographs import Kind, make_trainer, quality, rebuild, split
from ldm_pipe.training.run.loop import Micro
from ldm_pipe.training.tasks.crops import random_crop


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_reconstruction_of_unseen_parts_improves(kind: Kind, tmp_path: Path) -> None:
    pictures, squares = split()
    trainer = make_trainer(kind, tmp_path, pictures, max_train_steps=100)
    before = quality(squares, rebuild(trainer, squares))
    trainer.fit()
    after = quality(squares, rebuild(trainer, squares))
    assert after[0] > before[0] + 5.0
    assert after[1] > before[1]
    flat = squares.mean((2, 3), keepdim=True).expand_as(squares)
    if kind == "kl":  # codes take longer; in PSNR, smooth squares are hard to beat in so few steps
        assert after[1] > quality(squares, flat)[1], "more structure than the mean colour of each square"


def test_crop_and_flip_of_photographs_depend_on_seed_step_and_place_alone(tmp_path: Path) -> None:
    pictures, _ = split()
    seen: list[Any] = []
    for places in (range(4), range(2, 4)):
        trainer = make_trainer("kl", tmp_path, pictures, max_train_steps=100)
        memo: dict[str, Any] = {}
        trainer.parts[0].loss(Micro(7, [row % 4 for row in places], places, memo))
        seen.append(memo["image"])
    np.testing.assert_array_equal(seen[0][2:].numpy(), seen[1].numpy())
    assert not np.array_equal(seen[1][0].numpy(), seen[1][1].numpy())


def test_photographs_are_cropped_without_borders() -> None:
    from skimage import data

    photograph = Image.fromarray(data.chelsea())
    cut = random_crop(photograph, 64, 2.0, 0.3, 0.7)
    assert cut.size == (64, 64)
    assert not (np.asarray(cut) == 255).all(2).any()
