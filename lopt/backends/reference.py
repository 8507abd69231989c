"""The update rule in PyTorch: the definition of what is right, and the differentiable form for meta-training.

First half: the rule as functions of flat tensors. One call advances all tensors of a model, laid one behind the other
in a vector of n parameters; `Segments` says where each begins. Shapes carry leading batch dimensions `*B` throughout:
many independent models advance in lock-step, and meta-parameters may have them too (one optimizer per model).
Everything is differentiable, twice where the gradients fed in are. Letters and order are those of Wichrowska et al.
2017, section 3, and of its published code.

Second half: the three stages over lists of parameter tensors that every backend has, on top of the same functions.

Checked by tests/backends/test_reference.py against recordings of the original code.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lopt import compact
from lopt.config import (
    DIRECTION_EPS,
    EXTREME_LOG_LR,
    FIXED_GRAD_DECAY,
    FIXED_SCALE_DECAY,
    GRADIENT_LIMIT,
    SEEN,
    SHORTCUT_LOG_LR,
    HRNNConfig,
)
from lopt.metaparams import MetaParams
from lopt.state import FACTOR, SAMPLES, TOTAL, UNDAMPED, sampled, strides

STATE_FORMATS = ("float32", "compact")

Meta = Mapping[str, Tensor]


class Segments:
    """The tensors of a model as consecutive segments of one vector.

    Args:
        sizes: number of parameters of each tensor, at least one each.
        device: where the vectors live.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device | str = "cpu") -> None:
        if not sizes or min(sizes) < 1:
            raise ValueError(f"segment sizes must be positive, got {list(sizes)}")
        self.sizes = tuple(sizes)
        self.total = sum(self.sizes)
        self.bounds = tuple(itertools.pairwise([0, *itertools.accumulate(self.sizes)]))
        self.lengths = torch.tensor(self.sizes, device=device)

    def __len__(self) -> int:
        return len(self.sizes)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over each tensor: [..., n] -> [..., T]."""
        return _SegmentSum.apply(values, self)

    def expand(self, values: Tensor) -> Tensor:
        """Repeat each tensor's value for its parameters: [..., T] -> [..., n]."""
        return _SegmentExpand.apply(values, self)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over each tensor: [..., n] -> [..., T]."""
        return self.sum(values) / self.lengths

    def sample(self, values: Tensor) -> Tensor:
        """Those of `lopt.state.sampled` parameters: [..., n] -> [..., T, SAMPLES]; no gradient."""
        return values.detach()[..., self.places]

    @functools.cached_property
    def places(self) -> Tensor:
        """Where `lopt.state.sampled` parameters stand: [T, SAMPLES]."""
        places = [begin + sampled((size,))[:, 0] for size, (begin, _) in zip(self.sizes, self.bounds, strict=True)]
        return torch.from_numpy(np.stack(places)).to(self.lengths.device)

    def any_nonzero(self, values: Tensor) -> Tensor:
        """Whether a tensor has a non-zero value: [..., n] -> [..., T], bool; no gradient."""
        return self.sum((values.detach() != 0).to(values.dtype)) > 0


class _SegmentSum(torch.autograd.Function):
    """Sum and expand are each other's transpose, so their derivatives of every order are these two again."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, segments: Segments) -> Tensor:
        ctx.segments = segments
        out = values.new_empty(*values.shape[:-1], len(segments))
        for index, (begin, end) in enumerate(segments.bounds):
            torch.sum(values[..., begin:end], -1, out=out[..., index])
        return out

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        return _SegmentExpand.apply(cotangents[0], ctx.segments), None


class _SegmentExpand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, segments: Segments) -> Tensor:
        ctx.segments = segments
        return torch.repeat_interleave(values, segments.lengths, dim=-1, output_size=segments.total)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        return _SegmentSum.apply(cotangents[0], ctx.segments), None


