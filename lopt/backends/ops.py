"""The three stages of a step as operators of PyTorch's dispatcher, for torch.compile and torch.export.

`advance`, `summarise` and `apply` have the signature of a backend's stages, behind the backend's name, and leave one
node each in a traced graph. An operator cannot take a `MetaParams`, so it takes their flat view and the configuration
as text. Eager code calls the kernels directly: this way round costs more than the step of a small model.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lopt.config import HRNNConfig
from lopt.metaparams import MetaParams

SCHEMAS = {
    "advance": """(
        str backend, str config, Tensor meta, Tensor[] grads, Tensor(a!)[] hidden, Tensor(b!)[] accum, Tensor(c!)[] ms,
        Tensor(d!)[] log_lr, Tensor[] step, Tensor[] tensor_hidden, Tensor global_hidden, Tensor[] log_lr_mean,
        Tensor[] damping, Tensor[] distance, *, SymInt[] numel, bool[] maximize, Tensor? grad_scale, Tensor(e!) skip,
        Tensor(f!) update, Tensor(g!)? attention_update, Tensor(h!) sums) -> ()""",
    "summarise": """(
        str backend, str config, Tensor meta, Tensor sums, Tensor(a!)[] tensor_hidden, Tensor(b!) global_hidden,
        Tensor(c!)[] log_lr_mean, Tensor(d!)[] damping, Tensor(e!)[] distance, Tensor(f!)[] step, *, SymInt[] numel,
        Tensor update, Tensor? places, Tensor lr, Tensor skip, Tensor(g!) scale) -> ()""",
    "apply": """(
        str backend, str config, Tensor meta, Tensor(a!)[] params, Tensor(b!)[] true_param, Tensor update,
        Tensor? attention_update, Tensor scale, Tensor[] log_lr_mean, *, Tensor lr,
        float[] weight_decay, Tensor skip) -> ()""",
}

DEVICES = ("CPU", "CUDA")  # keys of PyTorch's dispatcher


_known: dict[str, tuple[Tensor, int, MetaParams]] = {}  # by configuration: flat view, its version, meta-parameters


def _meta(config: str, flat: Tensor) -> MetaParams:
    """The operands' meta-parameters, the same object as long as they are the same tensor: kernels pack each object."""
    known, version, meta = _known.get(config, (flat, -1, None))
    if meta is None or known.data_ptr() != flat.data_ptr() or version != flat._version:
        meta = MetaParams.from_flat(HRNNConfig.from_json(config), flat)
        _known[config] = flat, flat._version, meta
    return meta


def _define(stage: str, schema: str) -> None:
    def kernel(backend: str, config: str, meta: Tensor, *args: Any, **kwargs: Any) -> None:
        module = importlib.import_module(f"lopt.backends.{backend}")
        getattr(module, stage)(_meta(config, meta), *args, **kwargs)
        if stage == "apply":
            torch.autograd.graph.increment_version(args[0])  # the parameters

    name = f"lopt::hrnn_{stage}"
    torch.library.define(name, "".join(schema.split("\n")))
    torch.library.register_fake(name, lambda *args, **kwargs: None)
    for device in DEVICES:
        torch.library.impl(name, device, kernel)


for _stage, _schema in SCHEMAS.items():
    _define(_stage, _schema)


def advance(backend: str, meta: MetaParams, *args: Any, **kwargs: Any) -> None:
    """Stage 1 as one operator; see `lopt.backends.reference.advance`."""
    torch.ops.lopt.hrnn_advance(backend, meta.config_text, meta.flat(), *args, **kwargs)


def summarise(backend: str, meta: MetaParams, *args: Any, lr: Sequence[float | Tensor] | Tensor, **kwargs: Any) -> None:
    """Stage 2 as one operator; see `lopt.backends.reference.summarise`."""
    rates = _stacked(lr, kwargs["skip"])
    torch.ops.lopt.hrnn_summarise(backend, meta.config_text, meta.flat(), *args, lr=rates, **kwargs)


def apply(backend: str, meta: MetaParams, *args: Any, lr: Sequence[float | Tensor] | Tensor, **kwargs: Any) -> None:
    """Stage 3 as one operator; see `lopt.backends.reference.apply`."""
    rates = _stacked(lr, kwargs["skip"])
    torch.ops.lopt.hrnn_apply(backend, meta.config_text, meta.flat(), *args, lr=rates, **kwargs)


def _stacked(lr: Sequence[float | Tensor] | Tensor, like: Tensor) -> Tensor:
    """[T]. A number is added, for one that a tensor is made of would be a constant of the graph."""
    rates = [rate.reshape(()).to(like) if isinstance(rate, Tensor) else torch.zeros_like(like) + rate for rate in lr]
    return torch.stack(rates)


def traced(backend: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a backend's stage one operator where torch.compile traces it; elsewhere it is called directly."""

    def decorate(stage: Callable[..., None]) -> Callable[..., None]:
        operator = {"advance": advance, "summarise": summarise, "apply": apply}[stage.__name__]

        @functools.wraps(stage)
        def either(meta: MetaParams, *args: Any, **kwargs: Any) -> None:
            if torch.compiler.is_compiling():
                operator(backend, meta, *args, **kwargs)
            else:
                stage(meta, *args, **kwargs)

        return either

    return decorate
