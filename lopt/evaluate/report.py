"""Scores -> report.md, results.csv and plots: a folder to be read without the program that made it."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lopt.bench.results import device_name
from lopt.evaluate import ablations, figures, statistics, suites, timing
from lopt.evaluate.families import FAMILIES
from lopt.evaluate.optimizers import OPTIMIZERS, Setting
from lopt.evaluate.statistics import Entrant, Interval, Results, Scores
from lopt.evaluate.suites import Part, Suite
from lopt.evaluate.training import FLOOR
from lopt.meta.recipe import VARIANTS
from lopt.options import INIT_LR
from lopt.train.checkpoint import write_atomic

INTERVALS = "interquartile mean over tasks and seeds, and where there are several seeds its 95 % confidence interval"


@dataclass(frozen=True)
class Evaluation:
    """What a report is about.

    Args:
        suite: the suite. name: of the suite.
        seeds: number of seeds.
        weights: label -> digest of the meta-parameters.
        results: of all trainings there are.
        environment: one line: versions and the machine's processor.
        ablations: architecture -> digest of its meta-parameters.
        timings: of a training step.
    """

    name: str
    suite: Suite
    seeds: int
    weights: dict[str, str]
    results: Results
    environment: str
    ablations: dict[str, str]
    timings: list[timing.Timing]

    @property
    def all_seeds(self) -> range:
        """Of every task."""
        return range(self.seeds)

    def label(self, name: str) -> str:
        """Of HRNN with the meta-parameters of that label."""
        return "HRNN" if len(self.weights) == 1 else f"HRNN {name}"


def write(evaluation: Evaluation, folder: Path) -> str:
    """Write the report; each file is the old one or the whole new one.

    Returns:
        The summary: the tables over all tasks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts, summary = [_head(evaluation)], ""
    for part in evaluation.suite.parts:
        entrants = _entrants(evaluation, part)
        adam = _tuned(evaluation, part, "adam")
        text = _summary(evaluation, part, entrants, adam, folder)
        summary += text
        parts.append(text)
        if entrants:
            parts += [_families(evaluation, part, entrants, folder), _per_task(evaluation, part, entrants, folder)]
        if part.variants and adam is not None:
            parts.append(_variants(evaluation, part, adam, folder))
    if evaluation.suite.ablations is not None:
        parts.append(text := _ablations(evaluation, evaluation.suite.ablations, folder))
        summary += text
    if evaluation.timings:
        parts.append(text := _times(evaluation.timings, folder))
        summary += text
    parts.append(_method(evaluation))
    _save_text(folder / "results.csv", _table_of_runs(evaluation))
    _save_text(folder / "report.md", "\n".join(filter(None, parts)))
    return summary


def _save_text(path: Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(text.encode()))


def _entrants(evaluation: Evaluation, part: Part) -> list[Entrant]:
    """HRNN with each weights, then the baselines tuned for each task, for all at once, and untuned, as far as they were
    trained."""
    results, tasks, steps, seeds = evaluation.results, part.tasks, part.steps, evaluation.all_seeds
    found: list[Entrant | None] = []
    for label, weights in evaluation.weights.items():
        found.append(statistics.fixed(results, tasks, steps, seeds, evaluation.label(label), suites.hrnn(weights)))
    for name in part.optimizers:
        line = OPTIMIZERS[name]
        found.append(_tuned(evaluation, part, name))
        if len(line.rates) > 1:
            setting = statistics.baseline(name, line.default)
            found.append(statistics.uniform(results, tasks, steps, seeds, name, suites.choices(part, name)))
            found.append(statistics.fixed(results, tasks, steps, seeds, f"{line.label}, lr {line.default:g}", setting))
    return list({entrant.label: entrant for entrant in found if entrant is not None}.values())


def _tuned(evaluation: Evaluation, part: Part, name: str, metric: str = "final") -> Entrant | None:
    """A baseline at the best of the part's rates for each task."""
    rates, seeds = suites.choices(part, name), evaluation.all_seeds
    return statistics.tuned(evaluation.results, part.tasks, part.steps, seeds, name, rates, metric)


