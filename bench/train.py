"""How fast training goes with each optimizer: images per second, the optimizer's share of a step, peak memory.

Steps are those of `lopt train` on synthetic images, so that reading files costs nothing: HRNN by each fused backend,
with float32 and compact state, beside fused AdamW and SGD with momentum, foreach or, in fp16, fused. Contenders take
turns, round after round, and a row is the median over the rounds; warm-up stays outside. Peak memory is what a step has
beyond what was there before its model was made: of a GPU what torch allocated, of a CPU the resident set. The rows of a
contender differ in their unit: img/s, "optimizer share" of the time of a step, and B for the peak.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.util
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from lopt import backends
from lopt.bench.results import Row, append, commit, default_path, device_name, load, quantiles, today
from lopt.bench.step import threads_set
from lopt.train.arguments import current_device, whole
from lopt.train.config import Config
from lopt.train.data import Batches, Synthetic
from lopt.train.loop import Training
from lopt.train.optimizers import OPTIMIZERS
from lopt.train.precision import DTYPES

IMAGE_SIZES = {"resnet50": 224, "preresnet50": 224, "inceptionv3": 299}
TIMM_NAMES = {
    "resnet50": "timm:resnet50",
    "preresnet18": "timm:resnetv2_18",
    "preresnet50": "timm:resnetv2_50",
    "inceptionv3": "timm:inception_v3",
}
TURN = 0.5  # seconds, about
WARM_UP = 3  # steps
SPEED, SHARE, MEMORY = "img/s", "optimizer share", "B"  # units of the rows


class Contender(NamedTuple):
    """An optimizer as `lopt train` makes it."""

    name: str
    optimizer: str
    backend: str | None = None
    state_format: str | None = None


class Running(NamedTuple):
    """A contender in training, and the memory it needs, if that can be told."""

    training: Training
    batches: Batches
    peak: int | None


def named(model: str) -> str:
    """A model for `lopt train`: pytorchcv's or, where that is not installed, timm's."""
    return TIMM_NAMES.get(model, model) if importlib.util.find_spec("pytorchcv") is None else model


def contenders(device: torch.device, reference: bool, amp: str | None) -> list[Contender]:
    """Everything that can run on a device; the reference, of which a step takes a minute on a CPU, if asked for."""
    usable = [
        name
        for name, reason in backends.available().items()
        if reason is None and backends.BACKENDS[name].device in ("*", device.type)
    ]
    return [
        *(
            Contender(f"hrnn {name}" + (" compact" if state_format == "compact" else ""), "hrnn", name, state_format)
            for name in usable
            for state_format in backends.state_formats(name)
            if name != "reference" or (reference and state_format == "float32")
        ),
        Contender("adamw fused", "adamw"),
        Contender("sgd fused" if amp == "fp16" else "sgd foreach", "sgd"),  # what `lopt train` takes
    ]


def configure(model: str, contender: Contender, device: torch.device, args: argparse.Namespace) -> Config:
    """The Config of a contender; endless, for its steps are taken one by one."""
    choice, data = OPTIMIZERS[contender.optimizer], Synthetic()
    return Config(
        model=named(model),
        data=data.name,
        optimizer=contender.optimizer,
        lr=choice.lr,
        weight_decay=choice.weight_decay,
        schedule="constant",
        steps=sys.maxsize,
        batch_size=args.batch_size,
        image_size=args.image_size or IMAGE_SIZES[model],
        seed=0,
        device=str(device),
        threads=torch.get_num_threads(),
        workers=0,
        log_every=1,
        eval_every=1,
        train_images=data.train_count,
        classes=data.classes,
        state_format=contender.state_format,
        backend=contender.backend,
        amp=args.amp,
        channels_last=args.channels_last,
        compile=args.compile,
    )


def start(config: Config) -> Running:
    """A contender after its warm-up."""
    before = used_memory(torch.device(config.device))
    data = Synthetic()
    training = Training(config, data)
    batches = data.train_batches(training.feed, 0, config.steps)
    for _ in range(WARM_UP):
        training.take_step(batches)
    reset_peak(training.device)
    training.take_step(batches)
    peak = peak_memory(training.device)
    return Running(training, batches, None if peak is None or before is None else peak - before)


def used_memory(device: torch.device) -> int | None:
    """Bytes in use, after everything that can be given back was."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError, AttributeError):  # another C library has its own ways
        ctypes.CDLL(None).malloc_trim(0)
    return _kernel_says("VmRSS")


