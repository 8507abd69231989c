"""The fused CPU kernels: the three stages of lopt/backends/reference.py in C++.

The arithmetic is in csrc/hrnn_step.h, compiled for several instruction sets; the environment variable LOPT_ISA, on
x86-64 v2, v3 or v4, takes another than the strongest. This file hands addresses of tensors to it. A step allocates
nothing per parameter: a gradient or parameter that lies in another memory order than its state is copied, others are
read and written in place. Results do not depend on the number of threads.

Tests: tests/backends/test_cpu.py, tests/csrc/test_simd.py.
"""

from __future__ import annotations

import functools
import itertools
import operator
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lopt import native
from lopt.backends import coverage, ops
from lopt.backends.addresses import Followed, addresses, are
from lopt.backends.coverage import DTYPES
from lopt.config import FIXED_GRAD_DECAY, FIXED_SCALE_DECAY, HRNNConfig
from lopt.metaparams import MetaParams
from lopt.state import strides

STATE_FORMATS = ("float32", "compact")

_dtype = operator.attrgetter("dtype")


@functools.cache
def unusable() -> str | None:
    """Why this backend cannot run on this machine; None: it can."""
    if reason := native.absent():
        return reason
    try:
        native.load().use_isa(os.environ.get("LOPT_ISA", ""))
    except ValueError as error:
        return f"LOPT_ISA: {error}. Unset it, or set it to one of {', '.join(native.load().compiled()['isas'])}"
    return None


def unsupported(config: HRNNConfig) -> str | None:
    """Why this backend cannot run a configuration; None: it can."""
    return coverage.unsupported(config)


Made = TypeVar("Made")


class _Memo(Generic[Made]):
    """What was made for an object, for as long as that lives."""

    def __init__(self, make: Callable[[Any], Made]) -> None:
        self._make = make
        self._made: dict[int, tuple[weakref.ref[Any], Made]] = {}

    def __call__(self, owner: Any) -> Made:
        key, made = id(owner), self._made
        if key not in made:
            made[key] = weakref.ref(owner, lambda _: made.pop(key, None)), self._make(owner)
        return made[key][1]

    def known(self, owner: Any) -> Made | None:
        """What was made for it, or None."""
        return self._made.get(id(owner), (None, None))[1]


@_Memo
def _pack(meta: MetaParams) -> Any:
    """Meta-parameters in the kernels' layout."""
    config = meta.config
    tensors = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in meta.items()}
    options = {
        "tensor_size": config.tensor_size,
        "global_size": config.global_size,
        "attention": config.attention,
        "shortcut": config.gradient_shortcut,
        "products": config.gradient_products,
        "relative_to_problem": config.relative_log_lr == "problem",
        "global_last": config.global_input == "last",
        "log_lr_min": config.log_lr_min,
        "log_lr_min_steps": config.log_lr_min_steps,
        "log_lr_min_distance": config.log_lr_min_distance,
        "log_lr_min_distance_limit": config.log_lr_min_distance_limit,
        "log_lr_max": config.log_lr_max,
        "log_lr_max_ratio": config.log_lr_max_ratio,
        "ms_eps": config.ms_eps,
        "rms_eps": config.rms_eps,
        "damping": config.damping,
        "damping_decay": config.damping_decay,
        "fixed_grad_decay": FIXED_GRAD_DECAY,
        "fixed_scale_decay": FIXED_SCALE_DECAY,
    }
    return native.load().pack(options, {name: tensor.data_ptr() for name, tensor in tensors.items()})


class _Kept:
    """What a stage keeps from step to step: the addresses of its lists of state."""

    def __init__(self, _: Tensor) -> None:
        self._followed = Followed()
        self._lists: Sequence[Sequence[Tensor]] = ()  # of the last step, if they are tuples
        self._addresses: list[list[int]] = []
        self.sizes: list[int] = []  # of the tensors of the last list
        self.strides: list[tuple[int, ...]] = []  # of the tensors of the last list
        self.dense: list[tuple[int, ...]] = []  # strides of parameters that were all found to have no gaps

    def __call__(self, *lists: Sequence[Tensor]) -> list[list[int]]:
        if self._followed.stayed(*lists) and are(lists, self._lists):
            return self._addresses
        if changed := self._followed.changed(dict(enumerate(lists))):
            known = dict(enumerate(self._addresses)) | changed
            self._addresses = [known.get(index, []) for index in range(len(lists))]
            self.sizes = list(map(Tensor.numel, lists[-1]))
            self.strides = [tensor.stride() for tensor in lists[-1]]
        self._lists = lists if all(isinstance(tensors, tuple) for tensors in lists) else ()
        return self._addresses

    def release(self) -> None:
        self._followed.release()
        self._lists, self._addresses = (), []


