"""The plots of a report: scores -> PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lopt.evaluate.optimizers import OPTIMIZERS
from lopt.evaluate.statistics import METRICS, Entrant, Interval
from lopt.evaluate.timing import Timing
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
GREY = "#525252"
TITLES = {"final": "Final training loss", "area": "Training loss, all steps", "test": "Test loss"}

Points = Sequence[tuple[float, Interval]]


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(path: Path, figure: Any) -> None:
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=110))


def _clean(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _colour(label: str, place: int) -> str:
    """Of an optimizer by its label in the table; place: among the weights of HRNN."""
    if label.startswith("HRNN"):
        return HRNN_COLOURS[place % len(HRNN_COLOURS)]
    return next((COLOURS[name] for name, line in OPTIMIZERS.items() if line.label == label), GREY)


def _logarithmic(axis: Any) -> None:
    """Label 1, 2, 5, 10, ... or, over more than two decades, powers of ten alone."""
    from matplotlib.ticker import LogLocator

    if np.diff(np.log10(axis.get_view_interval())) < 2:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")


def _panels(count: int, most: int, width: float, height: float, entries: int) -> tuple[Any, list[Any], int]:
    """A figure, `count` of its panels in rows of at most `most`, and how many entries its legend has in a row."""
    columns = min(most, count)
    rows = -(-count // columns)
    fitting = int(width * columns // 2.7)
    figure = _figure(width * columns, height * rows + 0.23 * -(-entries // fitting) + 0.2)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count], fitting


def _legend_below(figure: Any, columns: int) -> None:
    """The first panel's legend, in the order of the table."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=columns, frameon=False)


