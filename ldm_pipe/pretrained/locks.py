"""Lock files: one process at a time, told by the kernel where it can be, else by process number and start time.

Enters: a path. Leaves: a held lock, until it is released or its process ends. A lock is never unlinked by anyone but
its holder. This file does not know what is locked.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from ldm_pipe.pretrained.files import LdmPipeError

_TRIES, _PAUSE = 50, 0.02  # seconds
_NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


def start_time(pid: int) -> str | None:
    """Return when a process started, in ticks since boot; with it a number that was given out anew is told apart."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def is_alive(pid: int) -> bool:
    """Tell whether a process of this number runs."""
    if pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


class FileLock:
    """A lock file with pid, host and start time of its holder.

    The kernel's lock (flock) on the open file decides: it ends with the process, so a file that a dead one left is
    taken over, and one without words in it is as good as any. It does not reach other hosts: the words in the file do.
    Where a file system has no such locks, the file appears with its words at once; whether its holder lives decides.
    """

    def __init__(self, path: Path, *, wait: bool = False) -> None:
        """Take the lock.

        Args:
            path: of the lock file; its folder must exist.
            wait: until another process on this host releases it; else it is refused.
        Raises: LdmPipeError naming the holder; OSError if the file cannot be written.
        """
        self.path, self._handle = path, -1
        words = {"pid": os.getpid(), "host": socket.gethostname(), "start": start_time(os.getpid())}
        try:
            import fcntl
        except ImportError:
            self._take_by_name(words)
            return
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                if _is_file(path, handle):  # else its holder removed it while we waited: it locks nothing any more
                    if not wait:
                        self._refuse_living(by_kernel=True)
                    os.ftruncate(handle, 0)
                    os.write(handle, json.dumps(words).encode())
                    self._handle, handle = handle, -1
                    return
            except BlockingIOError:
                raise self._held(self._holder()) from None
            except OSError as error:
                if error.errno not in _NO_FLOCK:
                    raise
                self._take_by_name(words)
                return
            finally:
                if handle >= 0:
                    os.close(handle)

    def _holder(self) -> dict[str, Any]:
        try:
            holder = json.loads(self.path.read_text(encoding="utf-8") or "{}")
        except (OSError, ValueError, RecursionError):
            return {}
        return holder if isinstance(holder, dict) and isinstance(holder.get("pid"), int) else {}

    def _held(self, holder: dict[str, Any]) -> LdmPipeError:
        who = f"process {holder['pid']} on {holder.get('host')}" if holder else "another process"
        fix = "Wait for it, or choose another folder."
        if holder and holder.get("host") != socket.gethostname():
            fix = f"{fix} If that process is gone, delete this file."
        return LdmPipeError(f"{who} writes here already", str(self.path), fix)

    def _refuse_living(self, *, by_kernel: bool) -> None:
        """Refuse what the words of the file say lives: on another host nobody knows, here it is looked up.

        Args:
            by_kernel: we hold the kernel's lock, so whoever wrote a start time (this version) is gone.
        """
        holder = self._holder()
        if not holder:
            return
        if holder.get("host") != socket.gethostname():
            raise self._held(holder)
        pid, began = holder["pid"], holder.get("start")
        if (by_kernel and "start" in holder) or pid == os.getpid() or not is_alive(pid):
            return
        if began is None or start_time(pid) in (None, began):
            raise self._held(holder)

    def _take_by_name(self, words: dict[str, Any]) -> None:
        """Take the lock without the kernel's help: the file appears with its words, by a link, or not at all."""
        mine = self.path.with_name(f"{self.path.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
        guard = self.path.with_name(self.path.name + ".taking")
        mine.write_text(json.dumps(words), encoding="utf-8")
        try:
            for _ in range(_TRIES):
                with contextlib.suppress(FileExistsError):
                    _link(mine, self.path)
                    return
                self._refuse_living(by_kernel=False)
                try:
                    _link(mine, guard)
                except FileExistsError:  # another process looks whether it is stale
                    time.sleep(_PAUSE)
                    continue
                try:
                    self._remove_stale()
                finally:
                    guard.unlink(missing_ok=True)
            fix = "If no other process does, delete this file."
            raise LdmPipeError("another process takes over a stale lock", str(guard), fix)
        finally:
            mine.unlink(missing_ok=True)

    def _remove_stale(self) -> None:
        """Remove the file if its holder is dead. Only who holds the guard does it, so that it is the file judged.

        One that was released meanwhile is left alone: another process may have made its own under the name.
        """
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            self._refuse_living(by_kernel=False)
            if _is_file(self.path, file.fileno()):
                self.path.unlink()

    def release(self) -> None:
        """Give it free; the file goes while it is still held, so that nobody else's is removed."""
        if self._handle < 0 or _is_file(self.path, self._handle):
            self.path.unlink(missing_ok=True)
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or fail if the name is taken."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # no hard links there: the name alone must do
        with target.open("xb") as file:
            file.write(source.read_bytes())


def _is_file(path: Path, handle: int) -> bool:
    """Tell whether a path still names an open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except OSError:
        return False
