"""The Config of a run, as config.json keeps it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from lopt.train import TrainError, checkpoint

HRNN_ONLY = ("init_lr", "min_lr", "meta", "state_format", "backend")  # fields of no other optimizer


@dataclass(frozen=True)
class Config:
    """Everything that decides what a run computes, plus where and how often. None: the default of what it configures.

    A step's `batch_size` images are all those of the step: processes share them equally, and each takes its share in
    `accumulate` parts.
    """

    model: str
    data: str
    optimizer: str
    lr: float
    weight_decay: float
    schedule: str  # of schedules.SCHEDULES
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
    train_digest: str | None = None  # of the names and classes of the training images, if they are files
    crop: str | None = None  # of data.CROPS, for a folder of images
    init_lr: float | None = None
    min_lr: float | None = None
    meta: str | None = None
    state_format: str | None = None
    backend: str | None = None
    checkpoint_every: int | None = None  # None: by time
    compare: tuple[str, ...] = ()
    compare_steps: int | None = None  # None: as many as the run
    schedule_for_all: bool = True  # the schedule of those it is compared with too; else each has its optimizer's own
    label_smoothing: float = 0.0
    ema: float | None = None  # decay of the averaged weights; None: none are kept
    amp: str | None = None  # of precision.DTYPES
    accumulate: int = 1
    channels_last: bool = False
    compile: bool = False
    parallel: str | None = None  # of parallel.MODES, for more than one process
    sync_bn: bool = False
    class_names: list[str] | None = None  # by label, for a folder of images; last, for they may be thousands

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