def _head(evaluation: Evaluation) -> str:
    suite = evaluation.suite
    weights = "\n".join(f"- {label}: `{digest}`" for label, digest in evaluation.weights.items())
    optimizers = dict.fromkeys(name for part in suite.parts for name in part.optimizers)
    absent = [OPTIMIZERS[name] for name in optimizers if OPTIMIZERS[name].missing]
    note = "".join(f"\n{line.label} is left out: `{line.package}` is not installed." for line in absent)
    return (
        f"# HRNN on the suite `{evaluation.name}`\n\n{suite.about} {evaluation.seeds} seeds. HRNN runs at its "
        "defaults, the same on every task.\n\n"
        f"Meta-parameters, by a digest of their numbers:\n\n{weights}\n\n{evaluation.environment}\n{note}\n"
    )


def _intervals(evaluation: Evaluation, part: Part, entrant: Entrant, zero: Entrant) -> dict[str, Interval]:
    """Of every metric that a task of the part has, relative to `zero`."""
    own = {}
    for metric in statistics.METRICS:
        found = _scores(evaluation, part, entrant, zero, metric)
        if len(found.own):
            own[metric] = statistics.interval(found)
    return own


def _scores(evaluation: Evaluation, part: Part, entrant: Entrant, zero: Entrant, metric: str = "final") -> Scores:
    seeds = evaluation.all_seeds
    return statistics.scores(evaluation.results, entrant, zero, part.tasks, part.steps, seeds, metric)


def _divergences(evaluation: Evaluation, part: Part, entrant: Entrant) -> int:
    return statistics.divergences(evaluation.results, entrant, part.tasks, part.steps, evaluation.all_seeds)


def _summary(evaluation: Evaluation, part: Part, entrants: list[Entrant], adam: Entrant | None, folder: Path) -> str:
    results, tasks, steps, seeds = evaluation.results, part.tasks, part.steps, evaluation.all_seeds
    lines = [f"\n## {part.title}\n"]
    if adam is None:
        return "\n".join([*lines, "Adam was not trained at every rate: there is nothing to compare with.\n"])
    by_test, rates = _tuned(evaluation, part, "adam", "test"), len(suites.choices(part, "adam"))
    compared = [*entrants, by_test] if by_test is not None else entrants
    intervals = {entrant.label: _intervals(evaluation, part, entrant, adam) for entrant in compared}
    untuned = statistics.fixed(
        results, tasks, steps, seeds, "Adam", statistics.baseline("adam", OPTIMIZERS["adam"].default)
    )
    assert untuned is not None
    for entrant in entrants:
        if not entrant.label.startswith("HRNN"):
            continue
        tuned_share, untuned_share = (
            statistics.share_not_worse(_scores(evaluation, part, entrant, other)) for other in (adam, untuned)
        )
        speed = _speed_ups(evaluation, part, entrant, adam)
        lines.append(
            f"{entrant.label} ends with at most the training loss of Adam at its best of {rates} rates on "
            f"{round(tuned_share * len(tasks))} of {len(tasks)} tasks, of Adam at {OPTIMIZERS['adam'].default:g} on "
            f"{round(untuned_share * len(tasks))}. It is {speed:.2f} times as fast as the tuned Adam (median over the "
            f"tasks). {_divergences(evaluation, part, entrant)} of {len(tasks) * len(seeds)} trainings diverged.\n"
        )
    lines += [
        f"Losses relative to Adam at the best of {rates} rates of each task: {INTERVALS}; below 1 is better.\n",
        "| | final training loss | training loss, all steps | test loss | test accuracy | <= tuned Adam | diverged |",
        "|---|---|---|---|---|---|---|",
    ]
    for entrant in compared:
        cells = [_ratio(intervals[entrant.label].get(metric)) for metric in statistics.METRICS]
        found = [
            result.accuracy
            for task in tasks
            for result in statistics.of(results, entrant, task, steps, seeds)
            if result.accuracy is not None
        ]
        accuracy = f"{100 * sum(found) / len(found):.1f} %" if found else "-"
        share = statistics.share_not_worse(_scores(evaluation, part, entrant, adam))
        diverged = _divergences(evaluation, part, entrant)
        lines.append(f"| {entrant.label} | {' | '.join(cells)} | {accuracy} | {100 * share:.0f} % | {diverged} |")
    ours = [evaluation.label(label) for label in evaluation.weights]
    figures.scores(folder / f"scores-{part.stem}.png", intervals, "tuned Adam", ours)
    lines += [_edges(evaluation, part), f"\n![Losses relative to tuned Adam](scores-{part.stem}.png)\n"]
    return "\n".join(lines)


