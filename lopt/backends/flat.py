"""The parameter level for meta-training, fused: `reference.advance_flat` with a derivative in kernels.

First order: the gradients that tasks feed in are constants. Autograd keeps the old state and the gradient of a step,
from which its derivative recomputes the rest. What is small, the injected biases and the mean log lr, stays with
PyTorch. Whatever the kernels do not do, `advance_flat` hands to the reference: other configurations and dtypes,
derivatives of second order, and derivatives by meta-parameters that differ from row to row.

A backend is an instance of a subclass of `Kernels`: lopt/backends/cpu_flat.py, lopt/backends/triton_flat.py.
Tests: tests/kernels/test_hrnn_meta.py.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad
from torch.utils.weak import WeakTensorKeyDictionary

from lopt.backends import reference
from lopt.backends.reference import Advanced, FlatState, Meta, Segments
from lopt.config import HRNNConfig
from lopt.state import FACTOR

GATES = ("gates", "candidate")
GATE_COLUMNS = 30
FEATURES_BEFORE_PRODUCTS = 4
PRODUCTS = 3
READ_OUTS = 41


@dataclasses.dataclass(frozen=True)
class Call:
    """What does not change from step to step.

    Attributes:
        batch: the leading dimensions. n: parameters of a row. sizes: of its tensors.
        columns: of the sums, gradients' left out. The others are those of the configuration.
    """

    batch: tuple[int, ...]
    n: int
    sizes: tuple[int, ...]
    products: bool
    attention: bool
    ms_eps: float
    rms_eps: float
    columns: int


class Inputs(NamedTuple):
    """What a step is computed from."""

    weights: Tensor  # [W] or [*B, W], see `Kernels.matrix_row`
    injected: Tensor  # [*B, T, 30] bias plus what higher levels add
    relative_to: Tensor  # [*B, T] mean log lr
    lowest: Tensor  # [*B, T] bounds of the log lr
    highest: Tensor  # [*B, T]
    grad: Tensor  # [*B, n]
    hidden: Tensor  # [*B, 10, n], like those below before the step
    accum: Tensor  # [*B, 4, n]
    ms: Tensor  # [*B, 4, n]
    grad_decay: Tensor  # [*B, n]
    scale_decay: Tensor  # [*B, n]
    log_lr: Tensor  # [*B, n]


STATE = slice(Inputs._fields.index("hidden"), len(Inputs._fields))
DECAYS = slice(Inputs._fields.index("grad_decay"), Inputs._fields.index("log_lr"))


class Cotangents(NamedTuple):
    """Of what `Advanced` holds; None: zero."""

    hidden: Tensor | None
    accum: Tensor | None
    ms: Tensor | None
    log_lr: Tensor | None
    update: Tensor | None
    attention_update: Tensor | None
    sums: Tensor | None


class Kernels:
    """What a backend fills in; all tensors are contiguous, of one dtype and device.

    Attributes:
        matrix_row, read_outs: lengths of the parts of the packed weights, at least 30 and 41, zeros behind. First the
            matrix [22, matrix_row]: rows for features, then hidden state (of the candidates: times the reset gate);
            columns reset, update, candidate. Then direction 10, its shortcut 4, attention 10, its shortcut 4, log lr
            10, its bias, momentum (after the sigmoid) and offset.
    """

    matrix_row = GATE_COLUMNS
    read_outs = READ_OUTS

    def covers(self, config: HRNNConfig, like: Tensor) -> bool:
        """Whether there are kernels for a configuration and tensors like this."""
        raise NotImplementedError

    def forward(self, call: Call, inputs: Inputs) -> Advanced:
        """One step."""
        raise NotImplementedError

    def backward(self, call: Call, inputs: Inputs, cotangents: Cotangents) -> tuple[Tensor | None, ...]:
        """Derivative of `forward`: cotangents of the inputs, None for the bound and the gradient.

        The log lr's clip passes it straight through, the root of a decay of 0 stops it.
        """
        raise NotImplementedError

    def advance_flat(
        self,
        meta: Meta,
        config: HRNNConfig,
        segments: Segments,
        grad: Tensor,
        state: FlatState,
        relative_to: Tensor | None = None,
    ) -> Advanced:
        """Per parameter: features, parameter GRU, read-outs; per tensor: sums. See `reference.advance_flat`."""
        if not self._fused(meta, config, grad, state):
            return reference.advance_flat(meta, config, segments, grad, state, relative_to)
        assert state.log_lr is not None and state.log_lr_mean is not None
        if relative_to is None:
            relative_to = reference.mean_log_lr(config, state.log_lr_mean, segments.lengths)
        lowest, highest = reference.log_lr_bounds(config, state.step, state.distance, state.log_lr_mean)
        bias = torch.cat([meta[f"level0.{part}.bias"] for part in GATES], -1)[..., None, :]
        injected = reference.injected_bias(meta, state.tensor_hidden, state.global_hidden)
        injected = bias if injected is None else bias + injected
        weights = self._pack(meta, config)
        batch = torch.broadcast_shapes(
            grad.shape[:-1],
            state.hidden.shape[:-2],
            state.accum.shape[:-2],
            injected.shape[:-2],
            relative_to.shape[:-1],
            weights.shape[:-1],
        )

        def rows(values: Tensor, *own: int) -> Tensor:
            return values.expand(*batch, *own)

        n, tensors = segments.total, len(segments)
        derived = [_SOURCES.get(decay) for decay in (state.grad_decay, state.scale_decay)]
        reads = [value.detach() for value in _decay_weights(meta, config)]
        if any(source is None or source() is not state.hidden for source in derived) or (
            state.hidden.shape[:-2] != batch
        ):
            reads = []
        columns = reference.sums_columns(config)
        call = Call(
            batch,
            n,
            segments.sizes,
            config.gradient_products,
            config.attention,
            config.ms_eps,
            config.rms_eps,
            columns.count - (columns.grad is not None),
        )
        outputs = _Advance.apply(
            self,
            call,
            reads,
            weights if weights.dim() == 1 else rows(weights, weights.shape[-1]),
            rows(injected, tensors, injected.shape[-1]),
            rows(relative_to, tensors),
            rows(lowest, tensors),
            rows(highest, tensors),
            rows(grad, n),
            rows(state.hidden, config.hidden_size, n),
            rows(state.accum, config.timescales, n),
            rows(state.ms, config.timescales, n),
            rows(state.grad_decay, n),
            rows(state.scale_decay, n),
            rows(state.log_lr, n),
        )
        advanced = Advanced(*outputs)
        return advanced if state.damping is None else _damped(advanced, config, segments, grad, state)

    def _fused(self, meta: Meta, config: HRNNConfig, grad: Tensor, state: FlatState) -> bool:
        """Whether the kernels do it."""
        if not self.covers(config, grad):
            return False
        tensors = [value for value in (*state, *meta.values()) if value is not None]
        if any(tensor.dtype != grad.dtype or tensor.device != grad.device for tensor in tensors):
            return False
        if torch.is_grad_enabled():
            per_row = meta["direction.weight"].dim() > 1
            return not grad.requires_grad and not (per_row and any(value.requires_grad for value in meta.values()))
        return True

    def _pack(self, meta: Meta, config: HRNNConfig) -> Tensor:
        """Level-0 meta-parameters apart from biases: [..., W], see `matrix_row`."""
        matrix = torch.cat([meta[f"level0.{part}.weight"] for part in GATES], -1)
        if not config.gradient_products:
            before, after = matrix.tensor_split([FEATURES_BEFORE_PRODUCTS], -2)
            matrix = torch.cat([before, matrix.new_zeros(*matrix.shape[:-2], PRODUCTS, matrix.shape[-1]), after], -2)
        if self.matrix_row > GATE_COLUMNS:
            matrix = pad(matrix, (0, self.matrix_row - GATE_COLUMNS))
        like = meta["direction.weight"]

        def zeros(count: int) -> Tensor:
            return like.new_zeros(*like.shape[:-1], count)

        def get(name: str, count: int) -> Tensor:
            return meta[name] if name in meta else zeros(count)

        h0, s = config.hidden_size, config.timescales
        scalars = [meta["log_lr.bias"], torch.sigmoid(meta["log_lr.momentum"]), meta["log_step.offset"]]
        return torch.cat(
            [
                matrix.flatten(-2),
                like,
                get("direction.shortcut", s),
                get("attention.weight", h0),
                get("attention.shortcut", s),
                meta["log_lr.weight"],
                torch.stack(scalars, -1),
                zeros(self.read_outs - READ_OUTS),
            ],
            -1,
        )


class _Slowed(torch.autograd.Function):
    """Log lrs [R, n] whose rises are shortened by a factor for each tensor, [R, T].

    Keeps the log lrs before and after, as the steps on both sides do anyway.
    """

    @staticmethod
    def forward(ctx: Any, old: Tensor, new: Tensor, factor: Tensor, segments: Segments) -> Tensor:
        rise = new - old
        slowed = old + torch.minimum(rise, segments.expand(factor) * rise)
        ctx.save_for_backward(old, slowed, factor)
        ctx.segments = segments
        return slowed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        (of_slowed,), (old, slowed, factor), segments = cotangents, ctx.saved_tensors, ctx.segments
        rise = torch.relu(slowed - old)  # times the factor
        of_new = torch.where(rise > 0, segments.expand(factor), 1.0) * of_slowed
        of_factor = segments.sum(rise * of_slowed) / torch.where(factor > 0, factor, torch.inf)
        return of_slowed - of_new, of_new, of_factor, None


def _damped(new: Advanced, config: HRNNConfig, segments: Segments, grad: Tensor, state: FlatState) -> Advanced:
    """What damping changes of a step: log lrs rise slower, what has had no gradient stays, and there is a sum more."""
    assert new.log_lr is not None and state.log_lr is not None and state.damping is not None
    column = reference.sums_columns(config).log_lr
    log_lr = _Slowed.apply(state.log_lr, new.log_lr, state.damping[..., FACTOR], segments)
    own = segments.sum(torch.stack([log_lr, grad.square()], -2)).mT
    sums = torch.cat([new.sums[..., :column], own[..., :1], new.sums[..., column + 1 :], own[..., 1:]], -1)
    seen = (new.accum.detach() != 0).any(-2)
    update = torch.where(seen, new.update, 0.0)
    attention = None if new.attention_update is None else torch.where(seen, new.attention_update, 0.0)
    return new._replace(log_lr=log_lr, update=update, attention_update=attention, sums=sums)


def read_decays(meta: Meta, config: HRNNConfig, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.read_decays`, of which autograd keeps nothing but `hidden` if the kernels made it: [*B, n] each.

    `advance_flat` recognises decays read out of the hidden state it gets with them, and does not keep them either.
    """
    reads = _decay_weights(meta, config)
    fused = hidden.grad_fn is not None and hidden.grad_fn.name() == f"{_Advance.__name__}Backward"
    if not fused or len(reads) < 4 or not torch.is_grad_enabled():
        return reference.read_decays(meta, config, hidden)
    grad_decay, scale_decay = _ReadDecays.apply(hidden, *reads)
    _SOURCES[grad_decay] = _SOURCES[scale_decay] = weakref.ref(hidden)
    return grad_decay, scale_decay


