"""The parameter level for meta-training, fused on the CPU: `reference.advance_flat` with a derivative in C++.

First order: the gradients that tasks feed in are constants. Autograd keeps the old state and the gradient of a step,
from which its derivative recomputes the rest. What is small, the injected biases and the mean log lr, stays with
PyTorch. Whatever the kernels do not do, `advance_flat` hands to the reference: other configurations and dtypes,
derivatives of second order, and derivatives by meta-parameters that differ from row to row. Results do not depend on
the number of threads.

Kernels: csrc/hrnn_meta.cpp, csrc/hrnn_adjoint.h. Tests: tests/backends/test_cpu_backward.py.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from lopt import native
from lopt.backends import reference
from lopt.backends.reference import Advanced, FlatState, Meta, Segments
from lopt.config import HRNNConfig

GATES = ("gates", "candidate")
FEATURES_BEFORE_PRODUCTS = 4
PRODUCTS = 3
HIDDEN, DECAYS = 4, slice(7, 9)  # among the arguments of the fused function


def advance_flat(
    meta: Meta, config: HRNNConfig, segments: Segments, grad: Tensor, state: FlatState, numel: Tensor | None = None
) -> Advanced:
    """Per parameter: features, parameter GRU, read-outs; per tensor: sums. See `reference.advance_flat`."""
    if not _fused(meta, config, grad, state):
        return reference.advance_flat(meta, config, segments, grad, state, numel)
    assert state.log_lr is not None and state.log_lr_mean is not None
    relative_to = reference.mean_log_lr(config, state.log_lr_mean, segments.lengths if numel is None else numel)
    bias = torch.cat([meta[f"level0.{part}.bias"] for part in GATES], -1)[..., None, :]
    injected = reference.injected_bias(meta, state.tensor_hidden, state.global_hidden)
    injected = bias if injected is None else bias + injected
    weights = _pack(meta, config)
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
    if any(source is None or source() is not state.hidden for source in derived) or state.hidden.shape[:-2] != batch:
        reads = []
    call = _Call(
        batch,
        n,
        segments.sizes,
        config.gradient_products,
        config.attention,
        config.log_lr_min,
        config.log_lr_max,
        config.ms_eps,
        config.rms_eps,
        reference.sums_columns(config).count,
    )
    outputs = _Advance.apply(
        call,
        reads,
        weights if weights.dim() == 1 else rows(weights, weights.shape[-1]),
        rows(injected, tensors, injected.shape[-1]),
        rows(relative_to, tensors),
        rows(grad, n),
        rows(state.hidden, config.hidden_size, n),
        rows(state.accum, config.timescales, n),
        rows(state.ms, config.timescales, n),
        rows(state.grad_decay, n),
        rows(state.scale_decay, n),
        rows(state.log_lr, n),
    )
    return Advanced(*outputs)


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


def _fused(meta: Meta, config: HRNNConfig, grad: Tensor, state: FlatState) -> bool:
    """Whether the kernels do it."""
    from lopt.backends import cpu

    if cpu.unusable() or cpu.unsupported(config):
        return False
    tensors = [value for value in (grad, *state, *meta.values()) if value is not None]
    if any(tensor.dtype != grad.dtype or tensor.device.type != "cpu" for tensor in tensors):
        return False
    if grad.dtype not in (torch.float32, torch.float64):
        return False
    if torch.is_grad_enabled():
        per_row = meta["direction.weight"].dim() > 1
        return not grad.requires_grad and not (per_row and any(value.requires_grad for value in meta.values()))
    return True


def _pack(meta: Meta, config: HRNNConfig) -> Tensor:
    """Level-0 meta-parameters apart from biases in the order of PlainWeights in csrc/hrnn_adjoint.h: [..., count]."""
    matrix = torch.cat([meta[f"level0.{part}.weight"] for part in GATES], -1)
    if not config.gradient_products:
        before, after = matrix.tensor_split([FEATURES_BEFORE_PRODUCTS], -2)
        matrix = torch.cat([before, matrix.new_zeros(*matrix.shape[:-2], PRODUCTS, matrix.shape[-1]), after], -2)
    like = meta["direction.weight"]

    def get(name: str, count: int) -> Tensor:
        return meta[name] if name in meta else like.new_zeros(*like.shape[:-1], count)

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
        ],
        -1,
    )


@dataclasses.dataclass(frozen=True)
class _Call:
    """What does not change from step to step."""

    batch: tuple[int, ...]
    n: int
    sizes: tuple[int, ...]
    products: bool
    attention: bool
    log_lr_min: float
    log_lr_max: float
    ms_eps: float
    rms_eps: float
    columns: int


@functools.lru_cache(maxsize=64)
def _layout(sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Which tensor each parameter belongs to, [n] int32; where each tensor begins and the last ends, [T + 1] int64."""
    lengths = torch.tensor(sizes)
    owner = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), lengths)
    return owner, torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _common(call: _Call, weights: Tensor, injected: Tensor, relative_to: Tensor, grad: Tensor) -> dict[str, Any]:
    owner, begins = _layout(call.sizes)
    return {
        "rows": grad.numel() // call.n,
        "n": call.n,
        "tensors": len(call.sizes),
        "owner": owner.data_ptr(),
        "begins": begins.data_ptr(),
        "products": call.products,
        "attention": call.attention,
        "log_lr_min": call.log_lr_min,
        "log_lr_max": call.log_lr_max,
        "ms_eps": call.ms_eps,
        "rms_eps": call.rms_eps,
        "weight_stride": 0 if weights.dim() == 1 else weights.shape[-1],
        "weights": weights.data_ptr(),
        "injected": injected.data_ptr(),
        "relative_to": relative_to.data_ptr(),
        "grad": grad.data_ptr(),
        "threads": torch.get_num_threads(),
    }