def _edges(evaluation: Evaluation, part: Part) -> str:
    """Where a tuned baseline might have wanted another rate than those it was given."""
    ends = []
    for name in part.optimizers:
        rates, tuned = suites.choices(part, name), _tuned(evaluation, part, name)
        if len(rates) > 1 and tuned is not None:
            count = sum(setting.lr in (rates[0], rates[-1]) for setting in tuned.settings.values())
            ends.append(f"{OPTIMIZERS[name].label} {count}")
    return f"\nTasks where the best rate is the lowest or highest of them: {', '.join(ends)}." if ends else ""


def _ratio(value: Interval | None) -> str:
    if value is None:
        return "-"
    middle, low, high = (math.exp(number) for number in value)
    return f"{middle:.3g} ({low:.3g} to {high:.3g})" if low < high else f"{middle:.3g}"  # of one seed


def _curve(evaluation: Evaluation, part: Part, entrant: Entrant, task: str) -> np.ndarray:
    return statistics.curve(statistics.of(evaluation.results, entrant, task, part.steps, evaluation.all_seeds))


def _speed_ups(evaluation: Evaluation, part: Part, ours: Entrant, other: Entrant) -> float:
    pairs = ([_curve(evaluation, part, entrant, task) for entrant in (ours, other)] for task in part.tasks)
    return float(np.median([statistics.speed_up(*pair) for pair in pairs]))


def _final(evaluation: Evaluation, part: Part, entrant: Entrant, task: str) -> float:
    """Final training loss, geometric mean over the seeds, between its bounds."""
    found = statistics.of(evaluation.results, entrant, task, part.steps, evaluation.all_seeds)
    return statistics.geometric_mean([result.start * math.exp(result.log_ratio) for result in found])


def _families(evaluation: Evaluation, part: Part, entrants: list[Entrant], folder: Path) -> str:
    """What activation, width and depth do; nothing for a part without families."""
    members = {
        family: {value: task for value, task in tasks.items() if task in part.tasks}
        for family, tasks in FAMILIES.items()
    }
    members = {family: tasks for family, tasks in members.items() if len(tasks) > 1}
    if not members:
        return ""
    shown = {task for tasks in members.values() for task in tasks.values()}
    losses = {task: [_final(evaluation, part, entrant, task) for entrant in entrants] for task in shown}
    figures.families(folder / f"families-{part.stem}.png", entrants, members, losses)
    return (
        "### Activation, width and depth\n\nFully connected and convolutional networks on digits; final training loss, "
        f"geometric mean over the seeds.\n\n![Activation, width and depth](families-{part.stem}.png)\n"
    )


def _per_task(evaluation: Evaluation, part: Part, entrants: list[Entrant], folder: Path) -> str:
    results, tasks, steps, seeds = evaluation.results, part.tasks, part.steps, evaluation.all_seeds
    lines = ["### Every task\n"]
    titles = {
        "final": "Final training loss: on all training samples after the last step, geometric mean over the seeds; a "
        "rate chosen for the task in parentheses.",
        "test": "Test loss.",
        "accuracy": "Test accuracy in %, mean over the seeds.",
    }
    for metric, title in titles.items():
        rows = _losses(evaluation, part, entrants, metric)
        if rows:
            head = ["", *(entrant.label for entrant in entrants)]
            lines += [title + "\n", *_markdown(head, rows), ""]
    values = {task: [_curve(evaluation, part, entrant, task) for entrant in entrants] for task in tasks}
    starts = {
        task: statistics.geometric_mean(
            [result.start for result in statistics.of(results, entrants[0], task, steps, seeds)]
        )
        for task in tasks
    }
    figures.curves(folder / f"curves-{part.stem}.png", entrants, values, starts, steps)
    lines.append(f"![Training loss of every task](curves-{part.stem}.png)\n")
    return "\n".join(lines)


