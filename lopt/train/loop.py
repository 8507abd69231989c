"""The training loop: a Config and data in, a run folder out.

    config.json    the Config and the versions it ran under
    metrics.csv    one row per `log_every` steps and per evaluation
    checkpoint.pt  everything needed to go on, bit for bit on a CPU

A batch is a pure function of (seed, step) and the generators' states are in the checkpoint, so a resumed run equals an
uninterrupted one. Nothing in a step waits for the device: the loss is read for rows, checkpoints and the bar.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lopt import HRNN, backends
from lopt.train import TrainError, checkpoint, models
from lopt.train.data import Digits, Feed, ImageFolder

COLUMNS = (
    "step",
    "epoch",
    "train_loss",  # mean cross-entropy (nats) over the images since the last row, as is train_accuracy
    "train_accuracy",
    "test_loss",  # empty where the row is no evaluation
    "test_accuracy",
    "images_per_second",  # since the last row, evaluation and checkpoints left out
    "seconds",  # since the start of the run, everything included
)
AUXILIARY_WEIGHT = 0.4  # of an auxiliary classifier's loss; Szegedy et al. 2015


@dataclass(frozen=True)
class Config:
    """Everything that decides what a run computes, plus where and how often. None: the optimizer's own default."""

    model: str
    data: str
    optimizer: str
    lr: float
    weight_decay: float
    schedule: str
    steps: int
    batch_size: int
    image_size: int
    seed: int
    device: str
    threads: int
    workers: int
    log_every: int
    eval_every: int
    train_images: int
    classes: int
    init_lr: float | None = None
    meta: str | None = None
    state_format: str | None = None  # of HRNN; None: its default
    backend: str | None = None
    checkpoint_every: int | None = None  # None: by time
    compare: tuple[str, ...] = ()

    def save(self, path: Path) -> None:
        content = {**asdict(self), "versions": {"python": sys.version.split()[0], "torch": torch.__version__}}
        checkpoint.write_atomic(path, lambda file: file.write((json.dumps(content, indent=2) + "\n").encode()))

    @staticmethod
    def load(path: Path) -> Config:
        """Raises TrainError when the file is not what `save` writes."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            content.pop("versions")
            unknown = set(content) - {field.name for field in fields(Config)}
            if unknown:
                raise ValueError(f"unknown field {sorted(unknown)[0]!r}")
            return Config(**{**content, "compare": tuple(content["compare"])})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise TrainError(f"{str(path)!r} is not the configuration of a run ({error}): check the folder") from error


def _hrnn(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    options = {"init_lr": config.init_lr, "state_format": config.state_format}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    optimizer = HRNN(
        model.parameters(),
        lr=config.lr,
        weight_decay=config.weight_decay,
        meta=config.meta,
        backend=config.backend,
        **given,
    )
    # Raises here, not at the first step.
    backends.choose(torch.device(config.device), optimizer.config, config.backend, optimizer.state_format)
    return optimizer


def _adamw(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)


def _sgd(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        model.parameters(), lr=config.lr, momentum=0.9, nesterov=True, weight_decay=config.weight_decay
    )


@dataclass(frozen=True)
class OptimizerChoice:
    label: str
    make: Callable[[nn.Module, Config], torch.optim.Optimizer]
    lr: float
    weight_decay: float


OPTIMIZERS = {
    "hrnn": OptimizerChoice("HRNN", _hrnn, lr=1.0, weight_decay=0.0),
    "adamw": OptimizerChoice("AdamW", _adamw, lr=1e-3, weight_decay=1e-2),
    "sgd": OptimizerChoice("SGD", _sgd, lr=0.1, weight_decay=5e-4),
}

SCHEDULES: dict[str, Callable[[float], float]] = {  # share of the steps done -> factor of lr
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * min(done, 1.0))),
}


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


class Meter:
    """Sums since the last row, kept on the device."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, device=device)  # loss times images, correct answers
        self.images = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        self.sums += torch.stack((loss.detach() * len(labels), (logits.detach().argmax(1) == labels).sum()))
        self.images += len(labels)

    def means(self) -> tuple[float, float]:
        """(loss, accuracy); waits for the device."""
        loss, correct = (self.sums / max(self.images, 1)).tolist()
        return loss, correct

    def clear(self) -> None:
        self.sums.zero_()
        self.images = 0


