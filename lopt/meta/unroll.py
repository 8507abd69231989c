"""Many tasks advanced in lock-step by one learned optimizer, in unrolls that estimators differentiate or compare.

A `Mix` lays P tasks side by side in one vector of n parameters, T tensors in all; R rows are independent copies of it.
Each task is a problem of its own: its tensors share a global hidden state and a mean log lr, and it restarts on its own
clock, with another instance, start and initial learning rates. `Mix` holds what does not change, `World` what does.

The per-parameter stage is `reference.advance_flat` or a kernel with its signature (`choose_advance`).
Checked by tests/meta/test_unroll.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lopt.backends import cpu_flat, reference, triton_flat
from lopt.backends.flat import read_decays
from lopt.backends.reference import Advanced, FlatState, Segments, Summary, affine, damp, gru, sums_columns, travel
from lopt.config import DIRECTION_EPS, GRADIENT_LIMIT, HRNNConfig
from lopt.meta.tasks.base import Data, Random, Task
from lopt.options import shortening
from lopt.state import FACTOR, SAMPLES, UNDAMPED
from lopt.train.group import ALONE, Group

Meta = Mapping[str, Tensor]
Advance = Callable[..., Advanced]


ADVANCE: dict[str, Advance] = {"cpu": cpu_flat.advance_flat, "cuda": triton_flat.advance_flat}


def choose_advance(device: torch.device) -> Advance:
    """The fastest per-parameter stage that can be differentiated on a device; without its kernels, the reference's."""
    return ADVANCE.get(device.type, reference.advance_flat)


@dataclasses.dataclass(frozen=True)
class Draw:
    """A random length in steps, or another positive number.

    Args:
        low, high: log-uniform between them.
        mean: if given, low + an exponential variable of this mean, rounded, instead.
    """

    low: float
    high: float = 0.0
    mean: float | None = None

    def __call__(self, random: Random) -> float:
        """One value."""
        uniform = random.scalar()
        if self.mean is not None:
            return round(-self.mean * math.log1p(-uniform)) + self.low
        return self.low * (max(self.high, self.low) / self.low) ** uniform


@dataclasses.dataclass(frozen=True)
class Augment:
    """What is drawn at every restart besides the task itself; all numbers in natural-log space or as (low, high).

    Applied outside of the optimizer's sight: it works on theta / scale and sees loss_scale times the gradient. Apart
    from epsilons a rule without a bound below its rates does not notice a common scale of a tensor's parameters and
    learning rates, so the spread of initial learning rates is a spread of parameter scales too. With a bound, rates
    drawn below it are at it after the first step: `lopt.HRNN` lowers it to `init_lr`, meta-training does not.

    Args:
        lr: initial learning rate, log-uniform for each task.
        lr_tensor, lr_param: standard deviations of the jitter of a tensor's and a parameter's initial log lr.
        scale: of each tensor's parameters, log-uniform; (1, 1) for none.
        loss_scale: of each task's loss, log-uniform.
        base_fan_in, base_depth: of `lopt.HRNN`: steps of tensors with more inputs, and of more matrices, are shorter.
            Its own defaults are for networks larger than those of meta-training, which does worse with them.
    """

    lr: tuple[float, float] = (1e-4, 3e-2)
    lr_tensor: float = 0.5
    lr_param: float = 0.1
    scale: tuple[float, float] = (1.0, 1.0)
    loss_scale: tuple[float, float] = (1e-4, 1e4)
    base_fan_in: float | None = 20
    base_depth: float | None = None