def _losses(evaluation: Evaluation, part: Part, entrants: Sequence[Entrant], metric: str) -> list[list[str]]:
    """A row for each task that has the metric: what every entrant reached, the best of them in bold."""
    rows = []
    for task in part.tasks:
        cells: list[tuple[float, str]] = []
        for entrant in entrants:
            found = statistics.of(evaluation.results, entrant, task, part.steps, evaluation.all_seeds)
            chosen = len(set(entrant.settings.values())) > 1
            cells.append(_cell(found, metric, entrant.settings[task] if chosen and metric == "final" else None))
        if not any(math.isnan(value) for value, _ in cells):
            best = (max if metric == "accuracy" else min)(value for value, _ in cells)
            rows.append([task, *(f"**{text}**" if value == best else text for value, text in cells)])
    return rows


def _cell(found: Sequence[Any], metric: str, setting: Setting | None) -> tuple[float, str]:
    """A number to compare, and its text; NaN where there is no such metric."""
    values = [getattr(result, metric) for result in found]
    if None in values:
        return math.nan, "-"
    if metric == "accuracy":
        mean = 100 * sum(values) / len(values)
        return mean, f"{mean:.1f}"
    mean = statistics.geometric_mean([max(value, 1e-30) for value in values])
    floor = FLOOR * found[0].start
    text = f"<{floor:.1g}" if metric == "final" and mean < floor else f"{mean:.3g}"
    value = max(mean, floor) if metric == "final" else mean
    return value, text if setting is None else f"{text} ({setting.lr:g})"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _variants(evaluation: Evaluation, part: Part, adam: Entrant, folder: Path) -> str:
    """HRNN's other settings for each weights, and what the learning rate is worth to the baselines."""
    results, tasks, steps, seeds = evaluation.results, part.tasks, part.steps, evaluation.all_seeds
    lines = ["### Initial learning rate\n" if part.rates else "### HRNN in other settings\n"]
    shown: dict[str, dict[str, list[tuple[float, Interval]]]] = {}
    for label, weights in evaluation.weights.items():
        rows, name = [], evaluation.label(label)
        for what in part.variants:
            for setting in suites.variants(weights, what):
                entrant = statistics.fixed(results, tasks, steps, seeds, "", setting)
                if entrant is None:
                    continue
                value = getattr(setting, what) if what in ("init_lr", "loss_scale") else None
                found = _scores(evaluation, part, entrant, adam)
                means = found.relative.mean(-1)
                intervals = _intervals(evaluation, part, entrant, adam)
                worst = tasks[int(means.argmax())]
                rows.append(
                    [
                        f"{what} {value:g}" if value is not None else what,
                        _ratio(intervals["final"]),
                        _ratio(intervals["area"]),
                        _ratio(intervals.get("test")),
                        f"{100 * statistics.share_not_worse(found):.0f} %",
                        f"{math.exp(means.max()):.3g} ({worst})",
                        str(_divergences(evaluation, part, entrant)),
                    ]
                )
                if value is not None:
                    shown.setdefault(what, {}).setdefault(name, []).append((value, intervals["final"]))
        if rows:
            head = [name, "final training loss", "all steps", "test loss", "<= tuned Adam", "worst task", "diverged"]
            lines += [*_markdown(head, rows), ""]
    if len(lines) == 1:
        return ""
    about = ["Losses relative to tuned Adam as above. The worst task is by its final training loss."]
    if "init_lr" in shown:
        about.append(f"init_lr is where the learned rates start, {INIT_LR:g} by default.")
    if "loss_scale" in shown:
        about.append("loss_scale multiplies every gradient.")
    lines.insert(1, " ".join(about) + "\n")
    if part.rates:
        lines += _rates(evaluation, part, adam, shown["init_lr"])
    if shown:
        figures.sensitivity(folder / f"robustness-{part.stem}.png", shown)
        lines.append(f"![Robustness](robustness-{part.stem}.png)\n")
    return "\n".join(lines)