class Training:
    """One model in training. Building it writes nothing; TrainError when model, data and optimizer do not fit."""

    def __init__(self, config: Config, data: Digits | ImageFolder) -> None:
        self.config, self.data = config, data
        self.device = torch.device(config.device)
        torch.manual_seed(config.seed)
        self.model, _, channels = models.build(config.model, data.classes, data.channels, config.image_size)
        self.model.to(self.device)
        self.feed = Feed(config.batch_size, channels, config.image_size, self.device, config.seed, config.workers)
        _check_shape(self.model, self.feed, config, data.classes)
        try:
            self.optimizer = OPTIMIZERS[config.optimizer].make(self.model, config)
        except (ValueError, RuntimeError, ImportError, OSError) as error:
            raise TrainError(f"optimizer {config.optimizer!r}: {error}") from error
        factor = SCHEDULES[config.schedule]
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: factor(step / config.steps))
        self.meter = Meter(self.device)
        self.step = 0  # steps taken
        self.row_step = 0  # step of the last row in metrics.csv
        self.seconds = 0.0  # of training before this process
        self._batches_per_epoch = data.train_count // config.batch_size

    @property
    def parameters(self) -> list[Tensor]:
        return [tensor for tensor in self.model.parameters() if tensor.requires_grad]

    def restore(self, path: Path) -> None:
        """Continue from the checkpoint at `path`. Raises TrainError when it is damaged or of another model."""
        state = checkpoint.load(path)
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.meter.sums.copy_(state["meter"])
            self.meter.images, self.step, self.row_step = state["meter_images"], state["step"], state["row_step"]
            self.seconds = state["seconds"]
            torch.set_rng_state(state["rng"])
            if self.device.type == "cuda" and state["rng_cuda"] is not None:
                torch.cuda.set_rng_state(state["rng_cuda"], self.device)
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise TrainError(
                f"checkpoint {str(path)!r} does not fit model {self.config.model!r} and optimizer "
                f"{self.config.optimizer!r} ({error}): was config.json changed?"
            ) from error

    def run(self, folder: Path, stop: StopRequest) -> bool:
        """Train to config.steps, or until `stop` has received a signal; a checkpoint is there in either case.

        folder: the run folder, existing. Returns whether all steps are done. Raises TrainError when the loss is not
        finite, an image cannot be read or a file cannot be written.
        """
        from tqdm import tqdm  # type: ignore[import-untyped]

        config, path = self.config, folder / "checkpoint.pt"
        if self.step > config.steps:
            raise TrainError(f"--steps {config.steps} is less than the {self.step} steps already taken: give more")
        if self.step == self.row_step == config.steps and path.exists():
            return True
        started = time.perf_counter() - self.seconds
        bar = tqdm(
            total=config.steps * config.batch_size,
            initial=self.step * config.batch_size,
            unit="img",
            unit_scale=True,
            smoothing=0.05,
            mininterval=0.2 if sys.stderr.isatty() else 10,
            dynamic_ncols=True,
            desc=config.optimizer,
            bar_format="{desc} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        )
        batches = self.data.train_batches(self.feed, self.step, config.steps)
        test_text = ""
        with _Metrics(folder / "metrics.csv", self.row_step) as metrics, bar, contextlib.closing(batches):
            self.model.train()
            clock = shown = saved = time.perf_counter()
            save_cost = 0.0
            saved_steps = (self.step, self.row_step) if path.exists() else None
            while True:
                if self._row_due():
                    loss, accuracy = self._finite_means(folder)
                    speed = self.meter.images / (time.perf_counter() - clock)
                    test = self._evaluate(stop) if self._evaluation_due() else ("", "")
                    if test is not None:
                        epoch = round(self.step / self._batches_per_epoch, 4)
                        seconds = round(time.perf_counter() - started, 2)
                        metrics.add(self.step, epoch, loss, accuracy, *test, round(speed, 1), seconds)
                        self.row_step = self.step
                        self.meter.clear()
                        test_text = f", test {100 * test[1]:.1f} %" if isinstance(test[1], float) else test_text
                    clock = time.perf_counter()
                ending = self.step >= config.steps or stop.received is not None
                due = ending or self._save_due(time.perf_counter() - saved, save_cost)
                if due and saved_steps != (self.step, self.row_step):
                    self._finite_means(folder)
                    before = time.perf_counter()
                    self.seconds = before - started
                    self._save(path)
                    saved, saved_steps = time.perf_counter(), (self.step, self.row_step)
                    save_cost = saved - before
                    clock += save_cost
                if ending:
                    return self.row_step == config.steps
                self._train_step(*next(batches))
                if time.perf_counter() - shown > 0.5 or self.step == config.steps:
                    loss, accuracy = self._finite_means(folder)
                    bar.set_postfix_str(f"loss {loss:.3g}, accuracy {100 * accuracy:.1f} %{test_text}", refresh=False)
                    shown = time.perf_counter()
                bar.update(config.batch_size)

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        output = self.model(images)
        logits, *auxiliary = output if isinstance(output, tuple) else (output,)
        loss = F.cross_entropy(logits, labels)
        total = loss + AUXILIARY_WEIGHT * sum(F.cross_entropy(other, labels) for other in auxiliary)
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        self.schedule.step()
        self.meter.add(loss, logits, labels)
        self.step += 1

    @torch.no_grad()
    def _evaluate(self, stop: StopRequest) -> tuple[float, float] | None:
        """(loss, accuracy) over all test images; None when a signal came meanwhile."""
        meter = Meter(self.device)
        self._set_mode("eval")
        try:
            with contextlib.closing(self.data.test_batches(self.feed)) as batches:
                for images, labels in batches:
                    if stop.received is not None:
                        return None
                    logits = self.model(images)
                    meter.add(F.cross_entropy(logits, labels), logits, labels)
        finally:
            self._set_mode("train")
        return meter.means()

    def _set_mode(self, mode: str) -> None:
        getattr(self.model, mode)()
        getattr(self.optimizer, mode, lambda: None)()  # optimizers that keep two points have modes, torch's have not

    def _evaluation_due(self) -> bool:
        return self.step % self.config.eval_every == 0 or self.step == self.config.steps

    def _row_due(self) -> bool:
        return self.step > self.row_step and (self.step % self.config.log_every == 0 or self._evaluation_due())

    def _save_due(self, since: float, cost: float) -> bool:
        """since: seconds since the last checkpoint; cost: seconds it took. By default every 30 seconds, and rarer when
        writing would take more than a twentieth of the time."""
        if self.config.checkpoint_every is not None:
            return self.step > 0 and self.step % self.config.checkpoint_every == 0
        return since > max(30.0, 20 * cost)

    def _save(self, path: Path) -> None:
        checkpoint.save(
            path,
            {
                "step": self.step,
                "row_step": self.row_step,
                "seconds": self.seconds,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "meter": self.meter.sums,
                "meter_images": self.meter.images,
                "rng": torch.get_rng_state(),
                "rng_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            },
        )

    def _finite_means(self, folder: Path) -> tuple[float, float]:
        loss, accuracy = self.meter.means()
        if not math.isfinite(loss):
            path = folder / "checkpoint.pt"
            kept = f"the checkpoint before it is {str(path)!r}" if path.exists() else "there is no checkpoint before it"
            smaller = "--init-lr" if self.config.optimizer == "hrnn" else "--lr"
            raise TrainError(
                f"the training loss of {self.config.optimizer} (lr {self.config.lr:g}) is {loss} at step {self.step}; "
                f"{kept}. Start again with a smaller {smaller}"
            )
        return loss, accuracy


def _check_shape(model: nn.Module, feed: Feed, config: Config, classes: int) -> None:
    """One image through the model, so that a model that does not fit the data is refused before anything is written."""
    shape = (1, feed.channels, feed.image_size, feed.image_size)
    model.eval()
    try:
        with torch.no_grad():
            output = model(torch.zeros(shape, device=feed.device))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise TrainError(
            f"model {config.model!r} does not take images of {feed.image_size}x{feed.image_size} ({error}): "
            "choose another --image-size"
        ) from error
    if not isinstance(output, Tensor) or output.shape != (1, classes):
        got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise TrainError(f"model {config.model!r} is no image classifier: it returns {got}, not logits [1, {classes}]")


class _Metrics(contextlib.AbstractContextManager["_Metrics"]):
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

    def add(self, *row: object) -> None:
        try:
            csv.writer(self.file, lineterminator="\n").writerow(row)
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
    """The rows of metrics.csv as text, without the header and without a row that was cut off by a kill."""
    with open(path, encoding="utf-8", newline="") as file:
        return [row for row in csv.reader(file) if len(row) == len(COLUMNS) and row[0].isdigit()]
