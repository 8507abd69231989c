"""How long one optimizer step takes: every usable backend beside what people use, in one run.

Contenders take turns, round after round, so that a slow moment of a shared machine hits all of them; a row is the
median over the rounds. Warm-up (state creation, compilation) stays outside. Parameters and gradients are float32 unless
asked otherwise; nothing but `optimizer.step()` is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import lopt
from lopt import backends
from lopt.backends import reference
from lopt.bench.results import Row, append, commit, default_path, device_name, load, quantiles, today
from lopt.train.arguments import current_device, not_negative, whole

SIZES = {"1k": 1_000, "100k": 100_000, "1M": 1_000_000, "10M": 10_000_000}
MODELS = {
    "resnet50": "pytorchcv.models.resnet",
    "preresnet50": "pytorchcv.models.preresnet",
    "inceptionv3": "pytorchcv.models.inceptionv3",
}
TIMM_MODELS = ("vit_base_patch16_224",)
TOY = "100 tensors"  # 50 layers of 32 units: time that does not grow with the parameters
CASES = (*SIZES, TOY, *MODELS, *TIMM_MODELS)

# Bytes that have to move per parameter and step, for the bandwidth column. HRNN: advance reads the gradient (4), reads
# and writes hidden, accum, ms and log_lr (2 * 76), writes the update (4); apply reads it and the parameter and writes
# that (12). The scan for non-finite gradients, which may find them in a cache, is not counted.
HRNN_BYTES = {"float32": 20 + 2 * 76, "compact": 20 + 2 * 40}  # by the format of the state
ADAMW_BYTES = 28

Step = Callable[[], Any]


class Contender(NamedTuple):
    """A name, and how to make its step for given parameters with gradients."""

    name: str
    make: Callable[[list[Tensor]], Step]


def shapes_of(case: str) -> list[torch.Size]:
    """Shapes of the tensors of a case: a size such as "1M", the toy model, or the name of a model.

    Raises:
        ValueError: the case is neither.
    """
    if case in SIZES:
        # Four tensors of unequal sizes: a model with little else than matrices.
        n = SIZES[case]
        parts = [n // 2, n // 4, n // 8]
        return [torch.Size([part]) for part in [*parts, n - sum(parts)]]
    if case == TOY:
        return [torch.Size(shape) for _ in range(50) for shape in ((32, 32), (32,))]
    with torch.device("meta"):
        if case in MODELS:
            model = getattr(importlib.import_module(MODELS[case]), case)()
        elif case in TIMM_MODELS:
            model = importlib.import_module("timm").create_model(case)
        else:
            raise ValueError(f"no benchmark case {case!r}; there are {', '.join(CASES)}")
    return [param.shape for param in model.parameters()]


def contenders(device: torch.device, case: str) -> list[Contender]:
    """Everything that can run on a device: usable backends, the compiled reference on plain sizes, torch's AdamW."""

    def hrnn(backend: str, state_format: str = "float32") -> Callable[[list[Tensor]], Step]:
        return lambda params: lopt.HRNN(params, backend=backend, state_format=state_format).step

    def adamw(**options: bool) -> Callable[[list[Tensor]], Step]:
        return lambda params: torch.optim.AdamW(params, lr=1e-3, **options).step

    usable = [
        name
        for name, reason in backends.available().items()
        if reason is None and backends.BACKENDS[name].device in ("*", device.type)
    ]
    entries = [Contender(f"hrnn {name}", hrnn(name)) for name in usable]
    entries += [
        Contender(f"hrnn {name} compact", hrnn(name, "compact"))
        for name in usable
        if name != "reference" and "compact" in backends.state_formats(name)
    ]
    if case in SIZES:
        entries.append(Contender("hrnn compiled reference", compiled_reference))
    entries.append(Contender("adamw fused", adamw(fused=True)))
    entries.append(Contender("adamw foreach", adamw(foreach=True)))
    return entries


