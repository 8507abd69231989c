"""Suites: which tasks, steps and optimizers make up an evaluation, and the list of its trainings."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lopt.evaluate import families, large, problems, tasks, validation
from lopt.evaluate.optimizers import OPTIMIZERS, Setting
from lopt.evaluate.statistics import baseline
from lopt.evaluate.tasks import Task
from lopt.evaluate.training import Run
from lopt.options import BASE_DEPTH, BASE_FAN_IN, INIT_LR

INIT_LRS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
LOSS_SCALES = (1e-6, 1e-3, 1.0, 1e3, 1e6)

SCHEDULED: dict[str, tuple[dict[str, Any], ...]] = {  # what varies -> changes of HRNN's setting
    "cosine schedule": ({"schedule": "cosine"},),
    "cosine schedule, annealed": ({"schedule": "cosine", "annealed": True},),
    "cooldown schedule": ({"schedule": "cooldown"},),
    "cooldown schedule, annealed": ({"schedule": "cooldown", "annealed": True},),
}
VARIANTS = {
    "init_lr": tuple({"init_lr": rate} for rate in INIT_LRS),
    "loss_scale": tuple({"loss_scale": scale} for scale in LOSS_SCALES),
    "weight decay 0.1": ({"weight_decay": 0.1},),
    **SCHEDULED,
}


@dataclass(frozen=True)
class Part:
    """Tasks that are scored together, all for the same number of steps.

    Args:
        tasks: names. steps: of every training.
        optimizers: names of baselines; optional ones take part where installed.
        name: of the part, if the suite has several kinds of tasks.
        variants: names of `VARIANTS`: HRNN's other settings.
        rates: every baseline is trained at these learning rates too, to be seen beside HRNN's initial ones.
        beyond: tuned baselines may take these learning rates too.
        held_out: whether no task is of a family of meta-training.
    """

    tasks: tuple[str, ...]
    steps: int
    optimizers: tuple[str, ...]
    name: str = ""
    variants: tuple[str, ...] = ()
    rates: tuple[float, ...] = ()
    beyond: tuple[float, ...] = ()
    held_out: bool = True

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.name}, {self.steps:,} steps" if self.name else f"{self.steps:,} steps"

    @property
    def stem(self) -> str:
        """Of the names of its plots."""
        return self.name.lower() or str(self.steps)


@dataclass(frozen=True)
class Suite:
    """An evaluation.

    Args:
        about: a sentence or two.
        parts: what is scored.
        ablations: where the architectures of meta-training are compared, without baselines.
        timed: whether to measure the time of a training step.
    """

    about: str
    parts: tuple[Part, ...]
    ablations: Part | None = None
    timed: bool = False


SUITES = {
    "digits": Suite(
        "Small networks on real data: scikit-learn's digits and other sets that ship with it.",
        (
            Part(
                tuple(tasks.TASKS), 500, tuple(name for name in OPTIMIZERS if name != "hrnn"), variants=tuple(VARIANTS)
            ),
        ),
    ),
    "paper": Suite(
        "The experiments on small problems of Wichrowska et al. 2017. Problems: families that meta-training knows, and "
        "families it does not, drawn once. Networks: families of small ones on scikit-learn's digits.",
        (
            Part(
                tuple(problems.PROBLEMS),
                1000,
                ("adam", "sgd", "rmsprop"),
                "Problems",
                beyond=(0.3, 1.0, 3.0, 10.0),
                held_out=False,
            ),
            Part(families.TASKS, 500, ("adam", "sgd", "rmsprop"), "Networks", variants=("init_lr",), rates=INIT_LRS),
        ),
        ablations=Part(
            (
                "mlp-relu-2",
                "deep-relu",
                "conv-tanh",
                "resnet",
                "gru-rows",
                "autoencoder",
                "label-noise",
                "cancer-mlp",
            ),
            500,
            (),
            "Ablations",
        ),
        timed=True,
    ),
    "large": Suite(
        "Networks of up to 1.1 million parameters on real data, 50 times as large as those of the suite digits.",
        (
            Part(
                tuple(large.TASKS),
                500,
                ("adam", "adamw-cosine", "prodigy", "schedule-free"),
                variants=tuple(SCHEDULED),
            ),
        ),
    ),
    "validation": Suite(
        "Networks small and large on patches of a photograph and on Python's source: what meta-parameters and defaults "
        "are chosen by, so that the other suites need not be.",
        (
            *(Part(tuple(validation.SMALL), steps, ("adam",)) for steps in (500, 2_000, 5_000)),
            Part(tuple(validation.LARGE), 500, ("adam",), "Large"),
        ),
    ),
    "long": Suite(
        "A part of the suite digits for 10 and 40 times as long.",
        tuple(
            Part(
                ("softmax", "mlp-relu", "deep-relu", "label-noise", "autoencoder", "diabetes-mlp"),
                steps,
                ("adam", "adamw-cosine"),
                variants=tuple(SCHEDULED),
            )
            for steps in (5_000, 20_000)
        ),
    ),
}

QUICK = ("mlp-8", "mlp-relu", "conv-8", "label-noise", "autoencoder", "cancer-mlp")
QUICK_STEPS = 60


def quick(suite: Suite) -> Suite:
    """A short form, to see whether everything works: at most four tasks and `QUICK_STEPS` steps of each part."""

    def short(part: Part) -> Part:
        few = tuple(name for name in part.tasks if name in QUICK) or part.tasks
        return dataclasses.replace(part, tasks=few[:4], steps=min(QUICK_STEPS, part.steps))

    ablations = None if suite.ablations is None else short(suite.ablations)
    return dataclasses.replace(suite, parts=tuple(dict.fromkeys(map(short, suite.parts))), ablations=ablations)


TASKS: dict[str, Callable[[], Task]] = {
    **tasks.TASKS,
    **large.TASKS,
    **validation.TASKS,
    **families.NETWORKS,
    **problems.PROBLEMS,
}


@functools.cache
def task(name: str) -> Task:
    """A task of any suite."""
    return TASKS[name]()


def hrnn(weights: str) -> Setting:
    """HRNN at its defaults. weights: digest of the meta-parameters."""
    return Setting("hrnn", 1.0, init_lr=INIT_LR, base_fan_in=BASE_FAN_IN, base_depth=BASE_DEPTH, weights=weights)


def variants(weights: str, name: str) -> list[Setting]:
    """HRNN's settings of a line of `VARIANTS`."""
    return [dataclasses.replace(hrnn(weights), **change) for change in VARIANTS[name]]


