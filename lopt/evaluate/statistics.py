"""Results -> scores: what every optimizer reached on every task, and over all tasks with confidence intervals.

A score is a natural logarithm relative to tuned Adam: the mean over its seeds is the zero of each task. Over tasks and
seeds the interquartile mean is taken, with confidence intervals from a bootstrap stratified by task; Agarwal et al.
2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lopt.evaluate.optimizers import OPTIMIZERS, Setting
from lopt.evaluate.training import FLOOR, Result, Run, bounded_log

Results = Mapping[Run, Result]

DRAWS = 4000
CONFIDENCE = 0.95
METRICS = ("final", "area", "test")


@dataclass(frozen=True)
class Entrant:
    """An optimizer with one setting for each task.

    Args:
        label: for people. settings: by task.
    """

    label: str
    settings: Mapping[str, Setting]


class Interval(NamedTuple):
    """Interquartile mean and its confidence interval."""

    middle: float
    low: float
    high: float


def tuned(results: Results, tasks: Sequence[str], steps: int, seeds: Sequence[int], optimizer: str) -> Entrant | None:
    """A baseline at the learning rate with the lowest final training loss (geometric mean over seeds) of each task.

    Among rates that all solve a task, which is where its final losses are not told apart any more, the one that is
    fastest over all steps. None where a training is missing.
    """
    choices = {}
    line = OPTIMIZERS[optimizer]
    for task in tasks:
        scores = {}
        for rate in line.rates:
            setting = baseline(optimizer, rate)
            runs = [Run(task, steps, seed, setting) for seed in seeds]
            if any(run not in results for run in runs):
                return None
            final, area = (sum(getattr(results[run], name) for run in runs) for name in ("log_ratio", "area"))
            scores[setting] = round(final, 9), area
        choices[task] = min(scores, key=lambda setting: scores[setting])
    label = line.label if len(line.rates) == 1 else f"{line.label}, best of {len(line.rates)}"
    return Entrant(label, choices)


def baseline(optimizer: str, rate: float) -> Setting:
    """The setting of an optimizer of the table at a learning rate."""
    line = OPTIMIZERS[optimizer]
    return Setting(optimizer, rate, line.schedule, line.weight_decay)


def fixed(
    results: Results, tasks: Sequence[str], steps: int, seeds: Sequence[int], label: str, setting: Setting
) -> Entrant | None:
    """The same setting on every task; None where a training is missing."""
    if any(Run(task, steps, seed, setting) not in results for task in tasks for seed in seeds):
        return None
    return Entrant(label, dict.fromkeys(tasks, setting))


def of(results: Results, entrant: Entrant, task: str, steps: int, seeds: Sequence[int]) -> list[Result]:
    """One result for each seed."""
    return [results[Run(task, steps, seed, entrant.settings[task])] for seed in seeds]


def log_metric(result: Result, metric: str) -> float | None:
    """Final or test loss relative to the start, or the area: natural logarithms. None without a test set."""
    if metric == "area":
        return result.area
    loss = result.final if metric == "final" else result.test
    return None if loss is None else bounded_log(loss, result.start)


def scores(
    results: Results,
    entrant: Entrant,
    zero: Entrant,
    tasks: Sequence[str],
    steps: int,
    seeds: Sequence[int],
    metric: str,
) -> np.ndarray:
    """Logarithm of a metric relative to the entrant `zero`, [tasks, seeds]; tasks without the metric are left out."""
    out = []
    for task in tasks:
        own = [log_metric(result, metric) for result in of(results, entrant, task, steps, seeds)]
        other = [log_metric(result, metric) for result in of(results, zero, task, steps, seeds)]
        if None not in own and None not in other:
            out.append([value - sum(other) / len(other) for value in own])  # type: ignore[operator,arg-type]
    return np.array(out)


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the middle half of [.., n], without the lowest and highest quarter."""
    ordered = np.sort(values, -1)
    cut = values.shape[-1] // 4
    return ordered[..., cut : values.shape[-1] - cut].mean(-1)


def interval(values: np.ndarray) -> Interval:
    """Of scores [tasks, seeds]: the bootstrap draws seeds anew within each task."""
    tasks, seeds = values.shape
    rng = np.random.default_rng(0)
    index = rng.integers(seeds, size=(DRAWS, tasks, seeds))
    drawn = np.take_along_axis(values[None], index, -1).reshape(DRAWS, -1)
    low, high = np.quantile(interquartile_mean(drawn), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(interquartile_mean(values.reshape(-1))), float(low), float(high))


def share_not_worse(values: np.ndarray) -> float:
    """Share of tasks whose mean score over seeds, [tasks, seeds], is not above zero."""
    return float((values.mean(-1) <= 1e-9).mean())


def divergences(results: Results, entrant: Entrant, tasks: Sequence[str], steps: int, seeds: Sequence[int]) -> int:
    """Number of trainings that ended above their start, or not finite."""
    return sum(result.diverged for task in tasks for result in of(results, entrant, task, steps, seeds))


def curve(results: Sequence[Result]) -> np.ndarray:
    """Geometric mean over seeds of the minibatch loss, [points], each a mean over the tenth of the steps before it."""
    losses = np.array([result.curve for result in results])
    starts = np.array([[result.start] for result in results])
    logs = np.log(np.clip(losses / starts, FLOOR, 1 / FLOOR)).mean(0)
    window = max(1, len(logs) // 10)
    sums = np.cumsum(np.concatenate([np.zeros(1), np.exp(logs)]))
    begin = np.maximum(np.arange(1, len(logs) + 1) - window, 0)
    return np.exp(np.log(starts).mean()) * (sums[1:] - sums[begin]) / (np.arange(1, len(logs) + 1) - begin)


def speed_up(ours: np.ndarray, other: np.ndarray) -> float:
    """How many times fewer steps we need to where the other ends, from curves of equal length.

    Below 1 if we do not get there: then it is the share of its steps that the other needs to where we end.
    """
    reached = np.flatnonzero(ours <= other[-1] * (1 + 1e-9))
    if len(reached):
        return len(ours) / float(reached[0] + 1)
    return float(np.flatnonzero(other <= ours[-1])[0] + 1) / len(ours) if (other <= ours[-1]).any() else 1.0


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers; infinite if one is."""
    return math.exp(sum(map(math.log, values)) / len(values)) if all(map(math.isfinite, values)) else math.inf
