"""A signal that asks a run to stop, noted until the step is done."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any


class StopRequest(contextlib.AbstractContextManager["StopRequest"]):
    """Inside, the first SIGINT or SIGTERM is only noted in `received`; a second one acts as it did outside."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()
        os.write(2, b"\nstopping after this step; once more stops at once\n")  # print may not be entered from here

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def __exit__(self, *error: object) -> None:
        self._restore()