def choices(part: Part, optimizer: str) -> list[float]:
    """Learning rates that a part chooses a tuned baseline's from, in ascending order; one for what needs none."""
    rates = OPTIMIZERS[optimizer].rates
    return list(rates) if len(rates) == 1 else sorted({*rates, *part.beyond})


def rates(part: Part, optimizer: str) -> list[float]:
    """Learning rates at which a part trains a baseline, in ascending order."""
    return sorted({*choices(part, optimizer), OPTIMIZERS[optimizer].default, *part.rates})


def settings(part: Part, weights: Sequence[str]) -> list[Setting]:
    """Every setting that a part trains, HRNN's first."""
    out = [hrnn(one) for one in weights]
    out += [setting for one in weights for name in part.variants for setting in variants(one, name)]
    for name in part.optimizers:
        if not OPTIMIZERS[name].missing:
            out += [baseline(name, rate) for rate in rates(part, name)]
    return list(dict.fromkeys(out))


def runs(suite: Suite, weights: Sequence[str], seeds: int, ablations: Sequence[str] = ()) -> list[Run]:
    """Every training of a suite. weights, ablations: digests of meta-parameters."""
    trained = [(part, setting) for part in suite.parts for setting in settings(part, weights)]
    if suite.ablations is not None:
        trained += [(suite.ablations, hrnn(one)) for one in ablations]
    every = (
        Run(name, part.steps, seed, setting)
        for part, setting in trained
        for name in part.tasks
        for seed in range(seeds)
    )
    return list(dict.fromkeys(every))
