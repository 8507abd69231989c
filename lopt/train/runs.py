"""A run and those it is compared with: the same task for other optimizers, each in a folder inside the run's."""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lopt import HRNN, backends
from lopt.train import TrainError, checkpoint
from lopt.train.config import HRNN_ONLY, Config
from lopt.train.data import Data
from lopt.train.loop import Diverged, Training
from lopt.train.metrics import COLUMNS, read_metrics
from lopt.train.optimizers import OPTIMIZERS
from lopt.train.stop import StopRequest


def train_all(training: Training, folder: Path | None) -> int:
    """Train to the end or until a signal, then the rivals; draw all curves. folder: existing or to be made; None: the
    first free one below runs/. Returns the exit code: 0, or 130 or 143 after SIGINT or SIGTERM."""
    config, data, group = training.config, training.data, training.group
    if folder is not None:
        _check_steps(config, folder)
    folder = group.from_first(make_folder(folder, config, data) if group.rank == 0 else None)
    if group.rank == 0:
        _announce(training, folder)
    drawn: dict[str, Path] = {}
    done = True
    with StopRequest() as stop, checkpoint.alone(folder) if group.rank == 0 else contextlib.nullcontext():
        for rival in ("", *config.compare):
            if rival:
                training = Training(rival_config(config, rival), data, group)
            home = _home(folder, rival)
            if group.rank == 0:
                make_folder(home, training.config, data)
            if group.from_first((home / "checkpoint.pt").exists()):
                training.restore(home / "checkpoint.pt")
            if group.rank == 0:
                _write_config(training.config, home)
            label = f"{OPTIMIZERS[training.config.optimizer].label}, lr {training.config.lr:g}"
            if label in drawn:
                label += f" ({rival})"
            if rival and group.rank == 0:
                details = f"{label} ({training.config.schedule}), weight decay {training.config.weight_decay:g}"
                print(f"compare    {details}", flush=True)
            outcome = None
            try:
                done = training.run(home, stop)
            except Diverged as error:
                if not rival:
                    raise
                outcome = f"ended: {error}"
            drawn[label] = home / "metrics.csv"
            if group.rank == 0:
                _draw(folder, f"{config.model} on {data.name}", drawn)
            if not done:
                break
            if group.rank == 0:
                print(f"result     {label}: {outcome or _result(training, home)}", flush=True)
    if group.rank == 0 and done:
        print(f"files      {folder}: curves.png, metrics.csv, checkpoint.pt, config.json")
    if group.rank == 0 and not done:
        print(
            f"stopped at step {training.step:,} of {training.config.steps:,} ({label}); "
            f"continue with: lopt train --resume {folder}"
        )
    return 0 if done else 128 + (stop.received or signal.SIGINT)


def _home(folder: Path, rival: str) -> Path:
    """Where a run lies that is compared with that of `folder`; that one itself for ""."""
    return folder / rival.replace(":", "-")


def _check_steps(config: Config, folder: Path) -> None:
    """Raises TrainError, before anything is written, if a run has gone further than it is asked to."""
    for rival in ("", *config.compare):
        path = _home(folder, rival) / "checkpoint.pt"
        steps = (rival_config(config, rival) if rival else config).steps
        if path.exists() and (taken := checkpoint.step_of(path)) > steps:
            option = "--compare-steps" if rival and steps == config.compare_steps else "--steps"
            raise TrainError(
                f"{option} {steps} is less than the {taken} steps already taken{rival and f' by {rival}'}: give more"
            )


def rival_config(config: Config, rival: str) -> Config:
    """The same task for another optimizer, or for the same with what else was given for it.

    rival: NAME, NAME:LR or NAME:LR:DECAY.
    """
    name, *numbers = rival.split(":")
    choice = OPTIMIZERS[name]
    if name != config.optimizer:
        own: dict[str, Any] = dict.fromkeys(HRNN_ONLY) | {"meta": config.meta if name == "hrnn" else None}
        config = replace(config, weight_decay=choice.weight_decay, **own)
    if len(numbers) > 1:
        config = replace(config, weight_decay=float(numbers[1]))
    return replace(
        config,
        optimizer=name,
        lr=float(numbers[0]) if numbers else choice.lr,
        schedule=config.schedule if config.schedule_for_all else choice.schedule,
        steps=min(config.steps, config.compare_steps or config.steps),
        compare=(),
        compare_steps=None,
    )