@dataclasses.dataclass(frozen=True)
class Objective:
    """Meta-loss of one task: mean over steps of log((f + floor f_0) / f_0), the mean of the log ratio to the start. A
    loss below zero counts as zero.

    Args:
        floor: below this share of the start a loss counts no further.
        cap: a log ratio counts no further above.
    """

    floor: float = 1e-3
    cap: float = 10.0

    def __call__(self, losses: Tensor, start: Tensor) -> Tensor:
        """losses: [K, R, P], start: [R, P] -> [R, P]."""
        # A loss that is not finite has diverged. Of NaN the logarithm would have no derivative, not even times zero.
        finite = losses.isfinite() & start.isfinite()
        losses, scale = torch.where(finite, losses, 0.0), torch.where(start.isfinite(), start.abs() + 1e-30, 1.0)
        ratio = torch.log((losses.clamp(min=0.0) + self.floor * scale) / scale)
        return torch.where(finite & (ratio <= self.cap), ratio, self.cap).mean(0)


@dataclasses.dataclass(frozen=True)
class PaperObjective:
    """The original's: mean of log(f / (f_0 + 1e-6) + 1e-6) over an unroll whose first loss counts twice."""

    def __call__(self, losses: Tensor, start: Tensor) -> Tensor:
        """losses: [K, R, P], start: [R, P] -> [R, P]."""
        return torch.log(torch.cat([losses[:1], losses]) / (start + 1e-6) + 1e-6).mean(0)


