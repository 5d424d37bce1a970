"""The training loop shared by all training scripts: it knows parts with a loss, steps and checkpoints, no model.

Everything that happens in step k (data, noise, learning rate, EMA decay) is a function of the config and k, so a
resumed run continues exactly: a checkpoint holds weights, EMA and optimiser state, and no generator or loader.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ldm_pipe.data.order import DataOrder
from ldm_pipe.pretrained import LdmPipeError
from ldm_pipe.training.run import sharding, state
from ldm_pipe.training.run.checkpoint import (
    RunLock,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    refuse_old_run,
    save_checkpoint,
    step_of,
)
from ldm_pipe.training.run.config import TrainConfig, default_values
from ldm_pipe.training.run.ema import Ema
from ldm_pipe.training.run.environment import describe_environment, peak_memory, plain_errors, start_processes
from ldm_pipe.training.run.optim import lr_at, make_optimizer, warn_of_long_warmup
from ldm_pipe.training.run.parts import Logs, Micro, Order, Part
from ldm_pipe.training.run.records import Records, start_records
from ldm_pipe.training.run.stop import StopSignal
from ldm_pipe.training.run.summary import write_summary
from ldm_pipe.training.run.update import Update, make_update
from ldm_pipe.training.run.zero import ZeroUpdate, zero_stage


class NonFiniteError(LdmPipeError):
    """Too many steps in a row gave NaN or infinity."""


class Trainer:
    """Train parts together: in every step each part in turn draws its losses, accumulates, clips and steps.

    What requires grad now is trained. Where the launcher asks for FSDP, a sharded copy is trained and `part.module` is
    that copy; the module given here then holds whole weights whenever `validate` or `save_result` is called.

    Args:
        config: the run's config.
        parts: trained in this order within each step.
        num_items: rows of the data set.
        weights: None or one drawing weight per row.
        order: makes the data order of a global batch size; without it `DataOrder` over rows and weights.
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
        order: Callable[[int], Order] | None = None,
        fingerprint: str = "",
        validate: Callable[[int, Trainer], None] | None = None,
        save_result: Callable[[], None] | None = None,
        kept: Mapping[str, nn.Module] | None = None,
    ) -> None:
        """Set processes, optimisers and the data order up; nothing is trained yet."""
        for part in parts:
            state.refuse_half_weights(part.name, part.module)
        self.config, self.parts, self.fingerprint = config, parts, fingerprint
        self.validate, self.save_result = validate, save_result
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        self.accelerator = start_processes(config.mixed_precision)
        self.sharded = sharding.sharding_wanted()
        self.split = self.sharded or zero_stage() > 0  # a checkpoint is gathered from all processes
        if self.split and len(parts) > 1:
            what = "FSDP and DeepSpeed train one network, this run has several"
            raise LdmPipeError(what, "accelerate config", "Use DDP.")
        self.folder = Path(config.output_dir)
        self.is_main: bool = self.accelerator.is_main_process
        processes = self.accelerator.num_processes
        self.global_batch = config.train_batch_size * config.gradient_accumulation_steps * processes
        self.order: Order = (
            order(self.global_batch) if order else DataOrder(num_items, self.global_batch, config.seed, weights)
        )
        self.raw = {part.name: part.module for part in parts}
        self.kept = dict(kept or {})
        self.nets = {part.name: self._place(part) for part in parts}  # what is trained: the modules, or sharded copies
        self.trained = {n: [p for p in net.parameters() if p.requires_grad] for n, net in self.nets.items()}
        self.left_out = {p.name: set() if p.save_frozen else state.frozen_names(p.module) for p in parts}
        self.frozen = {n: state.digest(self.raw[n], names) for n, names in self.left_out.items() if names}
        self.ema = {p.name: Ema(self.nets[p.name], p.ema_decay) for p in parts if p.ema_decay is not None}
        self.optimizers = {part.name: make_optimizer(self.nets[part.name], part.optim) for part in parts}
        self.updates = {part.name: self._prepare(part) for part in parts}
        for part in parts:
            part.module = self.updates[part.name].module
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.records: Records | None = None
        self.began = time.perf_counter()

    def _place(self, part: Part) -> nn.Module:
        module = part.module.to(self.accelerator.device)
        if not self.sharded:
            return module
        net = sharding.shard(module, self.accelerator)
        module.to("cpu")  # waits there for whole weights
        return net

    def _prepare(self, part: Part) -> Update | ZeroUpdate:
        net = self.nets[part.name]
        if self.config.torch_compile:
            net.compile()  # in place: the names of the weights stay as they are
        limit = part.optim.max_grad_norm if part.clip else math.inf
        return make_update(part.name, net, self.optimizers[part.name], limit, self.accelerator)

    # State

    def _groups(self) -> state.Groups:
        """Gather all tensors of a checkpoint; where something is split, all processes call this."""
        groups: state.Groups = {n: dict(module.state_dict()) for n, module in self.kept.items()}
        for name, net in self.nets.items():
            groups[name] = state.module_tensors(net, self.left_out[name])
            groups[f"{name}.optimizer"] = self.updates[name].tensors()
            if name in self.ema:
                groups[f"{name}.ema"] = self.ema[name].state_dict()
        return state.gather(groups, keep=self.is_main) if self.split else groups

    def _facts(self) -> dict[str, Any]:
        """Say what run this is, for the checkpoint."""
        config = self.config.model_dump(mode="json")
        facts = {"config": config, "fingerprint": self.fingerprint, "global_batch": self.global_batch}
        return {**facts, "frozen": self.frozen}

    def save(self) -> None:
        """Write a checkpoint of the present step, and the result beside it."""
        groups = self._groups() if self.is_main or self.split else {}
        if self.is_main:
            scaler = self.accelerator.scaler
            facts = {**self._facts(), "skipped": self.skipped, "scaler": scaler.state_dict() if scaler else None}
            state.refuse_nonfinite(groups, str(self.folder))
            try:
                save_checkpoint(self.folder, self.step, groups, facts, keep=self.config.checkpoints_total_limit)
            except LdmPipeError as error:
                self._go_on_without("checkpoint", error)
        if self.save_result:
            try:
                self.with_ema(self.save_result)
            except LdmPipeError as error:
                self._go_on_without("result", error)
        self.accelerator.wait_for_everyone()

    def _go_on_without(self, what: str, error: LdmPipeError) -> None:
        """Raise an error of a save, or tell it where the config says so; that of the last step is always raised."""
        if self.config.on_save_error == "stop" or self.step >= self.config.max_train_steps:
            raise error
        tqdm.write(f"warning: the run goes on without a {what} of step {self.step}: {error}", file=sys.stderr)

    def resume(self, which: str) -> None:
        """Continue from a whole checkpoint.

        Raises: LdmPipeError listing what differs (config, data set, global batch, frozen weights).
        """
        folder = find_checkpoint(self.folder, which)
        if folder is None:
            return
        groups, saved = load_checkpoint(folder)
        state.refuse_other_run(saved, self._facts(), default_values(type(self.config)), str(folder))
        try:
            for name, module in self.kept.items():
                module.load_state_dict(groups[name], strict=True)
            for name, net in self.nets.items():
                state.restore_module(net, groups[name], self.left_out[name])
                self.updates[name].restore(groups[f"{name}.optimizer"])
                if name in self.ema:
                    self.ema[name].load_state_dict(groups[f"{name}.ema"])
        except (RuntimeError, KeyError, ValueError) as error:
            what = f"the checkpoint does not fit the networks of this config ({' '.join(str(error).split()):.300})"
            raise LdmPipeError(what, str(folder), "Use the saved config.") from error
        if self.accelerator.scaler is not None and saved["scaler"]:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        self.step, self.skipped = int(saved["step"]), int(saved["skipped"])
        later = [p.name for p in list_checkpoints(self.folder) if step_of(p) > self.step]
        if later and which not in ("latest", "auto"):  # `latest` has found those damaged
            what = f"step {self.step} is resumed where later checkpoints lie: {', '.join(later)}"
            raise LdmPipeError(what, str(self.folder), "They would pass for newer ones: move them away.")

    def with_ema(self, action: Callable[[], None]) -> None:
        """Run something on the main process with every part's averaged weights in place; all processes call this."""
        if self.sharded:
            for name, net in self.nets.items():
                tensors = {**net.state_dict(), **(self.ema[name].state_dict() if name in self.ema else {})}
                for key, target in self.raw[name].state_dict().items():
                    sharding.put(target, sharding.whole(tensors[key]))
        if not self.is_main:
            return
        with ExitStack() as stack:
            for name, module in self.raw.items():
                if self.sharded:
                    module.to(self.accelerator.device)
                    stack.callback(module.to, "cpu")
                elif name in self.ema:
                    stack.enter_context(self.ema[name].applied(module))
            training = {name: module.training for name, module in self.raw.items()}
            for module in self.raw.values():
                module.eval()
            try:
                action()
            finally:
                for name, module in self.raw.items():
                    module.train(training[name])

    # Steps

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
        update = self.updates[part.name]
        lr = lr_at(self.step - part.start_step, part.optim, self.config.max_train_steps - part.start_step)
        for group in self.optimizers[part.name].param_groups:
            group["lr"] = lr
        if len(self.parts) > 1:  # the loss of one part passes through the others
            self._let_train(part.name)
        logs: Logs = {}
        for i, micro in enumerate(micros):
            with update.share(last=i == len(micros) - 1):
                loss, values = part.loss(micro)
                update.backward(loss / len(micros))
            for key, value in {"loss": float(loss.detach()), **values}.items():
                logs[key] = logs.get(key, 0.0) + value / len(micros)
        norm, finite = update.step()
        if finite and part.name in self.ema:
            self.ema[part.name].update(self.nets[part.name], self.step)
        return {**logs, "grad_norm": norm, "lr": lr}, finite

    def _let_train(self, name: str | None) -> None:
        """Let gradients flow to the trained weights of one part; None: of all parts."""
        for part, parameters in self.trained.items():
            for parameter in parameters:
                parameter.requires_grad_(name in (None, part))

    def train_step(self) -> Logs:
        """Do step `self.step` for every part and count it.

        Raises: NonFiniteError after `max_nonfinite_steps` steps in a row without a finite gradient.
        """
        micros = self._micros()
        logs: Logs = {}
        bad: list[str] = []
        for part in self.parts:
            if self.step < part.start_step:
                continue
            values, finite = self._train_part(part, micros)
            logs.update({f"{part.name}/{key}": value for key, value in values.items()})
            if not finite:
                named = (f"{key}={value}" for key, value in values.items() if not math.isfinite(value))
                bad.append(f"{part.name} ({', '.join(named)})")
        self.step += 1
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if bad else 0
        if bad:
            self.skipped += 1
            rows = [row for micro in micros for row in micro.indices]
            text = f"NaN or infinity in {', '.join(bad)}, step skipped; rows {rows}"
            tqdm.write(f"step {self.step - 1}: {text}", file=sys.stderr)
            if self.skipped_in_a_row >= self.config.max_nonfinite_steps:
                what = f"{self.skipped_in_a_row} steps in a row gave NaN or infinity; last rows {rows}"
                raise NonFiniteError(what, str(self.folder), "Lower the learning rate; the last checkpoint is kept.")
        return logs

    def fit(self) -> None:
        """Train to the end, or to a stop signal: then save and return."""
        lock = RunLock(self.folder) if self.is_main else None
        stop = StopSignal()
        try:
            if self.config.resume_from_checkpoint:
                self.resume(self.config.resume_from_checkpoint)
            else:
                refuse_old_run(self.folder)
            self._start_records()
            for part in self.parts if self.is_main else ():
                warn_of_long_warmup(part.optim, self.config.max_train_steps - part.start_step)
            for net in self.nets.values():
                net.train()
            with plain_errors(str(self.folder)):
                self._run(stop)
            self._summarise()
        finally:
            self._let_train(None)
            stop.restore()
            if self.records is not None:
                self.records.close()
            if lock is not None:
                lock.release()

    def _run(self, stop: StopSignal) -> None:
        config, first = self.config, self.step
        saved_at = self.step if config.resume_from_checkpoint else -1
        if first >= config.max_train_steps and self.is_main:
            tqdm.write(f"nothing left to train: step {first} of {config.max_train_steps} is reached", file=sys.stderr)
        while self.step < config.max_train_steps:
            began = time.perf_counter()
            logs = self._step_or_save()
            if self.records is not None:
                memory = peak_memory(self.accelerator.device)
                self.records.step(self.step, logs, self.global_batch, began, memory)
            if self._anyone_wants_to_stop(stop):
                break
            if self.validate and self.step % config.validation_steps == 0:
                self._validate_or_go_on()
            if self.step % config.checkpointing_steps == 0:
                self.save()
                saved_at = self.step
        if saved_at != self.step:
            self.save()
        elif self.step == first and self.save_result:  # the run before may have ended before its result was there
            self.with_ema(self.save_result)

    def _validate_or_go_on(self) -> None:
        """Validate; where the sheet cannot be written, go on if the config says so: weights are not lost by it."""
        assert self.validate is not None
        try:
            self.with_ema(partial(self.validate, self.step, self))
        except (OSError, LdmPipeError) as error:
            full = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(full, OSError) or self.config.on_save_error == "stop":
                raise
            tqdm.write(f"warning: the run goes on without the sheet of step {self.step}: {error}", file=sys.stderr)

    def _step_or_save(self) -> Logs:
        try:
            return self.train_step()
        except NonFiniteError:
            with suppress(LdmPipeError):  # where the weights themselves are lost, the checkpoint before stays the last
                self.save()
            raise

    def _anyone_wants_to_stop(self, stop: StopSignal) -> bool:
        if self.accelerator.num_processes == 1:
            return stop.wanted
        wish = torch.tensor([float(stop.wanted)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(wish, "sum").item())  # type: ignore[union-attr]

    # Records

    def _start_records(self) -> None:
        if self.is_main:
            facts = describe_environment(self.accelerator.device, self.accelerator.num_processes, self.raw)
            facts |= {"seed": self.config.seed, "first_step": self.step}
            self.records = start_records(self.folder, self.config, facts, self.step)

    def show(self, name: str, path: Path) -> None:
        """Put a picture of the run folder, made while validating, into the tracker and the summary."""
        if self.records is not None:
            self.records.show(name, path, self.step)

    def note(self, values: Logs) -> None:
        """Put numbers, measured while validating, into the tracker and the history."""
        if self.records is not None:
            self.records.note(self.step, values)

    def _summarise(self) -> None:
        if self.records is None:
            return
        figures = {
            "steps": f"{self.step} of {self.config.max_train_steps}",
            "epochs": f"{self.order.epoch_at(self.step):.2f}",
            "skipped steps": self.skipped,
            "hours of this start": f"{(time.perf_counter() - self.began) / 3600:.3f}",
            "peak memory, GB": f"{peak_memory(self.accelerator.device) / 1e9:.2f}",
        }
        write_summary(self.folder, figures, self.records)
