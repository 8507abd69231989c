"""`lopt meta-train`: options -> a recipe being carried out in a run folder."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lopt import __version__
from lopt.meta.meta_train import MetaTraining
from lopt.meta.recipe import RECIPES, VARIANTS, Recipe, varied
from lopt.meta.tasks import Task, try_out
from lopt.metaparams import MetaParams
from lopt.train import TrainError, checkpoint
from lopt.train.arguments import current_device, positive, whole
from lopt.train.group import Group
from lopt.train.stop import StopRequest

DEFAULTS: dict[str, Any] = {
    "recipe": "default",
    "minutes": None,
    "stages": None,
    "variant": [],
    "seed": 0,
    "tasks": [],
    "start": None,
    "device": "cpu",
    "threads": 1,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lopt meta-train`."""
    parser.add_argument(
        "--recipe", metavar="NAME", help=f"{', '.join(RECIPES)}, or a lopt.meta.recipe.Recipe of yours, MODULE:RECIPE"
    )
    parser.add_argument(
        "--minutes",
        type=positive,
        metavar="M",
        help="scale the recipe to about M minutes on one core (the same meta-steps on every machine)",
    )
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="only these stages of the recipe")
    parser.add_argument(
        "--variant", nargs="+", choices=VARIANTS, metavar="NAME", help=f"of the architecture: {', '.join(VARIANTS)}"
    )
    parser.add_argument("--seed", type=whole(0), metavar="N", help="of everything (default 0)")
    parser.add_argument("--tasks", nargs="+", metavar="MODULE:CLASS", help="train on these tasks too")
    parser.add_argument("--start", metavar="NAME|FILE", help="meta-parameters to go on from (default: untrained)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument("--threads", type=whole(1), metavar="N", help="on a CPU (default 1)")
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument("--out", type=Path, metavar="FOLDER", help="default: runs/meta-<n>")
    folder.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with the run in this folder")


def run(args: argparse.Namespace) -> int:
    """Exit code: 0 done, 130 or 143 stopped by SIGINT or SIGTERM.

    Raises TrainError for options that do not fit, before anything is written, and ImportError for a missing package.
    """
    for package in ("matplotlib", "tqdm"):
        importlib.import_module(package)
    given = {name: getattr(args, name) for name in DEFAULTS if getattr(args, name) is not None}
    folder, saved = args.resume, None
    options = DEFAULTS | given if folder is None else _resumed_options(folder, given)
    if folder is not None and (folder / "checkpoint.pt").exists():
        saved = checkpoint.load(folder / "checkpoint.pt")
    torch.set_num_threads(options["threads"])
    group = Group.from_environment()
    training = MetaTraining(
        _recipe(options),
        options["seed"],
        current_device(options["device"]),
        [load_task(name) for name in options["tasks"]],
        None if options["start"] is None or saved else MetaParams.resolve(options["start"]),
        group,
    )
    if folder is None:
        folder = group.from_first(_new_folder(args.out, options) if group.rank == 0 else None)
    elif saved is not None:
        training.load_state_dict(saved)
    with StopRequest() as stop, checkpoint.alone(folder) if group.rank == 0 else contextlib.nullcontext():
        finished = training.run(folder, stop)
    group.leave()
    if group.rank == 0:
        state = "done" if finished else f"stopped; go on with --resume {folder}"
        print(f"{state}: meta-parameters in {folder}/meta.safetensors")
        print(training.summary)
    return 0 if finished or stop.received is None else 128 + stop.received


def load_task(name: str) -> Task:
    """An instance of the class `module:Class`, also from the working directory.

    Raises:
        TrainError: there is no such module or class, or it is no task that can be trained on.
    """
    with _blamed_on("--tasks", name):
        task = _attribute(name)
        task = task() if isinstance(task, type) else task
        _check_task(task)
    return task


def load_recipe(name: str) -> Recipe:
    """A recipe by its name in `RECIPES`, or the object `module:RECIPE`, also from the working directory.

    Raises:
        TrainError: there is none of this name, or a stage's tasks are none that can be trained on.
    """
    if name in RECIPES:
        return RECIPES[name]
    with _blamed_on("--recipe", name):
        if ":" not in name:
            raise ValueError(f"choose {', '.join(RECIPES)}, or write MODULE:RECIPE for one of yours")
        recipe = _attribute(name)
        if not isinstance(recipe, Recipe):
            raise TypeError("not a lopt.meta.recipe.Recipe")
        mixes = [mix for stage in recipe.stages for mix in stage.mixes()]
        if not mixes or not all(mixes):
            raise ValueError("mixes must return lists of at least one task each")
        for task in {id(task): task for mix in mixes for task in mix}.values():
            _check_task(task)
    return recipe


@contextlib.contextmanager
def _blamed_on(option: str, name: str) -> Iterator[None]:
    """Whatever goes wrong inside, which is code of the user's, becomes a TrainError that names the option."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, TypeError | ValueError | ImportError) else f"{type(error).__name__}: "
        raise TrainError(f"{option} {name}: {kind}{error}") from error


def _attribute(name: str) -> Any:
    module, _, attribute = name.partition(":")
    if not (module and attribute):
        raise ValueError("write MODULE:NAME, as my_module:MyTask")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return getattr(importlib.import_module(module), attribute)


def _check_task(task: object) -> None:
    if not isinstance(task, Task):
        raise TypeError(f"{type(task).__name__} is not a lopt.meta.tasks.Task")
    try_out(task)


def _recipe(options: dict[str, Any]) -> Recipe:
    recipe = varied(load_recipe(options["recipe"]).scaled(options["minutes"]), options["variant"])
    if options["stages"] is None:
        return recipe
    named = {stage.name: stage for stage in recipe.stages}
    if unknown := [name for name in options["stages"] if name not in named]:
        raise TrainError(f"--stages {unknown[0]}: the recipe {options['recipe']!r} has {', '.join(named)}")
    return dataclasses.replace(recipe, stages=tuple(named[name] for name in options["stages"]))


def _resumed_options(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Options of the run in a folder, with those that may change as given."""
    saved = _saved_options(folder)
    if fixed := sorted(set(given) - {"device", "threads"}):
        raise TrainError(f"--{fixed[0]} cannot change in a resumed run: leave it out, or begin another with --out")
    options = saved | given
    if torch.device(saved["device"]).type != torch.device(options["device"]).type:
        raise TrainError(
            f"--device {options['device']}: the run began on {saved['device']}, and random numbers of another kind of "
            f"device are others: leave it out, or begin another run with --start {folder}/meta.safetensors"
        )
    return options


def _saved_options(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        options = {name: content.get(name, []) if name == "variant" else content[name] for name in DEFAULTS}
        _recipe(options)
        return options
    except TrainError as error:
        raise TrainError(f"{str(folder)!r} holds a meta-training run that does not go on here: {error}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainError(f"{str(folder)!r} holds no meta-training run ({error}): check the folder") from error


def _new_folder(out: Path | None, options: dict[str, Any]) -> Path:
    """A run folder with the options in config.json."""
    folder = _empty_folder(out)
    content = json.dumps({**options, "version": __version__}, indent=2) + "\n"
    checkpoint.write_atomic(folder / "config.json", lambda file: file.write(content.encode()))
    return folder


def _empty_folder(out: Path | None) -> Path:
    if out is not None:
        if out.is_dir() and any(out.iterdir()):
            raise TrainError(f"{str(out)!r} is not empty: choose another --out, or continue with --resume {out}")
        out.mkdir(parents=True, exist_ok=True)
        return out
    for number in range(1, 10_000):
        folder = Path("runs") / f"meta-{number}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise TrainError("runs/ is full of meta-training runs: choose a folder with --out")
