"""What the GPU backends share: three stages over tables of addresses in device memory.

A stage (see lopt.backends.reference) is one or two launches for all tensors at once, however many there are. What a
launch needs from one step to the next, packed meta-parameters, tables of addresses and scratch memory, is kept with the
buffer that the stage writes (`sums`, `scale`, `update`) and freed with it. Tables are compared on the host with what
they have to hold and sent again where an address changed, as gradients' do, without synchronisation.

A backend is an instance of a subclass of `Stages`, which packs meta-parameters for its kernels and launches them.
"""

from __future__ import annotations

import enum
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lopt.backends import ops
from lopt.backends.addresses import Followed, addresses, are
from lopt.backends.coverage import DTYPES
from lopt.backends.reference import sums_columns
from lopt.config import FIXED_GRAD_DECAY, FIXED_SCALE_DECAY, HRNNConfig
from lopt.metaparams import MetaParams
from lopt.state import strides

MIXED = 4  # instead of a dtype of lopt.backends.coverage: tensors of several
PARTIALS = 32  # row length of the partial sums, at least their number
CHUNKS_PER_TENSOR = 2048  # beyond which chunks grow
MOST = 16384  # parameters of a chunk
PACKED = 8  # meta-parameters, of any device, that are kept as the kernels read them
LOG2_E = 1 / math.log(2)


class AdvanceColumn(enum.IntEnum):
    """Columns of the table of `advance`; those of csrc/hrnn_cuda.h, which a test compares."""

    GRAD = 0
    GRAD_DTYPE = 1
    SIGN = 2  # -1 climbs
    HIDDEN = 3
    ACCUM = 4
    MS = 5
    LOG_LR = 6
    STEP = 7
    TENSOR_HIDDEN = 8
    LOG_LR_MEAN = 9
    DAMPING = 10  # anything without
    DISTANCE = 11  # anything without
    SIZE = 12  # parameters here
    NUMEL = 13  # parameters of the whole tensor, of which this may be a shard
    OFFSET = 14  # of the tensor in `update`
    CHUNK_FIRST = 15
    CHUNK_COUNT = 16
    CHUNK_SIZE = 17  # parameters


class SummaryColumn(enum.IntEnum):
    """Columns of the table of `summarise`."""

    TENSOR_HIDDEN = 0
    LOG_LR_MEAN = 1
    DAMPING = 2  # anything without
    DISTANCE = 3  # anything without
    STEP = 4
    NUMEL = 5
    LR = 6  # bits of a float64, or with LR_DTYPE >= 0 the address of a scalar
    LR_DTYPE = 7


class ApplyColumn(enum.IntEnum):
    """Columns of the table of `apply`."""

    PARAM = 0
    PARAM_DTYPE = 1
    TRUE_PARAM = 2
    LOG_LR_MEAN = 3
    SIZE = 4
    OFFSET = 5
    CHUNK_FIRST = 6
    CHUNK_SIZE = 7
    LR = 8  # as of `summarise`
    LR_DTYPE = 9
    WEIGHT_DECAY = 10  # bits of a float64


