"""A signal that asks a run to stop, noted until the step is done."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from lopt.train.group import announced

FORWARDED = 10.0  # seconds in which torchrun passes on to its processes what they may have received themselves


class StopRequest(contextlib.AbstractContextManager["StopRequest"]):
    """Inside, the first SIGINT or SIGTERM is only noted in `received`; a second one acts as it did outside.

    Among the processes of torchrun one request may arrive several times: there a second one counts only after a while.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if time.monotonic() - self._since > FORWARDED:
                self._restore()
                signal.raise_signal(number)
            return
        self.received, self._since = number, time.monotonic()
        if announced() < 2:
            self._restore()
        os.write(2, b"\nstopping after this step; once more stops at once\n")  # print may not be entered from here

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def __exit__(self, *error: object) -> None:
        self._restore()