class FlatState(NamedTuple):
    """State of a model whose T tensors are n parameters in one vector; leading batch dimensions `*B`."""

    hidden: Tensor  # [*B, H0, n]
    accum: Tensor  # [*B, S, n] moving averages of the gradient
    ms: Tensor  # [*B, S, n] moving averages of accum^2
    grad_decay: Tensor  # [*B, n] decay of the shortest average in the next step
    scale_decay: Tensor  # [*B, n] decay of the mean squares in the next step
    step: Tensor  # [*B, T] steps taken
    log_lr: Tensor | None  # [*B, n] natural log of the learning rate
    log_lr_mean: Tensor | None  # [*B, T]
    tensor_hidden: Tensor | None  # [*B, T, H1]
    global_hidden: Tensor | None  # [*B, H2]
    damping: Tensor | None  # [*B, T, 3] of the gradient: moving sum of mean squares, of their weights; factor of rises
    # [*B, T, 1 + SAMPLES] the largest distance from the start; how far some parameters are; where the bound follows it
    distance: Tensor | None

    def detach(self) -> FlatState:
        """The same numbers, cut from the graph: what truncation between unrolls does."""
        return FlatState(*(value if value is None else value.detach() for value in self))  # type: ignore[arg-type]

    def after(self, new: Advanced, decays: tuple[Tensor, Tensor], summary: Summary, segments: Segments) -> FlatState:
        """The state after one more step; `decays` are those read out of the new hidden state."""
        if summary.damping is not None:
            seen = segments.expand(has_seen(summary.damping).to(decays[0].dtype))
            decays = seen * decays[0], seen * decays[1]
        return FlatState(
            hidden=new.hidden,
            accum=new.accum,
            ms=new.ms,
            grad_decay=decays[0],
            scale_decay=decays[1],
            step=self.step + 1,
            log_lr=new.log_lr,
            log_lr_mean=summary.log_lr_mean,
            tensor_hidden=summary.tensor_hidden,
            global_hidden=summary.global_hidden,
            damping=summary.damping,
            distance=summary.distance,
        )


@dataclasses.dataclass(frozen=True)
class Sums:
    """Columns of the per-tensor sums table, [*B, T, K]."""

    hidden: slice
    features: slice
    direction: int
    log_lr: int
    attention: int | None
    grad: int | None
    count: int


def sums_columns(config: HRNNConfig) -> Sums:
    """Where each sum stands: hidden, features, direction^2, log lr, attention direction^2, with damping gradient^2."""
    h0, d = config.hidden_size, config.num_features
    attention = h0 + d + 2 if config.attention else None
    count = h0 + d + (3 if config.attention else 2)  # torch.compile before PyTorch 2.12 cannot add bools
    grad = count if config.damping else None
    return Sums(
        slice(0, h0), slice(h0, h0 + d), h0 + d, h0 + d + 1, attention, grad, count + (1 if config.damping else 0)
    )


def init_flat_state(meta: Meta, config: HRNNConfig, segments: Segments, log_lr: Tensor) -> FlatState:
    """State before the first step; gradients flow into the initial hidden states.

    Args:
        meta: meta-parameters.
        config: their architecture.
        segments: the model's tensors.
        log_lr: [*B, n] initial log learning rates; their dtype and device are the state's.
    """
    batch, n, tensors = log_lr.shape[:-1], segments.total, len(segments)
    zeros = log_lr.new_zeros(*batch, config.timescales, n)
    return FlatState(
        hidden=meta["level0.init"][..., None].expand(*batch, config.hidden_size, n),
        accum=zeros,
        ms=zeros,
        grad_decay=zeros[..., 0, :],
        scale_decay=zeros[..., 0, :],
        step=log_lr.new_zeros(*batch, tensors),
        log_lr=log_lr if config.dynamic_output_scale else None,
        log_lr_mean=segments.mean(log_lr) if config.dynamic_output_scale else None,
        tensor_hidden=_level_init(meta, 1, (*batch, tensors, config.tensor_size)) if config.levels >= 2 else None,
        global_hidden=_level_init(meta, 2, (*batch, config.global_size)) if config.levels >= 3 else None,
        damping=log_lr.new_tensor(UNDAMPED).expand(*batch, tensors, -1) if config.damping else None,
        distance=log_lr.new_zeros(*batch, tensors, 1 + SAMPLES) if config.log_lr_min_distance else None,
    )


def _level_init(meta: Meta, level: int, shape: tuple[int, ...]) -> Tensor:
    init = meta[f"level{level}.init"]
    return (init[..., None, :] if level == 1 else init).expand(shape)


def affine(meta: Meta, name: str, rows: Tensor) -> Tensor:
    """[*B, m, in] -> [*B, m, out]."""
    return rows @ meta[f"{name}.weight"] + meta[f"{name}.bias"][..., None, :]


def _dot(weight: Tensor, columns: Tensor) -> Tensor:
    """[*B, f], [*B, f, n] -> [*B, n]."""
    return (weight[..., None, :] @ columns)[..., 0, :]