class SmallSegments(Segments):
    """Segments of a few thousand parameters: sums and expansions are matrix products, one call each.

    Values must be finite. Mean squares are zero in a whole tensor or nowhere: before the first step, and never after it
    if ms_eps > 0.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device | str = "cpu") -> None:
        super().__init__(sizes, device)
        self._first = torch.tensor([begin for begin, _ in self.bounds], device=device)
        owner = torch.repeat_interleave(torch.arange(len(self), device=device), self.lengths)
        self._member = torch.nn.functional.one_hot(owner, len(self)).float()  # [n, T]

    def sum(self, values: Tensor) -> Tensor:
        return values @ self._member.to(values.dtype)

    def expand(self, values: Tensor) -> Tensor:
        return values @ self._member.mT.to(values.dtype)

    def any_nonzero(self, values: Tensor) -> Tensor:
        return values.detach()[..., self._first] != 0


class Mix:
    """P tasks side by side.

    Args:
        tasks: the tasks.
        config: the optimizer's architecture.
        device: where its worlds are.
    """

    def __init__(self, tasks: Sequence[Task], config: HRNNConfig, device: torch.device | str = "cpu") -> None:
        if not tasks:
            raise ValueError("a mix needs at least one task")
        self.tasks, self.config, self.device = tuple(tasks), config, torch.device(device)
        sizes = [size for task in self.tasks for size in task.sizes]
        kind = SmallSegments if config.ms_eps > 0 else Segments
        self.segments = kind(sizes, self.device)  # n parameters of T tensors
        self.problems = SmallSegments([sum(task.sizes) for task in self.tasks], self.device)  # n parameters of P tasks
        self.tensors = SmallSegments([len(task.shapes) for task in self.tasks], self.device)  # T tensors of P tasks
        self.weights = torch.tensor([task.weight for task in self.tasks], device=self.device)
        self.weights /= self.weights.sum()
        self._last = self.tensors.lengths.cumsum(0) - 1
        levels = config.level_sizes
        if config.levels > 1:
            levels = (config.hidden_size, config.tensor_size + config.global_size)
        self._advance_config = dataclasses.replace(config, level_sizes=levels)
        self._numel = self.segments.lengths.to(torch.get_default_dtype())
        self.advance = choose_advance(self.device)

    def __len__(self) -> int:
        return len(self.tasks)

    def advance_meta(self, meta: Meta) -> Meta:
        """Meta-parameters for the per-parameter stage: one level above it, tensor and global states side by side."""
        if self.config.levels < 3:
            return meta
        joined = dict(meta)
        joined["level0.from_level1.weight"] = torch.cat(
            [meta["level0.from_level1.weight"], meta["level0.from_level2.weight"]], -2
        )
        joined["level0.from_level1.bias"] = meta["level0.from_level1.bias"] + meta["level0.from_level2.bias"]
        return joined

    def step(
        self, meta: Meta, joined: Meta, theta: Tensor, grad: Tensor, state: FlatState
    ) -> tuple[Tensor, Tensor, FlatState]:
        """One step of all rows: what `reference.step` would do to each task alone.

        Args:
            meta: meta-parameters, with a leading [R] if every row has its own. joined: `advance_meta` of them.
            theta: [R, n]. grad: [R, n].
            state: global_hidden [R, P, H2], the rest as in `reference`.

        Returns:
            New theta and the point of the next gradient, [R, n] each, and the new state.
        """
        config, columns = self.config, sums_columns(self.config)
        tensor_hidden, global_hidden = state.tensor_hidden, state.global_hidden
        spread = None if global_hidden is None else self.tensors.expand(global_hidden.mT).mT
        view = state._replace(
            global_hidden=None,
            tensor_hidden=tensor_hidden
            if spread is None or tensor_hidden is None
            else torch.cat([tensor_hidden, spread], -1),
        )
        relative_to = self._relative_to(state.log_lr_mean)
        new = self.advance(joined, self._advance_config, self.segments, grad, view, relative_to)
        means = new.sums / self._numel.to(new.sums.dtype)[:, None]
        if tensor_hidden is not None:
            injected = None if spread is None else affine(meta, "level1.from_level2", spread)
            tensor_hidden = gru(
                meta, "level1", means[..., : config.tensor_input_size], tensor_hidden, injected, columns=False
            )
            if global_hidden is not None:
                inputs = (
                    self.tensors.mean(tensor_hidden.mT).mT
                    if config.global_input == "mean"
                    else tensor_hidden[..., self._last, :]
                )
                global_hidden = gru(meta, "level2", inputs, global_hidden, None, columns=False)
        damping = state.damping
        if damping is not None:
            assert columns.grad is not None
            damping = damp(config, damping, means[..., columns.grad])
        of_squares = (columns.direction, columns.attention)
        scales = [self._scale(means[..., column], damping) for column in of_squares if column is not None]
        moved = attended = theta - self.segments.expand(scales[0]) * new.update
        if new.attention_update is not None:
            attended = theta - self.segments.expand(scales[1]) * new.attention_update
        distance = state.distance
        if distance is not None:
            distance = travel(distance, scales[0][..., None] * self.segments.sample(new.update))
        log_lr_mean = means[..., columns.log_lr] if config.dynamic_output_scale else None
        summary = Summary(tensor_hidden, global_hidden, log_lr_mean, damping, distance, torch.stack(scales, -1))
        return moved, attended, state.after(new, read_decays(meta, config, new.hidden), summary, self.segments)

    def _scale(self, square: Tensor, damping: Tensor | None) -> Tensor:
        """[R, T] mean square of the direction, [R, T, 3] -> [R, T], what an update is multiplied with."""
        if not self.config.dynamic_output_scale:
            return torch.ones_like(square)
        scale = 1 / torch.sqrt(square + DIRECTION_EPS)
        return scale if damping is None else scale * damping[..., FACTOR]

    def _relative_to(self, log_lr_mean: Tensor | None) -> Tensor | None:
        """[R, T] -> [R, T], what each tensor's log lr is measured from."""
        if log_lr_mean is None or self.config.relative_log_lr != "problem":
            return log_lr_mean
        numel = self._numel.to(log_lr_mean.dtype)
        return self.tensors.expand(self.tensors.sum(log_lr_mean * numel) / self.tensors.sum(numel))

    def evaluate(self, theta: Tensor, batches: Sequence[Data], *, create_graph: bool) -> tuple[Tensor, Tensor]:
        """Losses [R, P] and their gradients [R, n], clean.

        create_graph: both are differentiable functions of theta; otherwise neither is.
        """
        rows = theta.shape[0]
        shapes = [shape for task in self.tasks for shape in task.shapes]
        if not create_graph:
            theta = theta.detach()
        elif not theta.requires_grad:
            theta = theta.clone().requires_grad_()
        with torch.enable_grad():
            params = [
                part.reshape(rows, *shape)
                for part, shape in zip(theta.split(self.segments.sizes, -1), shapes, strict=True)
            ]
            if not create_graph:
                for param in params:
                    param.requires_grad_()
            losses, begin = [], 0
            for task, batch in zip(self.tasks, batches, strict=True):
                losses.append(task.loss(params[begin : begin + len(task.shapes)], batch))
                begin += len(task.shapes)
            stacked = torch.stack(losses, -1)
            grads = torch.autograd.grad(stacked.sum(), params, create_graph=create_graph)
        grad = torch.cat([part.reshape(rows, -1) for part in grads], -1)
        return (stacked, grad) if create_graph else (stacked.detach(), grad)

    def corrupt(self, grad: Tensor, random: Random) -> Tensor:
        """What the optimizer sees of clean gradients, [R, n]."""
        if all(type(task).corrupt is Task.corrupt for task in self.tasks):
            return grad
        parts, out, begin = grad.split(self.segments.sizes, -1), [], 0
        for task in self.tasks:
            own = [part.reshape(-1, *shape) for part, shape in zip(parts[begin:], task.shapes, strict=False)]
            out += [part.reshape(len(part), -1) for part in task.corrupt(own, random)]
            begin += len(task.shapes)
        return torch.cat(out, -1)


