"""The meta-training loop: a recipe in, a run folder out.

    config.json         recipe, duration, seed, tasks
    metrics.csv         one row per `ROW_EVERY` meta-steps and per validation
    curves.png          drawn from it
    checkpoint.pt       everything needed to go on, bit for bit on a CPU
    meta.safetensors    the meta-parameters, averaged where the recipe says so, ready for `lopt.HRNN(params, meta=...)`
    best.safetensors    those with the best validation score; with tasks of the user's, the best mean of both scores
    tensorboard/        the same rows, where `tensorboard` is installed

All random numbers come from one generator that is part of the checkpoint: a resumed run equals an uninterrupted one.

Processes that `torchrun` has started share out the rows of every world equally. All draw the same random numbers from
the same seed and keep their part, so the result is that of one process with all rows, up to rounding. Evolution
strategies exchange losses alone: every process draws all perturbations. Backpropagation exchanges the mean
meta-gradient.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lopt.config import HRNNConfig
from lopt.interop.tf1 import RMSProp
from lopt.meta import validate
from lopt.meta.estimators import Estimate, chosen
from lopt.meta.recipe import ESTIMATORS, Recipe, Stage
from lopt.meta.tasks import Random, Task
from lopt.meta.unroll import World
from lopt.metaparams import MetaParams
from lopt.train import TrainError, checkpoint
from lopt.train.group import ALONE, Group
from lopt.train.scalars import Scalars
from lopt.train.stop import StopRequest

COLUMNS = (
    "meta_step",  # of the whole run
    "stage",
    # Mean since the last row; natural log of the loss relative to the task's start. It falls as the tasks of a stage,
    # new at first, grow older: validation tells what was learned.
    "meta_loss",
    "grad_norm",  # median since the last row, before clipping
    "lr",
    "task_steps_per_second",
    "seconds",  # of meta-steps, without validation
    "valid_final",  # see validate.Scores; mean over the validation tasks; empty where the row is no validation
    "valid_area",
    "own_final",  # the same of the user's tasks
    "own_area",
)
VALID = COLUMNS.index("valid_final")  # the first of the scores
FINALS = {"valid_final": "validation tasks", "own_final": "own tasks"}  # by whose mean the best are chosen
ROW_EVERY = 10
CHECKPOINT_SECONDS = 60
VALID_STEPS = 500
CHANGING = ("flat", "average", "stage", "step", "done", "seconds", "rows", "pending", "pending_seconds", "best")

SCALARS = {  # tag -> column
    "meta-training/meta_loss": "meta_loss",
    "meta-training/grad_norm": "grad_norm",
    "meta-training/lr": "lr",
    "speed/task_steps_per_second": "task_steps_per_second",
    "validation/final": "valid_final",
    "validation/area": "valid_area",
    "validation/own_final": "own_final",
    "validation/own_area": "own_area",
}


class Adam:
    """Adam on one vector, with a bound on the gradient's norm."""

    def __init__(self, betas: tuple[float, float], clip: float) -> None:
        self.betas, self.clip = betas, clip
        self.state: dict[str, Any] = {}

    def step(self, flat: Tensor, grad: Tensor, lr: float) -> Tensor:
        """[M] meta-parameters after one step; a gradient that is not finite is passed over."""
        if not grad.isfinite().all():
            return flat
        if not self.state:
            self.state = {"mean": torch.zeros_like(flat), "square": torch.zeros_like(flat), "steps": 0}
        s, (b1, b2) = self.state, self.betas
        grad = grad * min(1.0, self.clip / (grad.norm().item() + 1e-12))
        s["steps"] += 1
        s["mean"], s["square"] = b1 * s["mean"] + (1 - b1) * grad, b2 * s["square"] + (1 - b2) * grad.square()
        mean, square = s["mean"] / (1 - b1 ** s["steps"]), s["square"] / (1 - b2 ** s["steps"])
        return flat - lr * mean / (square.sqrt() + 1e-10)