def reset_peak(device: torch.device) -> None:
    """Forget the most that was in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """The most that was in use since `reset_peak`, in bytes; None where it cannot be told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return _kernel_says("VmHWM")


def _kernel_says(name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return 1024 * int(found[1]) if found else None


def measure(model: str, device: torch.device, args: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """Rows of every contender on one model, and the names of those that failed and are left out."""
    running: dict[str, Running] = {}
    listed = contenders(device, args.reference, args.amp)
    with contextlib.suppress(Exception):  # what libraries keep from their first use on is no contender's
        start(configure(model, listed[-1], device, args))
    for contender in listed:
        try:
            running[contender.name] = start(configure(model, contender, device, args))
        except Exception as error:  # whatever a contender raises must not end the others
            print(f"FAILED {contender.name} on {model}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in running}
    counts = dict.fromkeys(running, 1)
    for turn in range(args.rounds + 1):  # the first finds out how many steps a turn has
        for name, (training, batches, _) in running.items():
            training.times.clear()
            for _ in range(counts[name]):
                training.take_step(batches)
            seconds, _, optimizer = training.times.per_step()
            training.optimizer.zero_grad()
            if turn:
                samples[name].append((args.batch_size / seconds, optimizer / seconds))
            else:
                counts[name] = max(1, round(TURN / seconds))
    options = (
        args.image_size and f"{args.image_size}px",
        args.amp,
        args.channels_last and "channels_last",
        args.compile and "compiled",
    )
    case = " ".join([f"{named(model)} x{args.batch_size}", *filter(None, options)])
    rows = []
    for name, (training, _, peak) in running.items():
        speeds, shares = zip(*samples[name], strict=True)
        values = {SPEED: quantiles(speeds), SHARE: quantiles(shares)}
        if peak is not None:
            values[MEMORY] = (peak, peak, peak)
        rows += [
            Row(
                "train",
                case,
                name,
                0 if device.type == "cuda" else torch.get_num_threads(),
                sum(param.numel() for param in training.parameters),
                len(training.parameters),
                "float32",
                unit,
                *quantiles_of_unit,
                device_name(device),
                commit(),
                today(),
            )
            for unit, quantiles_of_unit in values.items()
        ]
    return rows, [contender.name for contender in listed if contender.name not in running]


def table(rows: list[Row]) -> str:
    """The rows of one or more cases, a line for each contender."""
    cells = {(row.case, row.threads, row.backend, row.unit): row for row in rows if row.op == "train"}
    lines = []
    for case, threads, name in dict.fromkeys(key[:3] for key in cells):
        speed, share = (cells[case, threads, name, unit] for unit in (SPEED, SHARE))
        peak = cells.get((case, threads, name, MEMORY))
        rival = cells.get((case, threads, "adamw fused", SPEED))
        lines.append(
            f"  {case:<36} {name:<20} {speed.p50:9.2f} img/s ({speed.p20:.2f} to {speed.p80:.2f}), "
            f"optimizer {100 * share.p50:5.1f} %"
            + (f", peak {peak.p50 / 2**30:6.2f} GiB" if peak else "")
            + (f", {speed.p50 / rival.p50:5.2f} of adamw's speed" if rival else "")
        )
    return "\n".join(lines)


def plot(path: Path, out: Path) -> None:
    """Draw the time of a step, its optimizer's part, and the peak memory; the latest row of each contender and case.

    Args:
        path: results file. out: PNG file to write.
    """
    from matplotlib.figure import Figure

    latest = {
        (row.device, row.threads, row.case, row.backend, row.unit): row for row in load(path) if row.op == "train"
    }
    panels = list(dict.fromkeys(key[:3] for key in latest))
    if not panels:
        raise ValueError(f"{path} has no rows of `lopt bench train` to draw")
    figure = Figure(figsize=(11, 0.6 + 1.9 * len(panels)), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), 2, squeeze=False), panels, strict=True):
        names = list(dict.fromkeys(key[3] for key in latest if key[:3] == panel))[::-1]
        batch = float(panel[2].split(" x")[1].split()[0])
        seconds = [batch / latest[(*panel, name, SPEED)].p50 for name in names]
        optimizer = [latest[(*panel, name, SHARE)].p50 * step for name, step in zip(names, seconds, strict=True)]
        rest = [step - part for step, part in zip(seconds, optimizer, strict=True)]
        axes[0].barh(names, rest, color="#9bb7d4", label="forward and backward")
        axes[0].barh(names, optimizer, left=rest, color="#e07b00", label="optimizer")
        threads = f", {panel[1]} thread(s)" if panel[1] else ""
        axes[0].set(xlabel="seconds per step", title=f"{panel[2]}, {panel[0]}{threads}")
        axes[0].title.set_fontsize(9)
        known = [name for name in names if (*panel, name, MEMORY) in latest]
        axes[1].barh(known, [latest[(*panel, name, MEMORY)].p50 / 2**30 for name in known], color="#4d9221")
        axes[1].set(xlabel="peak memory, GiB")
        for each in axes:
            each.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower left", frameon=False, ncols=2)
    figure.savefig(out, dpi=130)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `lopt bench train`."""
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(IMAGE_SIZES)}; default: all")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--batch-size", type=whole(1), metavar="N", help="default: 256 on a GPU, 4 on a CPU")
    parser.add_argument("--image-size", type=whole(1), metavar="PIXELS", help="default: what the model is made for")
    parser.add_argument("--amp", choices=[*DTYPES, "none"], help="default: bf16 on a GPU, none on a CPU")
    parser.add_argument(
        "--channels-last", action=argparse.BooleanOptionalAction, help="memory order (default: on a GPU)"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--reference", action="store_true", help="the reference backend too")
    parser.add_argument("--threads", type=whole(1), metavar="N", help="of a CPU (default: torch's own)")
    parser.add_argument("--rounds", type=whole(1), default=5, metavar="N", help="turns of each contender (default: 5)")
    parser.add_argument(
        "--out", type=Path, default=None, help="CSV file to append to (default: bench/results.csv of the checkout)"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the file's rows after measuring")


def run(args: argparse.Namespace) -> int:
    """`lopt bench train`: print a table per model, append its rows. Returns 1 if a contender failed."""
    if unknown := [model for model in args.models if model not in IMAGE_SIZES]:
        raise ValueError(f"no benchmark model {unknown[0]!r}; there are {', '.join(IMAGE_SIZES)}")
    device = current_device(args.device)
    path = args.out or default_path()
    on_gpu = device.type == "cuda"
    args.batch_size = args.batch_size or (256 if on_gpu else 4)
    args.amp = {"none": None, None: "bf16" if on_gpu else None}.get(args.amp, args.amp)
    args.channels_last = on_gpu if args.channels_last is None else args.channels_last
    print(f"{device_name(device)}, torch {torch.__version__}, commit {commit()}")
    failed: list[str] = []
    for model in args.models or IMAGE_SIZES:
        with threads_set(args.threads or torch.get_num_threads()):
            rows, lost = measure(model, device, args)
        append(rows, path)
        failed += lost
        print(table(rows), flush=True)
        gc.collect()
    print(f"rows appended to {path}")
    if args.plot:
        plot(path, args.plot)
        print(f"plot in {args.plot}")
    return 1 if failed else 0
