"""Stop signals as wishes: the loop ends after the step at hand and saves."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType


class StopSignal:
    """Turn SIGTERM, SIGINT and SIGHUP into a wish to stop after this step; the second one ends the process at once.

    SIGHUP says that the terminal was closed. A launcher that hears it too sends SIGTERM after it, so it does not count
    as the first one; what is still printed goes nowhere, as writing to a closed terminal fails. Under `nohup` it stays
    ignored.
    """

    def __init__(self) -> None:
        """Install the handlers; a thread other than the main one can have none, and signals stay as they were."""
        self.wanted = self._asked = False
        self._terminals = [number for number in (1, 2) if os.isatty(number)]  # a closed one does not say so any more
        numbers = [signal.SIGTERM, signal.SIGINT]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        if threading.current_thread() is not threading.main_thread():
            numbers = []
        self._old = {number: signal.signal(number, self._handle) for number in numbers}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
        if hasattr(signal, "SIGHUP") and number == signal.SIGHUP:
            self._hush()
            return
        if self._asked:
            os._exit(128 + number)
        self._asked = True

    def _hush(self) -> None:
        """Let what is printed to the closed terminal go nowhere."""
        if self._terminals:
            nowhere = os.open(os.devnull, os.O_RDWR)
            for number in self._terminals:
                os.dup2(nowhere, number)
            os.close(nowhere)

    def restore(self) -> None:
        """Put the old handlers back."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
