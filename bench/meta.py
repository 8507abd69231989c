"""How fast meta-training is: task-steps per second, and the memory that an unroll keeps for its gradient.

Each stage of a recipe runs its estimator on its own mixes, in turn, as `lopt meta-train` does. A task-step is one step
of one task in one row, its gradient and the share of the meta-gradient included. Memory is what autograd saves, each
storage once: per scalar parameter and step; an estimator without backpropagation keeps nothing. Under `torchrun` the
processes share out the rows, and the task-steps are those of all.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
import weakref
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lopt.bench.results import Row, append, commit, default_path, device_name, quantiles, today
from lopt.bench.step import threads_set
from lopt.meta.estimators import Estimator
from lopt.meta.recipe import ESTIMATORS, RECIPES, Recipe, Stage
from lopt.meta.tasks import Random
from lopt.meta.unroll import World
from lopt.metaparams import MetaParams
from lopt.train.arguments import current_device, not_negative, whole
from lopt.train.group import ALONE, Group


class Bench(NamedTuple):
    """A stage ready to run."""

    estimator: Estimator
    worlds: list[World]
    meta: MetaParams
    steps: int  # of an unroll
    group: Group


def prepare(recipe: Recipe, stage: Stage, rows: int, device: torch.device, group: Group = ALONE) -> Bench:
    """Worlds of all mixes of a stage, at their first restart; `rows` are those of all processes."""
    estimator = ESTIMATORS[stage.estimator](stage)
    if rows % (group.size * estimator.repeat):
        raise ValueError(f"--rows {rows}: {group.size} processes need a multiple of {group.size * estimator.repeat}")
    random = Random(torch.Generator(device).manual_seed(0), estimator.repeat, group.rank, group.size)
    stage = dataclasses.replace(stage, rows=rows)
    worlds = [stage.world(tasks, recipe.config, device, random, group) for tasks in stage.mixes()]
    return Bench(estimator, worlds, MetaParams.init(recipe.config).to(device=device), round(stage.unroll.low), group)


def task_steps_per_second(bench: Bench, rounds: int, budget: float) -> list[float]:
    """One sample for each turn of all mixes; a first turn warms up.

    Args:
        bench: the stage. rounds: turns. budget: seconds of turns after which no further one begins.
    """
    samples: list[float] = []
    spent = 0.0
    for turn in range(rounds + 1):
        started = time.perf_counter()
        for world in bench.worlds:
            bench.estimator(bench.meta, world, bench.steps)
        if bench.meta.device.type == "cuda":
            torch.cuda.synchronize()
        ended = time.perf_counter()
        count = sum(len(world.mix) * world.rows for world in bench.worlds) * bench.group.size * bench.steps
        if turn:
            spent += ended - started
            samples.append(count / (ended - started))
        if bench.group.any([spent > budget])[0]:
            break
    return samples


class _Saved:
    """A tensor that autograd keeps, for as long as it does."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(bench: Bench) -> float:
    """What one unroll of each mix saves for its gradient, in bytes per parameter and step."""
    total = 0.0
    for world in bench.worlds:
        saved: weakref.WeakSet[_Saved] = weakref.WeakSet()  # of these, the tasks' graphs go with their step

        def pack(tensor: Tensor, saved: weakref.WeakSet[_Saved] = saved) -> _Saved:
            saved.add(one := _Saved(tensor))
            return one

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor):
            flat = bench.meta.flat().detach().requires_grad_()
            named = MetaParams.from_flat(bench.meta.config, flat)
            world.restart(named)
            unroll = world.unroll(named, bench.steps, derivatives=1)
        storages = {one.tensor.untyped_storage().data_ptr(): one.tensor.untyped_storage().nbytes() for one in saved}
        del unroll
        total += sum(storages.values()) / (bench.steps * world.rows * world.mix.segments.total)
    return total / len(bench.worlds)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lopt bench meta`."""
    parser.add_argument("--recipe", choices=RECIPES, default="default", help="default: default")
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="of the recipe (default: all)")
    parser.add_argument(
        "--rows", type=whole(1), nargs="+", metavar="N", help="copies of a mix (default: the stage's own)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    parser.add_argument(
        "--threads", type=whole(1), nargs="+", default=[1], help="CPU threads of a process to try (default: 1)"
    )
    parser.add_argument("--rounds", type=whole(1), default=7, help="turns of all mixes (default: 7)")
    parser.add_argument("--budget", type=not_negative, default=60.0, help="seconds per stage (default: 60)")
    parser.add_argument(
        "--out", type=Path, default=None, help="CSV file to append to (default: bench/results.csv of the checkout)"
    )


def run(args: argparse.Namespace) -> int:
    """`lopt bench meta`: print a line per stage, append its rows."""
    device, path, recipe = current_device(args.device), args.out or default_path(), RECIPES[args.recipe]
    named = {stage.name: stage for stage in recipe.stages}
    if unknown := [name for name in args.stages or () if name not in named]:
        raise ValueError(f"--stages {unknown[0]}: the recipe {args.recipe!r} has {', '.join(named)}")
    group = Group.from_environment()
    first = group.rank == 0
    if first:
        print(f"{device_name(device)}, torch {torch.__version__}, commit {commit()}")
    for threads in args.threads if device.type == "cpu" else [0]:
        for stage in (named[name] for name in args.stages or named):
            for rows in args.rows or [stage.rows]:
                with threads_set(threads or torch.get_num_threads()):
                    found = measure(recipe, stage, rows, device, threads, args.rounds, args.budget, group)
                if not first:
                    continue
                append(found, path)
                speed, *memory = found
                print(
                    f"  {stage.name:<14} {stage.estimator:<5} {rows:4} rows {threads * group.size} thread(s) "
                    f"{speed.p50:9.0f} task-steps/s ({speed.p20:.0f} to {speed.p80:.0f})"
                    + "".join(f", {row.p50:.0f} bytes per parameter-step" for row in memory),
                    flush=True,
                )
    group.leave()
    if first:
        print(f"rows appended to {path}")
    return 0


def measure(
    recipe: Recipe,
    stage: Stage,
    rows: int,
    device: torch.device,
    threads: int,
    rounds: int,
    budget: float,
    group: Group = ALONE,
) -> list[Row]:
    """Rows of one stage: its speed, and the memory of an unroll; `threads` are those of each process."""
    bench = prepare(recipe, stage, rows, device, group)
    speed = task_steps_per_second(bench, rounds, budget)
    memory = saved_bytes(bench) if stage.estimator == "bptt" else 0.0
    segments = [world.mix.segments for world in bench.worlds]
    where = device_name(device)

    def row(unit: str, values: tuple[float, float, float]) -> Row:
        return Row(
            f"meta {stage.estimator}",
            f"{stage.name} x{rows}",
            f"hrnn {type(bench.estimator).__name__}" + (f", {group.size} processes" if group.size > 1 else ""),
            threads * group.size,
            rows * sum(each.total for each in segments),
            sum(map(len, segments)),
            "float32",
            unit,
            *values,
            where,
            commit(),
            today(),
        )

    return [row("task-steps/s", quantiles(speed)), row("B/parameter-step", (memory, memory, memory))]
