"""Where the time of a step goes, measured without waiting for the device."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


class Stopwatch:
    """Seconds spent inside `measure`, by the device's own clock: CUDA events, read only when they are asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.total = 0.0
        self._pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._pending.append((begin, end))
        else:
            started = time.perf_counter()
            yield
            self.total += time.perf_counter() - started

    def seconds(self) -> float:
        """Since `clear`; waits for the device to have done what was measured."""
        for begin, end in self._pending:
            end.synchronize()
            self.total += begin.elapsed_time(end) / 1e3
        self._pending.clear()
        return self.total

    def clear(self) -> None:
        self.total = 0.0
        self._pending.clear()


class StepTimes:
    """The steps since `clear`: how many, how long, and how long they waited for data and for the optimizer.

    Attributes:
        data: of this process: waiting for a batch to arrive. optimizer: of the device: the optimizer's step.
        steps: counted by whoever takes them.
    """

    def __init__(self, device: torch.device) -> None:
        self.data, self.optimizer = Stopwatch(torch.device("cpu")), Stopwatch(device)
        self.clear()

    def clear(self) -> None:
        self.data.clear()
        self.optimizer.clear()
        self.steps, self.begin = 0, time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Do not count what was spent on something else than steps."""
        self.begin += seconds

    def per_step(self) -> tuple[float, float, float]:
        """Mean of one step or more: (seconds, of these for data, of these in the optimizer); waits for the device."""
        optimizer = self.optimizer.seconds() / self.steps
        return (time.perf_counter() - self.begin) / self.steps, self.data.seconds() / self.steps, optimizer
