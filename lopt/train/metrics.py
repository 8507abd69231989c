"""What a run measures of itself: means over images, the rows of metrics.csv, and their TensorBoard tags."""

from __future__ import annotations

import contextlib
import csv
import io
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lopt.train import TrainError, checkpoint
from lopt.train.data import NO_LABEL

COLUMNS = (
    "step",
    "epoch",
    "train_loss",  # what is minimised, auxiliary classifiers apart (nats): mean over the images since the last row
    "train_accuracy",
    "test_loss",  # cross-entropy (nats); empty, as are those below, where the row is no evaluation
    "test_accuracy",
    "test_top5",  # the class is among the five likeliest; empty for five classes or fewer
    "ema_test_loss",  # of the averaged weights; empty without --ema
    "ema_test_accuracy",
    "ema_test_top5",
    "images_per_second",  # since the last row, evaluation and checkpoints left out
    "data_seconds",  # per step: waiting for a batch to arrive
    "optimizer_seconds",  # per step: in the optimizer, by the device's clock
    "seconds",  # since the start of the run, everything included
)
TAGS = {
    "train/loss": "train_loss",
    "train/accuracy": "train_accuracy",
    "test/loss": "test_loss",
    "test/accuracy": "test_accuracy",
    "test/top5": "test_top5",
    "test-ema/loss": "ema_test_loss",
    "test-ema/accuracy": "ema_test_accuracy",
    "test-ema/top5": "ema_test_top5",
    "speed/images_per_second": "images_per_second",
    "speed/data_seconds": "data_seconds",
    "speed/optimizer_seconds": "optimizer_seconds",
}
TOP = 5
REPLACED = "\N{REPLACEMENT CHARACTER}"  # what bytes are read as that are no UTF-8


class Scores(NamedTuple):
    """Of one evaluation; top5 is None for five classes or fewer."""

    loss: float
    accuracy: float
    top5: float | None


class Counts:
    """Sums over images, kept on the device."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(4, device=device)  # loss, correct, correct among TOP, images

    def add(self, losses: Tensor, logits: Tensor, labels: Tensor) -> None:
        """losses: [], summed over images. logits: [n, classes]. labels: [n]; NO_LABEL counts for nothing."""
        likeliest = logits.topk(min(TOP, logits.shape[1])).indices == labels[:, None]
        self.sums += torch.stack((losses, likeliest[:, 0].sum(), likeliest.sum(), (labels != NO_LABEL).sum()))

    @staticmethod
    def scores(sums: Tensor, classes: int) -> Scores:
        """Of `sums`, which may be those of several processes; waits for the device."""
        loss, correct, among, images = sums.tolist()
        return Scores(loss / images, correct / images, among / images if classes > TOP else None)


class Metrics(contextlib.AbstractContextManager["Metrics"]):
    """metrics.csv open for more rows; rows after `last_step`, of a run killed after its checkpoint, are dropped."""

    def __init__(self, path: Path, last_step: int) -> None:
        self.path = path
        rows = [row for row in read_metrics(path) if int(row[0]) <= last_step] if path.exists() else []
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
        try:
            checkpoint.write_atomic(path, lambda file: file.write(text.getvalue().encode()))
            self.file = open(path, "a", encoding="utf-8", newline="")  # noqa: SIM115 - closed in __exit__
        except OSError as error:
            raise self._unwritable(error) from error

    def add(self, row: dict[str, Any]) -> None:
        """row: a value for each of COLUMNS."""
        try:
            csv.writer(self.file, lineterminator="\n").writerow([row[name] for name in COLUMNS])
            self.file.flush()
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> TrainError:
        return TrainError(
            f"{str(self.path)!r} cannot be written ({error}): free space or make the folder writable, then resume"
        )

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):  # every row was flushed; a row that was not has been reported
            self.file.close()


def read_metrics(path: Path) -> list[list[str]]:
    """The rows of metrics.csv as text, a field for each of COLUMNS, "" for a column that the file has not; without the
    header and without a row that was cut off by a kill or is not text. Raises TrainError."""
    try:
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            header, *rows = [*csv.reader(file)] or [[]]
    except OSError as error:
        text = f"{str(path)!r} cannot be read ({error}): restore it from a copy, or make it readable"
        raise TrainError(text) from error
    places = [header.index(name) if name in header else None for name in COLUMNS]
    return [
        ["" if place is None else row[place] for place in places]
        for row in rows
        if len(row) == len(header) and row[0].isdigit() and REPLACED not in "".join(row)
    ]
