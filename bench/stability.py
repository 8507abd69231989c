"""Whether training stays stable: thousands of steps of HRNN on large models, the first ones beside AdamW and SGD.

The task is not ImageNet: the images are textures that `lopt make-images` draws, learnable by convolutional networks.
What is looked at is the course of the loss, not an accuracy. Every training is a run folder of `lopt train`, with its
curves. HRNN comes first on all models, then the others, each for fewer steps; a run that is there already goes on where
it stopped. So a time limit costs nothing but the rest:

    timeout --signal TERM 570 lopt bench stability      again and again, until it says that all is done

Every lr stays constant, so that a shorter run is the beginning of a longer one.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch

from lopt.bench.train import named
from lopt.train import TrainError, command, models, textures
from lopt.train.arguments import current_device, whole
from lopt.train.config import Config
from lopt.train.metrics import COLUMNS, read_metrics

RIVALS = ("adamw:0.0001", "adamw:0.0003", "adamw:0.001", "sgd:0.1")


class Images(NamedTuple):
    """What is drawn: numbers of classes and of images, pixels on a side."""

    classes: int
    train: int
    val: int
    size: int


class Case(NamedTuple):
    """A model, the size of its images in pixels, images in a step, steps of HRNN and of the others."""

    model: str
    image_size: int
    batch_size: int
    steps: int
    rival_steps: int


@dataclasses.dataclass(frozen=True)
class Scale:
    """What fits a kind of device."""

    images: Images
    cases: tuple[Case, ...]
    options: tuple[str, ...]


SCALES = {
    "cuda": Scale(
        Images(classes=100, train=20_000, val=1_000, size=320),
        (Case("preresnet50", 224, 128, 5_000, 1_000), Case("inceptionv3", 299, 128, 5_000, 1_000)),
        ("--amp", "bf16", "--channels-last"),
    ),
    "cpu": Scale(
        Images(classes=20, train=2_000, val=200, size=96),
        (Case("preresnet18", 64, 16, 400, 100), Case("inceptionv3", 299, 4, 20, 10)),
        (),
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `lopt bench stability`."""
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--out", type=Path, default=Path("runs/stability"), help="default: runs/stability")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="some of the device's models (default: all)")
    parser.add_argument("--steps", type=whole(1), metavar="N", help="of HRNN (default: 5000 on a GPU)")
    parser.add_argument("--rival-steps", type=whole(1), metavar="N", help="of the others (default: 1000 on a GPU)")
    parser.add_argument("--meta", metavar="NAME|FILE", help="meta-parameters (default: the shipped ones)")
    parser.add_argument("--threads", type=whole(1), metavar="N", help="of a CPU (default: torch's own)")
    parser.add_argument(
        "--jobs",
        type=whole(1),
        default=os.cpu_count() or 1,
        metavar="N",
        help="that draw images (default: one per core)",
    )


def run(args: argparse.Namespace) -> int:
    """`lopt bench stability`: draw images, train, print a table. Exit code: of `lopt train`, 1 if HRNN diverged."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = current_device(device).type
    if kind not in SCALES:
        raise ValueError(f"--device {device}: it runs on {' and '.join(SCALES)}")
    scale = SCALES[kind]
    cases = [case for case in scale.cases if args.models is None or case.model in args.models]
    if not cases:
        raise ValueError(f"--models {args.models[0]}: there are {', '.join(case.model for case in scale.cases)}")
    for case in cases:
        models.build(named(case.model), scale.images.classes, 3, case.image_size)  # raises before anything is drawn
    images = args.out / "images-{}x{}-{}-{}".format(*scale.images)
    if not images.exists():
        args.out.mkdir(parents=True, exist_ok=True)
        print(f"drawing {scale.images.train + scale.images.val:,} images in {images}", flush=True)
        textures.make(images, *scale.images, jobs=args.jobs)
    failed: list[str] = []
    for rivals in (False, True):
        for case in cases:
            if case.model in failed:
                continue
            try:
                code = train(case, images, device, scale.options, args, rivals)
            except (TrainError, ImportError) as error:
                print(f"{case.model}: {error}", flush=True)
                failed.append(case.model)
                continue
            if code:  # a signal
                print(summary(args.out, cases))
                return code
    print(summary(args.out, cases) + ("" if failed else "\nall is done"))
    return 1 if failed else 0


def train(
    case: Case, images: Path, device: str, options: tuple[str, ...], args: argparse.Namespace, rivals: bool
) -> int:
    """Begin or go on with the run of HRNN on one case, or with those beside it; the exit code of `lopt train`."""
    folder = args.out / case.model
    if (folder / "config.json").exists():
        given: list[object] = ["--resume", folder]
        given += ["--steps", args.steps] if args.steps else []
        given += ["--device", args.device] if args.device else []
    else:
        steps = args.steps or case.steps
        given = ["--data", images, "--model", named(case.model), "--out", folder, "--device", device, *options]
        given += ["--image-size", case.image_size, "--batch-size", case.batch_size, "--steps", steps]
        given += ["--schedule", "constant", "--eval-every", max(1, steps // 10), "--log-every", max(1, steps // 500)]
    given += ["--meta", args.meta] if args.meta else []
    given += ["--threads", args.threads] if args.threads else []
    if rivals:
        given += ["--compare-steps", args.rival_steps or case.rival_steps, "--compare", *RIVALS]
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(word) for word in given]))


def summary(out: Path, cases: list[Case]) -> str:
    """A line for each run that has begun: how far it got, its last loss, and the highest after the first tenth."""
    lines = [f"{'run':<32} {'steps':>14} {'loss, last tenth':>17} {'highest later':>14} {'test accuracy':>14}"]
    for case in cases:
        folders = [("hrnn", out / case.model)]
        folders += [(rival, out / case.model / rival.replace(":", "-")) for rival in RIVALS]
        for name, folder in folders:
            if not (folder / "metrics.csv").exists():
                continue
            rows = [dict(zip(COLUMNS, row, strict=True)) for row in read_metrics(folder / "metrics.csv")]
            if not rows:
                continue
            losses = [float(row["train_loss"]) for row in rows]
            tenth = max(1, len(losses) // 10)
            last, later = math.fsum(losses[-tenth:]) / tenth, max(losses[tenth:], default=losses[-1])
            tested = [row["test_accuracy"] for row in rows if row["test_accuracy"]]
            steps = f"{rows[-1]['step']} of {Config.load(folder / 'config.json').steps}"
            accuracy = f"{100 * float(tested[-1]):.1f} %" if tested else "-"
            lines.append(f"{f'{case.model} {name}':<32} {steps:>14} {last:17.4f} {later:14.4f} {accuracy:>14}")
    return "\n".join(lines)