class _Advance(torch.autograd.Function):
    """Arguments behind `reads` as in PlainWeights, Shared and State of csrc/hrnn_adjoint.h, with the batch in front.

    `reads`: weights and biases with which the decays can be read out of the hidden state again, or none.
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, reads: list[Tensor], *tensors: Tensor) -> tuple[Tensor | None, ...]:
        tensors = tuple(tensor.contiguous() for tensor in tensors)
        weights, injected, relative_to, grad, *old = tensors
        hidden, accum, ms, log_lr = (torch.empty_like(old[index]) for index in (0, 1, 2, 5))
        update = torch.empty_like(grad)
        attention_update = torch.empty_like(grad) if call.attention else None
        sums = grad.new_empty(*call.batch, len(call.sizes), call.columns)
        native.load().meta_forward(
            grad.dtype == torch.float64,
            _common(call, weights, injected, relative_to, grad),
            _addresses(*old),
            _addresses(hidden, accum, ms, None, None, log_lr),
            *_addresses(update, attention_update, sums),
        )
        ctx.call = call
        ctx.reads = reads
        ctx.save_for_backward(*(tensors[: DECAYS.start] + tensors[DECAYS.stop :] if reads else tensors))
        ctx.set_materialize_grads(False)
        return hidden, accum, ms, log_lr, update, attention_update, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        call = ctx.call
        tensors = list(ctx.saved_tensors)
        if ctx.reads:
            tensors[DECAYS.start : DECAYS.start] = [
                _sigmoid_read_out(tensors[HIDDEN], *ctx.reads[:2]),
                _sigmoid_read_out(tensors[HIDDEN], *ctx.reads[2:]),
            ]
        weights, injected, relative_to, grad, *old = tensors
        hidden, accum, ms, log_lr, update, attention_update, sums = (
            None if value is None else value.contiguous() for value in cotangents
        )
        d_old = [torch.empty_like(value) for value in old]
        d_small = [torch.empty_like(value) for value in (weights, injected, relative_to)]
        native.load().meta_backward(
            grad.dtype == torch.float64,
            _common(call, weights, injected, relative_to, grad),
            _addresses(*old),
            _addresses(hidden, accum, ms, None, None, log_lr),
            *_addresses(update, attention_update, sums),
            _addresses(*d_old),
            *_addresses(*d_small),
        )
        return (None, None, *d_small, None, *d_old)