class TFRMSProp:
    """The original's meta-optimizer on one vector."""

    def __init__(self, config: Any, clip: float) -> None:
        self.config, self.rmsprop = config, RMSProp(clip=clip)
        self.state: dict[str, Tensor] = {}

    def step(self, flat: Tensor, grad: Tensor, lr: float) -> Tensor:
        """[M] meta-parameters after one step."""
        meta, grads = (MetaParams.from_flat(self.config, values) for values in (flat, grad))
        self.rmsprop.lr, self.rmsprop.ms = lr, dict(self.state)
        after = self.rmsprop.step(meta, grads)
        self.state = self.rmsprop.ms
        return after.flat()


class MetaTraining:
    """A recipe being carried out.

    Args:
        recipe: stages and their settings.
        seed: of everything: meta-parameters, tasks, noise.
        device: where unrolls run.
        extra: further tasks, a mix of their own in every stage.
        start: meta-parameters to go on from; None: an initialisation with `seed`.
        group: processes that share the work, all with the same other arguments.

    Raises:
        TrainError: a stage's rows cannot be shared out equally to the processes, the architecture has none of what a
            stage is restricted to, or `start` is of another one.
    """

    def __init__(
        self,
        recipe: Recipe,
        seed: int,
        device: torch.device | str = "cpu",
        extra: Sequence[Task] = (),
        start: MetaParams | None = None,
        group: Group = ALONE,
    ) -> None:
        self.recipe, self.device, self.extra, self.group = recipe, torch.device(device), list(extra), group
        for stage in recipe.stages:
            if stage.rows % (least := group.size * ESTIMATORS[stage.estimator](stage).repeat):
                raise TrainError(
                    f"{stage.rows} rows of stage {stage.name!r} ({stage.estimator}) cannot be shared out equally to "
                    f"{group.size} processes: choose another --nproc-per-node, or a multiple of {least} rows"
                )
            try:
                chosen(recipe.config, stage.only)
            except ValueError as error:
                raise TrainError(f"stage {stage.name!r}: {error}") from None
        if start is not None:
            _check_start(start.config, recipe.config)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.flat = (start or MetaParams.init(recipe.config, seed)).flat().to(self.device)
        self.stage, self.step, self.done, self.seconds = 0, 0, 0, 0.0
        self.rows: list[list[Any]] = []
        self.pending: list[tuple[float, float, int]] = []  # loss, gradient norm, task steps since the last row
        self.pending_seconds = 0.0
        self.best = float("inf")
        self.remarks: list[str] = []  # on the user's tasks, of the last validation
        self._begin_stage()

    @property
    def total(self) -> int:
        """Meta-steps of the whole run."""
        return sum(stage.meta_steps for stage in self.recipe.stages)

    @property
    def meta(self) -> MetaParams:
        """The meta-parameters that are being trained."""
        return MetaParams.from_flat(self.recipe.config, self.flat)

    @property
    def finished(self) -> bool:
        """Whether the last stage is done."""
        return self.stage == len(self.recipe.stages)

    @property
    def result(self) -> MetaParams:
        """What the run has come to: their moving average, as soon as there is one."""
        return self.meta if self.average is None else MetaParams.from_flat(self.recipe.config, self.average)

    @property
    def summary(self) -> str:
        """What validation found at the start and at its best, in words."""
        validations = [(row[0], finals) for row in self.rows if (finals := _finals(row))]
        alike = [validation for validation in validations if validation[1].keys() == validations[-1][1].keys()]
        if not alike:
            return "no validation yet"
        first, start = alike[0]
        step, best = min(alike, key=lambda validation: statistics.mean(validation[1].values()))
        head = f"losses after {VALID_STEPS} steps relative to the first, at meta-step {first} and, the best, at {step}:"
        scores = [f"{FINALS[name]} {math.exp(start[name]):.3g}, {math.exp(best[name]):.3g}" for name in best]
        return "\n".join(["\n  ".join([head, *scores]), *self.remarks])

    def _begin_stage(self) -> None:
        self.worlds: dict[int, World] = {}
        self.average: Tensor | None = None
        if self.finished:
            return
        stage = self._current
        self.mixes = stage.mixes() + ([self.extra] if self.extra else [])
        self.estimator = ESTIMATORS[stage.estimator](stage)
        self.optimizer = (
            Adam(stage.betas, stage.clip) if stage.optimizer == "adam" else TFRMSProp(self.recipe.config, stage.clip)
        )

    @property
    def _current(self) -> Stage:
        return self.recipe.stages[self.stage]

    @property
    def _random(self) -> Random:
        return Random(self.generator, self.estimator.repeat, self.group.rank, self.group.size)

    def _make_world(self, mix: int) -> World:
        return self._current.world(self.mixes[mix], self.recipe.config, self.device, self._random, self.group)

    def _world(self) -> World:
        """The world of the next meta-step."""
        if not self._current.sampled:
            mix = self.step % len(self.mixes)
        else:
            world = next(iter(self.worlds.values()), None)
            if world is not None and not (world.restarts >= self._current.sampled and world.age[0] >= world.length[0]):
                return world
            self.worlds = {}
            mix = int(self._random.scalar() * len(self.mixes))
        if mix not in self.worlds:
            self.worlds[mix] = self._make_world(mix)
        return self.worlds[mix]

    def meta_step(self) -> Estimate:
        """One unroll and one step of the meta-optimizer."""
        begin, stage = time.perf_counter(), self._current
        world = self._world()
        steps = max(2, round(stage.unroll(self._random)))
        estimate = self.estimator(self.meta, world, steps)
        self.flat = self.optimizer.step(self.flat, estimate.grad, stage.lr_at(self.step))
        self.step += 1
        self.done += 1
        if stage.average and 2 * self.step > stage.meta_steps:
            self.average = self.flat if self.average is None else torch.lerp(self.flat, self.average, stage.average)
        self.pending.append((estimate.loss, estimate.grad.norm().item(), steps * stage.rows * len(world.mix)))
        taken = time.perf_counter() - begin
        self.seconds += taken
        self.pending_seconds += taken
        lr = stage.lr_at(self.step - 1)
        validated = self.done % self.recipe.validate_every == 0 or self.step == stage.meta_steps
        if validated or self.done % ROW_EVERY == 0:
            self._row(stage, lr, self._validated() if validated else ())
        if self.step == stage.meta_steps:
            self.flat = self.result.flat()
            self.stage, self.step = self.stage + 1, 0
            self._begin_stage()
        return estimate

    def _start_row(self) -> None:
        """The row of meta-step 0: what the run begins with, which it may leave as the best there is."""
        self.rows.append([0, "start", "", "", "", "", 0.0, *_cells(self._validated())])

    def _row(self, stage: Stage, lr: float, valid: Sequence[float]) -> None:
        losses, norms, counts = zip(*self.pending, strict=True)
        median = torch.tensor(norms).median().item()
        self.rows.append(
            [
                self.done,
                stage.name,
                round(sum(losses) / len(losses), 5),
                f"{median:.3e}",
                f"{lr:.3e}",
                round(sum(counts) / self.pending_seconds),
                round(self.seconds, 1),
                *_cells(valid),
            ]
        )
        self.pending, self.pending_seconds = [], 0.0

    def _validated(self) -> list[float]:
        return self.group.from_first(self._validate() if self.group.rank == 0 else None)

    def _validate(self) -> list[float]:
        """Mean scores of the validation tasks, and behind them, if there are any, of the user's."""
        mixes = [list(validate.validation_tasks().values()), self.extra]
        losses = [validate.learned(self.result, tasks, VALID_STEPS) for tasks in mixes if tasks]
        if self.extra:
            self.remarks = validate.remarks(self.extra, losses[1])
        return [values.mean().item() for each in losses for values in validate.scores(each)]

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes; complete at process 0 of the group, all of which have to call."""
        own = {mix: world.state_dict() for mix, world in self.worlds.items()}
        worlds, *others = self.group.to_first(_moved(own, torch.device("cpu"))) or [own]
        return {name: getattr(self, name) for name in CHANGING} | {
            "recipe": self.recipe.text,
            "extra": self._extra_text,
            "generator": self.generator.get_state(),
            "worlds": worlds,
            "worlds_of_others": others,
            "optimizer": {} if self.finished else self.optimizer.state,
        }

    @property
    def _extra_text(self) -> str:
        return str([(type(task).__qualname__, task.shapes) for task in self.extra])

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """The inverse of `state_dict`, into a run of the same recipe, tasks, device and number of processes.

        Raises:
            TrainError: the recipe, a task's shapes or the number of processes are others.
        """
        if saved.get("recipe") != self.recipe.text:
            raise TrainError(
                "the checkpoint is of another version of this recipe: resume with the version of lopt, and of a recipe "
                "of yours, that began it, or go on from its meta-parameters with --start FOLDER/meta.safetensors"
            )
        if saved.get("extra", self._extra_text) != self._extra_text:
            raise TrainError(
                f"the run began with the tasks {saved['extra']}, and their modules have {self._extra_text}: restore "
                f"them, or go on with --start FOLDER/meta.safetensors"
            )
        generator, parts = saved["generator"], [saved["worlds"], *saved.get("worlds_of_others", [])]
        if len(parts) != self.group.size:
            raise TrainError(
                f"the checkpoint is of {len(parts)} processes, these are {self.group.size}: resume with "
                f"torchrun --nproc-per-node {len(parts)}"
            )
        saved = {**saved, "worlds": parts[self.group.rank]}
        saved = dict(_moved(saved, self.device))
        worlds, optimizer = (saved.pop(name) for name in ("worlds", "optimizer"))
        self.stage = saved["stage"]
        self._begin_stage()
        for name in CHANGING:
            setattr(self, name, saved[name])
        self.pending = [(loss, norm, count) for loss, norm, count in self.pending]
        self.rows = [[*row, *[""] * (len(COLUMNS) - len(row))] for row in self.rows]
        validations = [finals for row in self.rows if (finals := _finals(row))]
        if self.extra and validations and "own_final" not in validations[-1]:
            self.best = float("inf")  # of scores without the user's tasks
        for mix, state in worlds.items():
            self.worlds[mix] = self._make_world(mix)
            self.worlds[mix].load_state_dict(state)
        if not self.finished:
            self.optimizer.state = optimizer
        self.generator.set_state(generator)

    def run(self, folder: Path, stop: StopRequest) -> bool:
        """Carry on to the end of the recipe, or until a signal; a checkpoint is there in either case.

        Args:
            folder: the run folder, existing.
            stop: what has received signals.

        Returns:
            Whether the recipe is done.
        """
        from tqdm import tqdm  # type: ignore[import-untyped]

        bar = tqdm(
            disable=self.group.rank > 0,
            total=self.total,
            initial=self.done,
            unit="step",
            smoothing=0.05,
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 10,
            bar_format="{desc} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]",
        )
        period, loss = CHECKPOINT_SECONDS, None
        saved = time.perf_counter()
        scalars = Scalars(folder / "tensorboard", SCALARS, self.done)
        with bar, contextlib.closing(scalars):
            if not self.rows and not self.done:
                bar.set_description_str("validation")
                self._start_row()
                self._publish(folder, scalars)
                for remark in self.remarks:
                    bar.write(remark, file=sys.stderr)
            (stopped,) = self.group.any([stop.received is not None])
            while not (self.finished or stopped):
                name, rows = self._current.name, len(self.rows)
                before = self.seconds
                estimate = self.meta_step()
                loss = estimate.loss if loss is None else 0.95 * loss + 0.05 * estimate.loss
                if len(self.rows) > rows:
                    rate = self.rows[-1][5]
                    self._publish(folder, scalars)
                else:
                    rate = self.pending[-1][2] / max(1e-9, self.seconds - before)
                bar.set_description_str(name, refresh=False)
                bar.set_postfix_str(f"meta-loss {loss:.3f}, {rate / 1000:.1f}k task-steps/s", refresh=False)
                bar.update()
                stopped, due = self.group.any([stop.received is not None, time.perf_counter() - saved > period])
                if due:
                    self.save(folder)
                    saved = time.perf_counter()
        self.save(folder)
        return self.finished

    def _publish(self, folder: Path, scalars: Scalars) -> None:
        """The last row, at process 0: to TensorBoard, and its meta-parameters to a file if they are the best."""
        if self.group.rank == 0:
            self._keep_best(folder)
            scalars.add(self.done, _named(self.rows[-1]))

    def _keep_best(self, folder: Path) -> None:
        finals = _finals(self.rows[-1])
        if finals and (mean := statistics.mean(finals.values())) < self.best:
            self.best = mean
            card = {"meta_step": self.done, **finals}
            self.result.save(folder / "best.safetensors", card={name: str(value) for name, value in card.items()})

    def save(self, folder: Path) -> None:
        """Write checkpoint, metrics, meta-parameters and curves, each atomically, at process 0; all have to call."""
        state = self.state_dict()
        if self.group.rank > 0:
            return
        checkpoint.save(folder / "checkpoint.pt", state)
        text = io.StringIO(newline="")
        csv.writer(text).writerows([COLUMNS, *self.rows])
        checkpoint.write_atomic(folder / "metrics.csv", lambda file: file.write(text.getvalue().encode()))
        self.result.save(folder / "meta.safetensors", card={"meta_step": str(self.done)})
        if self.rows:
            draw(folder / "curves.png", self.rows)


def _check_start(start: HRNNConfig, config: HRNNConfig) -> None:
    """Raise unless numbers of one architecture mean the same in the other; bounds and constants may differ."""
    ours, theirs = dataclasses.asdict(config), dataclasses.asdict(start)
    fixed = [name for name in ours if name != "init_lr_range" and not isinstance(ours[name], float)]
    if other := [name for name in fixed if ours[name] != theirs[name]]:
        raise TrainError(
            f"the meta-parameters to start from have {', '.join(f'{name}={theirs[name]!r}' for name in other)}, the "
            f"recipe has {', '.join(f'{name}={ours[name]!r}' for name in other)}: start from others, or choose the "
            f"architecture with --variant"
        )


def _named(row: Sequence[Any]) -> dict[str, Any]:
    """Name of a column -> its cell."""
    return dict(zip(COLUMNS, row, strict=True))


def _finals(row: Sequence[Any]) -> dict[str, float]:
    """Name of a column -> score, those of `FINALS`; empty where the row is no validation."""
    return {name: cell for name, cell in _named(row).items() if name in FINALS and cell != ""}


def _cells(scores: Sequence[float]) -> list[Any]:
    """The last columns of a row; empty where there is no score."""
    return [*(round(score, 5) for score in scores), *[""] * (len(COLUMNS) - VALID - len(scores))]


def _moved(tree: Any, device: torch.device) -> Any:
    """Dicts, lists and tuples with their tensors on a device."""
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, dict):
        return {key: _moved(value, device) for key, value in tree.items()}
    return type(tree)(_moved(value, device) for value in tree) if isinstance(tree, list | tuple) else tree


def draw(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    """Meta-loss and validation scores against meta-steps, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    training, validation = figure.subplots(1, 2)
    for name in dict.fromkeys(row[1] for row in rows):
        own = [row for row in rows if row[1] == name and row[2] != ""]
        if not own:
            continue
        training.plot([row[0] for row in own], [row[2] for row in own], label=name)
    for column, label in enumerate(
        ("at the end", "mean over the steps", "own tasks, at the end", "own tasks, mean over the steps"), VALID
    ):
        if tested := [(row[0], row[column]) for row in rows if row[column] != ""]:
            validation.plot(*zip(*tested, strict=True), marker="o", markersize=3, label=label)
    training.set_title("Meta-loss of a stage's tasks, which grow older")
    validation.set_title(f"Validation tasks, {VALID_STEPS} steps")
    for axes in (training, validation):
        axes.set(xlabel="meta-step", ylabel="log(loss / loss at the start)")
        axes.grid(alpha=0.25)
        if axes.lines:
            axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    checkpoint.write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=120))