_advanced, _summarised, _applied = _Memo(_Kept), _Memo(_Kept), _Memo(_Kept)  # of a stage's buffer


def release(*buffers: Tensor) -> None:
    """See `lopt.backends.reference.release`."""
    for memo, buffer in itertools.product((_advanced, _summarised, _applied), buffers):
        if (kept := memo.known(buffer)) is not None:
            kept.release()


def _ordered(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> Sequence[Tensor]:
    """`tensors`, those copied that do not lie in memory like their counterparts, or are of a dtype without a kernel."""
    ordered = list(tensors)
    for index, (tensor, order) in enumerate(zip(tensors, like, strict=True)):
        if tensor.stride() != order.stride() or tensor.dtype not in DTYPES:
            dtype = tensor.dtype if tensor.dtype in DTYPES else torch.float32
            ordered[index] = torch.empty_strided(order.shape, order.stride(), dtype=dtype).copy_(tensor)
    return ordered


def _dense(param: Tensor) -> Tensor:
    """`param`, copied to a dense tensor of the memory order of its state if it has gaps or a dtype without a kernel."""
    if param.dtype in DTYPES and (param.is_contiguous() or strides(param, None) == param.stride()):
        return param
    return torch.empty_like(param, dtype=param.dtype if param.dtype in DTYPES else torch.float32).copy_(param)


def _numbers(lr: Sequence[float | Tensor] | Tensor) -> list[float]:
    return lr.tolist() if isinstance(lr, Tensor) else list(map(float, lr))


@ops.traced("cpu")
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
    """Stage 1, per parameter; see `lopt.backends.reference.advance`."""
    kept = _advanced(sums)
    state = kept(hidden, accum, ms, step, tensor_hidden, log_lr_mean, damping, distance, log_lr)
    dtypes = list(map(DTYPES.get, map(_dtype, grads)))
    if None in dtypes or list(map(Tensor.stride, grads)) != kept.strides:
        grads = _ordered(grads, log_lr)
        dtypes = list(map(DTYPES.get, map(_dtype, grads)))
    native.load().advance(
        _pack(meta),
        hidden[0].dtype == torch.int16,
        addresses(grads),
        dtypes,
        list(maximize),
        kept.sizes,
        list(numel),
        *state,
        global_hidden.data_ptr(),
        0 if grad_scale is None else grad_scale.data_ptr(),
        skip.data_ptr(),
        update.data_ptr(),
        0 if attention_update is None else attention_update.data_ptr(),
        sums.data_ptr(),
        torch.get_num_threads(),
    )


@ops.traced("cpu")
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
    """Stage 2, per tensor and once; see `lopt.backends.reference.summarise`. An operator gives `lr` as one tensor."""
    native.load().summarise(
        _pack(meta),
        list(numel),
        *_summarised(scale)(step, tensor_hidden, log_lr_mean, damping, distance),
        _numbers(lr),
        global_hidden.data_ptr(),
        sums.data_ptr(),
        update.data_ptr(),
        0 if places is None else places.data_ptr(),
        skip.data_ptr(),
        scale.data_ptr(),
    )


@ops.traced("cpu")
def apply(
    meta: MetaParams,
    params: Sequence[Tensor],
    true_param: Sequence[Tensor],
    update: Tensor,
    attention_update: Tensor | None,
    scale: Tensor,
    log_lr_mean: Sequence[Tensor],
    *,
    lr: Sequence[float | Tensor] | Tensor,
    weight_decay: Sequence[float],
    skip: Tensor,
) -> None:
    """Stage 3, per parameter; see `lopt.backends.reference.apply`. An operator gives `lr` as one tensor."""
    kept, ordered = _applied(scale), params
    state = kept(log_lr_mean, true_param)
    found = list(map(Tensor.stride, params))
    dtypes = list(map(DTYPES.get, map(_dtype, params)))
    if None in dtypes or found != kept.dense:
        ordered = [_dense(param) for param in params]
        dtypes = [DTYPES[param.dtype] for param in ordered]
        kept.dense = found if are(ordered, params) else []
    native.load().apply(
        addresses(ordered),
        dtypes,
        list(map(Tensor.numel, ordered)),
        *state,
        _numbers(lr),
        list(weight_decay),
        update.data_ptr(),
        0 if attention_update is None else attention_update.data_ptr(),
        scale.data_ptr(),
        skip.data_ptr(),
        torch.get_num_threads(),
    )
    for param, copy in zip(params, ordered, strict=True) if ordered is not params else ():
        if copy is not param:
            param.copy_(copy)