class Scaled:
    """Meta-parameters as all GPU kernels want them, computed in float64 where they are.

    Weights into a sigmoid carry a factor -log2(e), into the tanh -2 log2(e). The log mean squares sum to zero over the
    timescales: there is one fewer, relative to the longest timescale's.

    Attributes:
        inputs: [21, 30] rows hidden state 10, scaled averages 4, log mean squares 3, relative log lr, products 3 (zero
            where the configuration has none); columns reset gates, update gates, candidates.
        bias: [30], from_tensor: [H1, 30], from_global: [H2, 30]: what is injected; one row of zeros without the level.
        read_outs: name -> weights or scalar, see `_read_outs`.
        tensor_gru, global_gru: weights of the higher levels, flat, in the order of `MetaParams.flat`;
            anything without the level.
    """

    def __init__(self, meta: MetaParams) -> None:
        config = meta.config
        values = {name: tensor.detach().double() for name, tensor in meta.items()}
        self.zeros = values["direction.weight"].new_zeros
        scale = self.zeros(30) - LOG2_E
        scale[20:] *= 2
        weights = [values[f"level0.{part}.weight"] for part in ("gates", "candidate")]
        self.inputs = self._reorder(config, torch.cat(weights, 1)) * scale
        bias = torch.cat([values["level0.gates.bias"], values["level0.candidate.bias"]])
        injections = []
        for level, size in ((1, config.tensor_size), (2, config.global_size)):
            name = f"level0.from_level{level}"
            if size:
                bias = bias + values[f"{name}.bias"]
            injections.append((values[f"{name}.weight"] if size else self.zeros(1, 30)) * scale)
        self.bias = bias * scale
        self.from_tensor, self.from_global = injections
        self.read_outs = self._read_outs(config, values)
        self.tensor_gru, self.global_gru = (
            join(
                [value for name, value in values.items() if name.startswith(level) and not name.endswith(".init")]
                or [bias]
            )
            for level in ("level1.", "level2.")
        )

    def _reorder(self, config: HRNNConfig, weight: Tensor) -> Tensor:
        """Rows of a weight of the parameter GRU, which has its features first, in the order of `inputs`."""
        products = 3 if config.gradient_products else 0
        scaled, product, log_ms, relative_log_lr, hidden = weight.split([4, products, 4, 1, 10])
        log_ms = (log_ms - log_ms.mean(0))[:3]
        return torch.cat([hidden, scaled, log_ms, relative_log_lr, product, self.zeros(3 - products, weight.shape[1])])

    def _read_outs(self, config: HRNNConfig, values: dict[str, Tensor]) -> dict[str, Tensor]:
        def decay(name: str, fixed: float) -> tuple[Tensor, Tensor]:
            if f"{name}.weight" in values:
                return values[f"{name}.weight"] * -LOG2_E, values[f"{name}.bias"] * -LOG2_E
            return self.zeros(10), self.zeros(()) - math.log(fixed / (1 - fixed)) * LOG2_E

        grad_decay, grad_decay_bias = decay("grad_decay", FIXED_GRAD_DECAY)
        scale_decay, scale_decay_bias = decay("scale_decay", FIXED_SCALE_DECAY)
        offset = values["log_step.offset"]
        bounds = ("log_lr_min", "log_lr_min_steps", "log_lr_min_distance", "log_lr_min_distance_limit", "log_lr_max")
        constants = (*bounds, "log_lr_max_ratio", "ms_eps", "rms_eps")
        return {
            "direction": values["direction.weight"],  # [10]
            "direction_shortcut": values.get("direction.shortcut", self.zeros(4)),
            "attention": values.get("attention.weight", self.zeros(10)),
            "attention_shortcut": values.get("attention.shortcut", self.zeros(4)),
            "decay": torch.stack([grad_decay, scale_decay], 1),  # [10, 2]
            "decay_bias": torch.stack([grad_decay_bias, scale_decay_bias]),
            "log_lr": values["log_lr.weight"],  # [10]
            "log_lr_bias": values["log_lr.bias"],
            "momentum": torch.sigmoid(values["log_lr.momentum"]),
            "log2_step_offset": offset * LOG2_E,
            "attention_factor": torch.exp(-offset),
            **{name: self.zeros(()) + getattr(config, name) for name in constants},
            "moves_unseen": self.zeros(()) + (0 if config.damping else 1),
        }


def join(parts: Sequence[Tensor]) -> Tensor:
    """All numbers of some tensors as one float32 vector."""
    return torch.cat([part.reshape(-1) for part in parts]).float()