def scores(path: Path, intervals: Mapping[str, Mapping[str, Interval]], zero: str, ours: Sequence[str]) -> None:
    """A row for each label, a panel for each metric, on a logarithmic axis.

    Args:
        intervals: of each label and metric. zero: what they are relative to. ours: labels to stand out.
    """
    shown = [metric for metric in METRICS if any(metric in own for own in intervals.values())]
    labels = list(intervals)
    figure = _figure(4.2 * len(shown) + 1, 0.34 * len(labels) + 1.2)
    panels = np.atleast_1d(figure.subplots(1, len(shown), sharey=True))
    for axes, metric in zip(panels, shown, strict=True):
        for place, label in enumerate(labels):
            if metric not in intervals[label]:
                continue
            middle, low, high = np.exp(intervals[label][metric])
            colour = HRNN_COLOURS[0] if label in ours else GREY
            axes.plot([low, high], [place, place], color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt")
            axes.plot([middle], [place], marker="|", color=colour, markersize=14, markeredgewidth=2.5)
        axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set(xscale="log", xlabel=f"relative to {zero}", title=TITLES[metric])
        _logarithmic(axes.xaxis)
        axes.set_yticks(range(len(labels)), labels)
        _clean(axes)
    panels[0].invert_yaxis()
    _save(path, figure)


def _look(entrant: Entrant, task: str, place: int) -> dict[str, Any]:
    """Of the line of an entrant; place: in the table."""
    setting = entrant.settings[task]
    ours = setting.optimizer == "hrnn"
    return {
        "label": entrant.label,
        "color": HRNN_COLOURS[place % len(HRNN_COLOURS)] if ours else COLOURS[setting.optimizer],
        "linewidth": 2.2 if ours else 1.1,
        "linestyle": "--" if ", lr" in entrant.label else "-",
    }


def curves(
    path: Path,
    entrants: Sequence[Entrant],
    values: Mapping[str, Sequence[np.ndarray]],
    starts: Mapping[str, float],
    steps: int,
) -> None:
    """A panel for each task: minibatch loss, geometric mean over the seeds, averaged over a tenth of the steps.

    Args:
        values: task -> a curve for each entrant. starts: task -> loss at the start, likewise.
    """
    figure, panels, fitting = _panels(len(values), 4, 3.6, 2.7, len(entrants))
    for (task, own), axes in zip(values.items(), panels, strict=True):
        for place, (entrant, curve) in reversed(list(enumerate(zip(entrants, own, strict=True)))):
            x = np.arange(1, len(curve) + 1) * steps / len(curve)
            axes.plot(x, np.where(curve < 3 * starts[task], curve, np.nan), **_look(entrant, task, place))
        axes.set(yscale="log", title=task)
        _logarithmic(axes.yaxis)
        _clean(axes)
    _legend_below(figure, fitting)
    _save(path, figure)


def families(
    path: Path,
    entrants: Sequence[Entrant],
    members: Mapping[str, Mapping[str, str]],
    losses: Mapping[str, Sequence[float]],
) -> None:
    """A panel for each family: final training loss against what varies.

    Args:
        members: family -> value of what varies -> task. losses: task -> a loss for each entrant.
    """
    figure, panels, fitting = _panels(len(members), 3, 4.1, 3, len(entrants))
    for (family, tasks), axes in zip(members.items(), panels, strict=True):
        for place, entrant in reversed(list(enumerate(entrants))):
            look = _look(entrant, next(iter(tasks.values())), place)
            axes.plot(list(tasks), [losses[task][place] for task in tasks.values()], marker="o", markersize=4, **look)
        axes.set(yscale="log", title=family)
        axes.margins(x=0.15)
        _logarithmic(axes.yaxis)
        _clean(axes)
    for axes in panels[::3]:
        axes.set_ylabel("final training loss")
    _legend_below(figure, fitting)
    _save(path, figure)


def sensitivity(path: Path, shown: Mapping[str, Mapping[str, Points]]) -> None:
    """Final training loss relative to tuned Adam against learning rate and gradient scale.

    shown: what varies -> label -> points, their values ascending.
    """
    titles = {"init_lr": "initial learning rate", "loss_scale": "scale of all gradients"}
    figure = _figure(4.8 * len(shown) + 1.8, 3.6)
    panels = np.atleast_1d(figure.subplots(1, len(shown), sharey=True))
    for axes, (what, lines) in zip(panels, shown.items(), strict=True):
        for place, (label, points) in enumerate(lines.items()):
            x, colour = [value for value, _ in points], _colour(label, place)
            middle, low, high = np.exp(np.array([number for _, number in points])).T
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
            width = 2.2 if label.startswith("HRNN") else 1.1
            axes.plot(x, middle, marker="o", markersize=4, color=colour, label=label, linewidth=width)
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set(xscale="log", yscale="log", xlabel=titles[what])
        if any(not label.startswith("HRNN") for label in lines):
            axes.set_xlabel("learning rate: HRNN's initial one, the others' own")
        _logarithmic(axes.yaxis)
        _clean(axes)
    panels[0].set_ylabel("final training loss\nrelative to tuned Adam")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    _save(path, figure)


def times(path: Path, timings: Sequence[Timing]) -> None:
    """Milliseconds of a training step, and the share of the update in them, against the batch size."""
    figure = _figure(10.4, 3.8)
    whole, share = figure.subplots(1, 2)
    batches = sorted({timing.batch for timing in timings})
    for label in dict.fromkeys(timing.optimizer for timing in timings):
        own = [timing for timing in timings if timing.optimizer == label]
        look = {"color": _colour(label, 0), "label": label, "linewidth": 2.2 if label == "HRNN" else 1.1}
        x = [timing.batch for timing in own]
        whole.plot(x, [1e3 * timing.step for timing in own], marker="o", markersize=4, **look)
        share.plot(x, [100 * timing.update / timing.step for timing in own], marker="o", markersize=4, **look)
    whole.set(yscale="log", ylabel="ms", title="Training step")
    share.set(ylim=(0, None), ylabel="%", title="Share of the optimizer")
    for axes in (whole, share):
        axes.set(xscale="log", xlabel="batch size")
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.set_xticks([], minor=True)
        _clean(axes)
    _logarithmic(whole.yaxis)
    whole.legend(frameon=False)
    _save(path, figure)
