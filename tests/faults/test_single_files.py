"""Single files that are usable were refused, or called damaged."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm_pipe import LatentDiffusionPipeline
from ldm_pipe.interop.pickles.checkpoint import load_checkpoint, unpickle
from ldm_pipe.interop.single.file import export_single_file
from ldm_pipe.pretrained import LdmPipeError, load_tensors, save_tensors
from tests.single_files import make_folder

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make_folder(root / name, name) for name in ("sd1", "sd2")}


@pytest.fixture(scope="module")
def files(folders: dict[str, Path]) -> dict[str, Tensors]:
    found = {}
    for name, folder in folders.items():
        export_single_file(folder, folder.with_suffix(".safetensors"))
        found[name] = load_tensors(folder.with_suffix(".safetensors"))
    return found


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new, 1): value for name, value in tensors.items()}


def longer(key: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, key: torch.cat([tensors[key], torch.randn(3, tensors[key].shape[1])])}


def beside(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: torch.zeros(shape)}


CHANGES: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "as it is": ("sd1", dict),
    "SD-Turbo's names": ("sd2", renamed("cond_stage_model.model.", "conditioner.embedders.0.model.")),
    "CLIP without text_model.": ("sd1", renamed("transformer.text_model.", "transformer.")),
    "embedding_manager": ("sd1", beside("embedding_manager.string_to_param_dict.*", 1, 32)),
    "more rows": ("sd1", longer("cond_stage_model.transformer.text_model.embeddings.token_embedding.weight")),
    "more rows, OpenCLIP": ("sd2", longer("cond_stage_model.model.token_embedding.weight")),
}


@pytest.mark.parametrize(("name", "change"), CHANGES.values(), ids=CHANGES.keys())
def test_files_under_other_names_are_the_same_model(
    name: str, change: Callable[[Tensors], Tensors], files: dict[str, Tensors], folders: dict[str, Path], tmp_path: Path
) -> None:
    save_tensors(tmp_path / "model.safetensors", change(files[name]))
    asked: Any = {"prediction": "eps"} if name == "sd2" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = LatentDiffusionPipeline.from_single_file(tmp_path / "model.safetensors", like=folders[name], **asked)
    wanted = LatentDiffusionPipeline.from_pretrained(folders[name])
    for one, other in ((ours.unet, wanted.unet), (ours.text_encoder, wanted.text_encoder)):
        for key, value in other.state_dict().items():  # type: ignore[union-attr]
            assert torch.equal(one.state_dict()[key][: len(value)], value), key  # type: ignore[union-attr]
    assert ours.name == "model"


def test_a_file_given_as_a_folder_is_told_the_way(files: dict[str, Tensors], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_tensors(path, {"x": torch.zeros(1)})
    with pytest.raises(LdmPipeError, match=r"from_single_file\(path\).*ldm-pipe convert"):
        LatentDiffusionPipeline.from_pretrained(path)
    with pytest.raises(LdmPipeError, match="from_pretrained"):
        LatentDiffusionPipeline.from_single_file(tmp_path)
    with pytest.raises(LdmPipeError, match="no such file"):
        LatentDiffusionPipeline.from_single_file(tmp_path / "other.safetensors")


EIGHT = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("kind", EIGHT)
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_float8_is_read_to_the_bit(kind: torch.dtype, dtype: torch.dtype | None, tmp_path: Path) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(kind)
    every = every[torch.isfinite(every.float())]
    save_file({"x": every, "y": torch.zeros(0, dtype=kind)}, tmp_path / "x.safetensors")
    with pytest.warns(UserWarning, match="float16"):
        found = load_tensors(tmp_path / "x.safetensors", dtype=dtype, finite=True, mapped=True)
    assert found["x"].dtype == found["y"].dtype == (dtype or torch.float16)
    assert torch.equal(found["x"].float(), every.float())


def test_other_number_types_are_no_damage(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "x.safetensors")
    with pytest.raises(LdmPipeError, match=r"is whole, but its numbers of type \['C64'\]"):
        load_tensors(tmp_path / "x.safetensors")


WEIGHTS = {"a.weight": torch.arange(4.0), "b": torch.ones(2, 3)}
BESIDE: dict[str, Any] = {
    **{f"numpy {kind}": np.dtype(kind).type(3 if kind != "?" else 1) for kind in ("f8", "f4", "i8", "i4", "u1", "?")},
    "numpy array": np.zeros(3),
    "numpy big-endian": np.array([3], ">f8")[0],
    "numpy text": np.str_("x"),
    "ParameterDict": nn.ParameterDict({"*": nn.Parameter(torch.ones(2))}),
    "a set": {1, 2},
    "a mapping of all": {"loss": np.float64(0.1), "steps": np.int64(7), "more": [np.float32(1)]},
}


def test_what_lies_beside_the_weights_of_a_pickle_does_no_harm(tmp_path: Path) -> None:
    torch.save({"state_dict": dict(WEIGHTS), **BESIDE}, tmp_path / "x.ckpt")
    found = load_checkpoint(tmp_path / "x.ckpt")
    assert found.keys() == WEIGHTS.keys()
    assert all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)
    content = unpickle(tmp_path / "x.ckpt")
    for name in ("f8", "f4", "i8", "i4", "u1"):
        assert content[f"numpy {name}"] == 3, name
    assert content["numpy ?"] is True
    assert content["numpy big-endian"] == 3
    assert content["a mapping of all"] == {"loss": 0.1, "steps": 7, "more": [1.0]}


def test_weights_in_a_parameter_dict_are_read(tmp_path: Path) -> None:
    torch.save(nn.ParameterDict({"w": nn.Parameter(torch.arange(3.0))}), tmp_path / "x.pt")
    found: Mapping[str, Tensor] = load_checkpoint(tmp_path / "x.pt")
    assert torch.equal(found["w"], torch.arange(3.0))
