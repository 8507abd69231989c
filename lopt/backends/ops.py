"""The three stages of a step as operators of PyTorch's dispatcher, for torch.compile and torch.export.

A backend with kernels registers them here per device type (`implement`); `advance`, `summarise` and `apply` then have
the signature of a backend's stages and leave one node each in a traced graph. An operator cannot take a `MetaParams`,
so it takes their flat view and the configuration as text. Eager code calls the kernels directly: this way round costs
more than the step of a small model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lopt.config import HRNNConfig
from lopt.metaparams import MetaParams

SCHEMAS = {
    "hrnn_advance": """(
        str config, Tensor meta, Tensor[] grads, Tensor(a!)[] hidden, Tensor(b!)[] accum, Tensor(c!)[] ms,
        Tensor(d!)[] log_lr, Tensor[] step, Tensor[] tensor_hidden, Tensor global_hidden, Tensor[] log_lr_mean, *,
        SymInt[] numel, bool[] maximize, Tensor? grad_scale, Tensor(e!) skip, Tensor(f!) update,
        Tensor(g!)? attention_update, Tensor(h!) sums) -> ()""",
    "hrnn_summarise": """(
        str config, Tensor meta, Tensor sums, Tensor(a!)[] tensor_hidden, Tensor(b!) global_hidden,
        Tensor(c!)[] log_lr_mean, Tensor(d!)[] step, *, SymInt[] numel, Tensor skip, Tensor(e!) scale) -> ()""",
    "hrnn_apply": """(
        str config, Tensor meta, Tensor(a!)[] params, Tensor(b!)[] true_param, Tensor update, Tensor? attention_update,
        Tensor scale, Tensor[] log_lr_mean, *, Tensor lr, float[] weight_decay, Tensor skip) -> ()""",
}

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"lopt::{_name}", "".join(_schema.split("\n")))
    torch.library.register_fake(f"lopt::{_name}", lambda *args, **kwargs: None)


@functools.lru_cache(maxsize=16)
def _config(text: str) -> HRNNConfig:
    return HRNNConfig.from_json(text)


def implement(device: str, **stages: Callable[..., None]) -> None:
    """Register a backend's `advance`, `summarise` and `apply` as the operators' kernels for a device type."""
    for name, stage in stages.items():

        def kernel(config: str, meta: Tensor, *args: Any, _stage: Callable[..., None] = stage, **kwargs: Any) -> None:
            _stage(MetaParams.from_flat(_config(config), meta), *args, **kwargs)

        torch.library.impl(f"lopt::hrnn_{name}", device, kernel)


def advance(meta: MetaParams, *args: Any, **kwargs: Any) -> None:
    """Stage 1 as one operator; see `lopt.backends.reference.advance`."""
    torch.ops.lopt.hrnn_advance(meta.config.to_json(), meta.flat(), *args, **kwargs)


def summarise(meta: MetaParams, *args: Any, **kwargs: Any) -> None:
    """Stage 2 as one operator; see `lopt.backends.reference.summarise`."""
    torch.ops.lopt.hrnn_summarise(meta.config.to_json(), meta.flat(), *args, **kwargs)


def apply(meta: MetaParams, *args: Any, lr: Sequence[float | Tensor] | Tensor, **kwargs: Any) -> None:
    """Stage 3 as one operator; see `lopt.backends.reference.apply`."""
    like = kwargs["skip"]
    rates = [rate.reshape(()).to(like) if isinstance(rate, Tensor) else like.new_tensor(rate) for rate in lr]
    torch.ops.lopt.hrnn_apply(meta.config.to_json(), meta.flat(), *args, lr=torch.stack(rates), **kwargs)
