"""`lopt train`: options -> a validated Config -> a run folder."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from lopt.metaparams import DEFAULT, MetaParams
from lopt.state import FORMATS
from lopt.train import TrainError, models, parallel
from lopt.train.arguments import checked_device, decay, not_negative, positive, share, whole
from lopt.train.config import HRNN_ONLY, Config
from lopt.train.data import CROPS, NAMED, Data, open_data
from lopt.train.group import announced
from lopt.train.loop import Training
from lopt.train.optimizers import OPTIMIZERS
from lopt.train.precision import DTYPES
from lopt.train.runs import train_all
from lopt.train.schedules import COOLDOWN, SCHEDULES


class Defaults(NamedTuple):
    """What is trained when the options do not say."""

    model: str
    epochs: int
    batch_size: int


DEFAULTS = {"digits": Defaults("preresnet8", 20, 64), "synthetic": Defaults("resnet50", 1, 128)}
FOLDER_DEFAULTS = Defaults("preresnet50", 90, 128)
SMALL_IMAGE = 32  # what images of no size of their own become for a model that takes any
ROWS = 400  # in metrics.csv, about, when --log-every does not say

CHANGEABLE = (
    *("steps", "data", "device", "meta", "state_format", "backend", "threads", "workers", "checkpoint_every"),
    *("compare", "compare_steps", "accumulate", "channels_last", "compile", "parallel"),
)  # of a resumed run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lopt train`. Every default is None here, so that a resumed run knows what was given."""
    what = parser.add_argument_group("what is trained")
    what.add_argument(
        "--model", help="preresnet8, a pytorchcv name, timm:NAME or torchvision:NAME; the default depends on --data"
    )
    what.add_argument("--data", help="digits (default), synthetic, or a folder with train/ and val/ of class folders")
    what.add_argument("--image-size", type=whole(1), metavar="PIXELS", help="default: what the model is made for")
    what.add_argument(
        "--crop",
        choices=CROPS,
        help="of a folder's images: resized, a random part (default), or padded, moved a little, for small images",
    )
    what.add_argument(
        "--batch-size", type=whole(1), metavar="N", help="of a step, on all devices (default: 64 for digits, else 128)"
    )
    length = what.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=whole(1), metavar="N", help="default: 20 for digits, 1 for synthetic, else 90")
    length.add_argument("--steps", type=whole(1), metavar="N")
    what.add_argument("--seed", type=whole(0), metavar="N", help="weights, order and augmentation (default 0)")

    how = parser.add_argument_group("how")
    how.add_argument("--optimizer", choices=OPTIMIZERS, help="default: hrnn")
    how.add_argument(
        "--lr",
        type=positive,
        help="default: 1 for hrnn (it multiplies the learned step), 0.001 for adamw, 0.1 for sgd",
    )
    how.add_argument("--init-lr", type=positive, metavar="LR", help="hrnn: rate its learned rates start from")
    how.add_argument(
        "--min-lr", type=positive, metavar="LR", help="hrnn: bound below these (default: the weights' own)"
    )
    how.add_argument(
        "--weight-decay",
        type=not_negative,
        metavar="W",
        help="decoupled for hrnn and adamw; default: 0 for hrnn, 0.01 for adamw, 0.0005 for sgd",
    )
    how.add_argument(
        "--schedule",
        choices=SCHEDULES,
        help=f"of lr; cooldown: linear to 0 over the last {COOLDOWN:.0%}%; default: cooldown for hrnn, else cosine",
    )
    how.add_argument("--label-smoothing", type=share, metavar="S", help="of training (default: 0; often 0.1)")
    how.add_argument(
        "--ema", type=decay, metavar="DECAY", help="test weights averaged over the steps too (often 0.9999)"
    )
    how.add_argument("--meta", metavar="NAME|FILE", help="hrnn: meta-parameters (default: the shipped ones)")
    how.add_argument("--state-format", choices=FORMATS, help="hrnn: 76 or, compact, 40 bytes of state per parameter")
    how.add_argument("--backend", metavar="NAME", help="hrnn: reference, cpu, triton or cuda (default: the fastest)")
    how.add_argument(
        "--compare",
        nargs="+",
        type=_rival,
        metavar="NAME[:LR[:DECAY]]",
        help="then train the same with adamw, sgd or hrnn, at a rate and weight decay, and draw both",
    )
    how.add_argument("--compare-steps", type=whole(1), metavar="N", help="of these (default: as many as of the run)")

    fast = parser.add_argument_group("speed and size")
    fast.add_argument(
        "--amp", choices=DTYPES, help="automatic mixed precision; fp16 with loss scaling (default: float32)"
    )
    fast.add_argument("--channels-last", action=argparse.BooleanOptionalAction, help="memory order (default: no)")
    fast.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the model (default: no)")
    fast.add_argument(
        "--accumulate", type=whole(1), metavar="N", help="take a step's images in N parts, for memory (default: 1)"
    )
    fast.add_argument("--parallel", choices=parallel.MODES, help="under torchrun: DDP (default) or FSDP2")
    fast.add_argument(
        "--sync-bn", action=argparse.BooleanOptionalAction, help="BatchNorm over all processes' images (default: no)"
    )

    where = parser.add_argument_group("where")
    where.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    where.add_argument(
        "--threads",
        type=whole(1),
        metavar="N",
        help="on a CPU (default: 1 for preresnet8 on digits, too little to share; else torch's own)",
    )
    where.add_argument(
        "--workers", type=whole(0), metavar="N", help="processes that decode images (default: the cores)"
    )
    folder = where.add_mutually_exclusive_group()
    folder.add_argument("--out", type=Path, metavar="FOLDER", help="default: runs/<model>-<data>-<optimizer>-<n>")
    folder.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with the run in this folder")
    where.add_argument(
        "--log-every", type=whole(1), metavar="STEPS", help=f"rows of metrics.csv (default: about {ROWS})"
    )
    where.add_argument("--eval-every", type=whole(1), metavar="STEPS", help="test accuracy (default: every epoch)")
    where.add_argument("--checkpoint-every", type=whole(1), metavar="STEPS", help="default: every half minute")


