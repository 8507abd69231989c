"""metrics.csv of one or more runs -> curves.png: training loss and accuracy against steps."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np

from lopt.train.checkpoint import write_atomic
from lopt.train.metrics import COLUMNS, read_metrics

COLOURS = ("#0b62a4", "#e07b00", "#4d9221", "#7b3294", "#525252")
ACCURACY_TICKS = (0.0, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 1.0)
LEAST_ERROR = 1e-3  # an error rate of 0 is drawn here on the logarithmic scale


def draw(path: Path, title: str, runs: dict[str, Path]) -> None:
    """Writes a PNG to `path`. runs: label -> metrics.csv; the first is drawn on top. Raises OSError where it
    cannot be written, TrainError where rows cannot be read.

    Accuracy is drawn on a logarithmic scale of the error, so that 98 % and 99 % are as far apart as 80 % and 90 %.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    lowest_loss, worst, best = np.inf, 1.0, 0.0
    for order, (label, metrics) in enumerate(runs.items()):
        look = {"color": COLOURS[order % len(COLOURS)], "zorder": 3 + len(runs) - order}
        table = _read(metrics)
        step, loss = table["step"], np.maximum(table["train_loss"], 1e-12)
        smooth = np.exp(smoothed(np.log(loss)))
        loss_axes.plot(step, loss, alpha=0.22, linewidth=0.8, **look)
        loss_axes.plot(step, smooth, linewidth=2, label=label, **look)
        train = smoothed(table["train_accuracy"])
        tested = ~np.isnan(table["test_accuracy"])
        test = table["test_accuracy"][tested]
        accuracy_axes.plot(step, train, alpha=0.6, linewidth=1.2, linestyle="--", **look)
        marker = "o" if len(test) <= 60 else ""
        last = f", test {100 * test[-1]:.1f} % at the end" if len(test) else ""
        accuracy_axes.plot(step[tested], test, linewidth=1.8, marker=marker, markersize=4, label=label + last, **look)
        if len(step):
            lowest_loss = min(lowest_loss, smooth.min())
            worst = min(worst, *train, *test)
            best = max(best, *train, *test)
    loss_axes.set(yscale="log", ylabel="cross-entropy (nats)", title="Training loss")
    if np.isfinite(lowest_loss):
        loss_axes.set_ylim(bottom=lowest_loss / 4)  # single lucky batches lie far below the line
    loss_axes.yaxis.set_major_formatter("{x:g}")
    loss_axes.legend(loc="upper right", frameon=False)

    accuracy_axes.set_yscale("function", functions=(_to_scale, _from_scale))
    ceiling = 1 - max(LEAST_ERROR, (1 - best) / 1.5)
    accuracy_axes.set_ylim(max(0.0, min(worst, 0.9) - 0.05), ceiling)
    ticks = [tick for tick in ACCURACY_TICKS if tick <= ceiling]
    accuracy_axes.set_yticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
    accuracy_axes.set_title("Accuracy: test (solid) and training (dashed)")
    accuracy_axes.legend(loc="lower right", frameon=False)
    for axes in (loss_axes, accuracy_axes):
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.margins(x=0.01)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontweight="bold", parse_math=False)
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=150))


def _to_scale(accuracy: np.ndarray) -> np.ndarray:
    return -np.log10(np.maximum(1 - accuracy, LEAST_ERROR / 10))


def _from_scale(height: np.ndarray) -> np.ndarray:
    return 1 - 10.0**-height


def smoothed(values: np.ndarray) -> np.ndarray:
    """Gaussian average over neighbouring rows, deviation a hundredth of them, shorter at both ends. [n] -> [n]."""
    if not len(values):
        return values
    deviation = max(len(values) / 100, 0.5)
    reach = int(3 * deviation)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    sums = np.convolve(values, kernel)[reach : reach + len(values)]
    return sums / np.convolve(np.ones(len(values)), kernel)[reach : reach + len(values)]


def _read(path: Path) -> dict[str, np.ndarray]:
    """Columns of metrics.csv, each [rows] float64; NaN where a field is empty."""
    rows = read_metrics(path)
    table = np.full((len(rows), len(COLUMNS)), np.nan)
    for place, row in enumerate(rows):
        for column, text in enumerate(row):
            with contextlib.suppress(ValueError):
                table[place, column] = float(text)
    return {name: table[:, column] for column, name in enumerate(COLUMNS)}
