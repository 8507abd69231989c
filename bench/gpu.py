"""What bench/gpu.sh measures on a GPU beside `lopt bench step`: fused kernels only, models, graph replays, bandwidth.

    python -m lopt.bench.gpu measure --out FILE     rows for models: steps, replays of a captured step, a device copy
    python -m lopt.bench.gpu tiles --out FILE       the Triton backend's `advance` with other tiles
    python -m lopt.bench.gpu kernels                time of each kernel in a step, by torch's profiler
    python -m lopt.bench.gpu small                  a few steps over small tensors, for compute-sanitizer
    python -m lopt.bench.gpu pack --out FILE        the CUDA backend alone, for builds that differ in their kernels
    python -m lopt.bench.gpu summary FILE           the rows of a file as a table

Contenders take turns as in `lopt bench step`. A failing one is named and left out, and the exit code is then 1.
Bandwidth counts the bytes that have to move, against a device-to-device copy counted both ways.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lopt
from lopt import backends, native
from lopt.bench.results import Row, append, commit, device_name, load, quantiles, today
from lopt.bench.step import Step, bytes_moved, shapes_of, timer
from lopt.bench.train import table as training_table
from lopt.meta.tasks import Random, paper
from lopt.meta.unroll import Augment, Draw, Mix, Objective, World
from lopt.options import INIT_LR

CASES = ("100 tensors", "resnet50", "preresnet50", "inceptionv3", "vit_base_patch16_224")
TIMM_NAMES = {"preresnet50": "resnetv2_50", "inceptionv3": "inception_v3"}  # where pytorchcv is not installed
DEVICE = torch.device("cuda")
COPY = 1 << 28  # float32 values: 1 GiB
Make = Callable[[list[Tensor]], Any]  # parameters with gradients -> optimizer


def shapes(case: str) -> list[torch.Size]:
    """Shapes of the tensors of a model, by pytorchcv or timm, whichever is there."""
    try:
        return shapes_of(case)
    except ImportError:
        with torch.device("meta"):
            model = importlib.import_module("timm").create_model(TIMM_NAMES.get(case, case))
        return [param.shape for param in model.parameters()]


def random_params(case: str) -> list[Tensor]:
    """Float32 parameters with gradients on the GPU."""
    torch.manual_seed(0)
    params = [torch.randn(shape, device=DEVICE).requires_grad_() for shape in shapes(case)]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def contenders() -> dict[str, Make]:
    """Fused kernels of lopt, torch's AdamW and, where it is installed, pylo's CUDA optimizers."""

    def hrnn(backend: str, state_format: str) -> Make:
        return lambda params: lopt.HRNN(params, backend=backend, state_format=state_format)

    def adamw(**options: bool) -> Make:
        return lambda params: torch.optim.AdamW(params, lr=1e-3, **options)

    makes = {
        f"hrnn {name}" if state_format == "float32" else f"hrnn {name} {state_format}": hrnn(name, state_format)
        for name, reason in backends.available().items()
        if reason is None and backends.BACKENDS[name].device == "cuda"
        for state_format in backends.state_formats(name)
    }
    # Capturable, foreach would be slower, fused is as fast.
    makes |= {"adamw fused": adamw(fused=True, capturable=True), "adamw foreach": adamw(foreach=True)}
    with contextlib.suppress(ImportError):
        module = importlib.import_module("pylo.optim")
        makes |= {f"pylo {name}": getattr(module, name) for name in dir(module) if name.endswith("_CUDA")}
    return makes


failed: list[str] = []  # what `failures_named` saw fail


@contextlib.contextmanager
def failures_named(what: str) -> Iterator[None]:
    """Print an exception and go on."""
    try:
        yield
    except Exception as error:  # whatever a contender raises must not end the others
        print(f"FAILED {what}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        failed.append(what)
        torch.cuda.synchronize()


def captured(step: Step) -> Step:
    """Capture a step that has run before; returns the graph's replay, which keeps alive what the step works on."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(_captured: Step = step) -> None:
        graph.replay()

    return replay


def take_turns(steps: dict[tuple[str, str], Step], rounds: int, n: int, tensors: int, case: str) -> list[Row]:
    """Time (op, backend) -> step, round after round, each turn about 20 ms."""
    seconds = timer(DEVICE)
    counts: dict[tuple[str, str], int] = {}
    samples: dict[tuple[str, str], list[float]] = {}
    for key, step in steps.items():
        seconds(step, 2)
        counts[key], samples[key] = max(1, min(200, int(0.02 / seconds(step, 2)))), []
    for _ in range(rounds):
        for key, step in steps.items():
            samples[key].append(seconds(step, counts[key]))
    return [
        Row(
            op,
            case,
            backend,
            0,
            n,
            tensors,
            "float32",
            "s",
            *quantiles(samples[op, backend]),
            device_name(DEVICE),
            commit(),
            today(),
        )
        for op, backend in steps
    ]


