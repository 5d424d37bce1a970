"""Small fine-tuning runs of the tiny pipeline on eight plain pictures, for the tests of fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from ldm_pipe import LatentDiffusionPipeline
from ldm_pipe.training.run.config import build_config
from ldm_pipe.training.run.loop import Trainer
from ldm_pipe.training.tasks.finetune.config import FinetuneConfig
from ldm_pipe.training.tasks.finetune.nets import Trained
from ldm_pipe.training.tasks.finetune.run import load_model, make_trainer
from tests.source import ROOT

TINY = ROOT / "tests" / "data" / "tiny_pipeline"
COLOURS = ("red", "green", "blue", "white", "black", "yellow", "purple", "orange")
BASE: dict[str, Any] = {
    "pretrained_model_name_or_path": str(TINY),
    "max_train_steps": 4,
    "train_batch_size": 4,
    "checkpointing_steps": 2,
    "report_to": "none",
    "num_threads": 1,
}
OPTIM = {"learning_rate": 1.0e-2, "lr_scheduler": "constant", "lr_warmup_steps": 0}


def make_pictures(folder: Path, captions: bool = True) -> Path:
    """Write eight pictures of 40x32 pixels, with a metadata.jsonl or without."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, colour in enumerate(COLOURS):
        image = Image.new("RGB", (40, 32), colour)
        image.paste((40 * index, 128, 20), (4, 4, 12 + index, 20))
        image.save(folder / f"{colour}.png")
    if captions:
        rows = [json.dumps({"file_name": f"{colour}.png", "text": f"{colour} apple"}) for colour in COLOURS]
        (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def make_config(folder: Path, **changes: Any) -> FinetuneConfig:
    """Build a run config; `data` and `optim` are joined to the defaults, the rest is replaced."""
    data = {"train_data_dir": str(folder / "pictures"), "resolution": 32, **changes.pop("data", {})}
    optim = {**OPTIM, **changes.pop("optim", {})}
    names = {"output_dir": str(folder / "run"), "cache_dir": str(folder / "cache")}
    return build_config(FinetuneConfig, {**BASE, **names, **changes, "data": data, "optim": optim}, "test")


def start(folder: Path, **changes: Any) -> tuple[Trainer, Trained, LatentDiffusionPipeline]:
    """Put a run together, with its pictures."""
    if not (folder / "pictures").is_dir():
        make_pictures(folder / "pictures")
    config = make_config(folder, **changes)
    pipe = load_model(config)
    return *make_trainer(pipe, config), pipe
