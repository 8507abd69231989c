"""The task interface, the random numbers tasks draw, and the wrappers that make tasks of tasks.

`count` is the number of independent copies that advance in lock-step; every tensor a task draws or receives has it as
its first dimension. Checked by tests/meta/test_tasks.py against recorded objectives and gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Params = Sequence[Tensor]  # one [count, *shape] per parameter tensor
Data = Any  # what `instance` and `minibatch` return: tensors, numbers and strings in dicts, lists and tuples

LOG_EPS = 1e-6


class Random:
    """Random numbers for `count` copies; each is used by `repeat` copies, one behind the other.

    Args:
        generator: the source.
        repeat: copy i, i + count/repeat, .. get the same numbers: the members of antithetic pairs see one world.
        part, parts: draw for `parts` times as many copies, and return the numbers of this part of them.
    """

    def __init__(self, generator: torch.Generator, repeat: int = 1, part: int = 0, parts: int = 1) -> None:
        self.generator, self.repeat, self.device = generator, repeat, generator.device
        self.part, self.parts = part, parts

    def _tiled(self, draw: Any, count: int, shape: tuple[int, ...]) -> Tensor:
        own, rest = divmod(count, self.repeat)
        if rest:
            raise ValueError(f"{count} copies cannot be shared out to {self.repeat} equal parts")
        values = draw((own * self.parts, *shape))
        if self.parts > 1:
            values = values[own * self.part : own * (self.part + 1)]
        return torch.cat([values] * self.repeat) if self.repeat > 1 else values

    def normal(self, count: int, *shape: int) -> Tensor:
        """[count, *shape], standard normal."""
        return self._tiled(lambda size: torch.randn(size, generator=self.generator, device=self.device), count, shape)

    def uniform(self, count: int, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """[count, *shape], uniform in [low, high)."""
        drawn = self._tiled(lambda size: torch.rand(size, generator=self.generator, device=self.device), count, shape)
        return low + (high - low) * drawn

    def log_uniform(self, count: int, *shape: int, low: float, high: float) -> Tensor:
        """[count, *shape], between low and high, uniform in the logarithm."""
        return torch.exp(self.uniform(count, *shape, low=math.log(low), high=math.log(high)))

    def integers(self, count: int, *shape: int, high: int) -> Tensor:
        """[count, *shape], integers in [0, high)."""
        return self._tiled(
            lambda size: torch.randint(high, size, generator=self.generator, device=self.device), count, shape
        )

    def permutation(self, count: int, n: int) -> Tensor:
        """[count, n], each row a random order of 0 .. n-1."""
        return self.uniform(count, n).argsort(-1)

    def scalar(self) -> float:
        """One number, uniform in [0, 1), the same for all copies."""
        return torch.rand((), generator=self.generator, device=self.device).item()


class Task:
    """A family of optimization problems. Subclasses give `shapes` and `loss`; the rest has defaults.

    Attributes:
        shapes: shape of each parameter tensor of one copy.
        weight: of this task in the meta-loss.
    """

    shapes: tuple[tuple[int, ...], ...] = ()
    weight: float = 1.0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of parameters of each tensor."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def fan_in(self) -> tuple[int, ...]:
        """Inputs of each tensor, by which `base_fan_in` shortens its steps. Default: 1, so that it does not."""
        return (1,) * len(self.shapes)

    def instance(self, count: int, random: Random) -> Data:
        """What makes up `count` problems: matrices, data sets, teachers."""
        return {}

    def start(self, count: int, random: Random, data: Data) -> list[Tensor]:
        """Where training of an instance starts: one [count, *shape] per tensor. Default: standard normal."""
        return [random.normal(count, *shape) for shape in self.shapes]

    def minibatch(self, data: Data, count: int, random: Random) -> Data:
        """What one step's loss is taken on, in the structure of `data`, which it may change in place, as a reshuffled
        order. Default: everything."""
        return data

    def loss(self, params: Params, data: Data) -> Tensor:
        """Objective of every copy: [count], positive. data: an instance or a minibatch of it."""
        raise NotImplementedError(f"{type(self).__name__} has no method loss(params, data)")

    def corrupt(self, grads: list[Tensor], random: Random) -> list[Tensor]:
        """What the optimizer gets to see of the gradients, [count, *shape] each. Default: the gradients."""
        return grads


def try_out(task: Task) -> None:
    """Take one step's loss and gradient of two pairs of copies, as an estimator does.

    Raises:
        ValueError: something about the task is not as `Task` says; the message names it.
    """
    count, random = 4, Random(torch.Generator().manual_seed(0), repeat=2)
    if not all(isinstance(shape, Sequence) for shape in task.shapes):
        raise ValueError(f"shapes must be a tuple of shapes such as ((8, 4), (4,)), got {task.shapes}")
    if not task.shapes or min(task.sizes) < 1:
        raise ValueError(f"shapes must be those of parameter tensors of at least one value, got {task.shapes}")
    if not (math.isfinite(task.weight) and task.weight > 0):
        raise ValueError(f"weight must be positive, as meta-losses are means with these weights, got {task.weight}")
    if not isinstance(task.fan_in, Sequence) or len(task.fan_in) != len(task.shapes):
        raise ValueError(f"fan_in must have a number for each of the {len(task.shapes)} tensors, got {task.fan_in}")
    data = task.instance(count, random)
    _check_data(data)
    params = [param.detach().clone().requires_grad_() for param in task.start(count, random, data)]
    expected, found = [(count, *shape) for shape in task.shapes], [tuple(param.shape) for param in params]
    if expected != found:
        raise ValueError(f"start of {count} copies must return tensors of shapes {expected}, got {found}")
    if other := [param.dtype for param in params if param.dtype != torch.float32]:
        raise ValueError(f"start must return float32, as meta-training computes in, got {other[0]}: cast it")
    batch = task.minibatch(data, count, random)
    _check_data(data)  # which a minibatch may have changed
    for given in (data, batch):  # the paper's recipe takes the loss of whole instances too
        try:
            loss = task.loss(params, given)
        except (LookupError, TypeError, AttributeError) as error:
            if given is batch:
                raise
            raise ValueError(
                f"loss must take what instance returns as it takes a minibatch, and raises {type(error).__name__}: "
                f"{error}; return both in the same structure"
            ) from error
        if not isinstance(loss, Tensor) or loss.shape != (count,):
            found_loss = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss of {count} copies must be a tensor of shape ({count},), got {found_loss}")
    if not loss.isfinite().all():
        raise ValueError(f"loss must be finite; at the start it is {loss.detach().tolist()}")
    if not (loss.detach() > 0).all():
        raise ValueError(
            f"loss must be positive, for what counts is its logarithm relative to the start; at the start it is "
            f"{loss.detach().tolist()}: add what its lowest value is below zero"
        )
    if loss.dtype != params[0].dtype:
        raise ValueError(f"loss must have the parameters' dtype {params[0].dtype}, got {loss.dtype}: cast the data")
    firsts = torch.autograd.grad(loss[0], params, allow_unused=True, retain_graph=True)
    if infinite := [index for index, grad in enumerate(firsts) if grad is not None and not grad[0].isfinite().all()]:
        raise ValueError(f"the gradient of parameter tensor {infinite[0]} is not finite at the start: start elsewhere")
    if any(grad is not None and grad[1:].any() for grad in firsts):
        raise ValueError("the loss of one copy depends on the parameters of another: take no mean or sum over copies")
    grads = torch.autograd.grad(loss.sum(), params, allow_unused=True)
    if unused := [index for index, grad in enumerate(grads) if grad is None]:
        raise ValueError(f"loss does not depend on parameter tensor {unused[0]}: leave it out of shapes")
    corrupted = task.corrupt(list(grads), random)
    if (found := [tuple(grad.shape) for grad in corrupted]) != expected:
        raise ValueError(f"corrupt must return gradients of shapes {expected}, got {found}")
    for name, values in (("start", params), ("loss", [loss]), ("corrupt", corrupted)):
        halves = [value.detach().chunk(2) for value in values]
        # Entries that cancel are rounded relative to the others.
        if not all(
            torch.allclose(left, right, rtol=1e-3, atol=1e-4 * left.abs().max().item(), equal_nan=True)
            for left, right in halves
        ):
            raise ValueError(
                f"{name} differs between copies that are given the same random numbers: draw all of them from the "
                f"argument `random`"
            )


def _check_data(data: Data) -> None:
    """Raise ValueError for what a checkpoint could not hold."""
    if type(data) in (dict, list, tuple):
        for value in data.values() if isinstance(data, dict) else data:
            _check_data(value)
    elif not (data is None or isinstance(data, Tensor) or type(data) in (bool, int, float, str)):
        raise ValueError(
            f"instance must return tensors, numbers and strings in dicts, lists and tuples, which a checkpoint can "
            f"hold, and minibatch leave them so, got {type(data).__name__}: keep other things in the task itself"
        )


class Wrapper(Task):
    """A task made of another one; what a subclass leaves alone is the inner task's."""

    def __init__(self, task: Task) -> None:
        self.task, self.shapes, self.weight = task, task.shapes, task.weight

    @property
    def fan_in(self) -> tuple[int, ...]:
        return self.task.fan_in

    def instance(self, count: int, random: Random) -> Data:
        return self.task.instance(count, random)

    def start(self, count: int, random: Random, data: Data) -> list[Tensor]:
        return self.task.start(count, random, data)

    def minibatch(self, data: Data, count: int, random: Random) -> Data:
        return self.task.minibatch(data, count, random)

    def loss(self, params: Params, data: Data) -> Tensor:
        return self.task.loss(params, data)

    def corrupt(self, grads: list[Tensor], random: Random) -> list[Tensor]:
        return self.task.corrupt(grads, random)