def measure_copy(rounds: int) -> list[Row]:
    """A copy within device memory."""
    source, target = torch.randn(COPY, device=DEVICE), torch.empty(COPY, device=DEVICE)
    return take_turns({("copy", "torch"): lambda: target.copy_(source)}, rounds, COPY, 1, "1 GiB")


def measure_case(case: str, rounds: int) -> list[Row]:
    """Steps and replays of every contender on one model."""
    steps: dict[tuple[str, str], Step] = {}
    n, tensors = sum(shape.numel() for shape in shapes(case)), len(shapes(case))
    for name, make in contenders().items():
        with failures_named(f"{name} on {case}"):
            optimizer = make(random_params(case))
            optimizer.step()
            torch.cuda.synchronize()
            steps["step", name] = optimizer.step
        with failures_named(f"graph of {name} on {case}"):
            if ("step", name) in steps and not name.startswith(("pylo", "adamw foreach")):
                replay = captured(steps["step", name])
                replay()
                torch.cuda.synchronize()
                steps["replay", name] = replay
    return take_turns(steps, rounds, n, tensors, case)


def measure_tiles(case: str, rounds: int, out: Path) -> None:
    """The Triton backend with each tile of lopt.bench.sass, beside its own; rows after each: compiling takes long."""
    from lopt.backends import triton as backend
    from lopt.bench.sass import OTHER_TILES

    def replay(tile: Any) -> dict[tuple[str, str], Step]:
        name = f"hrnn triton {tile.block}x{tile.warps}" + (f" {tile.registers} registers" if tile.registers else "")
        backend.TILE = tile
        try:
            optimizer = lopt.HRNN(random_params(case), backend="triton")
            optimizer.step()
            return {("replay", name): captured(optimizer.step)}
        finally:
            backend.TILE = own

    own, sizes = backend.TILE, shapes(case)
    usual = replay(own)
    for tile in OTHER_TILES:
        with failures_named(f"{tile} on {case}"):
            append(
                take_turns(usual | replay(tile), rounds, sum(shape.numel() for shape in sizes), len(sizes), case), out
            )


def measure_pack(case: str, rounds: int) -> list[Row]:
    """The CUDA backend by the number of parameters that its threads handle together, which this build fixed."""
    name = f"hrnn cuda pack {native.load().gpu_layout()['pack']}"
    optimizer, sizes = contenders()["hrnn cuda"](random_params(case)), shapes(case)
    optimizer.step()
    steps = {("replay", name): captured(optimizer.step)}
    return take_turns(steps, rounds, sum(shape.numel() for shape in sizes), len(sizes), case)


def print_kernels(case: str) -> None:
    """Mean time of each kernel of a step, for every fused backend."""
    from torch.profiler import ProfilerActivity, profile

    for name, make in contenders().items():
        if not name.startswith("hrnn"):
            continue
        with failures_named(name):
            optimizer = make(random_params(case))
            for _ in range(3):
                optimizer.step()
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
                for _ in range(10):
                    optimizer.step()
                torch.cuda.synchronize()
            print(f"{name} on {case}, 10 steps")
            print(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=12), flush=True)


def run_small(only: str) -> None:
    """Steps of fused backends over sizes around those of tiles and chunks: untrained meta-parameters with and without
    attention in float32, the shipped ones in bfloat16, and a meta-gradient by Triton."""
    shipped = lopt.MetaParams.resolve(None)
    variants = {
        "untrained": (lopt.MetaParams.init(lopt.HRNNConfig()), torch.float32),
        "attention": (lopt.MetaParams.init(lopt.HRNNConfig(attention=True)), torch.float32),
        "shipped": (shipped, torch.bfloat16),
    }
    names = [name for name in contenders() if name.startswith(f"hrnn {only}")]
    if not names:
        raise ValueError(f"no backend {only!r} for this device: it has {', '.join(contenders())}")
    for name in names:
        backend, _, state_format = name.removeprefix("hrnn ").partition(" ")
        for variant, (meta, dtype) in variants.items():
            with failures_named(f"{name}, {variant}"):
                ours, right = (
                    small_steps(meta, chosen, state_format or "float32", device, dtype)
                    for chosen, device in ((backend, DEVICE), ("reference", torch.device("cpu")))
                )
                for left, other in zip(ours, right, strict=True):
                    # Two steps of init_lr / e each; the compact state's numbers differ by about 1e-3 of themselves.
                    rtol = 1e-5 if dtype == torch.float32 else 2**-7  # a bfloat16 may round the other way
                    torch.testing.assert_close(left, other, rtol=rtol, atol=4e-3 * INIT_LR)
                print(f"{name}, {variant}: as the reference", flush=True)
        if name == "hrnn triton":
            with failures_named("meta-gradient"):
                if not bool(small_meta_gradient(shipped).isfinite().all()):
                    raise ArithmeticError("the meta-gradient is not finite")


