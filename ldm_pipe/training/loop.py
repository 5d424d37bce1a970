"""The training loop shared by all training scripts: it knows parts with a loss, steps and checkpoints, no model.

Everything that happens in step k (data, noise, learning rate, EMA decay) is a function of the config and k, so a
resumed run continues exactly: a checkpoint holds weights, EMA and optimiser state, and no generator or loader.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ldm_pipe.data.order import DataOrder
from ldm_pipe.pretrained import LdmPipeError, atomic_write
from ldm_pipe.training.checkpoint import (
    RunLock,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
    step_of,
)
from ldm_pipe.training.config import OptimConfig, TrainConfig, config_changes, dump_config
from ldm_pipe.training.ema import Ema
from ldm_pipe.training.environment import describe_environment
from ldm_pipe.training.optim import lr_at, make_optimizer
from ldm_pipe.training.stop import StopSignal

if TYPE_CHECKING:
    from accelerate import Accelerator

Logs = dict[str, float]


@dataclass(frozen=True)
class Micro:
    """One process's slice of one accumulation step of a global batch."""

    step: int
    indices: list[int]  # rows of the data set
    positions: range  # their places in the global batch, which key the noise
    memo: dict[str, Any] = field(default_factory=dict)  # what an earlier part of the same step leaves for a later one


@dataclass
class Part:
    """One network trained by one optimiser. `loss(micro)` returns the mean loss of the slice and values to log."""

    name: str
    module: nn.Module
    loss: Callable[[Micro], tuple[Tensor, Logs]]
    optim: OptimConfig
    ema_decay: float | None = None
    start_step: int = 0  # the part rests before this step
    clip: bool = True


