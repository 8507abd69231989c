"""Suites: which tasks, steps and optimizers make up an evaluation, and the list of its trainings."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

from lopt.evaluate import problems, tasks
from lopt.evaluate.optimizers import OPTIMIZERS, Setting
from lopt.evaluate.statistics import baseline
from lopt.evaluate.tasks import Task
from lopt.evaluate.training import Run

INIT_LR = 1e-3  # HRNN's default
INIT_LRS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
LOSS_SCALES = (1e-6, 1e-3, 1.0, 1e3, 1e6)


@dataclass(frozen=True)
class Suite:
    """An evaluation.

    Args:
        about: one sentence.
        tasks: names. steps: every horizon.
        optimizers: names of baselines; optional ones take part where installed.
        variants: train HRNN from other initial rates, with scaled gradients, weight decay and a schedule, too.
        held_out: whether no task is of a family of meta-training.
    """

    about: str
    tasks: tuple[str, ...]
    steps: tuple[int, ...]
    optimizers: tuple[str, ...]
    variants: bool = False
    held_out: bool = True


SUITES = {
    "digits": Suite(
        "Small networks on real data: scikit-learn's digits and other sets that ship with it.",
        tuple(tasks.TASKS),
        (500,),
        tuple(name for name in OPTIMIZERS if name != "hrnn"),
        variants=True,
    ),
    "paper": Suite(
        "Problems of Wichrowska et al. 2017, drawn once: families that meta-training knows, and families it does not.",
        tuple(problems.PROBLEMS),
        (1000,),
        ("adam", "sgd", "rmsprop"),
        held_out=False,
    ),
    "long": Suite(
        "A part of the suite digits for 10 and 40 times as long.",
        ("softmax", "mlp-relu", "deep-relu", "label-noise", "autoencoder", "diabetes-mlp"),
        (5_000, 20_000),
        ("adam", "adamw-cosine"),
    ),
}

QUICK = ("mlp-relu", "label-noise", "autoencoder", "cancer-mlp")


def quick(suite: Suite) -> Suite:
    """A short form, to see whether everything works: at most four tasks, at most 200 steps, no variants."""
    few = tuple(name for name in suite.tasks if name in QUICK) or suite.tasks[:4]
    return dataclasses.replace(suite, tasks=few, steps=(min(200, suite.steps[0]),), variants=False)


@functools.cache
def task(name: str) -> Task:
    """A task of any suite."""
    return tasks.task(name) if name in tasks.TASKS else problems.problem(name)


def hrnn(weights: str) -> Setting:
    """HRNN at its defaults. weights: digest of the meta-parameters."""
    return Setting("hrnn", 1.0, init_lr=INIT_LR, weights=weights)


def variants(weights: str) -> dict[str, list[Setting]]:
    """HRNN's other settings by what they vary."""
    plain = hrnn(weights)
    return {
        "init_lr": [dataclasses.replace(plain, init_lr=rate) for rate in INIT_LRS],
        "loss_scale": [dataclasses.replace(plain, loss_scale=scale) for scale in LOSS_SCALES],
        "weight decay 0.1": [dataclasses.replace(plain, weight_decay=0.1)],
        "cosine schedule": [dataclasses.replace(plain, schedule="cosine")],
    }


def settings(suite: Suite, weights: Sequence[str]) -> list[Setting]:
    """Every setting that a suite trains, HRNN's first."""
    out = [hrnn(one) for one in weights]
    if suite.variants:
        out += [setting for one in weights for group in variants(one).values() for setting in group]
    for name in suite.optimizers:
        if not OPTIMIZERS[name].missing:
            out += [baseline(name, rate) for rate in OPTIMIZERS[name].rates]
    return list(dict.fromkeys(out))


def runs(suite: Suite, weights: Sequence[str], seeds: int) -> list[Run]:
    """Every training of a suite."""
    return [
        Run(name, steps, seed, setting)
        for steps in suite.steps
        for setting in settings(suite, weights)
        for name in suite.tasks
        for seed in range(seeds)
    ]
