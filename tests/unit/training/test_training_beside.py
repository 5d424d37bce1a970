"""Laws of what stands beside the captions in training: maps and labels, each dropped by itself."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from conditioning import LabelInput, SpatialInput
from ldm_pipe.data.dataset import Records, load_records
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.training.run.config import DataConfig
from ldm_pipe.training.run.loop import Micro
from ldm_pipe.training.tasks.beside import Beside, read_labels, read_masks
from ldm_pipe.training.tasks.diffusion import DiffusionData, Texts, diffusion_loss
from tests.training import NUM_ITEMS, make_config, make_data

CPU = torch.device("cpu")
DATA = DataConfig(mask_column="mask", label_column="group", keywords_column=None, resolution=16)


def png(image: Image.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def rows() -> list[dict[str, Any]]:
    """Two pictures: the mask of the first is its left half, of the second everything."""
    half = Image.new("L", (32, 32))
    half.paste(255, (0, 0, 16, 32))
    pictures = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    masks, names = [half, Image.new("L", (32, 32), 255)], ["red thing", "blue thing"]
    found = zip(pictures, masks, names, ("things", "animals"), strict=True)
    return [{"image": png(p), "mask": png(m), "caption": name, "group": group} for p, m, name, group in found]


def records(folder: Path, changed: dict[str, Any] | None = None) -> Records:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    table = rows()
    table[1] |= changed or {}
    pandas.DataFrame(table).to_parquet(folder / "train.parquet")
    return load_records(folder / "train.parquet", caption_column="caption")


def test_masks_and_classes_of_a_table_are_read(tmp_path: Path) -> None:
    found = Beside.read(records(tmp_path), DATA, (4, 4))
    assert found.maps is not None
    assert found.maps[0, 0].tolist() == [[1, 1, -1, -1]] * 4
    assert found.maps[1, 0].tolist() == [[1] * 4] * 4
    assert found.classes == LabelInput(("animals", "things"))
    assert found.labels is not None
    assert found.labels.tolist() == [1, 0]


def test_rows_without_mask_or_class_are_named(tmp_path: Path) -> None:
    with pytest.raises(LdmPipeError, match=r"there is no mask.*row 1|row 1.*there is no mask"):
        read_masks(records(tmp_path, {"mask": None}), DATA)
    with pytest.raises(LdmPipeError, match="the mask is 8x8, the picture 32x32"):
        read_masks(records(tmp_path, {"mask": png(Image.new("L", (8, 8)))}), DATA)
    with pytest.raises(LdmPipeError, match="group is None"):
        read_labels(records(tmp_path, {"group": None}), "group")


@pytest.mark.parametrize("change", [{"random_flip": True}, {"center_crop": False}, {"aspect_ratio_buckets": True}])
def test_masks_of_pictures_that_are_framed_otherwise_are_refused(change: dict[str, bool], tmp_path: Path) -> None:
    with pytest.raises(LdmPipeError, match="masks are cut out of the middle"):
        Beside.read(records(tmp_path), DATA.model_copy(update=change), (4, 4))


def data_beside() -> DiffusionData:
    maps = torch.arange(1, NUM_ITEMS + 1).float()[:, None, None, None].expand(-1, 1, 4, 4)
    beside = Beside(SpatialInput(1), maps, LabelInput(tuple("abc")), torch.arange(NUM_ITEMS) % 3)
    return replace(make_data(), beside=beside)


def seen(folder: Path, num_steps: int = 200, **rates: float) -> dict[str, torch.Tensor]:
    """Return which of text, map and label were left out in many steps, (8 num_steps,) each."""
    data, found = data_beside(), []

    def net(x_t: torch.Tensor, t: torch.Tensor, **slots: torch.Tensor) -> torch.Tensor:
        nothing = (slots["tokens"] == data.tokens[-1]).flatten(1).all(1)
        found.append((nothing, (slots["spatial"] == 0).flatten(1).all(1), slots["labels"] == 3))
        return x_t

    config = make_config(folder, **rates)
    loss = diffusion_loss(net, data, config.schedule.build(), config, global_batch=8, device=CPU)
    for step in range(num_steps):
        loss(Micro(step, list(range(8)), range(8)))
    return dict(zip(("text", "map", "label"), (torch.cat(part) for part in zip(*found, strict=True)), strict=True))


def test_each_condition_is_dropped_by_itself_at_its_rate(tmp_path: Path) -> None:
    gone = seen(tmp_path, caption_dropout=0.1, mask_dropout=0.3, label_dropout=0.5)
    for name, rate in {"text": 0.1, "map": 0.3, "label": 0.5}.items():
        assert gone[name].float().mean().item() == pytest.approx(rate, abs=0.05), name  # 4 deviations of 1,600 draws
    assert (gone["map"] & gone["label"]).float().mean().item() == pytest.approx(0.15, abs=0.04)


def test_all_are_dropped_together(tmp_path: Path) -> None:
    gone = seen(tmp_path, caption_dropout=0.0, mask_dropout=0.0, label_dropout=0.0, all_dropout=0.2)
    assert torch.equal(gone["text"], gone["map"])
    assert torch.equal(gone["text"], gone["label"])
    assert gone["text"].float().mean().item() == pytest.approx(0.2, abs=0.04)


def test_what_is_not_dropped_belongs_to_its_picture(tmp_path: Path) -> None:
    data = data_beside()
    assert data.beside is not None
    slots = data.beside.slots(torch.tensor([4, 7]), torch.zeros(2, 2, dtype=torch.bool), CPU)
    assert slots["spatial"][:, 0, 0, 0].tolist() == [5, 8]
    assert slots["labels"].tolist() == [1, 1]
    assert Beside().slots(torch.tensor([0]), torch.zeros(1, 2, dtype=torch.bool), CPU) == {}


def test_latents_and_slots_of_a_slice_count_as_those_of_its_rows(tmp_path: Path) -> None:
    data, config = make_data(), make_config(tmp_path)
    law, micro = config.schedule.build(), Micro(3, [4, 0, 2, 2], range(4))
    assert data.mean is not None
    assert data.std is not None
    told: list[dict[str, torch.Tensor]] = []

    def net(x_t: torch.Tensor, t: torch.Tensor, **slots: torch.Tensor) -> torch.Tensor:
        told.append(slots)
        return 0.5 * x_t

    def moments(micro: Micro) -> tuple[torch.Tensor, torch.Tensor]:
        return data.mean[micro.indices], data.std[micro.indices]  # type: ignore[index]

    sliced = replace(data, mean=None, std=None, moments=moments, more=lambda _: {"labels": torch.arange(4)})
    plain, other = (diffusion_loss(net, d, law, config, global_batch=4, device=CPU)(micro)[0] for d in (data, sliced))
    assert plain == other
    assert "labels" not in told[0]
    assert told[1]["labels"].tolist() == [0, 1, 2, 3]
    with pytest.raises(LdmPipeError, match="neither mean and std nor moments"):
        replace(data, mean=None).posterior(micro)


def test_two_text_encoders_are_joined_and_dropped_each_by_itself(tmp_path: Path) -> None:
    data = make_data()
    second = Texts(torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1)).half(), pooled=torch.ones(5, 2))
    found: list[torch.Tensor] = []

    def net(x_t: torch.Tensor, t: torch.Tensor, *, tokens: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        assert tokens.shape == (8, 3, 12)
        assert tokens.dtype == pooled.dtype == torch.float32
        gone = [(part == null).flatten(1).all(1) for part, null in zip(tokens.split((8, 4), 2), nulls, strict=True)]
        found.append(torch.stack(gone))
        return x_t

    nulls = (data.tokens[-1], second.tokens[-1].float())
    config = make_config(tmp_path, caption_dropout=0.2, caption_dropout_2=0.4)
    two = replace(data, second=second)
    loss = diffusion_loss(net, two, config.schedule.build(), config, global_batch=8, device=CPU)
    for step in range(200):
        loss(Micro(step, list(range(8)), range(8)))
    first, other = torch.cat(found, dim=1).float()
    assert first.mean().item() == pytest.approx(0.2, abs=0.05)
    assert other.mean().item() == pytest.approx(0.4, abs=0.05)
    assert (first * other).mean().item() == pytest.approx(0.08, abs=0.04)
    rows = two.condition(torch.tensor([2, 3]), CPU)["tokens"]
    assert torch.equal(rows, torch.cat([data.tokens[[2, 3]], second.tokens[[2, 3]].float()], dim=2)), "the same texts"


def test_encoders_of_unequal_length_are_refused() -> None:
    two = replace(make_data(), second=Texts(torch.zeros(5, 7, 4)))
    with pytest.raises(LdmPipeError, match=r"tokens \[2, 3, 8\] and \[2, 7, 4\] cannot be joined"):
        two.condition(torch.tensor([0, 1]), CPU)