_SOURCES: MutableMapping[Tensor, weakref.ref[Tensor]] = WeakTensorKeyDictionary()


def _decay_weights(meta: Meta, config: HRNNConfig) -> list[Tensor]:
    """Weight and bias of the decays that are read out."""
    names = ["grad_decay"] * config.reads_grad_decay + ["scale_decay"] * config.learnable_decay
    return [meta[f"{name}.{part}"] for name in names for part in ("weight", "bias")]


def _sigmoid_read_out(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.sigmoid((weight[None] @ hidden)[..., 0, :] + bias)


class _ReadDecays(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *reads: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, *reads)
        return _sigmoid_read_out(hidden, *reads[:2]), _sigmoid_read_out(hidden, *reads[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, ...]:
        hidden, *reads = ctx.saved_tensors
        slopes = []
        for (weight, bias), cotangent in zip((reads[:2], reads[2:]), cotangents, strict=True):
            decay = _sigmoid_read_out(hidden, weight, bias)
            slopes.append(cotangent * decay * (1 - decay))
        both = torch.stack(slopes, -2)  # [*B, 2, n]
        weights = (both @ hidden.mT).reshape(-1, 2, hidden.shape[-2]).sum(0)
        biases = both.sum(-1).reshape(-1, 2).sum(0)
        return torch.stack(reads[::2], -1) @ both, weights[0], biases[0], weights[1], biases[1]


class _Advance(torch.autograd.Function):
    """Arguments behind `reads` are those of `Inputs`.

    `reads`: weights and biases with which the decays can be read out of the hidden state again, or none.
    """

    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, call: Call, reads: list[Tensor], *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        tensors = tuple(tensor.contiguous() for tensor in tensors)
        outputs = kernels.forward(call, Inputs(*tensors))
        ctx.kernels, ctx.call, ctx.reads = kernels, call, reads
        ctx.save_for_backward(*(tensors[: DECAYS.start] + tensors[DECAYS.stop :] if reads else tensors))
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = list(ctx.saved_tensors)
        if ctx.reads:
            hidden = tensors[STATE.start]
            tensors[DECAYS.start : DECAYS.start] = [
                _sigmoid_read_out(hidden, *ctx.reads[:2]),
                _sigmoid_read_out(hidden, *ctx.reads[2:]),
            ]
        given = Cotangents(*(None if value is None else value.contiguous() for value in cotangents))
        return (None, None, None, *ctx.kernels.backward(ctx.call, Inputs(*tensors), given))