def gru(meta: Meta, name: str, x: Tensor, h: Tensor, injected: Tensor | None, *, columns: bool) -> Tensor:
    """GRU whose reset gate multiplies the state before the matrix product; the update gate keeps the old state.

    Args:
        x, h: inputs and state; [*B, in, n] and [*B, H, n] with `columns`, otherwise [*B, m, in] and [*B, m, H].
        injected: what higher levels add to reset gate, update gate and candidate; 3H wide, broadcastable, or None.
    """
    axis = -2 if columns else -1
    size = h.shape[axis]

    def product(part: str, state: Tensor) -> Tensor:
        of_x, of_state = meta[f"{name}.{part}.weight"].split([x.shape[axis], size], -2)
        bias = meta[f"{name}.{part}.bias"]
        if columns:
            return of_x.mT @ x + of_state.mT @ state + bias[..., None]
        return x @ of_x + state @ of_state + bias[..., None, :]

    gates = product("gates", h)
    if injected is not None:
        gates = gates + injected.narrow(axis, 0, 2 * size)
    reset, update = torch.sigmoid(gates).chunk(2, axis)
    candidate = product("candidate", reset * h)
    if injected is not None:
        candidate = candidate + injected.narrow(axis, 2 * size, size)
    return torch.lerp(torch.tanh(candidate), h, update)


def _decay_ladder(decay: Tensor, timescales: int) -> Tensor:
    """[*B, n] -> [*B, S, n]."""
    ladder = [decay]
    for _ in range(timescales - 1):
        ladder.append(torch.sqrt(ladder[-1]))  # each timescale is twice the one before
    return torch.stack(ladder, -2)