def make_folder(folder: Path | None, config: Config, data: Data) -> Path:
    """An existing folder: the given one, or runs/<model>-<data>-<optimizer>-<n>. Raises TrainError."""
    stem = f"{config.model}-{data.name}-{config.optimizer}".replace(":", "-").replace("/", "-")
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        for number in itertools.count(1):
            folder = Path("runs", f"{stem}-{number}")
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                continue
    except OSError as error:
        raise TrainError(f"run folder {str(folder)!r} cannot be made ({error}): choose another --out") from error
    raise AssertionError("unreachable")


def _write_config(config: Config, folder: Path) -> None:
    try:
        config.save(folder / "config.json")
    except OSError as error:
        text = f"run folder {str(folder)!r} cannot be written ({error}): make it writable, or choose another"
        raise TrainError(text) from error


def _draw(folder: Path, title: str, drawn: dict[str, Path]) -> None:
    from lopt.train import plots

    try:
        plots.draw(folder / "curves.png", title, drawn)
    except OSError as error:
        text = f"{str(folder / 'curves.png')!r} cannot be written ({error}): free space, then resume"
        raise TrainError(text) from error


def _announce(training: Training, folder: Path) -> None:
    config, data, group = training.config, training.data, training.group
    tensors = training.parameters
    details = [f"lr {config.lr:g} ({config.schedule})", f"weight decay {config.weight_decay:g}"]
    if isinstance(training.optimizer, HRNN):
        own, architecture = training.optimizer, training.optimizer.config
        backend = backends.choose(training.device, architecture, config.backend, own.state_format)
        bound = f"min_lr {math.exp(architecture.log_lr_min):.3g}"
        if architecture.log_lr_min_steps:
            bound += f" / sqrt(1 + step / {architecture.log_lr_min_steps:.3g})"
        if architecture.log_lr_min_distance:
            limit = architecture.log_lr_min_distance_limit
            distance = f"min(distance, {limit:.3g})" if limit else "distance"
            bound += f" or {architecture.log_lr_min_distance:.3g} {distance} / sqrt(1 + step)"
        details += [f"init_lr {own.defaults['init_lr']:g}", bound]
        details += [f"{own.state_format} state", f"backend {backend.__name__.rpartition('.')[2]}"]
    epochs = config.steps * config.batch_size / data.train_count
    threads = f" with {config.threads} thread{'s' if config.threads > 1 else ''}"
    where = config.device + (threads if config.device == "cpu" else "")
    where += f" in {group.size} processes ({config.parallel})" if group.size > 1 else ""
    others = f", {data.left_out:,} other file{'s' if data.left_out > 1 else ''} left out" if data.left_out else ""
    print(f"model      {config.model}: {sum(map(torch.numel, tensors)):,} parameters in {len(tensors)} tensors")
    print(
        f"data       {data.name}: {data.train_count:,} training and {data.test_count:,} test images of "
        f"{config.image_size}x{config.image_size} in {data.classes} classes{others}"
    )
    print(f"optimizer  {OPTIMIZERS[config.optimizer].label}: {', '.join(details)}")
    steps = f"{config.steps:,} steps of {config.batch_size} images ({epochs:.3g} epochs)"
    print(f"run        {steps} on {where}, in {folder}", flush=True)


def _result(training: Training, folder: Path) -> str:
    path = folder / "metrics.csv"
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in read_metrics(path)]
    last = next((row for row in reversed(rows) if row["test_accuracy"]), None)
    if last is None:
        raise TrainError(f"{str(path)!r} has no row with a test accuracy: restore it from a copy")
    skipped = int(getattr(training.optimizer, "skipped_steps", 0))
    said = f"test accuracy {100 * float(last['test_accuracy']):.2f} %"
    if last["test_top5"]:
        said += f" (top-5 {100 * float(last['test_top5']):.2f} %)"
    if last["ema_test_accuracy"]:
        said += f", of the averaged weights {100 * float(last['ema_test_accuracy']):.2f} %"
    said += f", test loss {float(last['test_loss']):.4f}, {training.step:,} steps in {training.seconds:.0f} s"
    return said + (f"; {skipped:,} steps with a non-finite gradient were skipped" if skipped else "")
