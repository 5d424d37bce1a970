"""What a run tells while it goes on: history, trackers, progress bar. It knows steps and numbers, no networks.

`history.jsonl` is always written, one line for every tenth step; TensorBoard or Weights & Biases get the same numbers,
and the pictures.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from ldm_pipe.masking import masked_command
from ldm_pipe.pretrained import LdmPipeError, atomic_write, read_json
from ldm_pipe.training.run.config import TrainConfig, dump_config

EVERY = 10


class Tracker(Protocol):
    """Where numbers and pictures go."""

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Take the values of a step."""

    def picture(self, name: str, path: Path, step: int) -> None:
        """Take a picture."""

    def close(self) -> None:
        """Write out what is held back."""


class TensorBoard:
    """Event files in `<run>/tensorboard`."""

    def __init__(self, folder: Path, step: int) -> None:
        """Open the files; what an earlier start wrote after `step` is hidden."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            fix = "pip install tensorboard, or train with --report_to none"
            raise LdmPipeError("tensorboard is not installed", "report_to", fix) from None
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Write scalars."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, name: str, path: Path, step: int) -> None:
        """Write an image."""
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Write out what is held back."""
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; WANDB_MODE, WANDB_PROJECT and the login are theirs. Without a login it is offline."""

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        """Start the run, or continue the one that this folder began."""
        try:
            import wandb  # pyrefly: ignore[missing-import]
        except ImportError:
            fix = "pip install wandb, or train with --report_to tensorboard"
            raise LdmPipeError("wandb is not installed", "report_to", fix) from None
        self.wandb = wandb
        note = folder / "wandb_id"
        known = note.read_text(encoding="utf-8").strip() if note.is_file() else None
        self.run = wandb.init(
            dir=str(folder), id=known, resume="allow" if known else None, name=folder.name,
            config=config.model_dump(mode="json"), mode=_wandb_mode(),
        )  # fmt: skip
        atomic_write(note, self.run.id + "\n")
        self.run.define_metric("*", step_metric="step")  # a resumed run may go back some steps

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Log scalars."""
        self.run.log({**values, "step": step})

    def picture(self, name: str, path: Path, step: int) -> None:
        """Log an image."""
        self.run.log({name: self.wandb.Image(str(path)), "step": step})

    def close(self) -> None:
        """End the run."""
        self.run.finish()


def _wandb_mode() -> Any:
    import os
    from netrc import NetrcParseError, netrc

    if "WANDB_MODE" in os.environ or "WANDB_API_KEY" in os.environ:
        return None  # wandb reads them itself
    try:
        known = netrc().authenticators("api.wandb.ai")
    except (OSError, NetrcParseError):
        known = None
    return None if known else "offline"  # it would ask for a login on the terminal and wait


def open_tracker(folder: Path, config: TrainConfig, step: int) -> Tracker | None:
    """Open what `report_to` names.

    Raises: LdmPipeError if it is not installed.
    """
    match config.report_to:
        case "tensorboard":
            return TensorBoard(folder, step)
        case "wandb":
            return WeightsAndBiases(folder, config)
    return None


def read_history(folder: Path) -> list[dict[str, float]]:
    """Read the numbers of a run; a line torn by a kill is left out."""
    path, rows = folder / "history.jsonl", []
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


class Records:
    """History, tracker and progress bar of the main process."""

    def __init__(self, folder: Path, config: TrainConfig, step: int) -> None:
        """Open all; lines that an earlier start wrote after `step` are dropped from the history."""
        self.folder, self.total = folder, config.max_train_steps
        self.tracker = open_tracker(folder, config, step)
        self.history = [row for row in read_history(folder) if row["step"] <= step]
        atomic_write(folder / "history.jsonl", "".join(json.dumps(row) + "\n" for row in self.history))
        self.sheets: dict[str, Path] = {}
        self.pictures, self.seconds, self.steps = 0, 0.0, 0
        self._window = (0, 0.0)
        self.bar = tqdm(total=self.total, initial=step, dynamic_ncols=True, unit="step")

    def step(self, step: int, logs: Mapping[str, float], pictures: int, began: float, memory: int) -> None:
        """Take one step's numbers.

        Args:
            step: steps done.
            logs: values by name.
            pictures: of this step's global batch.
            began: when the step began, from `time.perf_counter`; saving and validation do not count.
            memory: largest memory so far, bytes.
        """
        self.steps += 1
        self.pictures += pictures
        self.seconds += time.perf_counter() - began
        self.bar.update(1)
        if step % EVERY and step not in (1, self.total):
            return
        done, seconds = self.pictures - self._window[0], self.seconds - self._window[1]
        self._window = (self.pictures, self.seconds)
        speed = done / max(seconds, 1e-9)
        self.note(step, {**logs, "images_per_second": speed, "memory_gb": memory / 1e9})
        losses = {name.removesuffix("/loss"): f"{v:.4f}" for name, v in logs.items() if name.endswith("/loss")}
        self.bar.set_postfix({**losses, "img/s": f"{speed:.1f}", "GB": f"{memory / 1e9:.2f}"})

    def note(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers of a step."""
        row = {"step": step, **{name: value if math.isfinite(value) else None for name, value in values.items()}}
        self.history.append(row)  # type: ignore[arg-type]
        try:
            with (self.folder / "history.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:  # a full disk ends no training; it is the checkpoint that counts
            tqdm.write(f"step {step}: history.jsonl cannot be written ({error.strerror})", file=sys.stderr)
        self._track(lambda tracker: tracker.numbers(values, step), step)

    def show(self, name: str, path: Path, step: int) -> None:
        """Take a picture that lies in the run folder."""
        self.sheets[name] = path
        self._track(lambda tracker: tracker.picture(name, path, step), step)

    def _track(self, tell: Callable[[Tracker], None], step: int) -> None:
        """Tell the tracker; one that cannot write any more (a full disk) is done without, and ends no training."""
        if self.tracker is None:
            return
        try:
            tell(self.tracker)
        except OSError as error:
            self.tracker = None
            tqdm.write(f"step {step}: the run goes on without its tracker ({error.strerror or error})", file=sys.stderr)

    def close(self) -> None:
        """Close all."""
        self.bar.close()
        if self.tracker is not None:
            self.tracker.close()


def start_records(folder: Path, config: TrainConfig, facts: dict[str, Any], step: int) -> Records:
    """Write `config.yaml` and `run.json` and open the records of a run.

    Args:
        facts: about this start, for `run.json`; those of the starts that it goes on from stay under "before".
        step: steps done.
    """
    atomic_write(folder / "config.yaml", dump_config(config))
    path = folder / "run.json"
    if config.resume_from_checkpoint and path.is_file():
        earlier = read_json(path)
        for one in (earlier, *earlier.get("before", [])):
            one["command"] = masked_command(str(one.get("command", "")))
        facts = {**facts, "before": [*earlier.pop("before", []), earlier]}
    atomic_write(path, json.dumps(facts, indent=1) + "\n")
    return Records(folder, config, step)
