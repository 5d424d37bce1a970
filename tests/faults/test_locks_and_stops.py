"""Locks, modes of files, full disks and hang-ups."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ldm_pipe
from ldm_pipe.data.shards import only_one
from ldm_pipe.pretrained import LdmPipeError, locks
from ldm_pipe.pretrained.files import atomic_write, new_folder, save_tensors
from ldm_pipe.training.run.checkpoint import RunLock, list_checkpoints
from ldm_pipe.training.run.records import start_records
from ldm_pipe.training.run.stop import StopSignal
from tests.training import make_config, make_trainer

TINY = str(Path(__file__).parents[1] / "data" / "tiny_pipeline")
ROOT = Path(__file__).parents[2]


# -- locks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["", "{", "[]", '{"pid": 1}', '{"pid": 999999999, "host": "x"}'])
def test_a_held_lock_is_refused_whatever_its_file_says(tmp_path: Path, words: str) -> None:
    """An empty or torn file was taken for one that nobody holds, and removed."""
    lock = RunLock(tmp_path)
    (tmp_path / ".lock").write_text(words)
    inode = (tmp_path / ".lock").stat().st_ino
    code = (
        "import sys, pathlib; from ldm_pipe.training.run.checkpoint import RunLock; RunLock(pathlib.Path(sys.argv[1]))"
    )
    other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert other.returncode != 0
    assert "writes here already" in other.stderr
    assert (tmp_path / ".lock").stat().st_ino == inode, "a live lock stays"
    lock.release()
    RunLock(tmp_path).release()
    assert not (tmp_path / ".lock").exists()


def _race(folder: str, barrier: Any, won: Any, without_kernel: bool) -> None:
    if without_kernel:
        sys.modules["fcntl"] = None  # type: ignore[assignment]
    for number in range(10):
        path = Path(folder) / f"{number}"
        path.mkdir(exist_ok=True)
        barrier.wait()
        try:
            lock = RunLock(path)
        except LdmPipeError:
            barrier.wait()
            continue
        with won.get_lock():
            won.value += 1
        barrier.wait()  # held until all have tried
        lock.release()


@pytest.mark.parametrize("without_kernel", [False, True])
def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path: Path, without_kernel: bool) -> None:
    for number in range(10):
        (tmp_path / str(number)).mkdir()
        stale = {"pid": 999999999, "host": os.uname().nodename} if number % 2 else {}
        (tmp_path / str(number) / ".lock").write_text(json.dumps(stale) if stale else "")
    context = multiprocessing.get_context("fork")
    barrier, won = context.Barrier(4), context.Value("i", 0)
    racers = [context.Process(target=_race, args=(str(tmp_path), barrier, won, without_kernel)) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(120)
    assert won.value == 10


def test_a_number_given_out_anew_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the kernel's lock: the process of that number started at another time than the one that wrote it."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    words = {"pid": os.getppid(), "host": os.uname().nodename, "start": locks.start_time(os.getppid())}
    (tmp_path / ".lock").write_text(json.dumps(words))
    with pytest.raises(LdmPipeError, match=f"process {os.getppid()} on"):
        RunLock(tmp_path)
    (tmp_path / ".lock").write_text(json.dumps({**words, "start": "17"}))
    RunLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def _hold(root: str, seconds: float, inside: Any, most: Any) -> None:
    with only_one(root, "k" * 20):
        with inside.get_lock():
            inside.value += 1
            most.value = max(most.value, inside.value)
        time.sleep(seconds)
        with inside.get_lock():
            inside.value -= 1


def test_those_who_wait_for_a_cache_come_one_by_one(tmp_path: Path) -> None:
    """The file was unlinked on release: one waited for the old file, the next made a new one, and both went on."""
    context = multiprocessing.get_context("fork")
    inside, most = context.Value("i", 0), context.Value("i", 0)
    workers = []
    for _ in range(8):
        workers.append(context.Process(target=_hold, args=(str(tmp_path), 0.15, inside, most)))
        workers[-1].start()
        time.sleep(0.05)
    for worker in workers:
        worker.join(60)
    assert most.value == 1


# -- modes of files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "file", "folder"), [(0o027, 0o640, 0o750), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)]
)
def test_files_of_four_threads_get_the_mode_of_the_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mask: int, file: int, folder: int
) -> None:
    """Fault 14: asking for the umask set it to 0 for a moment, for all threads."""
    old = os.umask(mask)
    try:
        monkeypatch.setattr(os, "umask", lambda _: pytest.fail("the umask belongs to all threads"))
        seen: list[int] = []

        def plain() -> None:
            for number in range(100):
                path = tmp_path / f"plain-{number}"
                path.touch()
                seen.append(stat.S_IMODE(path.stat().st_mode))

        def write(name: int) -> None:
            for number in range(30):
                path = tmp_path / f"{name}-{number}"
                if number % 3:
                    atomic_write(path, "x")
                else:
                    save_tensors(path, {"x": torch.zeros(1)})
                seen.append(stat.S_IMODE(path.stat().st_mode))

        threads = [threading.Thread(target=plain), *(threading.Thread(target=write, args=(i,)) for i in range(4))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(seen) == {file}
        assert len(seen) == 220
        assert stat.S_IMODE(new_folder(tmp_path / "x").stat().st_mode) == folder
    finally:
        monkeypatch.undo()
        os.umask(old)


def test_the_umask_is_set_nowhere() -> None:
    sources = list(Path(ldm_pipe.__file__).parent.rglob("*.py"))
    assert len(sources) > 100
    assert [path for path in sources if "os.umask(" in path.read_text(encoding="utf-8")] == []


# -- a full disk while the sheet is written ----------------------------------------------------------------------


def full_disk(wrapped: bool) -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    if wrapped:
        raise LdmPipeError("cannot be written (No space left on device)", "grids/step-2.png") from error
    raise error


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("on_save_error", ["continue", "stop"])
def test_a_sheet_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], on_save_error: str, wrapped: bool
) -> None:
    options: dict[str, Any] = {"validation_steps": 2, "on_save_error": on_save_error}
    trainer = make_trainer(make_config(tmp_path, **options), validate=lambda *_: full_disk(wrapped))
    if on_save_error == "stop":
        with pytest.raises((OSError, LdmPipeError), match="No space left"):
            trainer.fit()
        return
    trainer.fit()
    assert trainer.step == 6
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-6"]
    said = capsys.readouterr().err
    assert [f"without the sheet of step {step}:" in said for step in (2, 4, 6)] == [True] * 3


def test_a_sheet_that_cannot_be_drawn_is_no_full_disk(tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise LdmPipeError("the decoded picture holds NaN or infinity")

    config = make_config(tmp_path, validation_steps=2, on_save_error="continue")
    with pytest.raises(LdmPipeError, match="NaN or infinity"):
        make_trainer(config, validate=fail).fit()


def test_a_tracker_that_cannot_write_ends_no_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Full:
        def numbers(self, *_: Any) -> None:
            full_disk(False)

    (tmp_path / "run").mkdir()
    records = start_records(tmp_path / "run", make_config(tmp_path / "run"), {"command": "x"}, 0)
    records.tracker = Full()  # type: ignore[assignment]
    records.note(1, {"loss": 1.0})
    records.note(2, {"loss": 1.0})
    records.close()
    assert capsys.readouterr().err.count("goes on without its tracker (No space left on device)") == 1


# -- hang-ups ----------------------------------------------------------------------------------------------------

RUN = """
import sys
from pathlib import Path
from tests.training import make_config, make_trainer
config = make_config(Path(sys.argv[1]), max_train_steps=1000000, checkpointing_steps=1000000)
trainer = make_trainer(config)
trainer.fit()
(Path(sys.argv[1]) / "ended").write_text(str(trainer.step))
"""


@pytest.mark.slow
def test_closing_the_terminal_saves_and_ends(tmp_path: Path) -> None:
    """Fault 6: as SIGTERM, though every word to the closed terminal fails."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.environ["PYTHONPATH"] = str(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", RUN, str(tmp_path)])
    said, limit = b"", time.monotonic() + 300
    while not re.search(rb"[1-9]\d*/1000000", said) and time.monotonic() < limit:
        if select.select([terminal], [], [], 1)[0]:
            said += os.read(terminal, 4096)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, said[-2000:]
    steps = int((tmp_path / "ended").read_text())
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{steps}"]


@pytest.fixture
def hang_up() -> Iterator[None]:
    old = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, old)


def test_a_hang_up_is_a_wish_and_not_the_first_of_two(hang_up: None) -> None:
    process = os.fork()
    if process == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
        stop = StopSignal()
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):  # a launcher sends the last
            os.kill(os.getpid(), number)
            if not stop.wanted:
                os._exit(3)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_under_nohup_a_hang_up_stays_ignored(hang_up: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopSignal()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.wanted
    stop.restore()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