def bytes_moved(contender: str) -> int:
    """Bytes per parameter that a step of a contender has to move, by its name; 0: not known."""
    if contender.startswith("hrnn"):
        return HRNN_BYTES["compact" if contender.endswith("compact") else "float32"]
    return ADAMW_BYTES if contender.startswith("adamw") else 0


def compiled_reference(params: list[Tensor]) -> Step:
    """The reference's functional step under torch.compile."""
    meta = lopt.MetaParams.resolve(None).to(device=params[0].device)
    segments = reference.Segments([param.numel() for param in params], params[0].device)
    param = torch.cat([param.detach().reshape(-1) for param in params])
    grad = torch.cat([param.grad.reshape(-1) for param in params if param.grad is not None])
    state = reference.init_flat_state(meta, meta.config, segments, torch.full_like(param, math.log(1e-3)))
    tensors = dict(meta)
    compiled = torch.compile(lambda p, g, s: reference.step(tensors, meta.config, segments, p, g, s))
    current = [param, state]

    @torch.no_grad()
    def step() -> None:
        moved, _, new = compiled(current[0], grad, current[1])
        current[:] = [moved, new]

    return step


def timer(device: torch.device) -> Callable[[Step, int], float]:
    """A function of (step, count) that returns seconds per step."""

    def cpu(step: Step, count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            step()
        return (time.perf_counter() - begin) / count

    def cuda(step: Step, count: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(count):
            step()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / count

    return cuda if device.type == "cuda" else cpu


@contextlib.contextmanager
def threads_set(count: int) -> Iterator[None]:
    """Run with another number of CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(
    case: str, device: torch.device, dtype: torch.dtype, threads: int, *, rounds: int, budget: float, compiled: bool
) -> list[Row]:
    """Time one step of every contender on one case.

    Args:
        case: a size or a model's name. device, dtype: of the parameters. threads: of the CPU.
        rounds: turns of each contender. budget: seconds after which a contender takes no further turn.
        compiled: whether torch.compile of the reference takes part.
    """
    shapes, seconds = shapes_of(case), timer(device)
    generator = torch.Generator().manual_seed(0)
    steps: dict[Contender, Step] = {}
    counts: dict[Contender, int] = {}
    samples: dict[Contender, list[float]] = {}
    n = sum(shape.numel() for shape in shapes)
    with threads_set(threads):
        for contender in contenders(device, case):
            if "compiled" in contender.name and not compiled:
                continue
            params = [
                torch.randn(shape, generator=generator).to(device=device, dtype=dtype).requires_grad_()
                for shape in shapes
            ]
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).to(device=device, dtype=dtype)
            steps[contender] = step = contender.make(params)
            step()
            once = seconds(step, 1)
            # Short steps are timed in batches of about 20 ms, so that the clock's own cost vanishes.
            counts[contender] = max(1, min(1000, int(0.02 / once)))
            samples[contender] = []
            if once * counts[contender] < budget / 3:
                seconds(step, counts[contender])
        for _ in range(rounds):
            for contender, step in steps.items():
                spent = sum(samples[contender]) * counts[contender]
                if not samples[contender] or spent < budget:
                    samples[contender].append(seconds(step, counts[contender]))
    where = device_name(device)
    return [
        Row(
            "step",
            case,
            contender.name,
            0 if device.type == "cuda" else threads,
            n,
            len(shapes),
            str(dtype).removeprefix("torch."),
            "s",
            *quantiles(samples[contender]),
            where,
            commit(),
            today(),
        )
        for contender in steps
    ]


def table(rows: list[Row]) -> str:
    """Rows of one case side by side: time, time per parameter, bandwidth, speed-up over reference and fused AdamW."""
    lines = []
    median = {row.backend: row.p50 for row in rows}
    for row in rows:
        bandwidth = bytes_moved(row.backend) * row.n / row.p50
        spread = (row.p80 - row.p20) / row.p50

        def ratio(other: str, p50: float = row.p50) -> str:
            return f"{median[other] / p50:8.2f}x" if other in median else "        -"

        lines.append(
            f"  {row.backend:<24} {row.p50 * 1e3:10.4f} ms  ±{spread * 50:3.0f} % {row.p50 / row.n * 1e9:9.2f} ns/param"
            f" {bandwidth / 1e9:8.2f} GB/s {ratio('hrnn reference')} {ratio('adamw fused')}"
        )
    return "\n".join(lines)


def plot(path: Path, out: Path) -> None:
    """Draw ns per parameter over the number of parameters, the latest row of each contender and case on each device.

    Args:
        path: results file. out: PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    latest = {
        (row.device, row.threads, row.backend, row.case): row
        for row in load(path)
        if row.op == "step" and row.case in SIZES and row.dtype == "float32"
    }
    if not latest:
        raise ValueError(f"{path} has no rows of `lopt bench step` on plain sizes to draw")
    panels = sorted({key[:2] for key in latest})
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False, sharey=True)
    for axis, panel in zip(axes[0], panels, strict=True):
        names = list(dict.fromkeys(key[2] for key in latest if key[:2] == panel))
        for name in names:
            rows = sorted(
                (row for key, row in latest.items() if key[:2] == panel and key[2] == name), key=lambda row: row.n
            )
            per = [1e9 / row.n for row in rows]
            middle = [row.p50 * scale for row, scale in zip(rows, per, strict=True)]
            axis.errorbar(
                [row.n for row in rows],
                middle,
                marker="o",
                label=name,
                ls="--" if "adamw" in name else "-",
                yerr=[
                    [(row.p50 - row.p20) * scale for row, scale in zip(rows, per, strict=True)],
                    [(row.p80 - row.p50) * scale for row, scale in zip(rows, per, strict=True)],
                ],
                capsize=2,
            )
        axis.set(xscale="log", yscale="log", xlabel="parameters", title=f"{panel[0]}, {panel[1]} thread(s)")
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("ns per parameter and step")
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=130)
    pyplot.close(figure)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `lopt bench step`."""
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: sizes and models but timm's"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"], help="of the parameters"
    )
    parser.add_argument("--threads", type=whole(1), nargs="+", help="CPU threads to try (default: 1 and all)")
    parser.add_argument("--rounds", type=whole(1), default=9, help="turns of each contender (default: 9)")
    parser.add_argument(
        "--budget", type=not_negative, default=10.0, help="seconds per contender and case (default: 10)"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile of the reference")
    parser.add_argument(
        "--out", type=Path, default=None, help="CSV file to append to (default: bench/results.csv of the checkout)"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the file's rows after measuring")


def run(args: argparse.Namespace) -> int:
    """`lopt bench step`: print a table per case, append its rows."""
    device, path = current_device(args.device), args.out or default_path()
    for case in (cases := args.cases or [*SIZES, *MODELS]):
        shapes_of(case)
    threads = [0] if device.type == "cuda" else args.threads or sorted({1, torch.get_num_threads()})
    print(f"{device_name(device)}, torch {torch.__version__}, commit {commit()}")
    for case in cases:
        for count in threads:
            rows = measure(
                case,
                device,
                getattr(torch, args.dtype),
                count or torch.get_num_threads(),
                rounds=args.rounds,
                budget=args.budget,
                compiled=not args.no_compile,
            )
            append(rows, path)
            print(
                f"\n{case}: {rows[0].n:,} parameters in {rows[0].tensors} tensors, {args.dtype}"
                + (f", {count} thread(s)" if count else "")
                + f"\n  {'':<24} {'median':>13}  spread {'':>19} {'bandwidth':>10}  {'reference/':>8} {'adamw/':>8}"
            )
            print(table(rows), flush=True)
    print(f"\nrows appended to {path}")
    if args.plot:
        plot(path, args.plot)
        print(f"plot in {args.plot}")
    return 0
