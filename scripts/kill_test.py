"""Kill a training with SIGKILL at random moments, resume it each time, and compare its end with an unbroken run.

    python scripts/kill_test.py --kills 40 --seed 0

What enters: how many kills, and the seed of their moments. What leaves: one line of figures, and exit code 1 if any of
this fails: after each kill a whole checkpoint is found, at most one interval is done again, and in the end weights, EMA
and optimiser are those of the unbroken run bit for bit, and every picture was seen exactly once per epoch.

Half of the kills come from outside after a random time, half at a random file event in the middle of a save. Torch is
imported once; every start of the training is a fork of that process. The model is a tiny diffusion model on CPU.
"""

from __future__ import annotations

import argparse
import builtins
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from ldm_pipe.training.run import loop  # noqa: E402
from ldm_pipe.training.run.checkpoint import find_checkpoint, step_of  # noqa: E402
from tests.training import NUM_ITEMS, make_config, make_trainer, saved_state  # noqa: E402

STEPS, INTERVAL, BATCH = 33, 3, 4  # 12 epochs of 11 pictures in batches of 4
MOST_EVENTS = 50  # of a save
FILE_EVENTS = ((os, ("replace", "fsync", "mkdir", "unlink", "rmdir", "open", "chmod")), (builtins, ("open",)))


@dataclass
class Tally:
    """What was counted."""

    kills: int = 0
    in_a_save: int = 0
    runs: int = 0
    redone: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def die_in_a_save(save: int, event: int) -> None:
    """Arrange that this process is killed at one file event of one of its saves; both count from 0."""
    count, saves, real_save = 0, -1, loop.save_checkpoint

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count > event:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal saves
        saves += 1
        if saves == save:
            for module, names in FILE_EVENTS:
                for name in names:
                    setattr(module, name, counted(getattr(module, name)))
        return real_save(*args, **kwargs)

    loop.save_checkpoint = watched  # type: ignore[assignment]


