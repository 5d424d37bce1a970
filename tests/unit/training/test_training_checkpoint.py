"""A checkpoint is whole or absent: faults at every file event, damage, full disks, second writers."""

from __future__ import annotations

import builtins
import errno
import json
import os
import random
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ldm_pipe.pretrained import LdmPipeError, files
from ldm_pipe.training.run.checkpoint import (
    RunLock,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
    verify_checkpoint,
)

Groups = dict[str, dict[str, Tensor]]


def groups_of(step: int) -> Groups:
    g = torch.Generator().manual_seed(step)
    return {"net": {"w": torch.randn(9, 3, generator=g)}, "net.optimizer": {"0.step": torch.tensor(float(step))}}


def save(folder: Path, *steps: int, keep: int = 2) -> None:
    for step in steps:
        save_checkpoint(folder, step, groups_of(step), {"skipped": 0}, keep=keep)


def assert_whole(folder: Path | None, step: int) -> None:
    assert folder is not None
    groups, state = load_checkpoint(folder)
    assert state["step"] == step
    for name, tensors in groups_of(step).items():
        assert all(torch.equal(tensors[key], groups[name][key]) for key in tensors)


def test_what_was_saved_comes_back_with_its_bits(tmp_path: Path) -> None:
    save(tmp_path, 7)
    assert_whole(find_checkpoint(tmp_path, "latest"), 7)


def test_old_checkpoints_are_pruned_in_order_of_steps_not_of_names(tmp_path: Path) -> None:
    save(tmp_path, 1, 9, 10, 100, keep=3)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    save(tmp_path, 101, keep=1)  # fewer than two are never kept
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-101"]


def test_what_was_just_saved_is_never_pruned_for_damaged_later_ones(tmp_path: Path) -> None:
    save(tmp_path, 10, 20, 30, 40, keep=4)
    for step in (30, 40):
        (tmp_path / f"checkpoint-{step}" / "net.safetensors").write_bytes(b"torn")
    with pytest.warns(UserWarning, match="falling back"):
        assert_whole(find_checkpoint(tmp_path, "latest"), 20)
    save(tmp_path, 25)
    with pytest.warns(UserWarning, match="falling back"):
        assert_whole(find_checkpoint(tmp_path, "latest"), 25)


def test_fault_14_files_get_the_mode_that_the_umask_asks_for(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        save(tmp_path, 1)
    finally:
        os.umask(old)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "checkpoint-1").iterdir()}
    assert modes == {0o640}


def test_fault_15_paths_with_spaces_unicode_and_links_work(tmp_path: Path) -> None:
    real = tmp_path / "a folder: \u00e4\u2603"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    save(tmp_path / "link", 3)
    assert_whole(find_checkpoint(real, "latest"), 3)


# -- faults in the middle of a save ------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process: no handler of ours catches it."""


class Event(NamedTuple):
    name: str
    target: str


@contextmanager
def events(act: Callable[[int, Event], None]) -> Iterator[None]:
    """Call `act(number, event)` before every file event below the patched functions."""
    seen = 0

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            act(seen - 1, Event(name, str(args[0]) if args else ""))
            return function(*args, **kwargs)

        return wrapper

    patched = [(os, n) for n in ("replace", "rename", "fsync", "mkdir", "unlink", "rmdir", "open", "fdopen", "chmod")]
    patched += [(builtins, "open"), (shutil, "rmtree")]
    with pytest.MonkeyPatch.context() as patch:
        for module, name in patched:
            patch.setattr(module, name, counted(name, getattr(module, name)))
        yield


def count_events(folder: Path, step: int) -> list[Event]:
    names: list[Event] = []
    with events(lambda _, event: names.append(event)):
        save(folder, step)
    return names


def test_a_save_has_events_to_fail_at(tmp_path: Path) -> None:
    """Guards the two tests below: were the patches to miss, they would pass without testing anything."""
    save(tmp_path, 1, 2)
    names = [event.name for event in count_events(tmp_path, 3)]
    assert names.count("fsync") >= 8  # a file and its folder, four times
    assert names.count("replace") >= 5
    assert "rmtree" in names