class Table:
    """int64 [columns, tensors] in device memory that follows lists on the host.

    In CUDA graph capture nothing is allocated: a table that is right already is left to the graph, one that is not goes
    into spare memory with a copy that the graph repeats. Either way later steps outside of the graph do not touch it.
    """

    SPARES = 8  # steps that one capture can hold with new addresses

    def __init__(self, columns: int, tensors: int, device: torch.device) -> None:
        self._columns: list[list[int] | None] = [None] * columns
        self._host = np.zeros((columns, tensors), dtype=np.int64)
        self._device = device
        self._table = torch.empty(columns, tensors, dtype=torch.int64, device=device)
        self._valid = False  # the device has what the host has
        self._of_graph = False  # the table belongs to a captured graph
        self._spares: list[tuple[Tensor, Tensor]] = []
        self._kept: list[Tensor] = []  # graphs read them

    def follow(self, columns: dict[int, list[int]]) -> Tensor:
        """The table, holding `columns` and what it was given for the others before.

        Raises:
            RuntimeError: under graph capture, there was no ordinary step to prepare for it.
        """
        for index, values in columns.items():
            if self._columns[index] != values:
                self._columns[index] = values
                self._host[index] = values
                self._valid = False
        if self._device.type != "cuda":
            if not self._valid:
                self._table.copy_(torch.from_numpy(self._host))
                self._valid = True
            return self._table
        if torch.cuda.is_current_stream_capturing():
            if not self._valid:
                self._send_in_capture()
            self._of_graph = True
            return self._table
        if not self._valid:
            if self._of_graph:
                self._kept.append(self._table)
                self._table, self._of_graph = torch.empty_like(self._table), False
            # From pinned memory of torch's cache, which it takes back when the copy is done.
            self._table.copy_(torch.from_numpy(self._host).pin_memory(), non_blocking=True)
            self._valid = True
        while len(self._spares) < self.SPARES:
            self._spares.append(
                (
                    torch.empty(self._host.shape, dtype=torch.int64, device="cpu", pin_memory=True),
                    torch.empty_like(self._table),
                )
            )
        return self._table

    def _send_in_capture(self) -> None:
        if not self._spares:
            raise RuntimeError(
                "addresses of parameters, gradients or state are not on the device yet, and graph capture cannot send "
                f"them: run an ordinary optimizer step before each capture, and capture at most {self.SPARES} at once"
            )
        host, table = self._spares.pop()
        host.numpy()[:] = self._host
        table.copy_(host, non_blocking=True)
        self._kept += [self._table, host]
        self._table = table  # has its values when the graph runs: not valid outside of it


def _same_order(tensor: Tensor, order: Sequence[int]) -> bool:
    """Whether a tensor lies in memory like one with strides `order`."""
    found = tensor.stride()
    return found == order or all(a == b or size == 1 for a, b, size in zip(found, order, tensor.shape, strict=True))


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


_dtype = operator.attrgetter("dtype")


def _kinds(tensors: Sequence[Tensor], what: str) -> list[int]:
    try:
        return list(map(DTYPES.__getitem__, map(_dtype, tensors)))
    except KeyError as error:
        raise TypeError(
            f"a {what} has dtype {error.args[0]}; fused kernels take {', '.join(map(str, DTYPES))}: "
            f"use backend='reference'"
        ) from None


def _one_kind(kinds: Sequence[int]) -> int:
    return kinds[0] if len(set(kinds)) == 1 else MIXED


def _bits(values: Sequence[float]) -> list[int]:
    return np.asarray(values, dtype=np.float64).view(np.int64).tolist()


