"""Scores -> report.md, results.csv and plots: a folder to be read without the program that made it."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lopt.evaluate import statistics, suites
from lopt.evaluate.optimizers import OPTIMIZERS, Setting
from lopt.evaluate.statistics import Entrant, Interval, Results
from lopt.evaluate.suites import Suite
from lopt.evaluate.training import FLOOR, Run
from lopt.train.checkpoint import write_atomic

HRNN_COLOURS = ("#0b62a4", "#7b3294", "#00a6a6", "#1a1a1a")  # one for each weights
COLOURS = {
    "adam": "#e07b00",
    "adamw-cosine": "#4d9221",
    "sgd": "#b2182b",
    "rmsprop": "#c51b8a",
    "prodigy": "#8c6d31",
    "dadapt-adam": "#969696",
    "schedule-free": "#525252",
}


@dataclass(frozen=True)
class Evaluation:
    """What a report is about.

    Args:
        suite: the suite. name: of the suite.
        seeds: number of seeds.
        weights: label -> digest of the meta-parameters.
        results: of all trainings there are.
        environment: one line: versions and the machine's processor.
    """

    name: str
    suite: Suite
    seeds: int
    weights: dict[str, str]
    results: Results
    environment: str

    @property
    def all_seeds(self) -> range:
        """Of every task."""
        return range(self.seeds)


def write(evaluation: Evaluation, folder: Path) -> str:
    """Write the report; each file is the old one or the whole new one.

    Returns:
        The summary, the first part of the report.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts, summary = [_head(evaluation)], ""
    for steps in evaluation.suite.steps:
        entrants = _entrants(evaluation, steps)
        adam = statistics.tuned(evaluation.results, evaluation.suite.tasks, steps, evaluation.all_seeds, "adam")
        text = _summary(evaluation, steps, entrants, adam, folder)
        summary += text
        parts += [text, _per_task(evaluation, steps, entrants, folder)]
        if evaluation.suite.variants and adam is not None:
            parts.append(_variants(evaluation, steps, adam, folder))
    parts.append(_method(evaluation))
    _save_text(folder / "results.csv", _table_of_runs(evaluation))
    _save_text(folder / "report.md", "\n".join(parts))
    return summary


def _save_text(path: Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(text.encode()))


def _entrants(evaluation: Evaluation, steps: int) -> list[Entrant]:
    """HRNN with each weights, then the baselines tuned and untuned, as far as they were trained."""
    results, tasks, seeds = evaluation.results, evaluation.suite.tasks, evaluation.all_seeds
    found: list[Entrant | None] = []
    for label, weights in evaluation.weights.items():
        name = "HRNN" if len(evaluation.weights) == 1 else f"HRNN {label}"
        found.append(statistics.fixed(results, tasks, steps, seeds, name, suites.hrnn(weights)))
    for name in evaluation.suite.optimizers:
        line = OPTIMIZERS[name]
        found.append(statistics.tuned(results, tasks, steps, seeds, name))
        if len(line.rates) > 1:
            setting = statistics.baseline(name, line.default)
            found.append(statistics.fixed(results, tasks, steps, seeds, f"{line.label}, lr {line.default:g}", setting))
    return [entrant for entrant in found if entrant is not None]


def _head(evaluation: Evaluation) -> str:
    suite = evaluation.suite
    weights = "\n".join(f"- {label}: `{digest}`" for label, digest in evaluation.weights.items())
    absent = [OPTIMIZERS[name] for name in suite.optimizers if OPTIMIZERS[name].missing]
    note = "".join(f"\n{line.label} is left out: `{line.package}` is not installed." for line in absent)
    horizons = " and ".join(f"{steps:,}" for steps in suite.steps)
    return (
        f"# HRNN on the suite `{evaluation.name}`\n\n{suite.about} {len(suite.tasks)} tasks, {evaluation.seeds} seeds, "
        f"{horizons} steps. HRNN runs at its defaults, the same on every task.\n\n"
        f"Meta-parameters, by a digest of their numbers:\n\n{weights}\n\n{evaluation.environment}\n{note}\n"
    )