def read_decays(meta: Meta, config: HRNNConfig, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Decays for the step after the one that left `hidden`: [*B, H0, n] -> grad_decay, scale_decay, [*B, n] each."""

    def read(name: str, learned: bool, fixed: float) -> Tensor:
        if not learned:
            return torch.full_like(hidden[..., 0, :], fixed)
        return torch.sigmoid(_dot(meta[f"{name}.weight"], hidden) + meta[f"{name}.bias"][..., None])

    return (
        read("grad_decay", config.reads_grad_decay, FIXED_GRAD_DECAY),
        read("scale_decay", config.learnable_decay, FIXED_SCALE_DECAY),
    )


def injected_bias(meta: Meta, tensor_hidden: Tensor | None, global_hidden: Tensor | None) -> Tensor | None:
    """What the tensor and global states add to each tensor's parameter GRU: [*B, T, 3*H0], or None with one level."""
    if tensor_hidden is None:
        return None
    injected = affine(meta, "level0.from_level1", tensor_hidden)
    if global_hidden is not None:
        injected = injected + affine(meta, "level0.from_level2", global_hidden[..., None, :])
    return injected


def mean_log_lr(config: HRNNConfig, log_lr_mean: Tensor, numel: Tensor) -> Tensor:
    """What each tensor's log lr is taken relative to: [*B, T] -> [*B, T]."""
    if config.relative_log_lr == "problem":
        problem = (log_lr_mean * numel).sum(-1, keepdim=True) / numel.sum()
        return problem.expand_as(log_lr_mean)
    return log_lr_mean


def log_lr_bounds(
    config: HRNNConfig, step: Tensor, distance: Tensor | None, log_lr_mean: Tensor
) -> tuple[Tensor, Tensor]:
    """Lower and upper bound of the log lr of each tensor's parameters, [*B, T] each.

    Args:
        step: [*B, T] steps taken.
        distance: [*B, T, 1 + SAMPLES]; None will do where the lower bound does not follow it.
        log_lr_mean: [*B, T] before the step.
    """
    lowest = torch.full_like(step, config.log_lr_min)
    if config.log_lr_min_steps:
        lowest = lowest - torch.log1p(step / config.log_lr_min_steps) / 2
    if config.log_lr_min_distance:
        assert distance is not None
        largest = distance[..., 0].clamp(max=config.log_lr_min_distance_limit or math.inf)
        lowest = torch.maximum(lowest, torch.log(config.log_lr_min_distance * largest) - torch.log1p(step) / 2)
    if not config.log_lr_max_ratio:
        return lowest, torch.full_like(step, config.log_lr_max)
    highest = torch.maximum(log_lr_mean + math.log(config.log_lr_max_ratio), lowest)
    return lowest, highest.clamp(max=config.log_lr_max)


def scaled_gradients(
    config: HRNNConfig,
    segments: Segments,
    grad: Tensor,
    accum: Tensor,
    ms: Tensor,
    grad_decay: Tensor,
    scale_decay: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient averages over the timescales, their mean squares, and the averages in units of their root mean square.

    Args:
        grad: [*B, n]. accum, ms: [*B, S, n]. grad_decay, scale_decay: [*B, n].

    Returns:
        New accum, new ms and the scaled averages, compressed by asinh, [*B, S, n] each.
    """
    s = config.timescales
    if s > 1:
        decay = _decay_ladder(grad_decay, s)
        accum = (1 - decay) * grad[..., None, :] + decay * accum
    else:
        accum = grad[..., None, :]
    if config.multiple_scale_decays and s > 1:
        decay = _decay_ladder(scale_decay, s)
    else:
        decay = scale_decay[..., None, :]
    # A timescale whose mean squares are zero throughout a tensor has no past to average with.
    decay = decay * segments.expand(segments.any_nonzero(ms).to(ms.dtype))
    ms = (1 - decay) * (accum.square() + config.ms_eps) + decay * ms
    return accum, ms, torch.asinh(accum / torch.sqrt(ms + config.rms_eps))


def features(
    config: HRNNConfig,
    segments: Segments,
    scaled: Tensor,
    ms: Tensor,
    log_lr: Tensor | None,
    relative_to: Tensor | None,
) -> Tensor:
    """Inputs of the parameter GRU in the order of `config.features`: [*B, D, n].

    Args:
        scaled, ms: [*B, S, n]. log_lr: [*B, n]. relative_to: [*B, T], what each tensor's log lr is measured from.
    """
    columns = [scaled]
    if config.gradient_products:
        columns.append(scaled[..., :-1, :] * scaled[..., 1:, :])
    if config.log_ms_features:
        log_ms = torch.log(ms + config.rms_eps)
        columns.append(log_ms - log_ms.mean(-2, keepdim=True))
    if config.relative_log_lr:
        assert log_lr is not None and relative_to is not None
        columns.append((log_lr - segments.expand(relative_to))[..., None, :])
    if config.extreme_indicator:
        assert log_lr is not None
        columns.append((torch.relu(log_lr) - torch.relu(EXTREME_LOG_LR - log_lr))[..., None, :])
    if config.lr_shortcut:
        assert log_lr is not None
        columns.append((log_lr - SHORTCUT_LOG_LR)[..., None, :])
    return torch.cat(columns, -2)


class Advanced(NamedTuple):
    """What `advance_flat` returns: the new per-parameter state, the un-normalised updates and the per-tensor sums."""

    hidden: Tensor  # [*B, H0, n]
    accum: Tensor  # [*B, S, n]
    ms: Tensor  # [*B, S, n]
    log_lr: Tensor | None  # [*B, n]
    update: Tensor  # [*B, n] exp(log step) * direction
    attention_update: Tensor | None  # [*B, n]
    sums: Tensor  # [*B, T, K], columns: sums_columns


def advance_flat(
    meta: Meta,
    config: HRNNConfig,
    segments: Segments,
    grad: Tensor,
    state: FlatState,
    relative_to: Tensor | None = None,
) -> Advanced:
    """Per parameter: features, parameter GRU, read-outs; per tensor: sums. Uses the old tensor and global states.

    Args:
        meta: meta-parameters. config: their architecture. segments: the model's tensors.
        grad: [*B, n] gradient, any scale.
        state: before the step.
        relative_to: [*B, T] what each tensor's log lr is taken relative to, see `mean_log_lr`; None: that of the
            segments, if they are whole tensors of one problem.
    """
    accum, ms, scaled = scaled_gradients(
        config, segments, grad, state.accum, state.ms, state.grad_decay, state.scale_decay
    )
    if relative_to is None and state.log_lr_mean is not None:
        relative_to = mean_log_lr(config, state.log_lr_mean, segments.lengths)
    x = features(config, segments, scaled, ms, state.log_lr, relative_to)
    injected = injected_bias(meta, state.tensor_hidden, state.global_hidden)
    hidden = gru(
        meta, "level0", x, state.hidden, injected if injected is None else segments.expand(injected.mT), columns=True
    )

    def direction(name: str) -> Tensor:
        value = _dot(meta[f"{name}.weight"], hidden)
        return value + _dot(meta[f"{name}.shortcut"], scaled) if config.gradient_shortcut else value

    log_lr, zeros = state.log_lr, torch.zeros_like(grad)
    update = direction("direction")
    attention_update = direction("attention") if config.attention else None
    squares = [update.square()] + ([attention_update.square()] if attention_update is not None else [])
    if log_lr is not None:
        log_step = log_lr + _dot(meta["log_lr.weight"], hidden) + meta["log_lr.bias"][..., None]
        # The value is clipped, the gradient passes as if it were not.
        assert state.log_lr_mean is not None
        bounds = log_lr_bounds(config, state.step, state.distance, state.log_lr_mean)
        clipped = log_step.clamp(*map(segments.expand, bounds))
        log_step = log_step + (clipped - log_step).detach()
        momentum = torch.sigmoid(meta["log_lr.momentum"])[..., None]
        if state.damping is not None:
            rising = momentum + (1 - segments.expand(state.damping[..., FACTOR])) * (1 - momentum)
            momentum = torch.where(log_step > log_lr, rising, momentum)
        log_lr = momentum * log_lr + (1 - momentum) * log_step
        update = torch.exp(log_step + meta["log_step.offset"][..., None]) * update
        if attention_update is not None:
            attention_update = torch.exp(log_step) * attention_update
    if config.damping:  # what has had no gradient up to now stays
        moves = (scaled.detach().abs().amax(-2) * SEEN).clamp(max=1.0)
        update = moves * update
        attention_update = None if attention_update is None else moves * attention_update
    rows = [hidden, x, squares[0][..., None, :], (zeros if log_lr is None else log_lr)[..., None, :]]
    rows += [square[..., None, :] for square in squares[1:]]
    rows += [grad.square()[..., None, :]] if config.damping else []
    sums = segments.sum(torch.cat(rows, -2)).mT
    return Advanced(hidden, accum, ms, log_lr, update, attention_update, sums)


class Summary(NamedTuple):
    """What `summarise_flat` returns: the new per-tensor and global state, and the factors of the updates."""

    tensor_hidden: Tensor | None  # [*B, T, H1]
    global_hidden: Tensor | None  # [*B, H2]
    log_lr_mean: Tensor | None  # [*B, T]
    damping: Tensor | None  # [*B, T, 3]
    distance: Tensor | None  # [*B, T, 1 + SAMPLES]
    scale: Tensor  # [*B, T, 1], with attention [*B, T, 2]: 1 / root mean square of the direction, damped


def travel(distance: Tensor, moves: Tensor) -> Tensor:
    """How far tensors have come after one more step.

    Args:
        distance: [*B, T, 1 + SAMPLES] the largest distance so far, root mean square; how far each sampled parameter is.
            Steps are counted by `share_taken`, and as if no weight decayed.
        moves: [*B, T, SAMPLES] of the sampled parameters in this step.

    Returns:
        The same after it. No gradient flows through it: a bound is none that a step length is tuned by.
    """
    away = (distance[..., 1:] + moves).detach()
    largest = torch.maximum(distance[..., 0], away.square().mean(-1).sqrt())
    return torch.cat([largest[..., None], away], -1)


def damp(config: HRNNConfig, damping: Tensor, square: Tensor) -> Tensor:
    """Compare gradients with those before.

    Args:
        damping: [*B, T, 3] before the step. square: [*B, T] mean square of each tensor's gradient.

    Returns:
        [*B, T, 3]: moving sum of the mean squares, moving sum of their weights, factor of the tensor's steps.
    """
    decay, square = config.damping_decay, square.clamp(max=GRADIENT_LIMIT**2)
    total = decay * damping[..., 0] + (1 - decay) * square
    weight = decay * damping[..., 1] + (1 - decay)
    some = square > 0  # the root's slope at 0 is infinite
    ratio = torch.where(some, square, 1.0) / torch.where(some, total, 1.0) * weight
    factor = (torch.sqrt(ratio) / config.damping).clamp(max=1.0)
    return torch.stack([total, weight, torch.where(some, factor, 0.0)], -1)


def share_taken(lr: Tensor) -> Tensor:
    """The share of a learned step that is taken, as far as learned rates have to know: of any shape, 0 to 1.

    Where little of it is, gradients go on agreeing, which looks as if steps were too short. Half of it shows well
    enough what the whole would do.
    """
    return (2 * lr).clamp(0.0, 1.0)


def has_seen(damping: Tensor) -> Tensor:
    """Whether a tensor has had a gradient but 0, without which there is no past: [*B, T, 3] -> [*B, T], bool."""
    return damping.detach()[..., TOTAL] > 0


def summarise_flat(
    meta: Meta,
    config: HRNNConfig,
    sums: Tensor,
    numel: Tensor,
    tensor_hidden: Tensor | None,
    global_hidden: Tensor | None,
    damping: Tensor | None = None,
    distance: Tensor | None = None,
    sample: Tensor | None = None,
    lr: Tensor | None = None,
) -> Summary:
    """Per tensor: GRU over the means of hidden state and features; once: the global GRU over the tensors' new states.

    Args:
        meta: meta-parameters. config: their architecture.
        sums: [*B, T, K] of `advance_flat`. numel: [T] parameters of each tensor.
        tensor_hidden: [*B, T, H1], global_hidden: [*B, H2], damping: [*B, T, 3], distance: [*B, T, 1 + SAMPLES]; all
            before the step.
        sample: [*B, T, SAMPLES] updates of sampled parameters, where there is a distance.
        lr: [*B, T] factor of the steps; None: 1. The distance grows and, with damping, learned rates rise by
            `share_taken` of it.
    """
    taken = 1.0 if lr is None else share_taken(lr)[..., None]
    columns = sums_columns(config)
    means = sums / numel[:, None]
    if tensor_hidden is not None:
        injected = None
        if global_hidden is not None:
            injected = affine(meta, "level1.from_level2", global_hidden[..., None, :])
        inputs = means[..., : config.tensor_input_size]
        tensor_hidden = gru(meta, "level1", inputs, tensor_hidden, injected, columns=False)
    if global_hidden is not None:
        assert tensor_hidden is not None
        inputs = tensor_hidden.mean(-2) if config.global_input == "mean" else tensor_hidden[..., -1, :]
        global_hidden = gru(meta, "level2", inputs[..., None, :], global_hidden[..., None, :], None, columns=False)[
            ..., 0, :
        ]
    directions = [columns.direction] + ([columns.attention] if columns.attention is not None else [])
    squares = torch.stack([means[..., column] for column in directions], -1)
    dynamic = config.dynamic_output_scale
    scale = 1 / torch.sqrt(squares + DIRECTION_EPS) if dynamic else torch.ones_like(squares)
    if damping is not None:
        assert columns.grad is not None
        damping = damp(config, damping, means[..., columns.grad])
        scale = scale * damping[..., FACTOR, None]
        damping = torch.cat([damping[..., :FACTOR], taken * damping[..., FACTOR:]], -1)
    if distance is not None:
        assert sample is not None
        distance = travel(distance, taken * scale[..., :1] * sample)
    log_lr_mean = means[..., columns.log_lr] if dynamic else None
    return Summary(tensor_hidden, global_hidden, log_lr_mean, damping, distance, scale)


def step(
    meta: Meta, config: HRNNConfig, segments: Segments, param: Tensor, grad: Tensor, state: FlatState
) -> tuple[Tensor, Tensor, FlatState]:
    """One whole step as a function.

    Args:
        meta: meta-parameters, optionally with leading batch dimensions. config: their architecture.
        segments: the model's tensors.
        param: [*B, n] parameters. grad: [*B, n] gradient. state: before the step.

    Returns:
        The new parameters [*B, n]; the point at which to take the next gradient [*B, n], the parameters themselves
        without attention; the new state.
    """
    new = advance_flat(meta, config, segments, grad, state)
    summary = summarise_flat(
        meta,
        config,
        new.sums,
        segments.lengths,
        state.tensor_hidden,
        state.global_hidden,
        state.damping,
        state.distance,
        None if state.distance is None else segments.sample(new.update),
    )
    factor = segments.expand(summary.scale.mT)
    moved = param - factor[..., 0, :] * new.update
    attended = moved if new.attention_update is None else param - factor[..., 1, :] * new.attention_update
    return moved, attended, state.after(new, read_decays(meta, config, new.hidden), summary, segments)


def unusable() -> str | None:
    """Why this backend cannot run on this machine; None: it can, everywhere PyTorch does."""
    return None


def unsupported(config: HRNNConfig) -> str | None:
    """Why this backend cannot run a configuration; None: it runs them all."""
    return None


def release(*buffers: Tensor) -> None:
    """Keep no state alive for the sake of a next step with these buffers of the stages; nothing is kept here."""


def _flatten(tensors: Sequence[Tensor], size: int | None) -> Tensor:
    """[size, *shape] each -> [size, n], or [*shape] each -> [n]."""
    if size is None:
        return torch.cat([tensor.reshape(-1) for tensor in tensors])
    return torch.cat([tensor.reshape(size, -1) for tensor in tensors], 1)


def _commit(targets: Sequence[Tensor], flat: Tensor, keep: Tensor) -> None:
    """Write the parts of `flat`, [n] or [size, n], into the tensors they were flattened from, unless `keep` is true."""
    begin = 0
    for target in targets:
        count = target.numel() // (flat.shape[0] if flat.dim() == 2 else 1)
        part = flat[..., begin : begin + count].reshape(target.shape)
        target.copy_(torch.where(keep, target, part))
        begin += count


def _views(buffer: Tensor, tensors: Sequence[Tensor], state: Sequence[Tensor] | None = None) -> list[Tensor]:
    """The parts of [n] as tensors of some shapes, each in the memory order of its state."""
    views, begin = [], 0
    for index, tensor in enumerate(tensors):
        order = strides(tensor, None) if state is None else state[index].stride()[1:]
        views.append(buffer.as_strided(tensor.shape, order, buffer.storage_offset() + begin))
        begin += tensor.numel()
    return views


def _without_autocast(stage: Callable[..., None]) -> Callable[..., None]:
    """A stage whose products are in the dtype of their factors, also where its caller is under autocast."""

    @functools.wraps(stage)
    def run(meta: MetaParams, *args: Any, **kwargs: Any) -> None:
        if not torch.amp.is_autocast_available(meta.device.type):
            return stage(meta, *args, **kwargs)
        with torch.autocast(meta.device.type, enabled=False):
            return stage(meta, *args, **kwargs)

    return run


@torch.no_grad()
@_without_autocast
def advance(
    meta: MetaParams,
    grads: Sequence[Tensor],
    hidden: Sequence[Tensor],
    accum: Sequence[Tensor],
    ms: Sequence[Tensor],
    log_lr: Sequence[Tensor],
    step: Sequence[Tensor],
    tensor_hidden: Sequence[Tensor],
    global_hidden: Tensor,
    log_lr_mean: Sequence[Tensor],
    damping: Sequence[Tensor],
    distance: Sequence[Tensor],
    *,
    numel: Sequence[int],
    maximize: Sequence[bool],
    grad_scale: Tensor | None,
    skip: Tensor,
    update: Tensor,
    attention_update: Tensor | None,
    sums: Tensor,
) -> None:
    """Stage 1, per parameter: features, parameter GRU, read-outs; sums per tensor.

    Args:
        meta: meta-parameters.
        grads: T gradients, any floating dtype and strides; they are not written.
        hidden, accum, ms, log_lr: per-parameter state, updated in place, in either format of lopt/state.py; `log_lr` is
            empty without a learned log lr.
        step, tensor_hidden, global_hidden, log_lr_mean, damping, distance: the other state, before the step; what a
            configuration does not have is empty.
        numel: parameters of each whole tensor.
        maximize: per tensor, whether to climb.
        grad_scale: [] what the gradients were multiplied with, or None.
        skip: [] other than 0: nothing is changed by any stage. Becomes at least 1 at a gradient beyond
            GRADIENT_LIMIT, inf or NaN.
        update, attention_update: [n], written, each tensor in the memory order of its state: exp(log step) * direction;
            attention_update is None without attention.
        sums: [T, K], written: sums over each tensor.
    """
    config, dtype = meta.config, step[0].dtype
    meta = meta.to(dtype=dtype, device=hidden[0].device)
    flat_grad = _flatten([grad.to(dtype) for grad in grads], None)
    if grad_scale is not None:
        flat_grad = flat_grad * grad_scale.to(dtype).reciprocal()
    torch.maximum(skip, (~(flat_grad.abs() <= GRADIENT_LIMIT).all()).to(skip.dtype), out=skip)
    segments = Segments([grad.numel() for grad in grads], hidden[0].device)
    if any(maximize):
        sign = torch.tensor([-1.0 if climb else 1.0 for climb in maximize], dtype=dtype, device=flat_grad.device)
        flat_grad = flat_grad * segments.expand(sign)
    old = {
        "hidden": _flatten(hidden, config.hidden_size),
        "accum": _flatten(accum, config.timescales),
        "ms": _flatten(ms, config.timescales),
    }
    is_compact = hidden[0].dtype == torch.int16
    if is_compact:
        old = compact.decode(old, compact.limit(meta), dtype)
    steps = torch.stack(list(step))
    started = segments.expand((steps > 0) & has_seen(torch.stack(list(damping))) if damping else steps > 0)
    grad_decay, scale_decay = (torch.where(started, decay, 0.0) for decay in read_decays(meta, config, old["hidden"]))
    state = FlatState(
        **old,
        grad_decay=grad_decay,
        scale_decay=scale_decay,
        step=steps,
        log_lr=_flatten(log_lr, None) if log_lr else None,
        log_lr_mean=torch.stack(list(log_lr_mean)) if log_lr else None,
        tensor_hidden=torch.stack(list(tensor_hidden)) if tensor_hidden else None,
        global_hidden=global_hidden if config.levels >= 3 else None,
        damping=torch.stack(list(damping)) if damping else None,
        distance=torch.stack(list(distance)) if distance else None,
    )
    relative_to = None
    if state.log_lr_mean is not None:
        relative_to = mean_log_lr(config, state.log_lr_mean, torch.tensor(numel, device=flat_grad.device))
    new = advance_flat(meta, config, segments, flat_grad, state, relative_to)
    keep = skip != 0
    kept = {"hidden": new.hidden, "accum": new.accum, "ms": new.ms}
    if is_compact:
        kept = compact.encode(kept, compact.limit(meta))
    _commit(hidden, kept["hidden"], keep)
    _commit(accum, kept["accum"], keep)
    _commit(ms, kept["ms"], keep)
    if new.log_lr is not None:
        _commit(log_lr, new.log_lr, keep)
    for buffer, values in ((update, new.update), (attention_update, new.attention_update)):
        if buffer is not None and values is not None:
            for own, part in zip(_views(buffer, grads, hidden), values.split(segments.sizes), strict=True):
                own.copy_(part.view(own.shape))
    sums.copy_(new.sums)


@torch.no_grad()
@_without_autocast
def summarise(
    meta: MetaParams,
    sums: Tensor,
    tensor_hidden: Sequence[Tensor],
    global_hidden: Tensor,
    log_lr_mean: Sequence[Tensor],
    damping: Sequence[Tensor],
    distance: Sequence[Tensor],
    step: Sequence[Tensor],
    *,
    numel: Sequence[int],
    update: Tensor,
    places: Tensor | None,
    lr: Sequence[float | Tensor] | Tensor,
    skip: Tensor,
    scale: Tensor,
) -> None:
    """Stage 2, per tensor and once: tensor GRUs, global GRU, normalisation of the directions, distances.

    Args:
        meta: meta-parameters.
        sums: [T, K] of `advance`.
        tensor_hidden, global_hidden, log_lr_mean, damping, distance, step: updated in place.
        numel: parameters of each whole tensor.
        update: [n] of `advance`. places: [T, SAMPLES] where in it the updates of `lopt.state.sampled` parameters stand;
            None without distances.
        lr: per tensor, as in `summarise_flat`.
        skip: [] other than 0: nothing is changed.
        scale: [T, 1 or 2], written: 1 / root mean square of the (attention) direction, damped.
    """
    config = meta.config
    meta = meta.to(dtype=sums.dtype, device=sums.device)
    summary = summarise_flat(
        meta,
        config,
        sums,
        torch.tensor(numel, device=sums.device),
        torch.stack(list(tensor_hidden)) if tensor_hidden else None,
        global_hidden if config.levels >= 3 else None,
        torch.stack(list(damping)) if damping else None,
        torch.stack(list(distance)) if distance else None,
        None if places is None else update[places],
        torch.stack([rate.to(sums).reshape(()) if isinstance(rate, Tensor) else sums.new_tensor(rate) for rate in lr]),
    )
    keep = skip != 0
    for index, count in enumerate(step):
        if summary.tensor_hidden is not None:
            _commit([tensor_hidden[index]], summary.tensor_hidden[index], keep)
        if summary.log_lr_mean is not None:
            _commit([log_lr_mean[index]], summary.log_lr_mean[index, None], keep)
        if summary.damping is not None:
            _commit([damping[index]], summary.damping[index], keep)
        if summary.distance is not None:
            _commit([distance[index]], summary.distance[index], keep)
        count += (~keep).to(count.dtype)
    if summary.global_hidden is not None:
        _commit([global_hidden], summary.global_hidden, keep)
    scale.copy_(summary.scale)


@torch.no_grad()
def apply(
    meta: MetaParams,
    params: Sequence[Tensor],
    true_param: Sequence[Tensor],
    update: Tensor,
    attention_update: Tensor | None,
    scale: Tensor,
    log_lr_mean: Sequence[Tensor],
    *,
    lr: Sequence[float | Tensor],
    weight_decay: Sequence[float],
    skip: Tensor,
) -> None:
    """Stage 3, per parameter: move, and decay the weights.

    Args:
        meta: meta-parameters.
        params: T parameters, any floating dtype and strides, updated in place.
        true_param: T tensors with attention, where `params` hold the attended point; otherwise empty.
        update, attention_update, scale: of the stages before.
        log_lr_mean: T tensors, after the step; empty without a learned log lr.
        lr: per tensor, factor of the learned step.
        weight_decay: per tensor; each step shrinks it by lr * weight_decay * exp(log_lr_mean), at most to zero.
        skip: [] other than 0: nothing is changed.
    """
    keep = skip != 0
    updates = _views(update, params)
    attention_updates = [] if attention_update is None else _views(attention_update, params)
    for index, param in enumerate(params):
        base = true_param[index] if true_param else param
        old, rate = base.to(torch.promote_types(base.dtype, update.dtype)), lr[index]
        if isinstance(rate, Tensor):
            rate = rate.to(dtype=update.dtype, device=param.device).reshape(())
        decayed = old
        if weight_decay[index]:
            learned = torch.exp(log_lr_mean[index]) if log_lr_mean else torch.ones_like(skip)
            decay = torch.clamp(rate * weight_decay[index] * learned, max=1.0)
            decayed = torch.where(decay > 0, old - old * decay, old)  # an infinite parameter stays so
        moved = decayed - rate * scale[index, 0] * updates[index]
        if attention_updates:
            attended = decayed - rate * scale[index, 1] * attention_updates[index]
            param.copy_(torch.where(keep, param, attended.to(param.dtype)))
        base.copy_(torch.where(keep, base, moved.to(base.dtype)))
