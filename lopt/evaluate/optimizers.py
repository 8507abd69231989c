"""Who takes part in an evaluation: HRNN, tuned baselines, and optimizers that need no learning rate.

The baselines' updates are elementwise, so that any number of independent trainings advance in one call; they equal
those of torch.optim and schedulefree. HRNN and what comes from other packages are real optimizer objects, one for each
training.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lopt import HRNN, MetaParams
from lopt.train.schedules import SCHEDULES

ADAPTIVE_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
HIGHER_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)


@dataclass(frozen=True)
class Setting:
    """Everything that decides a training besides task, seed and steps.

    Args:
        optimizer: a name of `OPTIMIZERS`.
        lr: of the optimizer; HRNN's is a factor.
        schedule: a name of `SCHEDULES`.
        weight_decay: decoupled.
        init_lr, base_fan_in, base_depth, annealed: HRNN's. loss_scale: the optimizer sees gradients times this.
        weights: digest of HRNN's meta-parameters.
    """

    optimizer: str
    lr: float
    schedule: str = "constant"
    weight_decay: float = 0.0
    init_lr: float | None = None
    base_fan_in: float | None = None
    base_depth: float | None = None
    annealed: bool | None = None
    loss_scale: float = 1.0
    weights: str | None = None


@dataclass(frozen=True)
class Optimizer:
    """A line of the table.

    Args:
        label: for people.
        rates: learning rates to choose from. default: the one to be used without tuning.
        rule: an elementwise update, None for optimizer objects.
        package: where the optimizer comes from, None: from here or from torch.
        schedule, weight_decay: of the settings.
    """

    label: str
    rates: tuple[float, ...]
    default: float
    rule: Callable[..., Rule] | None = None
    package: str | None = None
    schedule: str = "constant"
    weight_decay: float = 0.0

    @property
    def missing(self) -> bool:
        """Whether its package is not installed."""
        return self.package is not None and importlib.util.find_spec(self.package) is None


class Rule:
    """An elementwise update of many trainings, [count, n] parameters each.

    Args:
        theta: [count, n], updated in place. weight_decay: the same for all.
    """

    def __init__(self, theta: Tensor, weight_decay: float) -> None:
        self.theta, self.weight_decay, self.steps = theta, weight_decay, 0

    def step(self, grad: Tensor, lr: Tensor) -> None:
        """grad: [count, n]. lr: [count, 1]."""
        self.steps += 1
        if self.weight_decay:
            self.theta.mul_(1 - lr * self.weight_decay)
        self.update(grad, lr)

    def update(self, grad: Tensor, lr: Tensor) -> None:
        """Move `theta`."""
        raise NotImplementedError

    def finish(self) -> None:
        """Leave in `theta` what is to be evaluated."""


class Adam(Rule):
    """torch.optim.Adam and AdamW at their default betas (.9, .999) and eps 1e-8."""

    def __init__(self, theta: Tensor, weight_decay: float) -> None:
        super().__init__(theta, weight_decay)
        self.mean, self.square = torch.zeros_like(theta), torch.zeros_like(theta)

    def update(self, grad: Tensor, lr: Tensor) -> None:
        self.mean.lerp_(grad, 0.1)
        self.square.mul_(0.999).addcmul_(grad, grad, value=0.001)
        root = self.square.sqrt().div_(math.sqrt(1 - 0.999**self.steps)).add_(1e-8)
        self.theta.sub_(self.mean.div(root).mul_(lr / (1 - 0.9**self.steps)))


class SGD(Rule):
    """torch.optim.SGD with momentum .9."""

    def __init__(self, theta: Tensor, weight_decay: float) -> None:
        super().__init__(theta, weight_decay)
        self.momentum = torch.zeros_like(theta)

    def update(self, grad: Tensor, lr: Tensor) -> None:
        self.momentum.mul_(0.9).add_(grad)
        self.theta.sub_(lr * self.momentum)


class RMSprop(Rule):
    """torch.optim.RMSprop at its default alpha .99 and eps 1e-8."""

    def __init__(self, theta: Tensor, weight_decay: float) -> None:
        super().__init__(theta, weight_decay)
        self.square = torch.zeros_like(theta)

    def update(self, grad: Tensor, lr: Tensor) -> None:
        self.square.mul_(0.99).addcmul_(grad, grad, value=0.01)
        self.theta.sub_(grad.div(self.square.sqrt().add_(1e-8)).mul_(lr))


class ScheduleFree(Rule):
    """Schedule-free AdamW, Defazio et al. 2024, "The Road Less Scheduled", as in schedulefree at its default betas
    (.9, .999) and eps 1e-8, without warm-up or decay, at a constant rate. Until the end, `theta` is where gradients are
    taken."""

    def __init__(self, theta: Tensor, weight_decay: float) -> None:
        super().__init__(theta, weight_decay)
        self.base, self.average, self.square = theta.clone(), theta.clone(), torch.zeros_like(theta)

    def update(self, grad: Tensor, lr: Tensor) -> None:
        self.square.mul_(0.999).addcmul_(grad, grad, value=0.001)
        root = self.square.div(1 - 0.999**self.steps).sqrt_().add_(1e-8)
        self.base.sub_(grad.div(root).mul_(lr))
        self.average.lerp_(self.base, 1 / self.steps)
        torch.lerp(self.average, self.base, 0.1, out=self.theta)

    def finish(self) -> None:
        self.theta.copy_(self.average)


class Objects:
    """A real optimizer object for each training; their parameters are views of one tensor.

    Args:
        theta: [count, n]. shapes: of the parameter tensors of one training.
        settings: one for each training.
        weights: digest -> meta-parameters.
    """

    def __init__(
        self,
        theta: Tensor,
        shapes: Sequence[tuple[int, ...]],
        settings: Sequence[Setting],
        weights: dict[str, MetaParams],
    ) -> None:
        sizes = [math.prod(shape) for shape in shapes]
        self.shapes, self.sizes = shapes, sizes
        self.params = [
            [torch.nn.Parameter(part.view(shape)) for part, shape in zip(row.split(sizes), shapes, strict=True)]
            for row in theta
        ]
        self.optimizers: list[Any] = [
            _object(params, setting, weights) for params, setting in zip(self.params, settings, strict=True)
        ]
        for optimizer in self.optimizers:
            if hasattr(optimizer, "train"):
                optimizer.train()

    def step(self, grad: Tensor, lr: Tensor) -> None:
        """grad: [count, n]. lr: [count, 1]."""
        rates = lr[:, 0].tolist()
        for row, params, optimizer, rate in zip(grad, self.params, self.optimizers, rates, strict=True):
            for param, part, shape in zip(params, row.split(self.sizes), self.shapes, strict=True):
                param.grad = part.view(shape)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()

    def finish(self) -> None:
        """Leave in `theta` what is to be evaluated."""
        for optimizer in self.optimizers:
            if hasattr(optimizer, "eval"):
                optimizer.eval()


def _object(
    params: list[torch.nn.Parameter], setting: Setting, weights: dict[str, MetaParams]
) -> torch.optim.Optimizer:
    if setting.optimizer == "hrnn":
        assert setting.weights is not None and setting.init_lr is not None
        return HRNN(
            params,
            lr=setting.lr,
            meta=weights[setting.weights],
            init_lr=setting.init_lr,
            base_fan_in=setting.base_fan_in,
            base_depth=setting.base_depth,
            annealed=bool(setting.annealed),
            weight_decay=setting.weight_decay,
        )
    if setting.optimizer == "prodigy":
        import prodigyopt  # type: ignore[import-not-found,import-untyped,unused-ignore]

        return prodigyopt.Prodigy(params, lr=setting.lr)
    assert setting.optimizer == "dadapt-adam"
    import dadaptation  # type: ignore[import-not-found,import-untyped,unused-ignore]

    return dadaptation.DAdaptAdam(params, lr=setting.lr)


OPTIMIZERS = {
    "hrnn": Optimizer("HRNN", (1.0,), 1.0),
    "adam": Optimizer("Adam", ADAPTIVE_RATES, 1e-3, Adam),
    "adamw-cosine": Optimizer("AdamW + cosine", ADAPTIVE_RATES, 1e-3, Adam, schedule="cosine", weight_decay=0.01),
    "sgd": Optimizer("SGD + momentum", HIGHER_RATES, 1e-1, SGD),
    "rmsprop": Optimizer("RMSprop", ADAPTIVE_RATES, 1e-3, RMSprop),
    "prodigy": Optimizer("Prodigy", (1.0,), 1.0, package="prodigyopt"),
    "dadapt-adam": Optimizer("D-Adapt Adam", (1.0,), 1.0, package="dadaptation"),
    "schedule-free": Optimizer("Schedule-free AdamW", HIGHER_RATES, 2.5e-3, ScheduleFree),
}


def factor(setting: Setting, done: float) -> float:
    """What a schedule multiplies lr by, at a share of the steps."""
    return SCHEDULES[setting.schedule](done)
