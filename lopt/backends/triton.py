"""The three stages as launches of the Triton kernels in kernels/hrnn.py, on a GPU.

A stage (see lopt.backends.reference) is one launch, `advance` two: four launches a step however many tensors there are.
What a launch needs from one step to the next, packed meta-parameters, tables of addresses and scratch memory, is kept
with the buffer that the stage writes (`sums`, `scale`, `update`) and freed with it. Tables are compared on the host
with what they have to hold and sent again where an address changed, as gradients' do, without synchronisation.

With TRITON_INTERPRET=1 in the environment before Triton is imported, the kernels run in Triton's interpreter, slowly,
on CPU tensors: that is how tests/kernels/test_hrnn.py checks them without a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
import operator
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lopt.backends import ops
from lopt.backends.reference import sums_columns
from lopt.config import DIRECTION_EPS, FIXED_GRAD_DECAY, FIXED_SCALE_DECAY, GRADIENT_LIMIT, HRNNConfig
from lopt.metaparams import MetaParams
from lopt.state import strides

KINDS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # as in lopt.kernels.hrnn
MIXED = 4


class Tile(NamedTuple):
    """What a kernel handles at a time: parameters, by how many warps, with at most how many registers per thread."""

    block: int
    warps: int
    registers: int | None


# Of `advance`: two parameters per thread, three programs per multiprocessor; `python -m lopt.bench.sass` shows others.
TILE = Tile(256, 4, 168)
STREAM = Tile(1024, 4, None)  # of the kernels that only pass over memory
CHUNK = 2048, 16384  # fewest and most parameters: enough to pay for adding up the sums, and not too many partial sums
CHUNKS_PER_TENSOR = 2048  # beyond which chunks grow

STATE_FORMATS = ("float32",)
NEEDED = {
    "timescales": 4,
    "log_ms_features": True,
    "extreme_indicator": False,
    "lr_shortcut": False,
    "multiple_scale_decays": False,
    "dynamic_output_scale": True,
}  # what the kernels are written for; other options may have any value
LARGEST_LEVEL = 1024  # hidden units

LOG2_E = 1 / math.log(2)


def interpreted() -> bool:
    """Whether Triton's interpreter is asked for."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unusable() -> str | None:
    """Why this backend cannot run on this machine, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install lopt[triton]"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU"
    major, minor = torch.cuda.get_device_capability()
    if torch.version.hip is not None or major < 7:
        return (
            f"its kernels are for Nvidia GPUs of compute capability 7.0 or later, and this is "
            f"{torch.cuda.get_device_name()} ({major}.{minor})"
        )
    return None


def unsupported(config: HRNNConfig) -> str | None:
    """Why this backend cannot run a configuration, or None."""
    obstacles = [
        f"{name}={getattr(config, name)!r} instead of {value!r}"
        for name, value in NEEDED.items()
        if getattr(config, name) != value
    ]
    if config.hidden_size != 10:
        obstacles.append(f"level_sizes[0]={config.hidden_size} instead of 10")
    if max(config.level_sizes) > LARGEST_LEVEL:
        obstacles.append(f"level_sizes={config.level_sizes} beyond {LARGEST_LEVEL}")
    if config.relative_log_lr is None:
        obstacles.append("relative_log_lr=None instead of 'problem' or 'tensor'")
    return f"its kernels do not do {', '.join(obstacles)}" if obstacles else None


def _kernels() -> ModuleType:
    """The kernels; importing them needs Triton."""
    return importlib.import_module("lopt.kernels.hrnn")


class Packed:
    """Meta-parameters as the kernels read them, computed where they are.

    Attributes:
        weights: [720] of the parameter level, see lopt.kernels.hrnn.
        bias: [32], from_tensor: [H1, 32], from_global: [H2, 32]: what is injected into the parameter level.
        levels: the tensor and the global GRU, in the order of `MetaParams.flat`.
    """

    def __init__(self, meta: MetaParams) -> None:
        config = meta.config
        values = {name: tensor.detach().double() for name, tensor in meta.items()}
        zeros = values["direction.weight"].new_zeros
        gates, candidate = (self._reorder(config, values[f"level0.{part}.weight"]) for part in ("gates", "candidate"))
        reset, update = (gates * -LOG2_E).split(10, 1)
        candidate = candidate * (-2 * LOG2_E)

        def decay(name: str, fixed: float) -> tuple[Tensor, Tensor]:
            if f"{name}.weight" in values:
                return values[f"{name}.weight"] * -LOG2_E, values[f"{name}.bias"] * -LOG2_E
            return zeros(10), zeros(()) - math.log(fixed / (1 - fixed)) * LOG2_E

        grad_decay, grad_decay_bias = decay("grad_decay", FIXED_GRAD_DECAY)
        scale_decay, scale_decay_bias = decay("scale_decay", FIXED_SCALE_DECAY)
        offset = values["log_step.offset"]
        constants = [config.ms_eps, config.rms_eps, config.log_lr_min, config.log_lr_max]
        self.weights = self._join(
            [
                torch.cat([reset, zeros(1, 10)]).reshape(22, 5, 2).transpose(0, 1),
                torch.cat([update.reshape(21, 5, 2), candidate.reshape(21, 5, 2)], 2).transpose(0, 1),
                torch.stack(
                    [
                        values["direction.weight"],
                        values["log_lr.weight"],
                        values.get("attention.weight", zeros(10)),
                        zeros(10),
                    ],
                    1,
                ),
                torch.stack([grad_decay, scale_decay], 1),
                values.get("direction.shortcut", zeros(4)),
                values.get("attention.shortcut", zeros(4)),
                grad_decay_bias,
                scale_decay_bias,
                values["log_lr.bias"],
                torch.sigmoid(values["log_lr.momentum"]),
                offset * LOG2_E,
                torch.exp(-offset),
                *(zeros(()) + value for value in constants),
                zeros(2),
            ]
        )
        bias = torch.cat([values["level0.gates.bias"], values["level0.candidate.bias"]])
        injections = []
        for level, size in ((1, config.tensor_size), (2, config.global_size)):
            name = f"level0.from_level{level}"
            if size:
                bias = bias + values[f"{name}.bias"]
            injections.append(self._inject(values[f"{name}.weight"] if size else zeros(1, 30)))
        self.bias = self._inject(bias[None])
        self.from_tensor, self.from_global = injections
        self.levels = self._join(
            [
                zeros(1) if not config.tensor_size else zeros(0),
                *(
                    value
                    for name, value in values.items()
                    if name.startswith(("level1.", "level2.")) and not name.endswith(".init")
                ),
            ]
        )

    @staticmethod
    def _join(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.reshape(-1) for part in parts]).float()

    @staticmethod
    def _reorder(config: HRNNConfig, weight: Tensor) -> Tensor:
        """Rows of a weight of the parameter GRU, features first, as the kernel has its inputs: [21, outputs]."""
        products = 3 if config.gradient_products else 0
        scaled, product, log_ms, relative_log_lr, hidden = weight.split([4, products, 4, 1, 10])
        # The log mean squares sum to 0 over the timescales: relative to the last one's they are one fewer.
        log_ms = (log_ms - log_ms.mean(0))[:3] * (-2 * math.log(2))
        return torch.cat(
            [hidden, scaled, log_ms, relative_log_lr, product, weight.new_zeros(3 - products, weight.shape[1])]
        )

    @staticmethod
    def _inject(rows: Tensor) -> Tensor:
        """Columns reset | update | candidate, 10 each, in the order and scale of lopt.kernels.hrnn.BIAS: [rows, 32]."""
        reset, update, candidate = (rows * -LOG2_E).split(10, 1)
        pairs = torch.cat([update.reshape(-1, 5, 2), 2 * candidate.reshape(-1, 5, 2)], 2)
        return torch.cat([reset, rows.new_zeros(len(rows), 2), pairs.reshape(-1, 20)], 1).float().contiguous()


class Table:
    """int64 [columns, tensors] in device memory that follows lists on the host.

    In CUDA graph capture nothing is allocated: a table that is right already is left to the graph, one that is not goes
    into spare memory with a copy that the graph repeats. Either way later steps outside of the graph do not touch it.
    """

    SPARES = 2

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
                (torch.empty(self._host.shape, dtype=torch.int64, pin_memory=True), torch.empty_like(self._table))
            )
        return self._table

    def _send_in_capture(self) -> None:
        if not self._spares:
            raise RuntimeError(
                "addresses of parameters, gradients or state are not on the device yet, and graph capture cannot send "
                "them: run an ordinary optimizer step before each capture"
            )
        host, table = self._spares.pop()
        host.numpy()[:] = self._host
        table.copy_(host, non_blocking=True)
        self._kept += [self._table, host]
        self._table = table  # has its values when the graph runs: not valid outside of it


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _is(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return len(left) == len(right) and all(map(operator.is_, left, right))


def _same_order(tensor: Tensor, order: Sequence[int]) -> bool:
    """Whether a tensor lies in memory like one with strides `order`."""
    found = tensor.stride()
    return found == order or all(a == b or size == 1 for a, b, size in zip(found, order, tensor.shape, strict=True))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


_dtype = operator.attrgetter("dtype")


def _kinds(tensors: Sequence[Tensor], what: str) -> list[int]:
    try:
        return list(map(KINDS.__getitem__, map(_dtype, tensors)))
    except KeyError as error:
        raise TypeError(
            f"a {what} has dtype {error.args[0]}; the Triton backend takes {', '.join(map(str, KINDS))}: "
            f"use backend='reference'"
        ) from None


class Followed:
    """Which tensors a table's columns held the addresses of; they are the optimizer's own, so they do not move."""

    def __init__(self) -> None:
        self._columns: dict[int, list[Tensor]] = {}

    def changed(self, columns: dict[int, Sequence[Tensor]]) -> dict[int, list[int]]:
        """Addresses for the columns that other tensors have come into."""
        changed = {}
        for index, tensors in columns.items():
            if not _is(tensors, self._columns.get(index, [])):
                self._columns[index] = list(tensors)
                changed[index] = _addresses(tensors)
        return changed


def _one_kind(kinds: Sequence[int]) -> int:
    return kinds[0] if len(set(kinds)) == 1 else MIXED


def _bits(values: Sequence[float]) -> list[int]:
    return np.asarray(values, dtype=np.float64).view(np.int64).tolist()


class Chunks:
    """How tensors are cut for the programs of a launch.

    Attributes:
        sizes: parameters of a chunk of each tensor; counts: chunks of each; firsts: the first one's index.
        offsets: of each tensor in the flat updates.
        of: int32 [total], the tensor of each chunk.
    """

    def __init__(self, numels: Sequence[int], device: torch.device) -> None:
        least, most = CHUNK
        self.sizes = [min(max(_round_up(-(-n // CHUNKS_PER_TENSOR), TILE.block), least), most) for n in numels]
        self.counts = [-(-n // size) for n, size in zip(numels, self.sizes, strict=True)]
        self.firsts = list(itertools.accumulate(self.counts, initial=0))[:-1]
        self.offsets = list(itertools.accumulate(numels, initial=0))[:-1]
        self.total = sum(self.counts)
        self.of = torch.from_numpy(np.repeat(np.arange(len(numels), dtype=np.int32), self.counts)).to(device)


class Advance:
    """What `advance` keeps between steps over tensors of the same sizes."""

    def __init__(self, meta: MetaParams, hidden: Sequence[Tensor], sizes: list[int]) -> None:
        device, tensors = hidden[0].device, len(hidden)
        kernels = self.kernels = _kernels()
        self.sizes, self.tensors = sizes, tensors
        self.meta, self.packed = meta, Packed(meta)
        self.chunks = Chunks(sizes, device)
        self.table = Table(kernels.ADVANCE_COLUMNS.value, tensors, device)
        self.table.follow(
            {
                kernels.SIZE.value: sizes,
                kernels.OFFSET.value: self.chunks.offsets,
                kernels.CHUNK_FIRST.value: self.chunks.firsts,
                kernels.CHUNK_COUNT.value: self.chunks.counts,
                kernels.CHUNK_SIZE.value: self.chunks.sizes,
            }
        )
        self.shared = torch.zeros(tensors, kernels.SHARED.value, device=device)
        self.partials = torch.empty(self.chunks.total, kernels.PARTIALS.value, device=device)
        self.tickets = torch.zeros(tensors, dtype=torch.int32, device=device)
        self.one = torch.ones((), device=device)
        self.state = Followed()
        self.maximize: Sequence[bool] = []
        self.orders: list[tuple[int, ...]] = []  # strides of each tensor's state

    def run(
        self,
        meta: MetaParams,
        grads: Sequence[Tensor],
        hidden: Sequence[Tensor],
        state: dict[int, Sequence[Tensor]],
        global_hidden: Tensor,
        numel: list[int],
        maximize: Sequence[bool],
        grad_scale: Tensor | None,
        skip: Tensor,
        update: Tensor,
        attention_update: Tensor | None,
        sums: Tensor,
    ) -> None:
        kernels, config, table = self.kernels, meta.config, self.table
        if meta is not self.meta:
            self.meta, self.packed = meta, Packed(meta)
        columns = {kernels.NUMEL.value: numel, **self.state.changed(state)}
        if kernels.HIDDEN_STATE.value in columns:
            self.orders = [row.stride()[1:] for row in hidden]
        if maximize != self.maximize:
            self.maximize = list(maximize)
            columns[kernels.SIGN.value] = [-1 if climb else 1 for climb in maximize]
        if list(map(Tensor.stride, grads)) != self.orders:
            grads = [
                grad
                if _same_order(grad, order)
                else torch.empty_strided(grad.shape, order, dtype=grad.dtype, device=grad.device).copy_(grad)
                for grad, order in zip(grads, self.orders, strict=True)
            ]
        kinds = _kinds(grads, "gradient")
        columns |= {kernels.GRAD.value: _addresses(grads), kernels.GRAD_KIND.value: kinds}
        values, kind = table.follow(columns), _one_kind(kinds)
        scale = self.one if grad_scale is None else grad_scale.to(torch.float32)
        attention = update if attention_update is None else attention_update
        packed, chunks = self.packed, self.chunks
        kernels.prepare[(self.tensors + chunks.total,)](
            values,
            self.tensors,
            chunks.of,
            self.shared,
            packed.bias,
            packed.from_tensor,
            packed.from_global,
            global_hidden,
            skip,
            scale,
            LIMIT=GRADIENT_LIMIT,
            TENSOR_SIZE=config.tensor_size,
            GLOBAL_SIZE=config.global_size,
            PROBLEM=config.relative_log_lr == "problem",
            KIND=kind,
            BLOCK=STREAM.block,
            num_warps=STREAM.warps,
            enable_fp_fusion=True,
        )
        count = kernels.ROWS if config.gradient_products else kernels.ROWS_WITHOUT_PRODUCTS
        kernels.advance[(chunks.total,)](
            values,
            self.tensors,
            chunks.of,
            packed.weights,
            self.shared,
            skip,
            scale,
            update,
            attention,
            self.partials,
            self.tickets,
            sums,
            KIND=kind,
            ATTENTION=int(config.attention),
            GRADIENT_SHORTCUT=config.gradient_shortcut,
            COUNT=count.value,
            BLOCK=TILE.block,
            THREADS=TILE.block if interpreted() else 32 * TILE.warps,
            num_warps=TILE.warps,
            maxnreg=TILE.registers,
            enable_fp_fusion=True,
        )


class Summarise:
    """What `summarise` keeps between steps over the same number of tensors."""

    def __init__(self, meta: MetaParams, sums: Tensor) -> None:
        config, device, tensors = meta.config, sums.device, len(sums)
        kernels = self.kernels = _kernels()
        self.tensors = tensors
        self.meta, self.packed = meta, Packed(meta)
        widest = max(config.tensor_input_size, config.tensor_size, config.global_size)
        self.width = 1 << (widest - 1).bit_length()
        self.table = Table(kernels.SUMMARY_COLUMNS.value, tensors, device)
        self.scratch = torch.empty(tensors, 2, self.width, device=device)
        self.ticket = torch.zeros((), dtype=torch.int32, device=device)
        self.columns = sums_columns(config)
        self.state = Followed()

    def run(
        self,
        meta: MetaParams,
        sums: Tensor,
        state: dict[int, Sequence[Tensor]],
        global_hidden: Tensor,
        numel: list[int],
        skip: Tensor,
        scale: Tensor,
    ) -> None:
        kernels, config = self.kernels, meta.config
        if meta is not self.meta:
            self.meta, self.packed = meta, Packed(meta)
        columns = {kernels.SUMMARY_NUMEL.value: numel, **self.state.changed(state)}
        indices = self.columns
        kernels.summarise[(self.tensors,)](
            self.table.follow(columns),
            self.tensors,
            sums,
            self.packed.levels,
            global_hidden,
            skip,
            scale,
            self.scratch,
            self.ticket,
            EPS=DIRECTION_EPS,
            INPUTS=config.tensor_input_size,
            COLUMNS=indices.count,
            SQUARES=indices.direction,
            ATTENTION=int(config.attention),
            TENSOR_SIZE=config.tensor_size,
            GLOBAL_SIZE=config.global_size,
            LAST=config.global_input == "last",
            WIDTH=self.width,
            num_warps=4,
            enable_fp_fusion=True,
        )


class Apply:
    """What `apply` keeps between steps over tensors of the same sizes."""

    def __init__(self, params: Sequence[Tensor], sizes: list[int]) -> None:
        device = params[0].device
        kernels = self.kernels = _kernels()
        self.sizes, self.tensors = sizes, len(params)
        self.state = Followed()
        self.weight_decay: Sequence[float] = []
        self.lr: Sequence[float | Tensor] = []  # without tensors, or empty
        self.compact_strides: list[tuple[int, ...]] = []  # of parameters that were all found to have no gaps
        self.chunks = Chunks(sizes, device)
        self.table = Table(kernels.APPLY_COLUMNS.value, len(params), device)
        self.table.follow(
            {
                kernels.PARAM_SIZE.value: sizes,
                kernels.PARAM_OFFSET.value: self.chunks.offsets,
                kernels.PARAM_CHUNK_FIRST.value: self.chunks.firsts,
                kernels.PARAM_CHUNK_SIZE.value: self.chunks.sizes,
            }
        )

    def run(
        self,
        params: Sequence[Tensor],
        true_param: Sequence[Tensor],
        update: Tensor,
        attention_update: Tensor | None,
        scale: Tensor,
        log_lr_mean: Sequence[Tensor],
        lr: Sequence[float | Tensor],
        weight_decay: Sequence[float],
        skip: Tensor,
    ) -> None:
        kernels = self.kernels
        compact = list(params)
        if list(map(Tensor.stride, params)) != self.compact_strides:
            compact = [
                param
                if param.is_contiguous() or param.stride() == strides(param, None)
                else torch.empty_like(param).copy_(param)
                for param in params
            ]
            self.compact_strides = list(map(Tensor.stride, params)) if _is(compact, params) else []
        kinds = _kinds(params, "parameter")
        columns = {
            kernels.PARAM.value: _addresses(compact),
            kernels.PARAM_KIND.value: kinds,
            **self.state.changed({kernels.TRUE_PARAM.value: true_param, kernels.PARAM_LOG_LR_MEAN.value: log_lr_mean}),
        }
        if weight_decay != self.weight_decay:
            self.weight_decay = list(weight_decay)
            columns[kernels.WEIGHT_DECAY.value] = _bits(weight_decay)
        plain = set(map(type, lr)) <= {float, int}
        if not plain or lr != self.lr:
            self.lr = list(lr) if plain else []
            columns |= self._rates(lr, update.device)
        values = self.table.follow(columns)
        attention = update if attention_update is None else attention_update
        kernels.apply[(self.chunks.total,)](
            values,
            self.tensors,
            self.chunks.of,
            update,
            attention,
            scale,
            skip,
            KIND=_one_kind(kinds),
            ATTENTION=int(attention_update is not None),
            BLOCK=STREAM.block,
            num_warps=STREAM.warps,
            enable_fp_fusion=True,
        )
        for param, moved in zip(params, compact, strict=True):
            if moved is not param:
                param.copy_(moved)

    def _rates(self, lr: Sequence[float | Tensor], device: torch.device) -> dict[int, list[int]]:
        """Columns of the table: tensors on the device by address, since they may change in a captured graph."""
        there = [rate if isinstance(rate, Tensor) and rate.device == device else None for rate in lr]
        rates = _bits([0.0 if tensor is not None else float(rate) for rate, tensor in zip(lr, there, strict=True)])
        kinds = [-1] * len(rates)
        for index, tensor in enumerate(there):
            if tensor is not None:
                rates[index], kinds[index] = tensor.data_ptr(), _kinds([tensor], "tensor lr")[0]
        return {self.kernels.LR.value: rates, self.kernels.LR_KIND.value: kinds}


_kept = WeakTensorKeyDictionary()  # buffer of a stage -> Advance, Summarise or Apply
Kept = TypeVar("Kept", Advance, Summarise, Apply)


def _keep(buffer: Tensor, fits: Callable[[Any], bool], make: Callable[[], Kept]) -> Kept:
    kept = _kept.get(buffer)
    if kept is None or not fits(kept):
        kept = _kept[buffer] = make()
    return kept


@torch.no_grad()
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
    *,
    numel: list[int],
    maximize: Sequence[bool],
    grad_scale: Tensor | None,
    skip: Tensor,
    update: Tensor,
    attention_update: Tensor | None,
    sums: Tensor,
) -> None:
    """Stage 1, see lopt.backends.reference.advance. At a non-finite gradient a `skip` of 0 becomes 1."""
    if torch.compiler.is_compiling():
        ops.advance(
            meta,
            grads,
            hidden,
            accum,
            ms,
            log_lr,
            step,
            tensor_hidden,
            global_hidden,
            log_lr_mean,
            numel=numel,
            maximize=maximize,
            grad_scale=grad_scale,
            skip=skip,
            update=update,
            attention_update=attention_update,
            sums=sums,
        )
        return
    sizes = list(map(Tensor.numel, grads))
    kept = _keep(
        sums,
        lambda kept: (kept.meta is meta or kept.meta.config == meta.config) and kept.sizes == sizes,
        lambda: Advance(meta, hidden, sizes),
    )
    kernels = kept.kernels
    state = {
        kernels.HIDDEN_STATE.value: hidden,
        kernels.ACCUM.value: accum,
        kernels.MS.value: ms,
        kernels.LOG_LR.value: log_lr,
        kernels.STEP.value: step,
        kernels.TENSOR_HIDDEN.value: tensor_hidden or step,
        kernels.LOG_LR_MEAN.value: log_lr_mean,
    }
    with torch.cuda.device_of(sums):
        kept.run(
            meta, grads, hidden, state, global_hidden, numel, maximize, grad_scale, skip, update, attention_update, sums
        )


@torch.no_grad()
def summarise(
    meta: MetaParams,
    sums: Tensor,
    tensor_hidden: Sequence[Tensor],
    global_hidden: Tensor,
    log_lr_mean: Sequence[Tensor],
    step: Sequence[Tensor],
    *,
    numel: list[int],
    skip: Tensor,
    scale: Tensor,
) -> None:
    """Stage 2, see lopt.backends.reference.summarise."""
    if torch.compiler.is_compiling():
        ops.summarise(meta, sums, tensor_hidden, global_hidden, log_lr_mean, step, numel=numel, skip=skip, scale=scale)
        return
    kept = _keep(
        scale,
        lambda kept: (kept.meta is meta or kept.meta.config == meta.config) and kept.tensors == len(sums),
        lambda: Summarise(meta, sums),
    )
    kernels = kept.kernels
    state = {
        kernels.SUMMARY_TENSOR_HIDDEN.value: tensor_hidden or step,
        kernels.SUMMARY_LOG_LR_MEAN.value: log_lr_mean,
        kernels.SUMMARY_STEP.value: step,
    }
    with torch.cuda.device_of(sums):
        kept.run(meta, sums, state, global_hidden, numel, skip, scale)


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
    lr: Sequence[float | Tensor] | Tensor,
    weight_decay: Sequence[float],
    skip: Tensor,
) -> None:
    """Stage 3, see lopt.backends.reference.apply. As an operator's kernel it gets `lr` as one tensor."""
    if torch.compiler.is_compiling():
        ops.apply(
            meta,
            params,
            true_param,
            update,
            attention_update,
            scale,
            log_lr_mean,
            lr=lr,
            weight_decay=weight_decay,
            skip=skip,
        )
        return
    sizes = list(map(Tensor.numel, params))
    kept = _keep(update, lambda kept: kept.sizes == sizes, lambda: Apply(params, sizes))
    with torch.cuda.device_of(update):
        kept.run(params, true_param, update, attention_update, scale, log_lr_mean, list(lr), weight_decay, skip)


if torch.cuda.is_available() and not interpreted():
    ops.implement("CUDA", advance=advance, summarise=summarise, apply=apply)