class Noisy(Wrapper):
    """Adds normal noise of standard deviation `std` to every entry of the gradient."""

    def __init__(self, task: Task, std: float) -> None:
        super().__init__(task)
        self.std = std

    def corrupt(self, grads: list[Tensor], random: Random) -> list[Tensor]:
        return [grad + self.std * random.normal(*grad.shape) for grad in super().corrupt(grads, random)]


class Sparse(Wrapper):
    """Sets each entry of the gradient to zero with a probability."""

    def __init__(self, task: Task, probability: float = 0.99) -> None:
        super().__init__(task)
        self.probability = probability

    def corrupt(self, grads: list[Tensor], random: Random) -> list[Tensor]:
        kept = super().corrupt(grads, random)
        return [grad * (random.uniform(*grad.shape) >= self.probability) for grad in kept]


class LogOf(Wrapper):
    """log(f + 1e-6) - log(1e-6): the same minima, other slopes."""

    def loss(self, params: Params, data: Data) -> Tensor:
        return torch.log(self.task.loss(params, data) + LOG_EPS) - math.log(LOG_EPS)


class Rescaled(Wrapper):
    """The task in other units of its parameters and of its loss: loss_scale * f(theta / scale).

    Args:
        task: f.
        scale, loss_scale: a number, or (low, high) to draw log-uniformly for each copy.
    """

    def __init__(
        self, task: Task, scale: float | tuple[float, float] = 1.0, loss_scale: float | tuple[float, float] = 1.0
    ) -> None:
        super().__init__(task)
        self.scale, self.loss_scale = scale, loss_scale

    def instance(self, count: int, random: Random) -> Data:
        drawn = [
            random.log_uniform(count, low=scale[0], high=scale[1]) if isinstance(scale, tuple) else scale
            for scale in (self.scale, self.loss_scale)
        ]
        return {"task": super().instance(count, random), "scale": drawn[0], "loss_scale": drawn[1]}

    def start(self, count: int, random: Random, data: Data) -> list[Tensor]:
        return [_times(data["scale"], param) for param in super().start(count, random, data["task"])]

    def minibatch(self, data: Data, count: int, random: Random) -> Data:
        return {**data, "task": super().minibatch(data["task"], count, random)}

    def loss(self, params: Params, data: Data) -> Tensor:
        inverse = 1 / data["scale"]
        return data["loss_scale"] * super().loss([_times(inverse, param) for param in params], data["task"])