def train(folder: Path, resume: bool, death: tuple[int, int] | None) -> None:
    """Train to the end in this process, writing each finished step and its rows to `rows.txt`."""
    config = make_config(
        folder, max_train_steps=STEPS, train_batch_size=BATCH, checkpointing_steps=INTERVAL,
        resume_from_checkpoint="auto" if resume else None,
    )  # fmt: skip
    trainer = make_trainer(config)
    log = os.open(folder / "rows.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    step = trainer.train_step

    def noted() -> Any:
        line = f"{trainer.step} {' '.join(str(row) for row in trainer._micros()[0].indices)}\n"
        logs = step()
        os.write(log, line.encode())
        return logs

    trainer.train_step = noted  # type: ignore[method-assign]
    if death is not None:
        die_in_a_save(*death)
    trainer.fit()


def start(folder: Path, resume: bool, death: tuple[int, int] | None = None) -> int:
    """Fork a process that trains; returns its id."""
    folder.mkdir(exist_ok=True)
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        train(folder, resume, death)
        code = 0
    except BaseException:  # noqa: BLE001  the text is all that leaves a forked process
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def end_of(process: int, deadline: float | None = None) -> int | None:
    """Wait for a process, until the deadline if there is one; returns the signal that killed it, 0, or None: it lives.

    Raises: RuntimeError if it failed by itself.
    """
    while True:
        found, status = os.waitpid(process, 0 if deadline is None else os.WNOHANG)
        if found:
            if os.WIFSIGNALED(status):
                return os.WTERMSIG(status)
            if os.WEXITSTATUS(status):
                raise RuntimeError("the training failed by itself; see output.txt in its folder")
            return 0
        if time.monotonic() > (deadline or 0):
            return None
        time.sleep(0.002)


def steps_done(folder: Path) -> list[tuple[int, tuple[int, ...]]]:
    """Read the steps in the order in which they were finished, with their rows."""
    path = folder / "rows.txt"
    lines = path.read_text().splitlines() if path.is_file() else []
    numbers = [[int(word) for word in line.split()] for line in lines]
    return [(number[0], tuple(number[1:])) for number in numbers]


def kill_once(folder: Path, rng: random.Random, seconds_per_step: float, tally: Tally) -> bool:
    """Start or resume the run and kill it once; returns whether it lived to its end instead."""
    known = len(steps_done(folder))
    in_a_save = rng.random() < 0.5
    death = (rng.randrange(2), rng.randrange(MOST_EVENTS)) if in_a_save else None
    process = start(folder, resume=True, death=death)
    if in_a_save:
        killed = end_of(process)
    else:
        killed, limit = None, time.monotonic() + 600
        while killed is None and len(steps_done(folder)) == known and time.monotonic() < limit:
            killed = end_of(process, time.monotonic() + 0.01)
        if killed is None:
            killed = end_of(process, time.monotonic() + rng.uniform(0, 2 * INTERVAL * seconds_per_step))
        if killed is None:
            os.kill(process, signal.SIGKILL)
            killed = end_of(process)
    if not killed:
        return True
    tally.kills += 1
    tally.in_a_save += in_a_save
    check_after_kill(folder, tally)
    return False


def check_after_kill(folder: Path, tally: Tally) -> None:
    """Look for a whole checkpoint that is at most one interval old."""
    done = max((step + 1 for step, _ in steps_done(folder)), default=0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = find_checkpoint(folder, "auto")
    at = 0 if found is None else step_of(found)
    tally.redone.append(done - at)
    if done - at > INTERVAL:
        tally.failures.append(f"kill {tally.kills}: {done} steps were done, the last checkpoint is of step {at}")
    if said:
        tally.failures.append(f"kill {tally.kills}: a damaged checkpoint was found: {said[0].message}")


def check_end(folder: Path, unbroken: dict[str, torch.Tensor], tally: Tally) -> None:
    """Compare the end of a run with the unbroken one, and count what it saw."""
    state = saved_state(folder / f"checkpoint-{STEPS}")
    other = [n for n in unbroken.keys() | state.keys() if n not in state or not torch.equal(state[n], unbroken[n])]
    if other:
        tally.failures.append(f"{folder.name}: {len(other)} tensors differ, for instance {other[0]}")
    rows: dict[int, tuple[int, ...]] = {}
    for step, seen in steps_done(folder):
        if rows.setdefault(step, seen) != seen:
            tally.failures.append(f"{folder.name}: step {step} saw other pictures when it was done again")
    stream = [row for step in sorted(rows) for row in rows[step]]
    epochs = [sorted(stream[i : i + NUM_ITEMS]) for i in range(0, len(stream), NUM_ITEMS)]
    if sorted(rows) != list(range(STEPS)) or any(epoch != list(range(NUM_ITEMS)) for epoch in epochs):
        tally.failures.append(f"{folder.name}: not every picture was seen exactly once per epoch")


def kill_test(folder: Path, kills: int, seed: int) -> Tally:
    """Kill runs until there were enough kills."""
    rng, tally = random.Random(seed), Tally()
    began = time.monotonic()
    end_of(start(folder / "unbroken", resume=False))
    seconds_per_step = (time.monotonic() - began) / STEPS
    unbroken = saved_state(folder / "unbroken" / f"checkpoint-{STEPS}")
    check_end(folder / "unbroken", unbroken, tally)
    while tally.kills < kills:
        run = folder / f"run-{tally.runs}"
        finished = False
        while not finished and tally.kills < kills:
            finished = kill_once(run, rng, seconds_per_step, tally)
        if not finished:
            end_of(start(run, resume=True))
        tally.runs += 1
        check_end(run, unbroken, tally)
    return tally


def main() -> None:
    """Run the test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a pool of threads does not live through a fork
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="kill-test-"))
    tally = kill_test(folder, args.kills, args.seed)
    print(
        f"{tally.kills} kills ({tally.in_a_save} in the middle of a save) over {tally.runs} runs of {STEPS} steps, "
        f"seed {args.seed}: {len(tally.failures)} failures; steps done again: {max(tally.redone)} at most, "
        f"{sum(tally.redone) / len(tally.redone):.1f} on average, an interval is {INTERVAL}; "
        f"{time.monotonic() - began:.0f} s"
    )
    if tally.failures:
        print("\n".join(tally.failures), f"folders are in {folder}", sep="\n")
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