def _summary(evaluation: Evaluation, steps: int, entrants: list[Entrant], adam: Entrant | None, folder: Path) -> str:
    results, tasks, seeds = evaluation.results, evaluation.suite.tasks, evaluation.all_seeds
    lines = [f"\n## {steps:,} steps\n"]
    if adam is None:
        return "\n".join([*lines, "Adam was not trained at every rate: there is nothing to compare with.\n"])
    intervals: dict[str, dict[str, Interval]] = {}
    for entrant in entrants:
        own = {}
        for metric in statistics.METRICS:
            values = statistics.scores(results, entrant, adam, tasks, steps, seeds, metric)
            if len(values):
                own[metric] = statistics.interval(values)
        intervals[entrant.label] = own
    untuned = statistics.fixed(
        results, tasks, steps, seeds, "Adam", statistics.baseline("adam", OPTIMIZERS["adam"].default)
    )
    assert untuned is not None
    for entrant in entrants:
        if not entrant.label.startswith("HRNN"):
            continue
        tuned_share, untuned_share = (
            statistics.share_not_worse(statistics.scores(results, entrant, other, tasks, steps, seeds, "final"))
            for other in (adam, untuned)
        )
        speed = _speed_ups(evaluation, steps, entrant, adam)
        lines.append(
            f"{entrant.label} ends with at most the training loss of Adam at its best of 7 rates on "
            f"{round(tuned_share * len(tasks))} of {len(tasks)} tasks, of Adam at {OPTIMIZERS['adam'].default:g} on "
            f"{round(untuned_share * len(tasks))}. It is {speed:.2f} times as fast as the tuned Adam (median over the "
            f"tasks). {statistics.divergences(results, entrant, tasks, steps, seeds)} of {len(tasks) * len(seeds)} "
            f"trainings diverged.\n"
        )
    lines += [
        "Losses relative to Adam at the best of 7 rates of each task: interquartile mean over tasks and seeds, 95 % "
        "confidence interval; below 1 is better.\n",
        "| | final training loss | training loss, all steps | test loss | test accuracy | <= tuned Adam | diverged |",
        "|---|---|---|---|---|---|---|",
    ]
    for entrant in entrants:
        cells = [_ratio(intervals[entrant.label].get(metric)) for metric in statistics.METRICS]
        found = [
            result.accuracy
            for task in tasks
            for result in statistics.of(results, entrant, task, steps, seeds)
            if result.accuracy is not None
        ]
        accuracy = f"{100 * sum(found) / len(found):.1f} %" if found else "-"
        share = statistics.share_not_worse(statistics.scores(results, entrant, adam, tasks, steps, seeds, "final"))
        diverged = statistics.divergences(results, entrant, tasks, steps, seeds)
        lines.append(f"| {entrant.label} | {' | '.join(cells)} | {accuracy} | {100 * share:.0f} % | {diverged} |")
    _plot_scores(folder / f"scores-{steps}.png", intervals)
    lines.append(f"\n![Losses relative to tuned Adam](scores-{steps}.png)\n")
    return "\n".join(lines)


def _ratio(value: Interval | None) -> str:
    if value is None:
        return "-"
    middle, low, high = (math.exp(number) for number in value)
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def _speed_ups(evaluation: Evaluation, steps: int, ours: Entrant, other: Entrant) -> float:
    found = []
    for task in evaluation.suite.tasks:
        curves = [
            statistics.curve(statistics.of(evaluation.results, entrant, task, steps, evaluation.all_seeds))
            for entrant in (ours, other)
        ]
        found.append(statistics.speed_up(*curves))
    return float(np.median(found))


def _per_task(evaluation: Evaluation, steps: int, entrants: list[Entrant], folder: Path) -> str:
    results, tasks, seeds = evaluation.results, evaluation.suite.tasks, evaluation.all_seeds
    lines = ["### Every task\n"]
    if not entrants:
        return ""
    titles = {
        "final": "Final training loss: on all training samples after the last step, geometric mean over the seeds; a "
        "rate chosen for the task in parentheses.",
        "test": "Test loss.",
        "accuracy": "Test accuracy in %, mean over the seeds.",
    }
    for metric, title in titles.items():
        rows = []
        for task in tasks:
            cells: list[tuple[float, str]] = []
            for entrant in entrants:
                found = statistics.of(results, entrant, task, steps, seeds)
                chosen = len(set(entrant.settings.values())) > 1
                cells.append(_cell(found, metric, entrant.settings[task] if chosen and metric == "final" else None))
            if not any(math.isnan(value) for value, _ in cells):
                best = (max if metric == "accuracy" else min)(value for value, _ in cells)
                rows.append([task, *(f"**{text}**" if value == best else text for value, text in cells)])
        if rows:
            head = ["", *(entrant.label for entrant in entrants)]
            lines += [title + "\n", *_markdown(head, rows), ""]
    _plot_curves(folder / f"curves-{steps}.png", evaluation, steps, entrants)
    lines.append(f"![Training loss of every task](curves-{steps}.png)\n")
    return "\n".join(lines)


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


