"""Wall-clock time of a training step against the batch size, HRNN beside torch's optimizers.

A small pre-activation ResNet on digits, `lopt.train`'s. Optimizers and batch sizes take turns, round after round, so
that a slow moment of a shared machine hits all of them; a number is the median over the rounds. It is of this machine
at this moment, and is not kept.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lopt import HRNN, MetaParams
from lopt.evaluate.tasks import data_set
from lopt.train import models

MODEL = "preresnet8"
THOROUGH: tuple[Sequence[int], int] = (1, 4, 16, 64, 256, 512), 25  # batch sizes, rounds
QUICK: tuple[Sequence[int], int] = (1, 16, 256), 3
WARM_UP = 2  # rounds before those that count: state is made, memory is allocated

OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {  # label -> as torch has it
    "Adam": lambda params: torch.optim.Adam(params, lr=1e-3),
    "SGD + momentum": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=1e-3),
}


class Timing(NamedTuple):
    """Median seconds of one optimizer at one batch size.

    Attributes:
        step: forward, backward and update. update: `optimizer.step()` alone.
    """

    optimizer: str
    batch: int
    step: float
    update: float


def measure(meta: MetaParams, batches: Sequence[int], rounds: int) -> list[Timing]:
    """A timing for each optimizer and batch size, HRNN first. meta: HRNN's meta-parameters."""
    data = data_set("digits")
    images, classes = data.x.view(-1, 1, 8, 8), data.y
    first, _, _ = models.build(MODEL, 10, 1, None)
    trained: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {}
    for label, make in {"HRNN": lambda params: HRNN(params, meta=meta), **OPTIMIZERS}.items():
        model = copy.deepcopy(first)
        trained[label] = model, make(model.parameters())
    seconds: dict[tuple[str, int], list[tuple[float, float]]] = {
        (label, batch): [] for label in trained for batch in batches
    }
    for turn in range(WARM_UP + rounds):
        for batch in batches:
            for label, (model, optimizer) in trained.items():
                found = _step(model, optimizer, images[:batch], classes[:batch])
                if turn >= WARM_UP:
                    seconds[label, batch].append(found)
    return [Timing(*key, *map(statistics.median, zip(*found, strict=True))) for key, found in seconds.items()]


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Seconds of a training step, and of the update in it."""
    begin = time.perf_counter()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    before = time.perf_counter()
    optimizer.step()
    end = time.perf_counter()
    return end - begin, end - before


def count() -> int:
    """Parameters of the network."""
    return sum(map(torch.numel, models.build(MODEL, 10, 1, None)[0].parameters()))
