"""`lopt train`: options -> a validated Config -> a run folder."""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from lopt import HRNN, backends
from lopt.state import FORMATS
from lopt.train import TrainError, models
from lopt.train.data import Digits, ImageFolder, open_data
from lopt.train.loop import OPTIMIZERS, SCHEDULES, Config, StopRequest, Training, read_metrics

DEFAULT_MODEL = {True: "preresnet8", False: "preresnet50"}  # for digits, for a folder of images
DEFAULT_EPOCHS = {True: 20, False: 90}
DEFAULT_BATCH = {True: 64, False: 128}
SMALL_IMAGE = 32  # what a folder's images become for a model that takes any size
ROWS = 400  # in metrics.csv, about, when --log-every does not say

CHANGEABLE = ("steps", "device", "state_format", "backend", "threads", "workers", "checkpoint_every", "compare")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lopt train`. Every default is None here, so that a resumed run knows what was given."""
    what = parser.add_argument_group("what is trained")
    what.add_argument("--model", help="preresnet8 (default), a pytorchcv name, timm:NAME or torchvision:NAME")
    what.add_argument("--data", help="digits (default), or a folder with train/ and val/ of class folders")
    what.add_argument("--image-size", type=_whole(1), metavar="PIXELS", help="default: what the model is made for")
    what.add_argument("--batch-size", type=_whole(1), metavar="N", help="default: 64 for digits, 128 for a folder")
    length = what.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=_whole(1), metavar="N", help="default: 20 for digits, 90 for a folder")
    length.add_argument("--steps", type=_whole(1), metavar="N")
    what.add_argument("--seed", type=_whole(0), metavar="N", help="weights, order and augmentation (default 0)")

    how = parser.add_argument_group("how")
    how.add_argument("--optimizer", choices=OPTIMIZERS, help="default: hrnn")
    how.add_argument(
        "--lr",
        type=_positive,
        help="default: 1 for hrnn (it multiplies the learned step), 0.001 for adamw, 0.1 for sgd",
    )
    how.add_argument("--init-lr", type=_positive, metavar="LR", help="hrnn: rate its learned rates start from")
    how.add_argument(
        "--weight-decay",
        type=_not_negative,
        metavar="W",
        help="decoupled for hrnn and adamw; default: 0 for hrnn, 0.01 for adamw, 0.0005 for sgd",
    )
    how.add_argument("--schedule", choices=SCHEDULES, help="of lr over the run (default: cosine)")
    how.add_argument("--meta", metavar="NAME|FILE", help="hrnn: learned weights (default: the shipped ones)")
    how.add_argument("--state-format", choices=FORMATS, help="hrnn: 76 or, compact, 40 bytes of state per parameter")
    how.add_argument("--backend", metavar="NAME", help="hrnn: reference, cpu, triton or cuda (default: the fastest)")
    how.add_argument(
        "--compare",
        nargs="+",
        type=_rival,
        metavar="NAME[:LR]",
        help="then train the same with adamw, sgd or hrnn and draw both",
    )

    where = parser.add_argument_group("where")
    where.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    where.add_argument(
        "--threads",
        type=_whole(1),
        metavar="N",
        help="on a CPU (default: 1 for preresnet8 on digits, too little to share; else torch's own)",
    )
    where.add_argument(
        "--workers", type=_whole(0), metavar="N", help="processes that decode images (default: the cores)"
    )
    folder = where.add_mutually_exclusive_group()
    folder.add_argument("--out", type=Path, metavar="FOLDER", help="default: runs/<model>-<data>-<optimizer>-<n>")
    folder.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with the run in this folder")
    where.add_argument(
        "--log-every", type=_whole(1), metavar="STEPS", help=f"rows of metrics.csv (default: about {ROWS})"
    )
    where.add_argument("--eval-every", type=_whole(1), metavar="STEPS", help="test accuracy (default: every epoch)")
    where.add_argument("--checkpoint-every", type=_whole(1), metavar="STEPS", help="default: every half minute")


def run(args: argparse.Namespace) -> int:
    """Exit code: 0 done, 130 or 143 stopped by SIGINT or SIGTERM. Raises TrainError, and ImportError for a package that
    is needed and not installed; options that do not fit raise before anything is written."""
    for package in ("matplotlib", "tqdm"):
        importlib.import_module(package)
    if args.resume is None:
        config, data = _new(args)
        folder = args.out
        if folder is not None and (folder / "config.json").exists():
            raise TrainError(f"{str(folder)!r} holds a run: continue with --resume {folder}, or choose another --out")
        if folder is not None and folder.is_dir() and any(folder.iterdir()):
            raise TrainError(f"{str(folder)!r} holds other files: choose an empty or a new folder for --out")
    else:
        config, data = _resumed(args)
        folder = args.resume
    with _threads(config.threads):
        training = Training(config, data)
        folder = _make_folder(folder, config, data)
        return _train_all(training, folder)


def _train_all(training: Training, folder: Path) -> int:
    """The run and those it is compared with; each of these has its own folder inside the run's."""
    from lopt.train import plots

    config, data = training.config, training.data
    _announce(training, folder)
    drawn: dict[str, Path] = {}
    done = True
    with StopRequest() as stop:
        for rival in ("", *config.compare):
            if rival:
                training = Training(_rival_config(config, rival), data)
            home = _make_folder(folder / rival.replace(":", "-"), training.config, data)
            if (home / "checkpoint.pt").exists():
                training.restore(home / "checkpoint.pt")
            _write_config(training.config, home)
            done = training.run(home, stop)
            label = f"{OPTIMIZERS[training.config.optimizer].label}, lr {training.config.lr:g}"
            drawn[label] = home / "metrics.csv"
            try:
                plots.draw(folder / "curves.png", f"{config.model} on {data.name}", drawn)
            except OSError as error:
                text = f"{str(folder / 'curves.png')!r} cannot be written ({error}): free space, then resume"
                raise TrainError(text) from error
            if not done:
                break
            _report(label, training, home)
    if not done:
        print(
            f"stopped at step {training.step:,} of {training.config.steps:,} ({label}); "
            f"continue with: lopt train --resume {folder}"
        )
        return 128 + (stop.received or signal.SIGINT)
    print(f"files      {folder}: curves.png, metrics.csv, checkpoint.pt, config.json")
    return 0


def _new(args: argparse.Namespace) -> tuple[Config, Digits | ImageFolder]:
    """The Config that the options and the defaults make, and the data it names."""
    name = args.data or "digits"
    digits = name == "digits"
    optimizer = args.optimizer or "hrnn"
    choice = OPTIMIZERS[optimizer]
    if optimizer != "hrnn":
        for option in ("init_lr", "meta", "state_format", "backend"):
            if getattr(args, option) is not None:
                flag = "--" + option.replace("_", "-")
                raise TrainError(f"{flag} is for --optimizer hrnn, not {optimizer}: leave it out")
    device = _device(args.device)
    data = open_data(name)
    model = args.model or DEFAULT_MODEL[digits]
    _, native, _ = models.build(model, data.classes, data.channels, args.image_size)
    batch_size = args.batch_size or min(DEFAULT_BATCH[digits], data.train_count)
    if batch_size > data.train_count:
        raise TrainError(f"--batch-size {batch_size} exceeds the {data.train_count} training images: make it smaller")
    per_epoch = data.train_count // batch_size
    steps = args.steps or (args.epochs or DEFAULT_EPOCHS[digits]) * per_epoch
    meta = args.meta
    config = Config(
        model=model,
        data=name if digits else str(Path(name).resolve()),
        optimizer=optimizer,
        lr=args.lr or choice.lr,
        weight_decay=choice.weight_decay if args.weight_decay is None else args.weight_decay,
        schedule=args.schedule or "cosine",
        steps=steps,
        batch_size=batch_size,
        image_size=args.image_size or native or data.image_size or SMALL_IMAGE,
        seed=args.seed or 0,
        device=device,
        threads=args.threads or (1 if digits and model in models.OWN else torch.get_num_threads()),
        workers=(0 if digits else min(_cores(), 16)) if args.workers is None else args.workers,
        log_every=args.log_every or max(1, steps // ROWS),
        eval_every=args.eval_every or per_epoch,
        train_images=data.train_count,
        classes=data.classes,
        init_lr=args.init_lr,
        meta=str(Path(meta).resolve()) if meta and Path(meta).is_file() else meta,
        state_format=args.state_format,
        backend=args.backend,
        checkpoint_every=args.checkpoint_every,
        compare=_rivals(args.compare or (), optimizer),
    )
    return config, data


def _resumed(args: argparse.Namespace) -> tuple[Config, Digits | ImageFolder]:
    """The stored Config with the changes a run allows. Raises TrainError for any other option that differs."""
    if not (args.resume / "config.json").is_file():
        raise TrainError(f"{str(args.resume)!r} holds no run (no config.json): check --resume")
    stored = Config.load(args.resume / "config.json")
    if args.epochs is not None:
        args.steps = args.epochs * (stored.train_images // stored.batch_size)
    changes = {}
    for field in stored.__dataclass_fields__:
        given = getattr(args, field, None)
        if field == "compare" and given is not None:
            given = _rivals(given, stored.optimizer)
        if field == "data" and given not in (None, "digits"):
            given = str(Path(given).resolve())
        if field == "meta" and given is not None and Path(given).is_file():
            given = str(Path(given).resolve())
        if given is None or given == getattr(stored, field):
            continue
        if field not in CHANGEABLE:
            flag = "--" + field.replace("_", "-")
            raise TrainError(
                f"{flag} {given} differs from the {getattr(stored, field)} of the run in {str(args.resume)!r}: "
                "leave it out, or start another run"
            )
        changes[field] = given
    config = replace(stored, **changes)
    config = replace(config, device=_device(config.device))
    data = open_data(config.data)
    if (data.train_count, data.classes) != (config.train_images, config.classes):
        raise TrainError(
            f"data {config.data!r} has {data.train_count} training images in {data.classes} classes, but the run in "
            f"{str(args.resume)!r} began with {config.train_images} in {config.classes}: restore it, or start anew"
        )
    return config, data


def _rivals(given: list[str] | tuple[str, ...], optimizer: str) -> tuple[str, ...]:
    rivals = tuple(dict.fromkeys(given))
    if optimizer in rivals:
        raise TrainError(f"--compare {optimizer} is the optimizer of the run: name another, or give it another :LR")
    return rivals


def _rival_config(config: Config, rival: str) -> Config:
    """The same task for another optimizer; rival: NAME or NAME:LR."""
    name, _, lr = rival.partition(":")
    choice = OPTIMIZERS[name]
    return replace(
        config,
        optimizer=name,
        lr=float(lr) if lr else choice.lr,
        weight_decay=choice.weight_decay,
        init_lr=None,
        meta=None,
        state_format=None,
        backend=None,
        compare=(),
    )


def _device(name: str | None) -> str:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TrainError(f"device {name!r} cannot be used ({reason}): choose another --device, such as cpu") from error
    return name


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _threads:
    """torch's number of CPU threads, inside. Sums over threads depend on it, so a resumed run uses its own."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.count)

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self.before)


def _make_folder(folder: Path | None, config: Config, data: Digits | ImageFolder) -> Path:
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


def _announce(training: Training, folder: Path) -> None:
    config, data = training.config, training.data
    tensors = training.parameters
    details = [f"lr {config.lr:g} ({config.schedule})", f"weight decay {config.weight_decay:g}"]
    if isinstance(training.optimizer, HRNN):
        own = training.optimizer
        backend = backends.choose(training.device, own.config, config.backend, own.state_format)
        details += [f"init_lr {own.defaults['init_lr']:g}", f"{own.state_format} state"]
        details += [f"backend {backend.__name__.rpartition('.')[2]}"]
    epochs = config.steps * config.batch_size / data.train_count
    threads = f" with {config.threads} thread{'s' if config.threads > 1 else ''}"
    where = config.device + (threads if config.device == "cpu" else "")
    print(f"model      {config.model}: {sum(map(torch.numel, tensors)):,} parameters in {len(tensors)} tensors")
    print(
        f"data       {data.name}: {data.train_count:,} training and {data.test_count:,} test images of "
        f"{config.image_size}x{config.image_size} in {data.classes} classes"
    )
    print(f"optimizer  {OPTIMIZERS[config.optimizer].label}: {', '.join(details)}")
    print(
        f"run        {config.steps:,} steps of {config.batch_size} images ({epochs:.3g} epochs) on {where}, "
        f"in {folder}",
        flush=True,
    )


def _report(label: str, training: Training, folder: Path) -> None:
    tested = [row for row in read_metrics(folder / "metrics.csv") if row[5]]
    skipped = int(getattr(training.optimizer, "skipped_steps", 0))
    note = f"; {skipped:,} steps with a non-finite gradient were skipped" if skipped else ""
    accuracy, loss = float(tested[-1][5]), float(tested[-1][4])
    print(
        f"result     {label}: test accuracy {100 * accuracy:.2f} %, test loss {loss:.4f}, "
        f"{training.step:,} steps in {training.seconds:.0f} s{note}"
    )


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
        return int(text)

    return parse


def _number(text: str, allowed: Callable[[float], bool], kind: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and allowed(value)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a {kind} number")
    return value


def _positive(text: str) -> float:
    return _number(text, lambda value: value > 0, "positive")


def _not_negative(text: str) -> float:
    return _number(text, lambda value: value >= 0, "positive or zero")


def _rival(text: str) -> str:
    name, colon, lr = text.partition(":")
    if name not in OPTIMIZERS:
        raise argparse.ArgumentTypeError(f"{text!r} is no optimizer: choose from {', '.join(OPTIMIZERS)}, or NAME:LR")
    return f"{name}:{_positive(lr)!r}" if colon else name