def _variants(evaluation: Evaluation, steps: int, adam: Entrant, folder: Path) -> str:
    """Robustness, and what weight decay and a schedule do, for each weights."""
    results, tasks, seeds = evaluation.results, evaluation.suite.tasks, evaluation.all_seeds
    lines = ["### HRNN in other settings\n"]
    shown: dict[str, dict[str, list[tuple[float, Interval]]]] = {}
    for label, weights in evaluation.weights.items():
        name = "HRNN" if len(evaluation.weights) == 1 else f"HRNN {label}"
        rows = []
        for what, settings in suites.variants(weights).items():
            for setting in settings:
                entrant = statistics.fixed(results, tasks, steps, seeds, "", setting)
                if entrant is None:
                    continue
                value = getattr(setting, what) if what in ("init_lr", "loss_scale") else None
                values = statistics.scores(results, entrant, adam, tasks, steps, seeds, "final")
                final = statistics.interval(values)
                test = statistics.interval(statistics.scores(results, entrant, adam, tasks, steps, seeds, "test"))
                worst = tasks[int(values.mean(-1).argmax())]
                rows.append(
                    [
                        f"{what} {value:g}" if value is not None else what,
                        _ratio(final),
                        _ratio(test),
                        f"{100 * statistics.share_not_worse(values):.0f} %",
                        f"{math.exp(values.mean(-1).max()):.3g} ({worst})",
                        str(statistics.divergences(results, entrant, tasks, steps, seeds)),
                    ]
                )
                if value is not None:
                    shown.setdefault(what, {}).setdefault(name, []).append((value, final))
        if rows:
            head = [name, "final training loss", "test loss", "<= tuned Adam", "worst task", "diverged"]
            lines += [*_markdown(head, rows), ""]
    if not shown:
        return ""
    lines.insert(
        1,
        "Losses relative to tuned Adam as above. init_lr is where the learned rates start (1e-3 by default); "
        "loss_scale multiplies every gradient. The worst task is by its final training loss.\n",
    )
    _plot_variants(folder / f"robustness-{steps}.png", shown)
    lines.append(f"![Robustness](robustness-{steps}.png)\n")
    return "\n".join(lines)


def _method(evaluation: Evaluation) -> str:
    suite = evaluation.suite
    rows = []
    for name in suite.tasks:
        task = suites.task(name)
        sizes = [f"{sum(task.sizes):,}", f"{task.train:,}", str(task.batch)]
        if not task.batched:
            sizes[1:] = ["-", "-"]
        rows.append([name, *sizes])
    rates = [
        f"- {OPTIMIZERS[name].label}: {', '.join(f'{rate:g}' for rate in OPTIMIZERS[name].rates)}"
        for name in suite.optimizers
    ]
    return "\n".join(
        [
            "\n## Method\n",
            "None of the tasks takes part in meta-training, which knows synthetic data alone."
            if suite.held_out
            else "Meta-training draws problems of some of these families too.",
            "All optimizers see the same starts and minibatches, which "
            "only the seed decides. Per task, a tuned baseline is the learning rate with the lowest final training "
            "loss, the geometric mean over the seeds, of:\n",
            *rates,
            "",
            *(["AdamW decays weights by 0.01.\n"] if "adamw-cosine" in suite.optimizers else []),
            "Final training loss: on all training samples after the last step. Training loss, all steps: the mean "
            "over the steps of the logarithm of the minibatch loss. Ratios of a loss to that at the start are bounded "
            f"to {FLOOR:g} .. {1 / FLOOR:g}: below, a task counts as solved; what is not finite is above. A training "
            "diverged if it ended above its start, or not finite. Batch normalisation is evaluated with the "
            "statistics of all training samples. Times as fast: the steps of tuned Adam over those until HRNN's "
            "training loss, averaged over a tenth of the steps, is where tuned Adam's ends.\n",
            "Scores are logarithms relative to the mean over the seeds of tuned Adam. Intervals are a bootstrap over "
            "the seeds, stratified by task (Agarwal et al. 2021): they say nothing of tasks that are not here.\n",
            *_markdown(["task", "parameters", "training samples", "minibatch"], rows),
            "",
        ]
    )