def _rates(
    evaluation: Evaluation, part: Part, adam: Entrant, shown: dict[str, list[tuple[float, Interval]]]
) -> list[str]:
    """A table of losses at the part's learning rates; adds to `shown` the baselines at all of theirs."""
    for name in part.optimizers:
        for rate in suites.rates(part, name):
            setting, seeds = statistics.baseline(name, rate), evaluation.all_seeds
            entrant = statistics.fixed(evaluation.results, part.tasks, part.steps, seeds, "", setting)
            if entrant is not None:
                found = statistics.interval(_scores(evaluation, part, entrant, adam))
                shown.setdefault(OPTIMIZERS[name].label, []).append((rate, found))
    rows = [
        [f"{rate:g}", *(_ratio(dict(points).get(rate)) for points in shown.values())] for rate in sorted(part.rates)
    ]
    return [
        "Final training loss at the same learning rate everywhere: HRNN's initial one, the others' own.\n",
        *_markdown(["learning rate", *shown], rows),
        "",
    ]


def _ablations(evaluation: Evaluation, part: Part, folder: Path) -> str:
    """The architectures of meta-training relative to the full one."""
    lines = [f"\n## {part.title}\n"]
    if not evaluation.ablations:
        return "\n".join(
            [
                *lines,
                "No meta-parameters of other architectures were found. For each of "
                f"{', '.join(ablations.NAMES[1:])}, and without `--variant` for {ablations.FULL}:\n",
                "```",
                "lopt meta-train --variant NAME --minutes MINUTES --out runs/NAME",
                "cp runs/NAME/best.safetensors ABLATIONS/NAME.safetensors",
                "```",
                "\nand then `lopt evaluate --suite paper --ablations ABLATIONS`.\n",
            ]
        )
    results, tasks, steps, seeds = evaluation.results, part.tasks, part.steps, evaluation.all_seeds
    found = (
        statistics.fixed(results, tasks, steps, seeds, name, suites.hrnn(weights))
        for name, weights in evaluation.ablations.items()
    )
    entrants = {entrant.label: entrant for entrant in found if entrant is not None}
    full = entrants.get(ablations.FULL)
    if full is None:
        return "\n".join([*lines, "Not trained: there is nothing to compare.\n"])
    intervals, rows = {name: _intervals(evaluation, part, entrant, full) for name, entrant in entrants.items()}, []
    for name, entrant in entrants.items():
        options = ", ".join(f"{option}={value}" for option, value in VARIANTS.get(name, {}).items())
        cells = [_ratio(intervals[name].get(metric)) for metric in statistics.METRICS]
        diverged = str(_divergences(evaluation, part, entrant))
        rows.append([name, f"`{options}`" if options else "", *cells, diverged, f"`{evaluation.ablations[name]}`"])
    missing = [name for name in ablations.NAMES if name not in entrants]
    figures.scores(folder / "ablations.png", intervals, ablations.FULL, [ablations.FULL])
    head = ["", "differs by", "final training loss", "training loss, all steps", "test loss", "diverged", "digest"]
    return "\n".join(
        [
            *lines,
            f"Architectures meta-trained alike, each at HRNN's defaults on {len(tasks)} tasks, beside the full one: "
            f"losses relative to it, {INTERVALS}. Above 1, what was taken away is of use; attention is an addition. "
            "The intervals say nothing of other seeds of meta-training.\n",
            *([f"Not there: {', '.join(missing)}.\n"] if missing else []),
            *_markdown(head, rows),
            "\n![Losses relative to the full architecture](ablations.png)\n",
            "Final training loss:\n",
            *_markdown(["", *entrants], _losses(evaluation, part, list(entrants.values()), "final")),
            "",
        ]
    )


def _times(timings: list[timing.Timing], folder: Path) -> str:
    """Milliseconds of a training step by batch size and optimizer."""
    found = {(one.optimizer, one.batch): one for one in timings}
    names, batches = (list(dict.fromkeys(column)) for column in zip(*found, strict=True))
    rows = []
    for batch in batches:
        cells = (found[name, batch] for name in names)
        rows.append([str(batch), *(f"{1e3 * one.step:.3g} ({1e3 * one.update:.2g})" for one in cells)])
    figures.times(folder / "times.png", timings)
    threads = torch.get_num_threads()
    return "\n".join(
        [
            "\n## Time of a training step\n",
            f"Milliseconds of forward, backward and update by batch size, the update alone in parentheses: a "
            f"pre-activation ResNet of {timing.count():,} parameters on digits, torch.nn's layers, torch.optim's "
            f"optimizers at their default implementation. Medians of interleaved repetitions on "
            f"{device_name(torch.device('cpu'))}, {threads} thread{'s' if threads > 1 else ''}, measured for this "
            "report.\n",
            *_markdown(["batch size", *names], rows),
            "\n![Time of a training step](times.png)\n",
        ]
    )