def small_steps(
    meta: lopt.MetaParams, backend: str, state_format: str, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """The parameters after two steps and one that a NaN leaves out, on the CPU. Gradients begin within an allocation,
    where vectors of them are not aligned."""
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.randn(n, generator=generator).to(device, dtype).requires_grad_()
        for n in (1, 7, 255, 257, 2049, 2052, 40_000)
    ]
    optimizer = lopt.HRNN(params, backend=backend, state_format=state_format, meta=meta, weight_decay=0.1)
    for step in range(3):
        for param in params:
            grad = torch.randn(len(param) + 1, generator=generator)
            if step == 2:
                grad[-1] = torch.nan
            param.grad = grad.to(device, dtype)[1:]
        optimizer.step()
    if int(optimizer.skipped_steps) != 1:
        raise ArithmeticError(f"{int(optimizer.skipped_steps)} steps were left out, not 1")
    return [param.detach().cpu() for param in params]


def small_meta_gradient(meta: lopt.MetaParams) -> Tensor:
    """Of a short unroll over tensors around the size of a tile."""
    mix = Mix([paper.Quadratic(3), paper.Quadratic(127), paper.Quadratic(300)], meta.config, DEVICE)
    random = Random(torch.Generator(DEVICE).manual_seed(0), repeat=1)
    world = World(mix, 3, random, Draw(1000), Augment(), Objective())
    flat = meta.flat().to(DEVICE).requires_grad_()
    named = lopt.MetaParams.from_flat(meta.config, flat)
    world.restart(named)
    (slope,) = torch.autograd.grad(world.unroll(named, 3, derivatives=1).sum(), flat)
    return slope


def summary(path: Path) -> str:
    """Rows of a file as tables. Steps: milliseconds, bandwidth and its part of the copy's, ratio to fused AdamW."""
    all_rows = load(path) if path.exists() else []
    rows = [row for row in all_rows if row.op != "train"]
    copies = [8 * row.n / row.p50 for row in rows if row.op == "copy"]
    lines = [f"{rows[0].device}, commit {rows[0].commit}, {rows[0].date}" if rows else "no rows"]
    lines += [f"device copy: {copies[-1] / 1e12:.2f} TB/s"] if copies else []
    cells: list[tuple[object, ...]] = [("op", "case", "backend", "ms", "p20-p80", "TB/s", "of copy", "adamw fused")]
    for row in rows:
        if row.op == "copy":
            continue
        moved = bytes_moved(row.backend) * row.n / row.p50
        rivals = [
            other.p50
            for other in rows
            if (other.op, other.case, other.dtype, other.backend) == (row.op, row.case, row.dtype, "adamw fused")
        ]
        cells.append(
            (
                row.op,
                row.case,
                row.backend,
                f"{row.p50 * 1e3:.3f}",
                f"{row.p20 * 1e3:.3f}-{row.p80 * 1e3:.3f}",
                f"{moved / 1e12:.2f}" if moved else "-",
                f"{moved / copies[-1]:.0%}" if moved and copies else "-",
                f"{row.p50 / rivals[-1]:.1f}x" if rivals else "-",
            )
        )
    for op, case, backend, *numbers in cells:
        lines.append(f"{op:<7} {case:<22} {backend:<34}" + "".join(f" {number:>15}" for number in numbers))
    lines += filter(None, [training_table(all_rows)])
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run one of the commands in the module's first lines; returns 1 if something failed, else 0."""
    parser = argparse.ArgumentParser(prog="python -m lopt.bench.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", choices=["measure", "tiles", "pack", "kernels", "small", "summary"])
    parser.add_argument("file", nargs="?", type=Path, help="of summary")
    parser.add_argument("--cases", nargs="+", default=list(CASES), help=f"default: {' '.join(CASES)}")
    parser.add_argument("--backend", default="", help="of small: this one alone (default: all)")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender (default: 15)")
    parser.add_argument("--out", type=Path, default=Path("results.csv"), help="CSV file (default: results.csv)")
    args = parser.parse_args(arguments)
    if args.command == "summary":
        print(summary(args.file or args.out))
        return 0
    if not torch.cuda.is_available():
        print(f"{parser.prog}: torch {torch.__version__} finds no GPU", file=sys.stderr)
        return 1
    if args.command == "small":
        run_small(args.backend)
    elif args.command == "kernels":
        print_kernels(args.cases[0])
    elif args.command == "pack":
        append(measure_pack(args.cases[0], args.rounds), args.out)
    elif args.command == "tiles":
        measure_tiles(args.cases[0], args.rounds, args.out)
    else:
        append(measure_copy(args.rounds), args.out)
        for case in args.cases:
            with failures_named(case):
                append(measure_case(case, args.rounds), args.out)
            gc.collect()
            torch.cuda.empty_cache()
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
