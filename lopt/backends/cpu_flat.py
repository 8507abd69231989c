"""The parameter level for meta-training on the CPU, in C++. Results do not depend on the number of threads.

Kernels: csrc/hrnn_meta.cpp, csrc/hrnn_adjoint.h. Tests: tests/kernels/test_hrnn_meta.py.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from lopt import native
from lopt.backends import cpu, flat
from lopt.backends.flat import Call, Cotangents, Inputs
from lopt.backends.reference import Advanced
from lopt.config import HRNNConfig

DTYPES = (torch.float32, torch.float64)


@functools.lru_cache(maxsize=64)
def _layout(sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Which tensor each parameter belongs to, [n] int32; where each tensor begins and the last ends, [T + 1] int64."""
    lengths = torch.tensor(sizes)
    owner = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), lengths)
    return owner, torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _state(of: Inputs) -> list[int]:
    """Addresses in the order of MetaState in csrc/hrnn_meta.h."""
    return _addresses(of.hidden, of.accum, of.ms, of.grad_decay, of.scale_decay, of.log_lr)


def _common(call: Call, inputs: Inputs) -> dict[str, Any]:
    owner, begins = _layout(call.sizes)
    return {
        "rows": inputs.grad.numel() // call.n,
        "n": call.n,
        "tensors": len(call.sizes),
        "owner": owner.data_ptr(),
        "begins": begins.data_ptr(),
        "products": call.products,
        "attention": call.attention,
        "ms_eps": call.ms_eps,
        "rms_eps": call.rms_eps,
        "weight_stride": 0 if inputs.weights.dim() == 1 else inputs.weights.shape[-1],
        "weights": inputs.weights.data_ptr(),
        "injected": inputs.injected.data_ptr(),
        "relative_to": inputs.relative_to.data_ptr(),
        "lowest": inputs.lowest.data_ptr(),
        "highest": inputs.highest.data_ptr(),
        "grad": inputs.grad.data_ptr(),
        "threads": torch.get_num_threads(),
    }


class Kernels(flat.Kernels):
    """The C++ kernels; the packed weights are their PlainWeights."""

    def covers(self, config: HRNNConfig, like: Tensor) -> bool:
        if cpu.unusable() or cpu.unsupported(config):
            return False
        return like.device.type == "cpu" and like.dtype in DTYPES

    def forward(self, call: Call, inputs: Inputs) -> Advanced:
        hidden, accum, ms, log_lr, update = map(
            torch.empty_like, (inputs.hidden, inputs.accum, inputs.ms, inputs.log_lr, inputs.log_lr)
        )
        attention_update = torch.empty_like(update) if call.attention else None
        sums = update.new_empty(*call.batch, len(call.sizes), call.columns)
        native.load().meta_forward(
            update.dtype == torch.float64,
            _common(call, inputs),
            _state(inputs),
            _addresses(hidden, accum, ms, None, None, log_lr),
            *_addresses(update, attention_update, sums),
        )
        return Advanced(hidden, accum, ms, log_lr, update, attention_update, sums)

    def backward(self, call: Call, inputs: Inputs, cotangents: Cotangents) -> tuple[Tensor | None, ...]:
        slopes = Inputs(*map(torch.empty_like, inputs))
        hidden, accum, ms, log_lr, update, attention_update, sums = cotangents
        native.load().meta_backward(
            inputs.hidden.dtype == torch.float64,
            _common(call, inputs),
            _state(inputs),
            _addresses(hidden, accum, ms, None, None, log_lr),
            *_addresses(update, attention_update, sums),
            _state(slopes),
            *_addresses(slopes.weights, slopes.injected, slopes.relative_to),
        )
        return (slopes.weights, slopes.injected, slopes.relative_to, None, None, None, *slopes[flat.STATE])


advance_flat = Kernels().advance_flat
