"""Problems of Wichrowska et al. 2017, each drawn once, as tasks of an evaluation.

There is no test set: these measure optimization alone. Gradients are exact, or those of minibatches.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lopt.evaluate.tasks import Params, Task
from lopt.meta.tasks import Random, paper
from lopt.meta.tasks import Task as MetaTask

DATA_SEED = 2_000_003  # apart from those of starts: the same numbers would make a start a copy of its problem


def _tree(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: _tree(function, value) for key, value in tree.items()}
    return [_tree(function, value) for value in tree] if isinstance(tree, list) else tree


class Problem(Task):
    """One instance of a family of meta-training tasks.

    Args:
        family: the family; its losses are positive.
        batch: samples of a minibatch, for the families with samples; None: everything.
    """

    def __init__(self, family: MetaTask, batch: int | None = None) -> None:
        self.family = family
        self.data = family.instance(1, Random(torch.Generator().manual_seed(DATA_SEED)))
        self.batched = batch is not None
        self.train = self.data["x"].shape[1] if self.batched else 1
        self.batch = batch or 1
        self.shapes = list(family.shapes)
        self.sizes = list(family.sizes)
        self.classes = False

    @property
    def cost(self) -> int:
        """Of a step, in about the same unit as that of other tasks."""
        return 200 * self.batch + self.count

    @property
    def digest(self) -> str:
        """Of data and start, in short."""
        content = [self.start(0).numpy().tobytes()]
        _tree(lambda values: content.append(values.numpy().tobytes()) or values, self.data)  # type: ignore[func-returns-value]
        return hashlib.sha256(b"".join(content) + f"{self.train} {self.batch}".encode()).hexdigest()[:16]

    def start(self, seed: int) -> Tensor:
        """[n], the parameters before the first step."""
        random = Random(torch.Generator().manual_seed(seed))
        return torch.cat([param.flatten() for param in self.family.start(1, random, self.data)])

    def minibatch(self, index: Tensor) -> Any:
        """Of an index [count, batch]; everything where there are no minibatches."""
        if self.batched:
            return {name: values[0][index] for name, values in self.data.items()}
        return _tree(lambda values: values.expand(len(index), *values.shape[1:]), self.data)

    def loss(self, params: Params, batch: Any) -> Tensor:
        """Of each copy on a minibatch, [count]."""
        return self.family.loss(params, batch)

    def evaluate(self, params: Params) -> tuple[float, float | None, float | None]:
        """Loss on everything, and no test."""
        return self.family.loss(params, self.data).item(), None, None


def _function(name: str) -> MetaTask:
    return paper.Function2D(*paper.FUNCTIONS_2D[name])


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "quadratic-100": lambda: Problem(paper.Quadratic(100)),
    "bowl": lambda: Problem(paper.Bowl(5.0, math.pi / 4)),
    "norm-1": lambda: Problem(paper.Norm(27, 1.0)),
    "rosenbrock": lambda: Problem(_function("rosenbrock")),
    "beale": lambda: Problem(_function("beale")),
    "booth": lambda: Problem(_function("booth")),
    "ackley": lambda: Problem(_function("ackley")),
    "matmul-3-22": lambda: Problem(paper.MatMul(3, 22)),
    "clouds-softmax": lambda: Problem(paper.Softmax(100, 1.0), 50),
    "sigmoid-net": lambda: Problem(paper.FullyConnected(12, (16, 8, 3)), 64),
    "parity-embedding": lambda: Problem(paper.SparseSoftmax(), 10),
    "conv-random-images": lambda: Problem(paper.ConvNet((6, 6, 3), ((3, 3, 4), (3, 3, 4))), 20),
    "min-max-well": lambda: Problem(paper.MinMaxWell(50)),
    "outward-snake": lambda: Problem(paper.OutwardSnake(20), 10),
    "dependency-chain": lambda: Problem(paper.DependencyChain(20)),
}
