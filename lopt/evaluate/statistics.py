"""Results -> scores: what every optimizer reached on every task, and over all tasks with confidence intervals.

A score is a natural logarithm relative to tuned Adam: the mean over its seeds is the zero of each task. Over tasks and
seeds the interquartile mean is taken, with confidence intervals from a bootstrap stratified by task, which draws the
seeds of both: they share starts and minibatches. Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the
Statistical Precipice".
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


class Scores(NamedTuple):
    """Logarithms of a metric, [tasks, seeds]: an entrant's, and those of what it is compared with."""

    own: np.ndarray
    zero: np.ndarray

    @property
    def relative(self) -> np.ndarray:
        """[tasks, seeds]: to the mean over the seeds of the other."""
        return self.own - self.zero.mean(-1, keepdims=True)


def tuned(
    results: Results,
    tasks: Sequence[str],
    steps: int,
    seeds: Sequence[int],
    optimizer: str,
    rates: Sequence[float] | None = None,
    metric: str = "final",
) -> Entrant | None:
    """A baseline at the learning rate with the lowest loss (geometric mean over seeds) of each task.

    Among rates that all solve a task, which is where its final losses are not told apart any more, the one that is
    fastest over all steps. None where a training, or a task's metric, is missing.

    Args:
        rates: to choose from, by default the optimizer's. metric: "final", the training loss, or "test".
    """
    choices = {}
    line = OPTIMIZERS[optimizer]
    rates = line.rates if rates is None else rates
    for task in tasks:
        found = {}
        for rate in rates:
            setting = baseline(optimizer, rate)
            runs = [Run(task, steps, seed, setting) for seed in seeds]
            if any(run not in results for run in runs):
                return None
            losses = [log_metric(results[run], metric) for run in runs]
            if None in losses:
                return None
            found[setting] = round(sum(losses), 9), sum(results[run].area for run in runs)  # type: ignore[arg-type]
        choices[task] = min(found, key=lambda setting: found[setting])
    label = line.label if len(rates) == 1 else f"{line.label}, best of {len(rates)}"
    return Entrant(label if metric == "final" else f"{label} by {metric} loss", choices)


def uniform(
    results: Results, tasks: Sequence[str], steps: int, seeds: Sequence[int], optimizer: str, rates: Sequence[float]
) -> Entrant | None:
    """A baseline at one learning rate for all tasks, that of the lowest mean logarithm of the final loss.

    None where a training is missing.
    """
    scores = {}
    for rate in rates:
        setting = baseline(optimizer, rate)
        runs = [Run(task, steps, seed, setting) for task in tasks for seed in seeds]
        if any(run not in results for run in runs):
            return None
        scores[rate] = sum(results[run].log_ratio for run in runs)
    best = min(scores, key=lambda rate: scores[rate])
    return fixed(results, tasks, steps, seeds, f"{OPTIMIZERS[optimizer].label}, lr {best:g}", baseline(optimizer, best))


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
) -> Scores:
    """Logarithms of a metric beside those of the entrant `zero`; tasks without the metric are left out."""
    pairs = []
    for task in tasks:
        pair = [
            [log_metric(result, metric) for result in of(results, one, task, steps, seeds)] for one in (entrant, zero)
        ]
        if None not in pair[0] + pair[1]:
            pairs.append(pair)
    own, other = np.array(pairs, dtype=float).reshape(len(pairs), 2, len(seeds)).swapaxes(0, 1)
    return Scores(own, other)


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the middle half of [.., n], without the lowest and highest quarter."""
    ordered = np.sort(values, -1)
    cut = values.shape[-1] // 4
    return ordered[..., cut : values.shape[-1] - cut].mean(-1)


def interval(scores: Scores) -> Interval:
    """The bootstrap draws seeds anew within each task, the same for both."""
    tasks, seeds = scores.own.shape
    rng = np.random.default_rng(0)
    index = rng.integers(seeds, size=(DRAWS, tasks, seeds))
    drawn = Scores(*(np.take_along_axis(values[None], index, -1) for values in scores)).relative
    low, high = np.quantile(interquartile_mean(drawn.reshape(DRAWS, -1)), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(interquartile_mean(scores.relative.reshape(-1))), float(low), float(high))


def share_not_worse(scores: Scores) -> float:
    """Share of tasks whose mean over seeds is not above the other's."""
    return float((scores.relative.mean(-1) <= 1e-9).mean())


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
    """How many times fewer steps we need than the other to where the worse of both ends; curves of equal length."""
    goal = max(ours[-1], other[-1]) * (1 + 1e-9)
    first, others = (int(np.flatnonzero(curve <= goal)[0]) + 1 for curve in (ours, other))
    return others / first


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers; infinite if one is."""
    return math.exp(sum(map(math.log, values)) / len(values)) if all(map(math.isfinite, values)) else math.inf