@pytest.mark.parametrize("before", [(1, 2), (1, 3)], ids=["new", "same-step"])
@pytest.mark.parametrize("fault", [Killed(), OSError(errno.EIO, "Input/output error")], ids=["killed", "error"])
def test_faults_2_and_3_never_fewer_than_one_whole_checkpoint_at_any_file_event(
    tmp_path: Path, before: tuple[int, ...], fault: BaseException
) -> None:
    save(tmp_path / "count", *before)
    total = len(count_events(tmp_path / "count", 3))
    for k in range(total + 1):
        folder = tmp_path / f"run-{k}"
        save(folder, *before)

        def act(number: int, _: Event, k: int = k) -> None:
            if number == k or (number > k and isinstance(fault, Killed)):
                raise fault

        try:
            with events(act):
                save(folder, 3)
        except (Killed, LdmPipeError, OSError):
            pass
        found = find_checkpoint(folder, "latest")
        assert found is not None, f"event {k} of {total}"
        _, state = load_checkpoint(found)
        assert_whole(found, state["step"])
        assert state["step"] in (max(before), 3)
        save(folder, 4)  # the next save works, whatever was left behind
        assert_whole(find_checkpoint(folder, "latest"), 4)


def test_fault_3_the_only_checkpoint_survives_being_replaced(tmp_path: Path) -> None:
    """Between the two renames of a replacement the old one is still found."""
    save(tmp_path, 3)
    for k in range(len(count_events(tmp_path, 3)) + 1):
        shutil.rmtree(tmp_path)
        save(tmp_path, 3)

        def act(number: int, _: Event, k: int = k) -> None:
            if number >= k:
                raise Killed

        try:
            with events(act):
                save(tmp_path, 3)
        except Killed:
            pass
        assert_whole(find_checkpoint(tmp_path, "latest"), 3)


def test_left_overs_of_dead_processes_are_cleared_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getppid()):
        (tmp_path / f".tmp-5-{pid}").mkdir()
    save(tmp_path, 6)
    assert [p.name for p in tmp_path.glob(".tmp-*")] == [f".tmp-5-{os.getppid()}"]


# -- full disk ---------------------------------------------------------------------------------------------------


def test_fault_4_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(LdmPipeError, match=r"no room for a checkpoint: \d+ bytes needed, 1000 free"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert_whole(find_checkpoint(tmp_path, "latest"), 1)


def test_fault_4_a_disk_that_fills_in_the_middle_of_a_write_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    total = sum(path.stat().st_size for path in (tmp_path / "checkpoint-1").iterdir())
    for limit in range(0, total, total // 20):
        room = limit

        def fill(path: Path) -> None:
            """Keep as much of a file just written as there is room for."""
            nonlocal room
            size = path.stat().st_size
            if size > room:
                os.truncate(path, room)
                raise OSError(errno.ENOSPC, "No space left on device")
            room -= size

        def save_limited(tensors: Any, path: Any, metadata: Any, real: Callable[..., Any] = files.save_file) -> None:
            real(tensors, path, metadata)
            fill(Path(path))

        def write_limited(path: Path, data: bytes, real: Callable[..., Any] = Path.write_bytes) -> int:
            written = real(path, data)
            fill(path)
            return int(written)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "save_file", save_limited)
            patch.setattr(Path, "write_bytes", write_limited)
            with pytest.raises(LdmPipeError, match=r"No space left on device.*bytes are needed"):
                save(tmp_path, 2)
        assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"], "nothing half-written stays"
        assert_whole(find_checkpoint(tmp_path, "latest"), 1)


# -- damage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flips", [400, pytest.param(2000, marks=pytest.mark.slow)])
def test_fault_13_every_flipped_bit_is_noticed_or_harmless(tmp_path: Path, flips: int) -> None:
    save(tmp_path, 1, 2)
    newest = tmp_path / "checkpoint-2"
    rng = random.Random(0)
    files = sorted(newest.iterdir())
    noticed = 0
    for i in range(flips):
        path = files[i % len(files)]
        whole = path.read_bytes()
        place = rng.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
        try:
            verify_checkpoint(newest)
        except LdmPipeError:
            noticed += 1
            with pytest.warns(UserWarning, match="falling back"):
                assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-1"
        else:
            assert path.name == "manifest.json"  # its own step, or its white space
            assert_whole(newest, 2)
        path.write_bytes(whole)
    assert noticed > 0.85 * flips
    verify_checkpoint(newest)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "net.safetensors").write_bytes((folder / "net.safetensors").read_bytes()[:-1]),
        lambda folder: (folder / "state.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text(""),
        lambda folder: (folder / "manifest.json").write_text("[]"),
        lambda folder: (folder / "manifest.json").write_text('{"format": 1, "files": {"net.safetensors": 3}}'),
        lambda folder: (folder / "manifest.json").write_text('{"format": 2, "files": {}}'),
        lambda folder: (folder / "manifest.json").write_text('{"format": 1, "files": {"../../x": {}}}'),
        lambda folder: shutil.copy(folder / "net.safetensors", folder / "net.optimizer.safetensors"),
    ],
    ids=["torn", "missing", "empty", "list", "number", "format", "outside", "swapped"],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    save(tmp_path, 1, 2)
    damage(tmp_path / "checkpoint-2")
    with pytest.warns(UserWarning, match=r"checkpoint-2.*falling back"):
        assert_whole(find_checkpoint(tmp_path, "latest"), 1)
    with pytest.raises(LdmPipeError, match="checkpoint-2"):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoint-2"))


