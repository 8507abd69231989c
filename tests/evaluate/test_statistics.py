"""Scores: interquartile means, bootstrap, tuning, speed-ups."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from lopt.evaluate import statistics
from lopt.evaluate.optimizers import OPTIMIZERS
from lopt.evaluate.statistics import Entrant, Scores
from lopt.evaluate.training import Result, Run

TASKS, SEEDS = ("one", "two"), (0, 1, 2)


def made(final: float, test: float | None = 0.5) -> Result:
    return Result(1.0, final, final, math.log(final), test, None, (1.0, final), 0.0)


def table(losses):
    """Adam's results: losses of (task, rate, seed)."""
    return {
        Run(task, 10, seed, statistics.baseline("adam", rate)): made(losses(task, rate, seed))
        for task in TASKS
        for rate in OPTIMIZERS["adam"].rates
        for seed in SEEDS
    }


def test_interquartile_mean_is_the_trimmed_mean():
    values = np.random.default_rng(0).normal(size=(5, 48))
    np.testing.assert_allclose(statistics.interquartile_mean(values), stats.trim_mean(values, 0.25, axis=1))
    assert statistics.interquartile_mean(np.array([0.0, 1.0, 2.0, 1e9])) == 1.5


def test_interval_holds_its_middle_and_shrinks_with_the_spread_of_the_seeds():
    rng = np.random.default_rng(0)
    tasks, noise, zero = rng.normal(size=(12, 1)), rng.normal(size=(12, 5)), np.zeros((12, 5))
    wide, narrow = (statistics.interval(Scores(tasks + scale * noise, zero)) for scale in (0.5, 0.05))
    for found in (wide, narrow):
        assert found.low < found.middle < found.high
    assert narrow.high - narrow.low < 0.3 * (wide.high - wide.low)
    same = statistics.interval(Scores(np.repeat(tasks, 5, 1), zero))
    assert same.low == pytest.approx(same.high)


def test_interval_knows_that_the_other_has_few_seeds_too_and_shares_their_luck():
    rng = np.random.default_rng(0)
    ours, theirs, luck = (rng.normal(size=(12, 5)) for _ in range(3))

    def width(own, zero):
        found = statistics.interval(Scores(own, zero))
        return found.high - found.low

    assert width(np.zeros((12, 5)), theirs) > 0
    assert width(ours, theirs) > 1.2 * width(ours, np.zeros((12, 5)))  # by the root of 2, for many tasks
    assert width(ours + 3 * luck, 3 * luck) < 0.8 * width(ours + 3 * luck, 3 * np.roll(luck, 1, -1))


def test_tuning_takes_the_lowest_geometric_mean_of_each_task():
    best = {"one": 1e-3, "two": 3e-2}
    results = table(lambda task, rate, seed: 0.1 + abs(math.log10(rate / best[task])) / 10)
    entrant = statistics.tuned(results, TASKS, 10, SEEDS, "adam")
    assert {task: setting.lr for task, setting in entrant.settings.items()} == best
    values = statistics.scores(results, entrant, entrant, TASKS, 10, SEEDS, "final")
    assert values.own.shape == (2, 3) and np.abs(values.relative).max() < 1e-12
    worse = statistics.fixed(results, TASKS, 10, SEEDS, "", statistics.baseline("adam", 1e-3))
    values = statistics.scores(results, worse, entrant, TASKS, 10, SEEDS, "final")
    assert values.relative[0] == pytest.approx(0) and (values.relative[1] > 0.5).all()
    assert statistics.share_not_worse(values) == 0.5


def test_of_rates_that_solve_a_task_tuning_takes_the_one_that_is_fastest():
    solved = {3e-3: -5.0, 1e-2: -9.0, 3e-2: -7.0}  # rate: area
    results = table(lambda task, rate, seed: 1e-7 / rate if rate in solved else 0.5)
    for run, result in results.items():
        results[run] = dataclasses.replace(result, area=solved.get(run.setting.lr, -9.5))
    entrant = statistics.tuned(results, TASKS, 10, SEEDS, "adam")
    assert {setting.lr for setting in entrant.settings.values()} == {1e-2}


def test_tuning_by_test_loss_takes_other_rates_and_needs_a_test_set():
    results = table(lambda task, rate, seed: rate)
    for run, result in results.items():
        results[run] = dataclasses.replace(result, test=1 / run.setting.lr)
    lowest, highest = (statistics.tuned(results, TASKS, 10, SEEDS, "adam", metric=name) for name in ("final", "test"))
    assert {setting.lr for setting in lowest.settings.values()} == {1e-4}
    assert {setting.lr for setting in highest.settings.values()} == {1e-1}
    few = statistics.tuned(results, TASKS, 10, SEEDS, "adam", (1e-3, 1e-2))
    assert {setting.lr for setting in few.settings.values()} == {1e-3} and few.label == "Adam, best of 2"
    for run in results:
        results[run] = dataclasses.replace(results[run], test=None)
    assert statistics.tuned(results, TASKS, 10, SEEDS, "adam", metric="test") is None


def test_one_rate_for_all_tasks_is_the_best_on_average():
    best = {"one": 1e-4, "two": 1e-2}
    results = table(lambda task, rate, seed: math.exp(math.log10(rate / best[task]) ** 2 - 9))
    entrant = statistics.uniform(results, TASKS, 10, SEEDS, "adam", OPTIMIZERS["adam"].rates)
    assert entrant.label == "Adam, lr 0.001" and {setting.lr for setting in entrant.settings.values()} == {1e-3}
    del results[Run("two", 10, 1, statistics.baseline("adam", 1e-4))]
    assert statistics.uniform(results, TASKS, 10, SEEDS, "adam", OPTIMIZERS["adam"].rates) is None


def test_a_missing_training_leaves_the_optimizer_out():
    results = table(lambda task, rate, seed: 0.5)
    del results[Run("two", 10, 1, statistics.baseline("adam", 1e-1))]
    assert statistics.tuned(results, TASKS, 10, SEEDS, "adam") is None
    assert statistics.fixed(results, TASKS, 10, SEEDS, "", statistics.baseline("adam", 1e-1)) is None
    assert statistics.fixed(results, TASKS, 10, SEEDS, "", statistics.baseline("adam", 1e-2)) is not None


def test_divergences_are_counted():
    bad = {("one", 0), ("two", 2)}
    results = table(lambda task, rate, seed: (math.inf if task == "one" else 1.5) if (task, seed) in bad else 0.5)
    entrant = Entrant("", dict.fromkeys(TASKS, statistics.baseline("adam", 1e-2)))
    assert statistics.divergences(results, entrant, TASKS, 10, SEEDS) == 2


def test_speed_up_is_the_ratio_of_the_steps_to_the_same_loss():
    slow = np.linspace(1, 0.5, 100)
    fast = np.maximum(np.linspace(1, 0, 100), 0.3)
    assert statistics.speed_up(fast, slow) == pytest.approx(2, rel=0.03)
    assert statistics.speed_up(slow, fast) == pytest.approx(0.5, rel=0.03)
    early = np.maximum(np.linspace(1, 0, 100), 0.5)  # there after half of its steps
    assert statistics.speed_up(early, early) == statistics.speed_up(slow, slow) == 1
    assert statistics.speed_up(early, slow) == pytest.approx(2, rel=0.03)
    assert statistics.speed_up(slow, early) == pytest.approx(0.5, rel=0.03)
