"""Independent trainings of one task in lock-step, and the cache of what came of them.

Loss and gradient of all trainings are computed in one go; each sees the minibatches and the start of its own seed, the
same for every optimizer. A result is a file of its own, written when it is there: a stopped evaluation goes on where
it was, and another one trains only what it does not find.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lopt.evaluate.optimizers import OPTIMIZERS, Objects, Setting, factor
from lopt.evaluate.tasks import Task
from lopt.metaparams import MetaParams
from lopt.train.checkpoint import write_atomic

VERSION = 1  # of all that decides a result and is in no key: raise it when networks, optimizers or measures change
RULE = 4  # of HRNN, likewise: part of the digest of its meta-parameters
POINTS = 100  # of a stored curve
FLOOR = 1e-4  # of a loss relative to the start: what is below counts as solved
LOCKSTEP = 24  # trainings at once: more need memory beyond the caches
LOCKSTEP_PARAMETERS = 500_000  # of all of them, likewise


class Run(NamedTuple):
    """One training."""

    task: str
    steps: int
    seed: int
    setting: Setting


@dataclass(frozen=True)
class Result:
    """What came of a training. Losses are infinite if they were not finite.

    Attributes:
        start: loss on all training samples before the first step.
        final: loss on all training samples after the last step.
        last_tenth: mean minibatch loss over the last tenth of the steps.
        area: mean over the steps of log(minibatch loss / start), each between log(FLOOR) and -log(FLOOR).
        test, accuracy: on the test samples after the last step; None if there are none.
        curve: mean minibatch losses of up to `POINTS` stretches of steps.
        seconds: of wall-clock time, the lock-step's shared out equally.
    """

    start: float
    final: float
    last_tenth: float
    area: float
    test: float | None
    accuracy: float | None
    curve: tuple[float, ...]
    seconds: float

    @property
    def diverged(self) -> bool:
        """Whether the final loss is not finite or above the start."""
        return not self.final <= self.start

    @property
    def log_ratio(self) -> float:
        """log(final / start), between log(FLOOR) and -log(FLOOR)."""
        return bounded_log(self.final, self.start)


def bounded_log(loss: float, start: float) -> float:
    """log(loss / start), between log(FLOOR) and -log(FLOOR); what is not finite has diverged."""
    ratio = loss / start if math.isfinite(loss) else math.inf
    return math.log(min(max(ratio, FLOOR), 1 / FLOOR))


def digest(meta: MetaParams) -> str:
    """Of meta-parameters, their architecture and the rule that they are for, in short."""
    content = f"{RULE} {meta.digest} {meta.config.to_json()}"
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def train(
    task: Task,
    settings: Sequence[Setting],
    seeds: Sequence[int],
    steps: int,
    weights: dict[str, MetaParams],
    progress: Callable[[int], None] = lambda count: None,
) -> list[Result]:
    """Train independent copies of a task, all with one kind of optimizer.

    Args:
        task: the task.
        settings, seeds: one for each copy; the settings share optimizer and weight decay.
        steps: how many.
        weights: digest -> meta-parameters, for HRNN.
        progress: called with the number of copy-steps done since the last call.
    """
    begin = time.perf_counter()
    count, first = len(settings), settings[0]
    own = {seed: (task.start(seed), task.order(seed, steps)) for seed in set(seeds)}
    theta = torch.stack([own[seed][0] for seed in seeds])
    order = torch.stack([own[seed][1] for seed in seeds], 1)  # [steps, count, batch]
    scale = torch.tensor([setting.loss_scale for setting in settings])[:, None]
    constant = torch.tensor([setting.lr for setting in settings])[:, None]
    at_start = {seed: task.evaluate(_views(task, own[seed][0][None]))[0] for seed in own}
    rule = OPTIMIZERS[first.optimizer].rule
    if rule is None:
        optimizer: Any = Objects(theta, task.shapes, settings, weights)
    else:
        optimizer = rule(theta, first.weight_decay)
    losses = torch.empty(steps, count)
    reported = 0
    for step in range(steps):
        losses[step], grad = _loss_and_gradient(task, theta, order[step])
        factors = torch.tensor([factor(setting, step / steps) for setting in settings])[:, None]
        with torch.no_grad():
            optimizer.step(grad * scale, constant * factors)
        if (step + 1) % 20 == 0 or step + 1 == steps:
            progress((step + 1 - reported) * count)
            reported = step + 1
    optimizer.finish()
    results = []
    with torch.no_grad():
        for copy, seed in enumerate(seeds):
            final, test, accuracy = task.evaluate(_views(task, theta[copy : copy + 1]))
            results.append(_result(losses[:, copy].double(), at_start[seed], final, test, accuracy))
    seconds = (time.perf_counter() - begin) / count
    return [dataclasses.replace(result, seconds=seconds) for result in results]


def _views(task: Task, theta: Tensor) -> list[Tensor]:
    """[count, n] -> [count, *shape] each."""
    parts = zip(theta.split(task.sizes, -1), task.shapes, strict=True)
    return [part.reshape(len(theta), *shape) for part, shape in parts]


def _loss_and_gradient(task: Task, theta: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """[count] and [count, n]."""
    params = [part.detach().requires_grad_() for part in _views(task, theta)]
    loss = task.loss(params, task.minibatch(index))
    grads = torch.autograd.grad(loss.sum(), params)
    return loss.detach(), torch.cat([grad.flatten(1) for grad in grads], -1)


def _result(losses: Tensor, start: float, final: float, test: float | None, accuracy: float | None) -> Result:
    losses = torch.where(losses.isfinite(), losses, math.inf)
    logs = (losses / start).clamp(FLOOR, 1 / FLOOR).log()
    stretches = losses.tensor_split(min(POINTS, len(losses)))
    return Result(
        start,
        _finite(final),
        losses[-max(1, round(0.1 * len(losses))) :].mean().item(),
        logs.mean().item(),
        None if test is None else _finite(test),
        accuracy,
        tuple(stretch.mean().item() for stretch in stretches),
        0.0,
    )


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


class Cache:
    """Results in a folder, a file for each run.

    Args:
        folder: made when the first result is stored.
        digests: of each task, part of its runs' keys.
    """

    def __init__(self, folder: Path, digests: Callable[[str], str]) -> None:
        self.folder, self.digests = folder, digests

    def key(self, run: Run) -> dict[str, Any]:
        """What has to agree for a result to be the run's."""
        setting = {name: value for name, value in dataclasses.asdict(run.setting).items() if value is not None}
        return {"version": VERSION, "digest": self.digests(run.task), **run._asdict(), "setting": setting}

    def _path(self, key: dict[str, Any]) -> Path:
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        return self.folder / key["task"] / f"{name}.json"

    def get(self, run: Run) -> Result | None:
        """The result of a run, None if there is none."""
        key = self.key(run)
        try:
            content = json.loads(self._path(key).read_text(encoding="utf-8"))
            if content["key"] != json.loads(json.dumps(key)):
                return None
            return Result(**{**content["result"], "curve": tuple(content["result"]["curve"])})
        except (OSError, ValueError, LookupError, TypeError):  # not there, or not what `put` has written
            return None

    def put(self, run: Run, result: Result) -> None:
        """Store the result of a run; raises OSError, the folder is as before then."""
        key = self.key(run)
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"key": key, "result": dataclasses.asdict(result)})
        own = path.with_suffix(f".{os.getpid()}")  # another evaluation may store the same
        write_atomic(own, lambda file: file.write(text.encode()))
        os.replace(own, path)


def lock_steps(runs: Iterable[Run], parameters: Callable[[str], int]) -> list[list[Run]]:
    """Runs that can advance together: of one task, length and kind of optimizer, and no more than fit the caches.

    parameters: of a task.
    """
    groups: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        same: tuple[object, ...] = (run.task, run.steps, run.setting.optimizer)
        if OPTIMIZERS[run.setting.optimizer].rule is not None:
            same = (*same, run.setting.weight_decay)
        groups.setdefault(same, []).append(run)
    out = []
    for group in groups.values():
        most = min(LOCKSTEP, max(1, LOCKSTEP_PARAMETERS // parameters(group[0].task)))
        parts = -(-len(group) // most)
        out += [group[part::parts] for part in range(parts)]
    return out