def _table_of_runs(evaluation: Evaluation) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    names = ("optimizer", "lr", "schedule", "weight_decay", "init_lr", "loss_scale", "weights")
    measures = ("start", "final", "last_tenth", "area", "test", "accuracy", "seconds")
    writer.writerow(["task", "steps", "seed", *names, *measures])
    for run, result in evaluation.results.items():
        of_setting = [getattr(run.setting, name) for name in names]
        of_result = [getattr(result, name) for name in measures]
        shown = ["" if value is None else f"{value:.6g}" if isinstance(value, float) else value for value in of_setting]
        shown += ["" if value is None else f"{value:.6g}" for value in of_result]
        writer.writerow([run.task, run.steps, run.seed, *shown])
    return text.getvalue()


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save_figure(path: Path, figure: Any) -> None:
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=110))


def _clean(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _plot_scores(path: Path, intervals: dict[str, dict[str, Interval]]) -> None:
    """A row for each entrant, a panel for each metric, on a logarithmic axis."""
    titles = {"final": "Final training loss", "area": "Training loss, all steps", "test": "Test loss"}
    shown = [metric for metric in titles if any(metric in own for own in intervals.values())]
    labels = list(intervals)
    figure = _figure(4.2 * len(shown) + 1, 0.34 * len(labels) + 1.2)
    panels = np.atleast_1d(figure.subplots(1, len(shown), sharey=True))
    for axes, metric in zip(panels, shown, strict=True):
        for place, label in enumerate(labels):
            if metric not in intervals[label]:
                continue
            middle, low, high = np.exp(intervals[label][metric])
            colour = HRNN_COLOURS[0] if label.startswith("HRNN") else COLOURS["schedule-free"]
            axes.plot([low, high], [place, place], color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt")
            axes.plot([middle], [place], marker="|", color=colour, markersize=14, markeredgewidth=2.5)
        axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set(xscale="log", xlabel="relative to tuned Adam", title=titles[metric])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}" if np.diff(np.log10(axes.get_xlim())) < 1 else "")
        axes.set_yticks(range(len(labels)), labels)
        _clean(axes)
    panels[0].invert_yaxis()
    _save_figure(path, figure)


def _plot_curves(path: Path, evaluation: Evaluation, steps: int, entrants: list[Entrant]) -> None:
    """A panel for each task: minibatch loss, geometric mean over the seeds, averaged over a tenth of the steps."""
    tasks = evaluation.suite.tasks
    columns = min(4, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = _figure(3.6 * columns, 2.7 * rows + 0.7)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for task, axes in zip(tasks, panels, strict=False):
        start = evaluation.results[Run(task, steps, 0, entrants[0].settings[task])].start
        for place, entrant in reversed(list(enumerate(entrants))):
            values = statistics.curve(statistics.of(evaluation.results, entrant, task, steps, evaluation.all_seeds))
            setting = entrant.settings[task]
            ours = setting.optimizer == "hrnn"
            axes.plot(
                np.arange(1, len(values) + 1) * steps / len(values),
                np.where(values < 3 * start, values, np.nan),
                label=entrant.label,
                color=HRNN_COLOURS[place % len(HRNN_COLOURS)] if ours else COLOURS[setting.optimizer],
                linewidth=2.2 if ours else 1.1,
                linestyle="--" if ", lr" in entrant.label else "-",
            )
        axes.set(yscale="log", title=task)
        _clean(axes)
    for axes in list(panels)[len(tasks) :]:
        axes.set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=4, frameon=False)
    _save_figure(path, figure)


def _plot_variants(path: Path, shown: dict[str, dict[str, list[tuple[float, Interval]]]]) -> None:
    """Final training loss against initial rate and gradient scale."""
    titles = {"init_lr": "Initial learning rate", "loss_scale": "Scale of all gradients"}
    figure = _figure(5 * len(shown), 3.4)
    panels = np.atleast_1d(figure.subplots(1, len(shown), sharey=True))
    for axes, (what, lines) in zip(panels, shown.items(), strict=True):
        for place, (label, points) in enumerate(lines.items()):
            x = [value for value, _ in points]
            middle, low, high = np.exp(np.array([number for _, number in points])).T
            axes.fill_between(x, low, high, color=HRNN_COLOURS[place % len(HRNN_COLOURS)], alpha=0.2, linewidth=0)
            axes.plot(x, middle, marker="o", color=HRNN_COLOURS[place % len(HRNN_COLOURS)], label=label)
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set(xscale="log", yscale="log", xlabel=titles[what])
        _clean(axes)
    panels[0].set_ylabel("final training loss\nrelative to tuned Adam")
    panels[0].legend(frameon=False)
    _save_figure(path, figure)


def environment() -> str:
    """Versions, and the processor."""
    import platform

    import torch

    import lopt

    return (
        f"lopt {lopt.__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()})."
    )