def _times(scale: float | Tensor, values: Tensor) -> Tensor:
    return values * (scale.view(-1, *[1] * (values.dim() - 1)) if isinstance(scale, Tensor) else scale)


class Sum(Task):
    """Several tasks as one: tensors side by side, losses added."""

    def __init__(self, *tasks: Task) -> None:
        self.tasks = tasks
        self.shapes = tuple(shape for task in tasks for shape in task.shapes)

    @property
    def fan_in(self) -> tuple[int, ...]:
        return tuple(inputs for task in self.tasks for inputs in task.fan_in)

    def _split(self, tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        parts, begin = [], 0
        for task in self.tasks:
            parts.append(tensors[begin : begin + len(task.shapes)])
            begin += len(task.shapes)
        return parts

    def instance(self, count: int, random: Random) -> Data:
        return [task.instance(count, random) for task in self.tasks]

    def start(self, count: int, random: Random, data: Data) -> list[Tensor]:
        return [tensor for task, own in zip(self.tasks, data, strict=True) for tensor in task.start(count, random, own)]

    def minibatch(self, data: Data, count: int, random: Random) -> Data:
        return [task.minibatch(part, count, random) for task, part in zip(self.tasks, data, strict=True)]

    def loss(self, params: Params, data: Data) -> Tensor:
        losses = [task.loss(part, own) for task, part, own in zip(self.tasks, self._split(params), data, strict=True)]
        return torch.stack(losses).sum(0)

    def corrupt(self, grads: list[Tensor], random: Random) -> list[Tensor]:
        """The children's noise is kept apart: each corrupts its own gradients."""
        return [
            grad
            for task, part in zip(self.tasks, self._split(grads), strict=True)
            for grad in task.corrupt(list(part), random)
        ]
