"""Rows of metrics as TensorBoard events."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class Scalars:
    """Rows as TensorBoard events; does nothing where `tensorboard` is not installed.

    Args:
        folder: of the events, made at the first row.
        tags: tag -> name of the value in a row.
        done: steps of the checkpoint that the run goes on from: events after it, of a run killed later, are hidden from
            TensorBoard.
    """

    def __init__(self, folder: Path, tags: Mapping[str, str], done: int) -> None:
        self.tags = tags
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.make: Callable[[], Any] | None = lambda: SummaryWriter(str(folder), purge_step=done + 1)
        except ImportError:
            self.make = None
        self.writer: Any = None

    def add(self, step: int, row: Mapping[str, Any]) -> None:
        """row: name -> number, or "" for none."""
        if self.make is None:
            return
        self.writer = self.writer or self.make()
        for tag, name in self.tags.items():
            if row[name] != "":
                self.writer.add_scalar(tag, float(row[name]), step)

    def close(self) -> None:
        """Write what is pending."""
        if self.writer is not None:
            self.writer.close()
