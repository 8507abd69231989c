"""What the optimizer remembers, and in which memory order: one line per kind.

A parameter tensor of shape `shape` has one state tensor per kind, features outermost: `hidden` is `[10, *shape]`. Each
slice of it (`hidden[i]`) lies in memory like the parameter itself does (channels_last stays channels_last), so a kernel
walks parameter, gradient and state with one index. All of it is float32, whatever the parameter's dtype, but for what
the compact format (lopt/compact.py) keeps in 16 bits. The two decays of a step are read-outs of `hidden`; they are
recomputed, not stored.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lopt import compact
from lopt.config import HRNNConfig
from lopt.metaparams import MetaParams

FORMATS = ("float32", "compact")
# `damping` before the first step: sum of mean squares, of their weights; factor of rises.
UNDAMPED = (0.0, 0.0, 1.0)
TOTAL, FACTOR = 0, 2  # where the first and the last of these stand
SAMPLES = 32  # parameters of a tensor from which its distance from the start is estimated


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of state.

    Attributes:
        name: its key in `optimizer.state[param]`.
        per: what has one of it: a "parameter" (a scalar), a "tensor", or the whole "model".
        size: number of values per parameter, tensor or model, None where there is no leading dimension.
        present: whether a configuration has it.
    """

    name: str
    per: str
    size: Callable[[HRNNConfig], int | None]
    present: Callable[[HRNNConfig], bool] = lambda config: True

    def dtype(self, state_format: str) -> torch.dtype:
        """Of this kind of state in one of `FORMATS`."""
        return compact.DTYPES.get(self.name, torch.float32) if state_format == "compact" else torch.float32


ROWS = (
    Row("hidden", "parameter", lambda config: config.hidden_size),
    Row("accum", "parameter", lambda config: config.timescales),
    Row("ms", "parameter", lambda config: config.timescales),
    Row("log_lr", "parameter", lambda config: None, lambda config: config.dynamic_output_scale),
    Row("true_param", "parameter", lambda config: None, lambda config: config.attention),
    Row("tensor_hidden", "tensor", lambda config: config.tensor_size, lambda config: config.levels >= 2),
    Row("log_lr_mean", "tensor", lambda config: None, lambda config: config.dynamic_output_scale),
    Row("damping", "tensor", lambda config: len(UNDAMPED), lambda config: config.damping > 0),
    Row("distance", "tensor", lambda config: 1 + SAMPLES, lambda config: config.log_lr_min_distance > 0),
    Row("step", "tensor", lambda config: None),
    Row("global_hidden", "model", lambda config: config.global_size, lambda config: config.levels >= 3),
)


def rows(config: HRNNConfig, per: str | None = None) -> tuple[Row, ...]:
    """The kinds of state that a configuration has, all of them or those per "parameter", "tensor" or "model"."""
    return tuple(row for row in ROWS if row.present(config) and per in (None, row.per))


def bytes_per_parameter(config: HRNNConfig, state_format: str = "float32") -> int:
    """Persistent state per scalar parameter in bytes: 76 for the default configuration, 40 in the compact format."""
    return sum(row.dtype(state_format).itemsize * (row.size(config) or 1) for row in rows(config, "parameter"))


def strides(param: Tensor, size: int | None) -> tuple[int, ...]:
    """Strides of the state of `param`: its slices lie like the parameter, without gaps and overlaps it may have."""
    inner = torch.empty_like(param, device="meta").stride()
    return inner if size is None else (param.numel(), *inner)


def empty_rows(param: Tensor, size: int | None, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uninitialised state of `param`, `[size, *shape]`, or `[*shape]` without a size, in its memory order."""
    shape = tuple(param.shape) if size is None else (size, *param.shape)
    return torch.empty_strided(shape, strides(param, size), dtype=dtype, device=param.device)


def like_parameter(tensor: Tensor, param: Tensor) -> Tensor:
    """State `[size, *shape]` or `[*shape]`, copied into the memory order of `param` if it has another one."""
    size = tensor.shape[0] if tensor.dim() > param.dim() else None
    if tensor.stride() == strides(param, size):
        return tensor
    return empty_rows(param, size, dtype=tensor.dtype).copy_(tensor)


def init_state(
    param: Tensor,
    meta: MetaParams,
    log_lr: float,
    *,
    state_format: str = "float32",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """State of one parameter tensor before its first step, all kinds but the model's.

    Args:
        param: the parameter tensor, any floating dtype and strides.
        meta: meta-parameters, for the initial hidden states.
        log_lr: natural logarithm of the initial learning rate of every parameter.
        state_format: one of `FORMATS`.
        dtype: of the float32 format; float64 only serves to check kernels.
    """
    config, device = meta.config, param.device
    zeros = torch.zeros(config.timescales, dtype=dtype, device=device)
    of_one = {"hidden": meta["level0.init"].to(dtype=dtype, device=device), "accum": zeros, "ms": zeros}
    if state_format == "compact":
        of_one = compact.encode(of_one, compact.limit(meta))
    state = {}
    for row in rows(config, "parameter"):
        values = of_one.get(row.name, zeros[0])
        own = state[row.name] = empty_rows(param, row.size(config), dtype=values.dtype)
        own.copy_(values.reshape(-1, *[1] * param.dim()) if values.dim() else values)
    if config.dynamic_output_scale:
        state["log_lr"].fill_(log_lr)
        state["log_lr_mean"] = torch.full((), log_lr, dtype=dtype, device=device)
    if config.damping:
        state["damping"] = torch.tensor(UNDAMPED, dtype=dtype, device=device)
    if config.log_lr_min_distance:
        state["distance"] = torch.zeros(1 + SAMPLES, dtype=dtype, device=device)
    if config.attention:
        state["true_param"].copy_(param)
    if config.levels >= 2:
        state["tensor_hidden"] = meta["level1.init"].to(dtype=dtype, device=device, copy=True)
    state["step"] = torch.zeros((), dtype=dtype, device=device)
    return state


def convert(
    state: Mapping[str, Tensor], meta: MetaParams, state_format: str, *, ms_steps: int | None = compact.MS_STEPS
) -> dict[str, Tensor]:
    """State of one parameter tensor in another format, or, where it is compact, with other codes.

    Args:
        state: all kinds.
        meta: meta-parameters that it was made with.
        state_format: one of `FORMATS`.
        ms_steps: codes per octave that its mean squares have, where it is compact.
    """
    found = ms_steps if state["hidden"].dtype == torch.int16 else None
    wanted = compact.MS_STEPS if state_format == "compact" else None
    state = dict(state)
    if found != wanted and found is not None:
        state |= compact.decode(state, compact.limit(meta), ms_steps=found)
    if found != wanted and wanted is not None:
        state |= compact.encode(state, compact.limit(meta))
    return state


def sampled(shape: Sequence[int]) -> np.ndarray:
    """Which parameters of a tensor its distance from the start is estimated from: [SAMPLES, dimensions], indices.

    They are as far from each other as can be, whatever the order in memory; those of a smaller tensor come repeatedly.
    """
    flat = np.arange(SAMPLES) * math.prod(shape) // SAMPLES
    return np.stack(np.unravel_index(flat, shape), -1) if shape else np.zeros((SAMPLES, 0), dtype=np.int64)


def init_global(meta: MetaParams, device: torch.device, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The model's hidden state before the first step, [H2]; empty without a global GRU."""
    if meta.config.levels < 3:
        return torch.empty(0, dtype=dtype, device=device)
    return meta["level2.init"].to(dtype=dtype, device=device, copy=True)
