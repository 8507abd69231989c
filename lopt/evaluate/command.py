"""`lopt evaluate`: meta-parameters on tasks they were not trained on, beside tuned optimizers."""

from __future__ import annotations

import argparse
import concurrent.futures
import concurrent.futures.process
import importlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from lopt.evaluate import ablations, report, suites, timing
from lopt.evaluate.optimizers import OPTIMIZERS
from lopt.evaluate.training import Cache, Result, Run, digest, lock_steps, train
from lopt.metaparams import MetaParams
from lopt.train.arguments import whole

SEEDS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lopt evaluate`."""
    parser.add_argument(
        "--weights", nargs="+", metavar="FILE|NAME", help="meta-parameters, side by side (default: the default ones)"
    )
    parser.add_argument("--suite", choices=suites.SUITES, default="digits", help="default: digits")
    parser.add_argument(
        "--ablations",
        type=Path,
        metavar="FOLDER",
        help="architectures that the suite paper compares (default: shipped)",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: runs/evaluate-<suite>, written anew")
    parser.add_argument(
        "--seeds", type=whole(1), default=SEEDS, metavar="N", help=f"of every training (default {SEEDS})"
    )
    parser.add_argument("--quick", action="store_true", help="few tasks and steps: a try")
    parser.add_argument(
        "--only", choices=OPTIMIZERS, help="train this optimizer alone; the rest as far as it is cached"
    )
    parser.add_argument(
        "--jobs", type=whole(1), metavar="N", help="processes of one thread (default: one per processor)"
    )
    parser.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="results of all evaluations (default: ~/.cache/lopt/evaluate)"
    )


def run(args: argparse.Namespace) -> int:
    """Exit code 0. Raises ValueError, OSError or ImportError for options that cannot be carried out."""
    for package in ("matplotlib", "sklearn", "tqdm"):
        importlib.import_module(package)
    suite = suites.quick(suites.SUITES[args.suite]) if args.quick else suites.SUITES[args.suite]
    if args.ablations is not None and (suite.ablations is None or not args.ablations.is_dir()):
        reason = "is not a folder" if suite.ablations else f"is of no use: the suite {args.suite} compares none"
        raise ValueError(f"--ablations {args.ablations} {reason}")
    weights = load(args.weights)
    ablated = ablations.load(args.ablations or ablations.shipped()) if suite.ablations else {}
    labels, architectures = ({label: digest(meta) for label, meta in loaded.items()} for loaded in (weights, ablated))
    by_digest = {digest(meta): meta for meta in (*weights.values(), *ablated.values())}
    runs = suites.runs(suite, list(labels.values()), args.seeds, list(architectures.values()))
    if args.only and (line := OPTIMIZERS[args.only]).missing:
        raise ImportError(f"--only {args.only}: install {line.package}")
    trained = {run.setting.optimizer for run in runs}
    if args.only and args.only not in trained:
        raise ValueError(f"--only {args.only}: the suite {args.suite} has {', '.join(sorted(trained))}")
    folder = args.out or Path("runs") / f"evaluate-{args.suite}{'-quick' if args.quick else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    cache = Cache(args.cache or default_cache(), lambda name: suites.task(name).digest)
    results = {run: result for run in runs if (result := cache.get(run)) is not None}
    missing = [run for run in runs if run not in results and args.only in (None, run.setting.optimizer)]
    jobs = args.jobs or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    results |= complete(missing, by_digest, cache, jobs)
    timings: list[timing.Timing] = []
    if suite.timed:
        timings = timing.measure(next(iter(weights.values())), *(timing.QUICK if args.quick else timing.THOROUGH))
    ordered = {run: results[run] for run in runs if run in results}
    name = f"{args.suite} (quick)" if args.quick else args.suite
    evaluation = report.Evaluation(
        name, suite, args.seeds, labels, ordered, report.environment(), architectures, timings
    )
    print(report.write(evaluation, folder).strip())
    print(f"\nreport in {folder}/report.md")
    return 0


def load(names: list[str] | None) -> dict[str, MetaParams]:
    """Label -> meta-parameters.

    Raises:
        ValueError: two of them are the same, or a file does not hold meta-parameters. FileNotFoundError: no such file.
    """
    if not names:
        return {"default": MetaParams.resolve(None)}
    loaded = {name: MetaParams.resolve(name) for name in names}
    labels = {name: Path(name).stem for name in loaded}
    if len(set(labels.values())) < len(labels):
        labels = {name: name for name in loaded}
    out = {labels[name]: meta for name, meta in loaded.items()}
    seen: dict[str, str] = {}
    for label, meta in out.items():
        if (other := seen.setdefault(digest(meta), label)) != label:
            raise ValueError(f"--weights {label} and {other} hold the same meta-parameters: leave one out")
    return out


def default_cache() -> Path:
    """The user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lopt" / "evaluate"


def complete(runs: list[Run], weights: dict[str, MetaParams], cache: Cache, jobs: int) -> dict[Run, Result]:
    """Train what is missing, with a progress bar; every result is stored as soon as it is there."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    groups = sorted(lock_steps(runs, lambda name: suites.task(name).count), key=_cost, reverse=True)
    out: dict[Run, Result] = {}
    if not groups:
        return out
    bar = tqdm(
        total=sum(map(_cost, groups)),
        unit="step",
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10,
        bar_format="{desc} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]",
    )
    with bar:
        for group, results in _carried_out(groups, weights, jobs, bar.update):
            for run, result in zip(group, results, strict=True):
                cache.put(run, result)
                out[run] = result
            bar.set_description_str(f"{group[0].task}, {group[0].setting.optimizer}", refresh=False)
    return out


def _cost(group: list[Run]) -> int:
    """Parameter-steps: about proportional to the time."""
    return group[0].steps * len(group) * suites.task(group[0].task).cost


def _carried_out(
    groups: list[list[Run]], weights: dict[str, MetaParams], jobs: int, progress: Callable[[int], Any]
) -> Iterator[tuple[list[Run], list[Result]]]:
    """Groups and their results, as they are done."""
    if jobs == 1 or len(groups) == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for group in groups:
                cost = suites.task(group[0].task).cost
                yield group, _train(group, weights, lambda steps, cost=cost: progress(steps * cost))  # type: ignore[misc]
        finally:
            torch.set_num_threads(threads)
        return
    context, others = multiprocessing.get_context("spawn"), multiprocessing.active_children()
    with concurrent.futures.ProcessPoolExecutor(min(jobs, len(groups)), context, _prepare) as pool:
        futures = {pool.submit(_train, group, weights): group for group in groups}
        try:
            for future in concurrent.futures.as_completed(futures):
                group = futures[future]
                yield group, future.result()
                progress(_cost(group))
        except concurrent.futures.process.BrokenProcessPool as error:
            raise RuntimeError(
                f"a worker process was killed, as it is for want of memory: give fewer --jobs than {jobs}, and run "
                f"again, which goes on from what is done"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in set(multiprocessing.active_children()).difference(others):
                worker.terminate()  # or it would go on with what it is at
            raise


def _prepare() -> None:
    """Of a worker process: one thread; it ends with Ctrl-C, and with the main process, however that ends."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _train(
    group: list[Run], weights: dict[str, MetaParams], progress: Callable[[int], None] = lambda count: None
) -> list[Result]:
    settings, seeds = [run.setting for run in group], [run.seed for run in group]
    return train(suites.task(group[0].task), settings, seeds, group[0].steps, weights, progress)