def test_folders_that_are_no_checkpoints_are_left_alone(tmp_path: Path) -> None:
    for name in ("checkpoint-best", "checkpoint-", "checkpoint-12x", ".tmp-oldx-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    (tmp_path / "checkpoint-3").mkdir()  # without a manifest: never finished
    assert list_checkpoints(tmp_path) == []
    save(tmp_path, 5, 6, 7)
    assert (tmp_path / "checkpoint-best" / "manifest.json").is_file()


# -- one writer --------------------------------------------------------------------------------------------------


def lock_of(folder: Path, **facts: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / ".lock").write_text(json.dumps(facts))


def test_fault_5_a_second_writer_is_refused_at_once(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        lock_of(tmp_path, pid=other.pid, host=socket.gethostname())
        with pytest.raises(LdmPipeError, match=f"process {other.pid} on {socket.gethostname()} writes here already"):
            RunLock(tmp_path)
    finally:
        other.kill()
        other.wait()
    RunLock(tmp_path).release()  # the holder is dead: taken over
    assert not (tmp_path / ".lock").exists()


def test_the_lock_of_another_host_is_respected(tmp_path: Path) -> None:
    lock_of(tmp_path, pid=1, host="elsewhere")
    with pytest.raises(LdmPipeError, match="process 1 on elsewhere"):
        RunLock(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', "{}"])
def test_a_torn_lock_is_taken_over(tmp_path: Path, text: str) -> None:
    (tmp_path / ".lock").write_text(text)
    RunLock(tmp_path).release()


def test_fault_15_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LdmPipeError, match="file"):
        RunLock(tmp_path / "file" / "run")


# -- optimiser state ---------------------------------------------------------------------------------------------


def test_the_optimiser_continues_bit_for_bit() -> None:
    def make() -> tuple[torch.nn.Linear, torch.optim.AdamW]:
        net = torch.nn.Linear(3, 3)
        return net, torch.optim.AdamW(net.parameters(), lr=0.1)

    def step(net: torch.nn.Linear, optimizer: torch.optim.AdamW, i: int) -> None:
        optimizer.zero_grad()
        net(torch.full((2, 3), float(i))).square().sum().backward()
        optimizer.step()

    net, optimizer = make()
    for i in range(3):
        step(net, optimizer, i)
    other, again = make()
    other.load_state_dict(net.state_dict())
    restore_optimizer(again, {name: t.clone() for name, t in optimizer_tensors(optimizer).items()})
    for i in range(3, 6):
        step(net, optimizer, i)
        step(other, again, i)
    assert torch.equal(net.weight, other.weight)
