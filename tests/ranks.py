"""Runs on several gloo processes of this machine, forked from a server that has torch imported already."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _enter(function: Callable[..., None], environ: Mapping[str, str], args: Any) -> None:
    os.environ.update(environ)
    function(*args)


def _environ(rank: int, num: int, port: int) -> dict[str, str]:
    """Set what torchrun sets; nothing for a process alone."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num, "LOCAL_WORLD_SIZE": num, "MASTER_PORT": port}
    launched = {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in ranks.items()}}
    return {"CUDA_VISIBLE_DEVICES": "", **(launched if num > 1 else {})}


def run_ranks(
    function: Callable[..., None], num: int, *args: Any, environ: Mapping[str, str] | None = None, seconds: float = 600
) -> list[int | None]:
    """Run `function(*args)` in each process; returns the exit codes. The function must lie in this file."""
    context = mp.get_context("forkserver")
    preload = ["tests.ranks", "tests.training", "tests.finetuning", "accelerate", "torch.distributed.fsdp"]
    context.set_forkserver_preload(preload)
    port = free_port()
    processes = [
        context.Process(target=_enter, args=(function, {**_environ(rank, num, port), **(environ or {})}, args))
        for rank in range(num)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def _trainer(folder: Path, changes: dict[str, Any], rank: int) -> Any:
    """Make the tiny trainer; `rank` above 0 trains a LoRA of that rank on a frozen U-Net."""
    from ldm_pipe.interop.lora.layers import TrainableLora
    from ldm_pipe.training.run.loop import Part, Trainer
    from ldm_pipe.training.run.rng import generator
    from ldm_pipe.training.tasks.diffusion import diffusion_loss
    from tests.training import Both, make_config, make_data, make_trainer, make_unet

    config = make_config(folder, **changes)
    if not rank:
        return make_trainer(config)
    unet, data = make_unet(), make_data()
    net = Both(unet, TrainableLora({"unet": unet}, rank=rank, generator=generator(0, "lora")))
    part = Part("unet", net, lambda micro: loss(micro), config.optim, 0.9, save_frozen=False)
    trainer = Trainer(config, [part], num_items=len(data.mean), fingerprint="data")
    sizes: Any = {"global_batch": trainer.global_batch, "device": trainer.accelerator.device}
    loss = diffusion_loss(part.module, data, config.schedule.build(), config, **sizes)
    return trainer


def train(folder: Path, changes: dict[str, Any], lora: int = 0, stop_at: int | None = None) -> None:
    """Train to the end, leaving losses and rows of the own slices beside the checkpoints.

    In step `stop_at` the last process alone gets SIGTERM.
    """
    trainer = _trainer(folder, changes, lora)
    trainer.save_result = lambda: trainer.raw["unet"].save_pretrained(folder / "unet") if not lora else None
    _fit_noted(trainer, folder, stop_at)


def train_with_nan(folder: Path, changes: dict[str, Any], at: int) -> None:
    """Train to the end; in step `at` the last process alone has a loss of NaN."""
    trainer = _trainer(folder, changes, 0)
    part = trainer.parts[0]
    loss = part.loss

    def poisoned(micro: Any) -> Any:
        value, logs = loss(micro)
        return value * float("nan" if micro.step == at and trainer.accelerator.is_last_process else 1), logs

    part.loss = poisoned
    _fit_noted(trainer, folder, None)


def finetune(folder: Path, changes: dict[str, Any]) -> None:
    """Fine-tune the tiny pipeline to the end as `scripts/finetune.py` does; `folder` holds `pictures`."""
    from ldm_pipe.training.tasks.finetune.run import load_model, make_trainer
    from tests.finetuning import make_config

    config = make_config(folder, **changes)
    trainer, _ = make_trainer(load_model(config), config)
    _fit_noted(trainer, Path(config.output_dir), None)


def _fit_noted(trainer: Any, folder: Path, stop_at: int | None) -> None:
    """Train, noting losses and rows of the own slices in `rank-<number>.json`."""
    losses: list[float] = []
    rows: list[list[int]] = []
    step, mean = trainer.train_step, trainer.accelerator.reduce

    def noted() -> Any:
        if trainer.step == stop_at and trainer.accelerator.is_last_process:
            os.kill(os.getpid(), signal.SIGTERM)
        rows.append([row for micro in trainer._micros() for row in micro.indices])
        logs = step()
        import torch

        losses.append(float(mean(torch.tensor(logs["unet/loss"], dtype=torch.float64), "mean")))
        return logs

    trainer.train_step = noted
    trainer.fit()
    facts = {"losses": losses, "rows": rows, "start": trainer.step - len(losses)}
    (folder / f"rank-{trainer.accelerator.process_index}.json").write_text(json.dumps(facts))


def die(folder: Path, changes: dict[str, Any], at: int) -> None:
    """Train; the last process is killed in a step."""
    trainer = _trainer(folder, changes, 0)
    step = trainer.train_step

    def watched() -> Any:
        if trainer.step == at and trainer.accelerator.is_last_process:
            os.kill(os.getpid(), signal.SIGKILL)
        return step()

    trainer.train_step = watched
    try:
        trainer.fit()
    except Exception as error:  # noqa: BLE001  what a user reads
        (folder / "error.txt").write_text(f"{type(error).__name__}: {error}")
        sys.exit(2)


def facts_of(folder: Path, num: int) -> list[dict[str, Any]]:
    """Read what each process noted."""
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(num)]


def rows_of(facts: list[dict[str, Any]]) -> list[list[int]]:
    """Return the rows of every step, of all processes together."""
    steps = zip(*(fact["rows"] for fact in facts), strict=True)
    return [sorted(row for rows in step for row in rows) for step in steps]


def assert_near(a: dict[str, Any], b: dict[str, Any], most: float = 1e-5) -> None:
    """Compare two states of the same names, number by number."""
    assert a.keys() == b.keys()
    worst = max((float((a[name].double() - b[name].double()).abs().max()), name) for name in a)
    assert worst[0] < most, worst