class Chunks:
    """How tensors are cut for the programs of a launch.

    Args:
        numels: sizes of the tensors.
        sizes: parameters of a chunk of each tensor.
        device: of the tensors.

    Attributes:
        counts: chunks of each tensor; firsts: the first one's index; total: of all.
        offsets: of each tensor in the flat updates.
        of: int32 [total], the tensor of each chunk.
    """

    def __init__(self, numels: Sequence[int], sizes: list[int], device: torch.device) -> None:
        self.sizes = sizes
        self.counts = [-(-n // size) for n, size in zip(numels, self.sizes, strict=True)]
        self.firsts = list(itertools.accumulate(self.counts, initial=0))[:-1]
        self.offsets = list(itertools.accumulate(numels, initial=0))[:-1]
        self.total = sum(self.counts)
        self.of = torch.from_numpy(np.repeat(np.arange(len(numels), dtype=np.int32), self.counts)).to(device)


class Advance:
    """What `advance` keeps between steps over tensors of the same sizes."""

    def __init__(self, stages: Stages, meta: MetaParams, hidden: Sequence[Tensor], sizes: list[int]) -> None:
        device, tensors = hidden[0].device, len(hidden)
        self.sizes, self.tensors = sizes, tensors
        self.compact = hidden[0].dtype == torch.int16  # the format of the state
        self.meta, self.packed = meta, stages.packed(meta)
        self.chunks = Chunks(sizes, stages.chunk_sizes(sizes), device)
        self.table = Table(len(AdvanceColumn), tensors, device)
        self.table.follow(
            {
                AdvanceColumn.SIZE: sizes,
                AdvanceColumn.OFFSET: self.chunks.offsets,
                AdvanceColumn.CHUNK_FIRST: self.chunks.firsts,
                AdvanceColumn.CHUNK_COUNT: self.chunks.counts,
                AdvanceColumn.CHUNK_SIZE: self.chunks.sizes,
            }
        )
        self.shared = torch.zeros(tensors, stages.shared_size(), dtype=torch.float32, device=device)
        self.partials = torch.empty(self.chunks.total, PARTIALS, dtype=torch.float32, device=device)
        self.tickets = torch.zeros(tensors, dtype=torch.int32, device=device)
        self.one = torch.ones((), dtype=torch.float32, device=device)
        self.state = Followed()
        self.maximize: Sequence[bool] = []
        self.orders: list[tuple[int, ...]] = []  # strides of each tensor's state

    def follow(
        self,
        grads: Sequence[Tensor],
        hidden: Sequence[Tensor],
        state: dict[int, Sequence[Tensor]],
        numel: list[int],
        maximize: Sequence[bool],
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Put this step's addresses into the table.

        Returns:
            The gradients, those copied that lay otherwise than their state; the table; their dtype or MIXED.
        """
        self.state.stayed(hidden, *state.values())
        columns = {AdvanceColumn.NUMEL: numel, **self.state.changed(state)}
        if AdvanceColumn.HIDDEN in columns:
            self.orders = [row.stride()[1:] for row in hidden]
        if maximize != self.maximize:
            self.maximize = list(maximize)
            columns[AdvanceColumn.SIGN] = [-1 if climb else 1 for climb in maximize]
        if list(map(Tensor.stride, grads)) != self.orders:
            grads = [
                grad
                if _same_order(grad, order)
                else torch.empty_strided(grad.shape, order, dtype=grad.dtype, device=grad.device).copy_(grad)
                for grad, order in zip(grads, self.orders, strict=True)
            ]
        kinds = _kinds(grads, "gradient")
        columns |= {AdvanceColumn.GRAD: addresses(grads), AdvanceColumn.GRAD_DTYPE: kinds}
        return grads, self.table.follow(columns), _one_kind(kinds)


class Rates:
    """The lrs in two columns of a table: tensors on the device by address, as they may change in a captured graph."""

    def __init__(self, column: int, dtype_column: int, device: torch.device) -> None:
        self._column, self._dtype_column, self._device = column, dtype_column, device
        self._last: Sequence[float | Tensor] = []  # without tensors, or empty

    def changed(self, lr: Sequence[float | Tensor]) -> dict[int, list[int]]:
        """The two columns, where they may not be as in the last call."""
        plain = set(map(type, lr)) <= {float, int}
        if plain and lr == self._last:
            return {}
        self._last = list(lr) if plain else []
        there = [rate if isinstance(rate, Tensor) and rate.device == self._device else None for rate in lr]
        rates = _bits([0.0 if tensor is not None else float(rate) for rate, tensor in zip(lr, there, strict=True)])
        kinds = [-1] * len(rates)
        for index, tensor in enumerate(there):
            if tensor is not None:
                rates[index], kinds[index] = tensor.data_ptr(), _kinds([tensor], "tensor lr")[0]
        return {self._column: rates, self._dtype_column: kinds}


class Summarise:
    """What `summarise` keeps between steps over the same number of tensors."""

    def __init__(self, stages: Stages, meta: MetaParams, sums: Tensor) -> None:
        device, self.tensors = sums.device, len(sums)
        self.meta, self.packed = meta, stages.packed(meta)
        self.columns = sums_columns(meta.config)
        self.table = Table(len(SummaryColumn), self.tensors, device)
        self.scratch = torch.zeros(self.tensors, stages.summary_size(meta.config), dtype=torch.float32, device=device)
        self.ticket = torch.zeros((), dtype=torch.int32, device=device)
        self.state = Followed()
        self.lr = Rates(SummaryColumn.LR, SummaryColumn.LR_DTYPE, device)

    def follow(self, state: dict[int, Sequence[Tensor]], numel: list[int], lr: Sequence[float | Tensor]) -> Tensor:
        """Put this step's addresses and rates into the table; returns it."""
        self.state.stayed(*state.values())
        columns = {SummaryColumn.NUMEL: numel, **self.state.changed(state), **self.lr.changed(lr)}
        return self.table.follow(columns)


class Apply:
    """What `apply` keeps between steps over tensors of the same sizes."""

    def __init__(self, stages: Stages, params: Sequence[Tensor], sizes: list[int]) -> None:
        device = params[0].device
        self.sizes, self.tensors = sizes, len(params)
        self.state = Followed()
        self.weight_decay: Sequence[float] = []
        self.lr = Rates(ApplyColumn.LR, ApplyColumn.LR_DTYPE, device)
        self.compact_strides: list[tuple[int, ...]] = []  # of parameters that were all found to have no gaps
        self.chunks = Chunks(sizes, stages.chunk_sizes(sizes), device)
        self.table = Table(len(ApplyColumn), len(params), device)
        self.table.follow(
            {
                ApplyColumn.SIZE: sizes,
                ApplyColumn.OFFSET: self.chunks.offsets,
                ApplyColumn.CHUNK_FIRST: self.chunks.firsts,
                ApplyColumn.CHUNK_SIZE: self.chunks.sizes,
            }
        )

    def follow(
        self,
        params: Sequence[Tensor],
        true_param: Sequence[Tensor],
        log_lr_mean: Sequence[Tensor],
        lr: Sequence[float | Tensor],
        weight_decay: Sequence[float],
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Put this step's addresses and rates into the table.

        Returns:
            The parameters, those copied that have gaps; the table; their dtype or MIXED.
        """
        compact = list(params)
        if list(map(Tensor.stride, params)) != self.compact_strides:
            compact = [
                param
                if param.is_contiguous() or param.stride() == strides(param, None)
                else torch.empty_like(param).copy_(param)
                for param in params
            ]
            self.compact_strides = list(map(Tensor.stride, params)) if are(compact, params) else []
        kinds = _kinds(params, "parameter")
        self.state.stayed(log_lr_mean, true_param)
        columns = {
            ApplyColumn.PARAM: addresses(compact),
            ApplyColumn.PARAM_DTYPE: kinds,
            **self.state.changed({ApplyColumn.TRUE_PARAM: true_param, ApplyColumn.LOG_LR_MEAN: log_lr_mean}),
        }
        if weight_decay != self.weight_decay:
            self.weight_decay = list(weight_decay)
            columns[ApplyColumn.WEIGHT_DECAY] = _bits(weight_decay)
        columns |= self.lr.changed(lr)
        return compact, self.table.follow(columns), _one_kind(kinds)


Kept = TypeVar("Kept", Advance, Summarise, Apply)


class Stages:
    """The three stages of a backend; a subclass packs meta-parameters for its kernels and launches them."""

    name: str  # in lopt.backends.BACKENDS

    def __init__(self) -> None:
        self._kept = WeakTensorKeyDictionary()  # buffer of a stage -> Advance, Summarise or Apply
        self._packed: list[tuple[MetaParams, Any]] = []  # the last used first

    def functions(self) -> tuple[Callable[..., None], ...]:
        """`advance`, `summarise`, `apply` and `release` as a backend's module has them."""
        traced = ops.traced(self.name)
        return traced(self.advance), traced(self.summarise), traced(self.apply), self.release

    def pack(self, meta: MetaParams) -> Any:
        """Meta-parameters as the kernels read them, on their device."""
        raise NotImplementedError

    def chunk_sizes(self, numels: Sequence[int]) -> list[int]:
        """Parameters of a chunk of each tensor, given the tensors' sizes."""
        raise NotImplementedError

    def shared_size(self) -> int:
        """Numbers that the parameters of a tensor share, written by the first launch."""
        raise NotImplementedError

    def summary_size(self, config: HRNNConfig) -> int:
        """Numbers of scratch memory that `summarise` wants per tensor."""
        raise NotImplementedError

    def launch_advance(
        self,
        kept: Advance,
        table: Tensor,
        kind: int,
        global_hidden: Tensor,
        grad_scale: Tensor | None,
        skip: Tensor,
        update: Tensor,
        attention_update: Tensor | None,
        sums: Tensor,
    ) -> None:
        """Launch stage 1; `kind` is the dtype of all gradients, or MIXED."""
        raise NotImplementedError

    def launch_summarise(
        self,
        kept: Summarise,
        table: Tensor,
        sums: Tensor,
        global_hidden: Tensor,
        update: Tensor,
        places: Tensor | None,
        skip: Tensor,
        scale: Tensor,
    ) -> None:
        """Launch stage 2."""
        raise NotImplementedError

    def launch_apply(
        self,
        kept: Apply,
        table: Tensor,
        kind: int,
        update: Tensor,
        attention_update: Tensor | None,
        scale: Tensor,
        skip: Tensor,
    ) -> None:
        """Launch stage 3; `kind` is the dtype of all parameters, or MIXED."""
        raise NotImplementedError

    def _keep(self, buffer: Tensor, fits: Callable[[Any], bool], make: Callable[[], Kept]) -> Kept:
        kept = self._kept.get(buffer)
        if kept is None or not fits(kept):
            kept = self._kept[buffer] = make()
        return kept

    def release(self, *buffers: Tensor) -> None:
        """See `lopt.backends.reference.release`."""
        for buffer in buffers:
            if (kept := self._kept.get(buffer)) is not None:
                kept.state.release()

    def packed(self, meta: MetaParams) -> Any:
        """What `pack` makes of meta-parameters, once for those in use: it costs many launches and waits for them."""
        known = next((entry for entry in self._packed if entry[0] is meta), None) or (meta, self.pack(meta))
        self._packed = [known, *(entry for entry in self._packed if entry[0] is not meta)][:PACKED]
        return known[1]

    def _follow_meta(self, kept: Advance | Summarise, meta: MetaParams) -> None:
        if kept.meta is not meta:
            kept.meta, kept.packed = meta, self.packed(meta)

    @torch.no_grad()
    def advance(
        self,
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
        numel: list[int],
        maximize: Sequence[bool],
        grad_scale: Tensor | None,
        skip: Tensor,
        update: Tensor,
        attention_update: Tensor | None,
        sums: Tensor,
    ) -> None:
        """Stage 1, see lopt.backends.reference.advance."""
        sizes = list(map(Tensor.numel, grads))
        state: dict[int, Sequence[Tensor]] = {
            AdvanceColumn.HIDDEN: hidden,
            AdvanceColumn.ACCUM: accum,
            AdvanceColumn.MS: ms,
            AdvanceColumn.LOG_LR: log_lr,
            AdvanceColumn.STEP: step,
            AdvanceColumn.TENSOR_HIDDEN: tensor_hidden or step,
            AdvanceColumn.LOG_LR_MEAN: log_lr_mean,
            AdvanceColumn.DAMPING: damping or step,
            AdvanceColumn.DISTANCE: distance or step,
        }
        with torch.cuda.device_of(sums):
            kept = self._keep(
                sums,
                lambda kept: (
                    (kept.meta is meta or kept.meta.config == meta.config)
                    and kept.sizes == sizes
                    and kept.compact == (hidden[0].dtype == torch.int16)
                ),
                lambda: Advance(self, meta, hidden, sizes),
            )
            self._follow_meta(kept, meta)
            grads, table, kind = kept.follow(grads, hidden, state, numel, maximize)
            if grad_scale is not None:
                grad_scale = grad_scale.to(torch.float32)
            self.launch_advance(kept, table, kind, global_hidden, grad_scale, skip, update, attention_update, sums)

    @torch.no_grad()
    def summarise(
        self,
        meta: MetaParams,
        sums: Tensor,
        tensor_hidden: Sequence[Tensor],
        global_hidden: Tensor,
        log_lr_mean: Sequence[Tensor],
        damping: Sequence[Tensor],
        distance: Sequence[Tensor],
        step: Sequence[Tensor],
        *,
        numel: list[int],
        update: Tensor,
        places: Tensor | None,
        lr: Sequence[float | Tensor] | Tensor,
        skip: Tensor,
        scale: Tensor,
    ) -> None:
        """Stage 2, see lopt.backends.reference.summarise. An operator gives `lr` as one tensor."""
        state: dict[int, Sequence[Tensor]] = {
            SummaryColumn.TENSOR_HIDDEN: tensor_hidden or step,
            SummaryColumn.LOG_LR_MEAN: log_lr_mean,
            SummaryColumn.DAMPING: damping or step,
            SummaryColumn.DISTANCE: distance or step,
            SummaryColumn.STEP: step,
        }
        with torch.cuda.device_of(sums):
            kept = self._keep(
                scale,
                lambda kept: (kept.meta is meta or kept.meta.config == meta.config) and kept.tensors == len(sums),
                lambda: Summarise(self, meta, sums),
            )
            self._follow_meta(kept, meta)
            table = kept.follow(state, numel, list(lr))
            self.launch_summarise(kept, table, sums, global_hidden, update, places, skip, scale)

    @torch.no_grad()
    def apply(
        self,
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
        """Stage 3, see lopt.backends.reference.apply. An operator gives `lr` as one tensor."""
        sizes = list(map(Tensor.numel, params))
        with torch.cuda.device_of(update):
            kept = self._keep(update, lambda kept: kept.sizes == sizes, lambda: Apply(self, params, sizes))
            compact, table, kind = kept.follow(params, true_param, log_lr_mean, list(lr), weight_decay)
            self.launch_apply(kept, table, kind, update, attention_update, scale, skip)
            for param, moved in zip(params, compact, strict=True):
                if moved is not param:
                    param.copy_(moved)
