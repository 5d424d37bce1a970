"""Stop signals as wishes: the loop ends after the step at hand and saves."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType


class StopSignal:
    """Turn SIGTERM and SIGINT into a wish to stop after this step; the second one ends the process at once."""

    def __init__(self) -> None:
        """Install the handlers; a thread other than the main one can have none, and signals stay as they were."""
        self.wanted = False
        numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
        self._old = {number: signal.signal(number, self._handle) for number in numbers}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.wanted:
            os._exit(128 + number)
        self.wanted = True

    def restore(self) -> None:
        """Put the old handlers back."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