class World:
    """R rows of a mix in the middle of their training.

    Args:
        mix: the tasks.
        rows: R.
        random: everything drawn; its `repeat` must divide R.
        episode: steps a task trains before it restarts.
        augment: what else is drawn at a restart.
        objective: meta-loss.
        full_loss: take the meta-loss on the whole data set, not on the minibatch whose gradient a step uses.
        clock: whether episodes are counted in "steps" or "unrolls".
        staggered: the first episodes are cut short at random, so that the tasks do not restart together.
        group: processes that have such a world each, of R rows too; `random` is of this one's part.
    """

    def __init__(
        self,
        mix: Mix,
        rows: int,
        random: Random,
        episode: Draw,
        augment: Augment,
        objective: Callable[[Tensor, Tensor], Tensor],
        *,
        full_loss: bool = False,
        clock: str = "steps",
        staggered: bool = True,
        group: Group = ALONE,
    ) -> None:
        self.mix, self.rows, self.random, self.episode, self.group = mix, rows, random, episode, group
        self.augment, self.objective, self.full_loss, self.clock = augment, objective, full_loss, clock
        tasks, n = len(mix), mix.segments.total
        config, device = mix.config, mix.device
        self.theta = torch.zeros(rows, n, device=device)  # in the tasks' units
        self.attended = self.theta
        self.scale = torch.ones(rows, n, device=device)  # the optimizer works on theta / scale
        self.loss_scale = torch.ones(rows, tasks, device=device)
        self.start = torch.full((rows, tasks), math.nan, device=device)  # losses at the start of the episodes
        self.data: list[Data] = [None] * tasks
        self.age = [0.0] * tasks
        self.length = [0.0] * tasks  # 0: starts with the next unroll
        self.staggered = staggered  # until the first episodes have begun
        self.restarts = 0  # of the first task
        # Of PES and all processes.
        self.noise: Tensor | None = None  # [R/2, M], of each pair
        self.noise_age = 0  # unrolls
        self.perturbation: Tensor | None = None  # [R/2, P, M], noise added up since the tasks' starts
        self.state = empty_state(config, rows, mix)

    def restart(self, meta: Meta) -> list[int]:
        """Begin new episodes where the old ones are over; returns the tasks. Gradients flow into the initial states."""
        mix, random = self.mix, self.random
        over = [p for p in range(len(mix)) if self.age[p] >= self.length[p]]
        if not over:
            return over
        log_lr = torch.zeros(self.rows, mix.segments.total, device=mix.device)
        self.theta, self.scale = self.theta.clone(), self.scale.clone()
        self.loss_scale, self.start = self.loss_scale.clone(), self.start.clone()
        for p in over:
            task, (begin, end) = mix.tasks[p], mix.problems.bounds[p]
            self.data[p] = task.instance(self.rows, random)
            params = task.start(self.rows, random, self.data[p])
            self.theta[:, begin:end] = torch.cat([param.reshape(self.rows, -1) for param in params], -1)
            self.start[:, p] = math.nan
            self._draw(task, p, log_lr)
            self.age[p] = 0.0
            self.restarts += p == 0
            self.length[p] = self.episode(random) * (random.scalar() if self.staggered else 1.0)
        self.staggered = False
        restarted = torch.tensor([p in over for p in range(len(mix))], device=mix.device)
        self.attended = torch.where(mix.problems.expand(restarted.float()) > 0, self.theta, self.attended)
        self.state = restart_state(meta, mix, self.state, restarted, log_lr)
        return over

    def _draw(self, task: Task, p: int, log_lr: Tensor) -> None:
        """Augmentations of a task's new episode, into `log_lr` [R, n], `scale` and `loss_scale`."""
        random, augment, rows = self.random, self.augment, self.rows
        self.loss_scale[:, p] = random.log_uniform(rows, low=augment.loss_scale[0], high=augment.loss_scale[1])
        begin = self.mix.problems.bounds[p][0]
        of_task = random.log_uniform(rows, 1, low=augment.lr[0], high=augment.lr[1]).log()
        matrices = sum(len(shape) > 1 for shape in task.shapes)
        for size, inputs in zip(task.sizes, task.fan_in, strict=True):
            own = of_task + augment.lr_tensor * random.normal(rows, 1) + augment.lr_param * random.normal(rows, size)
            log_lr[:, begin : begin + size] = own
            scale = random.log_uniform(rows, 1, low=augment.scale[0], high=augment.scale[1])
            shorter = shortening(inputs, matrices, augment.base_fan_in, augment.base_depth)
            self.scale[:, begin : begin + size] = scale * shorter
            begin += size

    def unroll(self, meta: Meta, steps: int, *, derivatives: int) -> Tensor:
        """Train all rows for some steps from the world's state, which is left at the end of them, detached.

        Args:
            meta: meta-parameters, with a leading [R] if every row has its own.
            steps: K.
            derivatives: 0: the result has no gradient; 1: its gradient leaves out how the tasks' gradients change with
                the parameters; 2: complete.

        Returns:
            Meta-loss of each row and task, [R, P].
        """
        mix, random = self.mix, self.random
        joined = mix.advance_meta(meta)
        gain = mix.problems.expand(self.loss_scale) * self.scale  # of the gradient the optimizer sees
        theta, attended, state = self.theta / self.scale, self.attended / self.scale, self.state
        attention = mix.config.attention
        losses = []
        with torch.set_grad_enabled(derivatives > 0):
            for _ in range(steps):
                batches = [
                    task.minibatch(data, self.rows, random) for task, data in zip(mix.tasks, self.data, strict=True)
                ]
                loss, clean = mix.evaluate(attended * self.scale, batches, create_graph=derivatives == 2)
                grad = mix.corrupt(clean, random) * gain
                grad = torch.where(
                    grad.abs() <= GRADIENT_LIMIT, grad, 0.0
                )  # not finite, or so large that its square is not
                if self.full_loss or attention:
                    judged = self.data if self.full_loss else batches
                    loss, clean = mix.evaluate(theta * self.scale, judged, create_graph=derivatives == 2)
                if derivatives == 1:
                    # The value of the loss with its gradient by theta, without the graph of the task.
                    slope = torch.where(clean.abs() <= GRADIENT_LIMIT, clean, 0.0) * self.scale
                    loss = loss + mix.problems.sum(slope * (theta - theta.detach()))
                losses.append(loss)
                theta, attended, state = mix.step(meta, joined, theta, grad, state)
            stacked = torch.stack(losses)
            self.start = torch.where(self.start.isnan(), stacked[0].detach(), self.start)
            value = self.objective(stacked, self.start)
        self.theta, self.attended = theta.detach() * self.scale, attended.detach() * self.scale
        self.state = state.detach()
        self.age = [age + (steps if self.clock == "steps" else 1) for age in self.age]
        return value

    def copy_first_half(self) -> None:
        """Make the second member of every antithetic pair what the first one is."""

        def copied(values: Tensor | None) -> Tensor | None:
            return None if values is None else torch.cat([values[: self.rows // 2]] * 2)

        self.theta, self.attended = (
            self.theta[: self.rows // 2].repeat(2, 1),
            self.attended[: self.rows // 2].repeat(2, 1),
        )
        self.state = FlatState(*(copied(values) for values in self.state))  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes."""
        names = (
            "theta",
            "attended",
            "scale",
            "loss_scale",
            "start",
            "data",
            "age",
            "length",
            "staggered",
            "restarts",
            "noise",
            "noise_age",
            "perturbation",
        )
        return {name: getattr(self, name) for name in names} | {"state": self.state._asdict()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`, into a world of the same mix and rows."""
        for name, value in saved.items():
            setattr(self, name, FlatState(**value) if name == "state" else value)


def empty_state(config: HRNNConfig, rows: int, mix: Mix) -> FlatState:
    """A state of zeros, to be filled by `restart_state`."""
    n, tensors = mix.segments.total, len(mix.segments)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(rows, *shape, device=mix.device)

    dynamic = config.dynamic_output_scale
    return FlatState(
        hidden=zeros(config.hidden_size, n),
        accum=zeros(config.timescales, n),
        ms=zeros(config.timescales, n),
        grad_decay=zeros(n),
        scale_decay=zeros(n),
        step=zeros(tensors),
        log_lr=zeros(n) if dynamic else None,
        log_lr_mean=zeros(tensors) if dynamic else None,
        tensor_hidden=zeros(tensors, config.tensor_size) if config.levels >= 2 else None,
        global_hidden=zeros(len(mix), config.global_size) if config.levels >= 3 else None,
        damping=zeros(tensors, len(UNDAMPED)) if config.damping else None,
        distance=zeros(tensors, 1 + SAMPLES) if config.log_lr_min_distance else None,
    )


def restart_state(meta: Meta, mix: Mix, state: FlatState, restarted: Tensor, log_lr: Tensor) -> FlatState:
    """The state with that of some tasks as before their first step; gradients flow into the initial hidden states.

    Args:
        meta: meta-parameters, with a leading [R] if every row has its own.
        restarted: [P], bool. log_lr: [R, n], their initial log learning rates; other tasks' values are ignored.
    """
    of_param = mix.problems.expand(restarted.float()) > 0  # [n]
    of_tensor = mix.tensors.expand(restarted.float()) > 0  # [T]

    def zero(old: Tensor) -> Tensor:
        return torch.where(of_param, 0.0, old)

    return FlatState(
        hidden=torch.where(of_param, meta["level0.init"][..., None], state.hidden),
        accum=zero(state.accum),
        ms=zero(state.ms),
        grad_decay=zero(state.grad_decay),
        scale_decay=zero(state.scale_decay),
        step=torch.where(of_tensor, 0.0, state.step),
        log_lr=None if state.log_lr is None else torch.where(of_param, log_lr, state.log_lr),
        log_lr_mean=None
        if state.log_lr_mean is None
        else torch.where(of_tensor, mix.segments.mean(log_lr), state.log_lr_mean),
        tensor_hidden=None
        if state.tensor_hidden is None
        else torch.where(of_tensor[:, None], meta["level1.init"][..., None, :], state.tensor_hidden),
        global_hidden=None
        if state.global_hidden is None
        else torch.where(restarted[:, None], meta["level2.init"][..., None, :], state.global_hidden),
        damping=None
        if state.damping is None
        else torch.where(of_tensor[:, None], state.damping.new_tensor(UNDAMPED), state.damping),
        distance=None if state.distance is None else torch.where(of_tensor[:, None], 0.0, state.distance),
    )