class Trainer:
    """Train parts together: in every step each part in turn draws its losses, accumulates, clips and steps.

    Args:
        config: the run's config.
        parts: trained in this order within each step.
        num_items: rows of the data set.
        weights: None or one drawing weight per row.
        fingerprint: of the data set; a resumed run must have the same.
        validate: called with the step, EMA weights in place, on the main process, every `validation_steps`.
        save_result: called with EMA weights in place on the main process after every checkpoint: writes the result.
        kept: further modules by name, alike in all processes, whose state belongs in the checkpoint.
    """

    def __init__(
        self,
        config: TrainConfig,
        parts: list[Part],
        *,
        num_items: int,
        weights: Any = None,
        fingerprint: str = "",
        validate: Callable[[int, Trainer], None] | None = None,
        save_result: Callable[[], None] | None = None,
        kept: Mapping[str, nn.Module] | None = None,
    ) -> None:
        """Set processes, optimisers and the data order up; nothing is trained yet."""
        from accelerate import Accelerator

        _refuse_half_weights(parts)
        self.config, self.parts, self.fingerprint = config, parts, fingerprint
        self.validate, self.save_result = validate, save_result
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        self.accelerator: Accelerator = Accelerator(
            mixed_precision=config.mixed_precision, cpu=not torch.cuda.is_available()
        )
        self.folder = Path(config.output_dir)
        self.is_main: bool = self.accelerator.is_main_process
        self.global_batch = (
            config.train_batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes
        )
        self.order = DataOrder(num_items, self.global_batch, config.seed, weights)
        self.raw = {part.name: part.module for part in parts}
        self.kept = dict(kept or {})
        self.ema = {
            p.name: Ema(p.module.to(self.accelerator.device), p.ema_decay) for p in parts if p.ema_decay is not None
        }
        self.optimizers = {part.name: make_optimizer(part.module, part.optim) for part in parts}
        for part in parts:
            self._prepare(part)
        self.step = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.writer: Any = None

    def _prepare(self, part: Part) -> None:
        module: nn.Module = part.module
        if self.config.torch_compile:
            module.compile()  # in place: the names of the weights stay as they are
        part.module = self.accelerator.prepare(module)

    # -- state ---------------------------------------------------------------------------------------------------

    def _groups(self) -> dict[str, dict[str, Tensor]]:
        groups: dict[str, dict[str, Tensor]] = {n: dict(module.state_dict()) for n, module in self.kept.items()}
        for name, module in self.raw.items():
            groups[name] = dict(module.state_dict())
            groups[f"{name}.optimizer"] = optimizer_tensors(self.optimizers[name])
            if name in self.ema:
                groups[f"{name}.ema"] = self.ema[name].state_dict()
        return groups

    def save(self) -> None:
        """Write a checkpoint of the present step, and the result beside it."""
        if self.is_main:
            state = {
                "config": self.config.model_dump(mode="json"),
                "fingerprint": self.fingerprint,
                "global_batch": self.global_batch,
                "skipped": self.skipped,
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
            }
            groups = self._groups()
            _refuse_nonfinite(groups, str(self.folder))
            save_checkpoint(self.folder, self.step, groups, state, keep=self.config.checkpoints_total_limit)
            if self.save_result:
                self.with_ema(self.save_result)
        self.accelerator.wait_for_everyone()

    def resume(self, which: str) -> None:
        """Continue from a whole checkpoint.

        Raises: LdmPipeError listing what differs (config, data set, global batch).
        """
        folder = find_checkpoint(self.folder, which)
        if folder is None:
            return
        groups, state = load_checkpoint(folder)
        changes = config_changes(state["config"], self.config.model_dump(mode="json"))
        if changes and not self.config.allow_config_change:
            what = "the config differs from the checkpoint's: " + "; ".join(changes)
            raise LdmPipeError(what, str(folder), "Use the saved config, or --allow_config_change if you are sure.")
        if state["fingerprint"] != self.fingerprint:
            raise LdmPipeError(
                "the data set changed since the checkpoint was written", str(folder), "Restore the data."
            )
        if state["global_batch"] != self.global_batch:
            what = f"the global batch is {self.global_batch}, the checkpoint's was {state['global_batch']}"
            raise LdmPipeError(
                what, str(folder), "Choose batch size x accumulation x processes to give the same product."
            )
        try:
            for name, module in self.kept.items():
                module.load_state_dict(groups[name], strict=True)
            for name, module in self.raw.items():
                module.load_state_dict(groups[name], strict=True)
                restore_optimizer(self.optimizers[name], groups[f"{name}.optimizer"])
                if name in self.ema:
                    self.ema[name].load_state_dict(groups[f"{name}.ema"])
        except (RuntimeError, KeyError, ValueError) as error:
            what = f"the checkpoint does not fit the networks of this config ({' '.join(str(error).split()):.300})"
            raise LdmPipeError(what, str(folder), "Use the saved config.") from error
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.skipped = int(state["step"]), int(state["skipped"])
        later = [p.name for p in list_checkpoints(self.folder) if step_of(p) > self.step]
        if later and which not in ("latest", "auto"):  # `latest` has found those damaged
            what = f"step {self.step} is resumed where later checkpoints lie: {', '.join(later)}"
            raise LdmPipeError(what, str(self.folder), "They would pass for newer ones: move them away.")

    def _refuse_old_run(self) -> None:
        """Refuse to start anew where another run's checkpoints would be mistaken for this one's."""
        old = list_checkpoints(self.folder)
        if old:
            what = f"the folder holds checkpoints of an earlier run, the last is {old[-1].name}"
            raise LdmPipeError(
                what, str(self.folder), "Add --resume_from_checkpoint latest, or use another output_dir."
            )

    def with_ema(self, action: Callable[[], None]) -> None:
        """Run something with every part's averaged weights in place."""
        from contextlib import ExitStack

        with ExitStack() as stack:
            for name, ema in self.ema.items():
                stack.enter_context(ema.applied(self.raw[name]))
            training = {name: module.training for name, module in self.raw.items()}
            for module in self.raw.values():
                module.eval()
            try:
                action()
            finally:
                for name, module in self.raw.items():
                    module.train(training[name])

    # -- steps ---------------------------------------------------------------------------------------------------

    def _micros(self) -> list[Micro]:
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        num = self.config.gradient_accumulation_steps
        size = self.config.train_batch_size
        micros = []
        for i in range(num):
            rows = self.order.batch_at(
                self.step, process_index=rank, num_processes=world, micro_step=i, num_micro_steps=num
            )
            first = (i * world + rank) * size
            micros.append(Micro(self.step, [int(row) for row in rows], range(first, first + size)))
        return micros

    def _train_part(self, part: Part, micros: list[Micro]) -> tuple[Logs, bool]:
        """Do one optimiser step of one part; returns its logs and whether the gradient was finite."""
        optimizer = self.optimizers[part.name]
        lr = lr_at(self.step - part.start_step, part.optim, self.config.max_train_steps - part.start_step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, module in self.raw.items():
            module.requires_grad_(name == part.name)
        logs: Logs = {}
        for i, micro in enumerate(micros):
            with self._sync_only_if(i == len(micros) - 1, part.module):
                loss, values = part.loss(micro)
                self.accelerator.backward(loss / len(micros))
            for key, value in {"loss": float(loss.detach()), **values}.items():
                logs[key] = logs.get(key, 0.0) + value / len(micros)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm = float(nn.utils.clip_grad_norm_(parameters, part.optim.max_grad_norm if part.clip else math.inf))
        finite = math.isfinite(norm)
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
        elif finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if finite and part.name in self.ema:
            self.ema[part.name].update(self.raw[part.name], self.step)
        return {**logs, "grad_norm": norm, "lr": lr}, finite

    def _sync_only_if(self, last: bool, module: nn.Module) -> Any:
        from contextlib import nullcontext

        return nullcontext() if last else self.accelerator.no_sync(module)

    def train_step(self) -> Logs:
        """Do step `self.step` for every part and count it.

        Raises: LdmPipeError after `max_nonfinite_steps` steps in a row without a finite gradient.
        """
        micros = self._micros()
        logs: Logs = {}
        all_finite = True
        for part in self.parts:
            if self.step < part.start_step:
                continue
            values, finite = self._train_part(part, micros)
            logs.update({f"{part.name}/{key}": value for key, value in values.items()})
            all_finite = all_finite and finite
        self.step += 1
        self.skipped_in_a_row = 0 if all_finite else self.skipped_in_a_row + 1
        if not all_finite:
            self.skipped += 1
            rows = [row for micro in micros for row in micro.indices]
            tqdm.write(f"step {self.step - 1}: NaN or infinity, step skipped; rows {rows}", file=sys.stderr)
            if self.skipped_in_a_row >= self.config.max_nonfinite_steps:
                what = f"{self.skipped_in_a_row} steps in a row gave NaN or infinity; last rows {rows}"
                raise LdmPipeError(what, str(self.folder), "Lower the learning rate; the last checkpoint is kept.")
        return logs

    def fit(self) -> None:
        """Train to the end, or to a stop signal: then save and return."""
        lock = RunLock(self.folder) if self.is_main else None
        stop = StopSignal()
        try:
            if self.config.resume_from_checkpoint:
                self.resume(self.config.resume_from_checkpoint)
            else:
                self._refuse_old_run()
            self._start_records()
            for module in self.raw.values():
                module.train()
            self._run(stop)
        finally:
            for module in self.raw.values():
                module.requires_grad_(True)
            stop.restore()
            if self.writer is not None:
                self.writer.close()
            if lock is not None:
                lock.release()

    def _run(self, stop: StopSignal) -> None:
        config, saved_at = self.config, self.step if self.config.resume_from_checkpoint else -1
        bar = tqdm(total=config.max_train_steps, initial=self.step, disable=not self.is_main, dynamic_ncols=True)
        began, done = time.perf_counter(), 0
        while self.step < config.max_train_steps:
            logs = self.train_step()
            done += 1
            bar.update(1)
            logs["images_per_second"] = done * self.global_batch / (time.perf_counter() - began)
            self._record(logs, bar)
            if self._anyone_wants_to_stop(stop):
                break
            if self.validate and self.step % config.validation_steps == 0 and self.is_main:
                self.with_ema(partial(self.validate, self.step, self))
            if self.step % config.checkpointing_steps == 0:
                self.save()
                saved_at = self.step
        bar.close()
        if saved_at != self.step:
            self.save()
        elif (
            not done and self.save_result and self.is_main
        ):  # the run before may have ended before its result was there
            self.with_ema(self.save_result)

    def _anyone_wants_to_stop(self, stop: StopSignal) -> bool:
        if self.accelerator.num_processes == 1:
            return stop.wanted
        wish = torch.tensor([float(stop.wanted)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(wish, "sum").item())  # type: ignore[union-attr]

    # -- records -------------------------------------------------------------------------------------------------

    def _start_records(self) -> None:
        if not self.is_main:
            return
        atomic_write(self.folder / "config.yaml", dump_config(self.config))
        facts = describe_environment(self.accelerator.device, self.accelerator.num_processes, self.raw)
        atomic_write(self.folder / "run.json", json.dumps(facts, indent=1) + "\n")
        if self.config.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step)

    def _record(self, logs: Logs, bar: Any) -> None:
        if not self.is_main:
            return
        if self.writer is not None and (self.step % 10 == 0 or self.step == 1):
            for key, value in logs.items():
                self.writer.add_scalar(key, value, self.step)
        if self.step % 10 == 0:
            shown = {f"{name}": f"{logs[f'{name}/loss']:.4f}" for name in self.raw if f"{name}/loss" in logs}
            bar.set_postfix({**shown, "img/s": f"{logs['images_per_second']:.1f}"})


def _refuse_half_weights(parts: list[Part]) -> None:
    for part in parts:
        half = [n for n, p in part.module.named_parameters() if p.requires_grad and p.dtype != torch.float32]
        if half:
            what = f"{len(half)} trainable weights of {part.name} are not float32, for instance {half[0]}"
            raise LdmPipeError(what, "training", "Load the weights in float32; mixed_precision sets the compute dtype.")


def _refuse_nonfinite(groups: dict[str, dict[str, Tensor]], where: str) -> None:
    for group, tensors in groups.items():
        bad = [name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
        if bad:
            what = (
                f"no checkpoint is written: {len(bad)} tensors of {group} hold NaN or infinity, for instance {bad[0]}"
            )
            raise LdmPipeError(what, where, "Lower the learning rate; the last checkpoint is kept.")