def run(args: argparse.Namespace) -> int:
    """Exit code: 0 done, 130 or 143 stopped by SIGINT or SIGTERM. Raises TrainError, and ImportError for a package that
    is needed and not installed; options that do not fit raise before anything is written."""
    for package in ("matplotlib", "tqdm"):
        importlib.import_module(package)
    if args.parallel is not None and "WORLD_SIZE" not in os.environ:
        raise TrainError(
            f"--parallel {args.parallel} is for several processes: start them with "
            "torchrun --nproc-per-node N -m lopt train"
        )
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
    _check_parts(config)
    group = parallel.join(parallel.own_device(config.device))
    with _threads(config.threads):
        code = train_all(Training(config, data, group), folder)
    group.leave()
    return code


def _new(args: argparse.Namespace) -> tuple[Config, Data]:
    """The Config that the options and the defaults make, and the data it names."""
    name = args.data or "digits"
    default = DEFAULTS.get(name, FOLDER_DEFAULTS)
    optimizer = args.optimizer or "hrnn"
    choice = OPTIMIZERS[optimizer]
    rivals = _rivals(args.compare or (), optimizer)
    _check_own(args, optimizer, rivals)
    device = checked_device(args.device)
    data = open_data(name, args.crop)
    model = args.model or default.model
    _, native, _ = models.build(model, data.classes, data.channels, args.image_size)
    parts = announced() * (args.accumulate or 1)
    batch_size = args.batch_size or max(1, min(default.batch_size, data.train_count) // parts) * parts
    if batch_size > data.train_count:
        raise TrainError(f"--batch-size {batch_size} exceeds the {data.train_count} training images: make it smaller")
    per_epoch = data.train_count // batch_size
    steps = args.steps or (args.epochs or default.epochs) * per_epoch
    config = Config(
        model=model,
        data=name if name in NAMED else str(Path(name).resolve()),
        optimizer=optimizer,
        lr=args.lr or choice.lr,
        weight_decay=choice.weight_decay if args.weight_decay is None else args.weight_decay,
        schedule=args.schedule or choice.schedule,
        steps=steps,
        batch_size=batch_size,
        image_size=args.image_size or native or data.image_size or SMALL_IMAGE,
        seed=args.seed or 0,
        device=device,
        threads=args.threads or (1 if name == "digits" and model in models.OWN else torch.get_num_threads()),
        workers=(0 if name in NAMED else min(_cores(), 16)) if args.workers is None else args.workers,
        log_every=args.log_every or max(1, steps // ROWS),
        eval_every=args.eval_every or per_epoch,
        train_images=data.train_count,
        classes=data.classes,
        train_digest=data.digest,
        crop=data.crop,
        init_lr=args.init_lr,
        min_lr=args.min_lr,
        meta=_named(args.meta or DEFAULT) if _has_hrnn(optimizer, rivals) else None,
        state_format=args.state_format,
        backend=args.backend,
        checkpoint_every=args.checkpoint_every,
        compare=rivals,
        compare_steps=args.compare_steps,
        schedule_for_all=args.schedule is not None,
        label_smoothing=args.label_smoothing or 0.0,
        ema=args.ema,
        amp=args.amp,
        accumulate=args.accumulate or 1,
        channels_last=bool(args.channels_last),
        compile=bool(args.compile),
        parallel=args.parallel or "ddp",
        sync_bn=bool(args.sync_bn),
        class_names=data.class_names,
    )
    return config, data


def _resumed(args: argparse.Namespace) -> tuple[Config, Data]:
    """The stored Config with the changes a run allows. Raises TrainError for any other option that differs."""
    if not (args.resume / "config.json").is_file():
        raise TrainError(f"{str(args.resume)!r} holds no run (no config.json): check --resume")
    stored = Config.load(args.resume / "config.json")
    if stored.crop is None and stored.data not in NAMED:  # of a version that had but one
        stored = replace(stored, crop=CROPS[0])
    if stored.schedule is None:  # of a version that left it to the optimizer
        stored = replace(stored, schedule=OPTIMIZERS[stored.optimizer].schedule, schedule_for_all=False)
    _check_own(args, stored.optimizer, args.compare or stored.compare)
    if args.epochs is not None:
        args.steps = args.epochs * (stored.train_images // stored.batch_size)
    changes = {}
    for field in stored.__dataclass_fields__:
        given = getattr(args, field, None)
        if field == "compare" and given is not None:
            given = _rivals(given, stored.optimizer)
        if field == "data" and given is not None and given not in NAMED:
            given = str(Path(given).resolve())
        if field == "meta" and given is not None:
            given = _named(given)
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
    if config.meta is None and _has_hrnn(config.optimizer, config.compare):
        if _has_hrnn(stored.optimizer, stored.compare):
            raise TrainError(
                f"the run in {str(args.resume)!r} does not say with which meta-parameters it began, and the default "
                f"may have been another: give --meta, hrnn-10 say"
            )
        config = replace(config, meta=DEFAULT)
    config = replace(config, device=checked_device(config.device))
    data = open_data(config.data, args.crop if config.data in NAMED else config.crop)
    if (data.train_count, data.classes) != (config.train_images, config.classes):
        raise TrainError(
            f"data {config.data!r} has {data.train_count} training images in {data.classes} classes, but the run in "
            f"{str(args.resume)!r} began with {config.train_images} in {config.classes}: restore it, or start anew"
        )
    if config.train_digest not in (None, data.digest):
        raise TrainError(
            f"the training images of data {config.data!r} have other names or classes than those with which the run in "
            f"{str(args.resume)!r} began: restore them, or start anew"
        )
    return replace(config, class_names=data.class_names), data


def _has_hrnn(optimizer: str, rivals: Sequence[str]) -> bool:
    """Whether HRNN is the optimizer of a run or of one that it is compared with."""
    return "hrnn" in (optimizer, *(rival.partition(":")[0] for rival in rivals))


def _check_own(args: argparse.Namespace, optimizer: str, rivals: Sequence[str]) -> None:
    """Raises TrainError for an option of HRNN where another optimizer trains; of them a rival takes `--meta` alone."""
    for option in HRNN_ONLY if optimizer != "hrnn" else ():
        if getattr(args, option) is not None and not (option == "meta" and _has_hrnn(optimizer, rivals)):
            flag = "--" + option.replace("_", "-")
            raise TrainError(f"{flag} is for --optimizer hrnn, not {optimizer}: leave it out")


def _named(meta: str) -> str:
    """What `--meta` names, whatever the working directory."""
    return str(Path(meta).resolve()) if meta not in MetaParams.shipped() and Path(meta).is_file() else meta


def _rivals(given: list[str] | tuple[str, ...], optimizer: str) -> tuple[str, ...]:
    rivals = tuple(dict.fromkeys(given))
    if optimizer in rivals:
        raise TrainError(f"--compare {optimizer} is the optimizer of the run: name another, or give it another :LR")
    return rivals


def _check_parts(config: Config) -> None:
    """Raises TrainError for a batch that cannot be shared equally, one GPU for several processes, --sync-bn on a CPU,
    and FSDP2 where it cannot train."""
    processes, device = announced(), torch.device(config.device)
    if processes > 1 and device.type != "cpu" and device.index is not None:
        raise TrainError(
            f"--device {config.device} is one GPU for {processes} processes: give --device {device.type}, "
            "of which each process takes its own"
        )
    if config.batch_size % (processes * config.accumulate):
        raise TrainError(
            f"--batch-size {config.batch_size} cannot be shared equally by {processes} processes in parts of "
            f"--accumulate {config.accumulate}: make it a multiple of {processes * config.accumulate}"
        )
    if config.parallel == "fsdp" and (reason := parallel.unable_to_shard(device)):
        raise TrainError(f"--parallel fsdp: {reason}; leave it out for DDP")
    if config.sync_bn and device.type == "cpu":
        raise TrainError(f"--sync-bn works on GPUs, not on device {config.device!r}: leave it out")


def _cores() -> int:
    """Of the machine, for each of its processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """torch's number of CPU threads, inside. Sums over threads depend on it, so a resumed run uses its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rival(text: str) -> str:
    name, *numbers = text.split(":")
    if name not in OPTIMIZERS or len(numbers) > 2:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no optimizer: choose from {', '.join(OPTIMIZERS)}, or NAME:LR or NAME:LR:DECAY"
        )
    kinds = zip((positive, not_negative), numbers, strict=False)
    return ":".join([name, *(repr(kind(number)) for kind, number in kinds)])
