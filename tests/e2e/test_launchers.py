"""Every way to start a training: plain python, torchrun, accelerate with shipped and default files, a notebook."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("pandas")
pytest.importorskip("pyarrow")
pytest.importorskip("accelerate")

from tests.e2e.test_training_scripts import (
    MODEL,
    TWO_RANKS,
    data_of,
    diffusion_config,
    drawings,
    load_script,
    script,
)
from tests.source import ROOT
from tests.training import assert_same_bits, saved_state

__all__ = ["drawings"]  # a fixture
CONFIGS = ROOT / "configs" / "accelerate"
LAUNCH = ("-m", "accelerate.commands.launch", "--config_file")


def config_of(folder: Path, drawings: Path, size: int) -> Path:
    return diffusion_config(
        folder, drawings, MODEL / "vae", train_batch_size=size, max_train_steps=2, checkpointing_steps=2,
        optim={"learning_rate": 1.0e-3, "lr_warmup_steps": 1, "adam_epsilon": 1.0e-4},
        data={**data_of(drawings), "concept_column": None},
    )  # fmt: skip


def end_of(folder: Path) -> dict[str, Tensor]:
    assert (folder / "diffusion" / "summary.md").is_file()
    assert (folder / "diffusion" / "pipeline" / "model_index.json").is_file()
    return saved_state(folder / "diffusion" / "checkpoint-2")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, drawings: Path) -> dict[str, Tensor]:
    """The end of `python scripts/train_diffusion.py`."""
    folder = tmp_path_factory.mktemp("plain")
    script("scripts/train_diffusion.py", "--config", config_of(folder, drawings, 4))
    return end_of(folder)


def test_accelerate_reads_every_shipped_file() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    files = sorted(CONFIGS.glob("*.yaml"))
    assert {file.stem for file in files} == {"cpu", "deepspeed_zero2", "fsdp2", "gpu", "multi_gpu", "two_cpu"}
    kinds = {file.stem: load_config_from_file(str(file)).distributed_type.value for file in files}
    assert kinds["fsdp2"] == "FSDP"
    assert kinds["multi_gpu"] == "MULTI_GPU"
    assert kinds["deepspeed_zero2"] == "DEEPSPEED"


@pytest.mark.slow
def test_a_call_in_a_notebook(tmp_path: Path, drawings: Path, plain: dict[str, Tensor]) -> None:
    torch.set_num_threads(1)
    load_script("train_diffusion").main(["--config", str(config_of(tmp_path, drawings, 4))])
    assert_same_bits(end_of(tmp_path), plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu", "gpu", "default"])
def test_accelerate_launch_of_one_process_is_plain_python(
    tmp_path: Path, drawings: Path, plain: dict[str, Tensor], name: str
) -> None:
    from accelerate.utils import write_basic_config

    file = CONFIGS / f"{name}.yaml"
    if name == "default":  # what `accelerate config default` writes
        file = tmp_path / "default.yaml"
        write_basic_config(save_location=str(file))
    script("scripts/train_diffusion.py", "--config", config_of(tmp_path, drawings, 4), launcher=(*LAUNCH, str(file)))
    assert_same_bits(end_of(tmp_path), plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchrun", "two_cpu", "multi_gpu", "fsdp2"])
def test_two_processes_of_every_launcher_train_as_one(
    tmp_path: Path, drawings: Path, plain: dict[str, Tensor], name: str
) -> None:
    ranks = ("--num_processes", "2", "--main_process_port", "29583")
    launcher = TWO_RANKS if name == "torchrun" else (*LAUNCH, str(CONFIGS / f"{name}.yaml"), *ranks)
    script("scripts/train_diffusion.py", "--config", config_of(tmp_path, drawings, 2), launcher=launcher)
    end = end_of(tmp_path)
    assert end.keys() == plain.keys()
    for key, tensor in plain.items():
        torch.testing.assert_close(end[key], tensor, rtol=0, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