def _method(evaluation: Evaluation) -> str:
    suite = evaluation.suite
    rows = []
    parts = [*suite.parts, *([suite.ablations] if suite.ablations is not None else [])]
    for name in dict.fromkeys(name for part in parts for name in part.tasks):
        task = suites.task(name)
        sizes = [f"{sum(task.sizes):,}", f"{task.train:,}", str(task.batch)]
        if not task.batched:
            sizes[1:] = ["-", "-"]
        rows.append([name, *sizes])
    optimizers = dict.fromkeys(name for part in suite.parts for name in part.optimizers)
    rates = [
        f"- {OPTIMIZERS[name].label}: {', '.join(f'{rate:g}' for rate in OPTIMIZERS[name].rates)}"
        for name in optimizers
    ]
    rates += [
        f"- {part.name}, also: {', '.join(f'{rate:g}' for rate in part.beyond)}" for part in suite.parts if part.beyond
    ]
    drawn = ", ".join(part.name for part in suite.parts if not part.held_out)
    return "\n".join(
        [
            "\n## Method\n",
            f"Meta-training knows synthetic data alone, but draws problems of some of the families of the part {drawn} "
            "too; no other task takes part in it."
            if drawn
            else "None of the tasks takes part in meta-training, which knows synthetic data alone.",
            "All optimizers see the same starts and minibatches, which "
            "only the seed decides. Per task, a tuned baseline is the learning rate with the lowest final training "
            "loss, the geometric mean over the seeds, and of those that solve it the fastest over all steps; by test "
            "loss, the one with the lowest test loss, which nobody knows beforehand. At one rate for all tasks, "
            "baselines are shown at their default and where the mean logarithm of the final loss is lowest. The "
            "rates:\n",
            *rates,
            "",
            *(["AdamW decays weights by 0.01.\n"] if "adamw-cosine" in optimizers else []),
            "Final training loss: on all training samples after the last step. Training loss, all steps: the mean "
            "over the steps of the logarithm of the minibatch loss, at the point where the gradient is taken; with "
            "attention and for schedule-free AdamW that is not the point which is evaluated in the end. Ratios of a "
            f"loss to that at the start are bounded to {FLOOR:g} .. {1 / FLOOR:g}: below, a task counts as solved; "
            "what is not finite is above. A training diverged if it ended above its start, or not finite. Batch "
            "normalisation is evaluated with the statistics of all training samples. Times as fast: the steps of "
            "tuned Adam over HRNN's until the training loss, averaged over a tenth of the steps, is where the worse of "
            "both ends.\n",
            "Scores are logarithms relative to the mean over the seeds of tuned Adam. Intervals are a bootstrap over "
            "the seeds of both, stratified by task (Agarwal et al. 2021): they say nothing of tasks that are not here, "
            "nor of which rates other seeds would choose.\n",
            *_markdown(["task", "parameters", "training samples", "minibatch"], rows),
            "",
        ]
    )


def _table_of_runs(evaluation: Evaluation) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    names = [field.name for field in dataclasses.fields(Setting)]
    measures = ("start", "final", "last_tenth", "area", "test", "accuracy", "seconds")
    writer.writerow(["task", "steps", "seed", *names, *measures])
    for run, result in evaluation.results.items():
        of_setting = [getattr(run.setting, name) for name in names]
        of_result = [getattr(result, name) for name in measures]
        shown = ["" if value is None else f"{value:.6g}" if isinstance(value, float) else value for value in of_setting]
        shown += ["" if value is None else f"{value:.6g}" for value in of_result]
        writer.writerow([run.task, run.steps, run.seed, *shown])
    return text.getvalue()


def environment() -> str:
    """Versions, and the processor."""
    import platform

    import lopt

    return (
        f"lopt {lopt.__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()})."
    )
