"""The parameter level for meta-training on a GPU, in Triton: three launches forward, three and a small sum backward.

With TRITON_INTERPRET=1 in the environment before Triton is imported, it runs on CPU tensors, in float64 too: that is
how it is checked without a GPU. Two runs are bitwise equal.

Kernels: kernels/hrnn_meta.py. Tests: tests/kernels/test_hrnn_meta.py.
"""

from __future__ import annotations

import functools
import importlib
import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lopt.backends import coverage, flat, triton
from lopt.backends.flat import GATE_COLUMNS, READ_OUTS, Call, Cotangents, Inputs
from lopt.backends.reference import Advanced
from lopt.backends.triton import Tile
from lopt.config import HRNNConfig

# A parameter per thread; more per thread take more registers than there are. `python -m lopt.bench.sass` shows them.
FORWARD = Tile(128, 4, None)
BACKWARD = Tile(128, 4, 168)
PART = 32  # parameters at a time in the products that are the gradients by the weights
PROGRAMS = 1024  # at most; the same on every device, since sums are made in parts of a program each
OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}  # of the compiler; scratch memory must not be read ahead


def _kernels() -> ModuleType:
    """The kernels; importing them needs Triton."""
    return importlib.import_module("lopt.kernels.hrnn_meta")


class Layout(NamedTuple):
    """How the parameters of a row are spread over lanes; all on the device.

    Attributes:
        slots, owners: int32 [tiles * BLOCK]: the parameter of a lane or -1, and its tensor.
        begins: int64 [T + 1] where each tensor begins. firsts: int64 [T + 1], the first group of each.
        tiles: of a row.
    """

    slots: Tensor
    owners: Tensor
    begins: Tensor
    firsts: Tensor
    tiles: int


class Work(NamedTuple):
    """Tiles of all rows, tiles of a program, programs."""

    total: int
    per_program: int
    programs: int


@functools.lru_cache(maxsize=64)
def _layout(sizes: tuple[int, ...], device: torch.device, block: int) -> Layout:
    group = _kernels().GROUP.value
    lengths = torch.tensor(sizes)
    zero = torch.zeros(1, dtype=torch.int64)
    begins = torch.cat([zero, lengths.cumsum(0)])
    firsts = torch.cat([zero, ((lengths + group - 1) // group).cumsum(0)])
    tiles = math.ceil(int(firsts[-1]) * group / block)
    slots = torch.full((tiles * block,), -1, dtype=torch.int32)
    owners = torch.zeros(tiles * block, dtype=torch.int32)
    owner = torch.repeat_interleave(torch.arange(len(sizes)), lengths)
    index = torch.arange(len(owner))
    lanes = firsts[owner] * group + index - begins[owner]
    slots[lanes], owners[lanes] = index.int(), owner.int()
    return Layout(slots.to(device), owners.to(device), begins.to(device), firsts.to(device), tiles)


@functools.lru_cache(maxsize=8)
def _outer_index(device: torch.device) -> Tensor:
    """Where each packed weight's gradient is in what a program of the derivative stores: int64 [W]."""
    kernels = _kernels()
    inputs, hidden, row = kernels.INPUTS.value, coverage.HIDDEN_SIZE, kernels.MATRIX_ROW.value
    nowhere = row - 1  # a column of zeros
    matrix = torch.arange(inputs + hidden)[:, None] * row + torch.arange(row)
    matrix[inputs:, 2 * hidden :] += hidden * row  # what the candidates read of the hidden state is behind it
    matrix[:, GATE_COLUMNS:] = nowhere
    read_outs = torch.full((kernels.READ_OUTS.value,), nowhere)
    rows = torch.tensor([*range(14), *range(14), *range(10), 14, 15, 14])
    columns = torch.tensor([0] * 14 + [1] * 14 + [2] * 11 + [3, 4])
    read_outs[:READ_OUTS] = row * row + rows * 16 + columns
    return torch.cat([matrix.flatten(), read_outs]).to(device)


def options(call: Call) -> dict[str, Any]:
    """Compile-time arguments that both directions have."""
    return {
        "PRODUCTS": call.products,
        "ATTENTION": int(call.attention),
        "MS_EPS": call.ms_eps,
        "RMS_EPS": call.rms_eps,
    }


class Kernels(flat.Kernels):
    """Launches of the Triton kernels."""

    matrix_row = 32
    read_outs = 44

    def covers(self, config: HRNNConfig, like: Tensor) -> bool:
        if triton.unusable() or coverage.unsupported(config):
            return False
        if triton.interpreted():
            return like.device.type == "cpu" and like.dtype in (torch.float32, torch.float64)
        return like.device.type == "cuda" and like.dtype == torch.float32

    def _share(self, call: Call, layout: Layout, inputs: Inputs, d_sums: Tensor | None) -> Tensor:
        """What the parameters of each row's tensors share: [R * T, SHARED]."""
        kernels, pairs = _kernels(), inputs.relative_to.numel()
        shared = inputs.ms.new_empty(pairs, kernels.SHARED.value)
        kernels.share[(pairs,)](
            layout.begins,
            inputs.injected,
            inputs.relative_to,
            inputs.lowest,
            inputs.highest,
            inputs.ms,
            inputs.relative_to if d_sums is None else d_sums,
            shared,
            call.n,
            len(call.sizes),
            PRODUCTS=call.products,
            ATTENTION=int(call.attention),
            BACKWARD=d_sums is not None,
            num_warps=1,
            **OPTIONS,
        )
        return shared

    def _work(self, layout: Layout, like: Tensor, rows: int, tile: Tile) -> tuple[Tensor, Work]:
        """Memory for the sums over groups, and how the tiles of all rows are shared out."""
        kernels, total = _kernels(), rows * layout.tiles
        groups = like.new_empty(rows, kernels.COLUMNS.value, layout.tiles * tile.block // kernels.GROUP.value)
        per_program = math.ceil(total / PROGRAMS)
        return groups, Work(total, per_program, math.ceil(total / per_program))

    def _add_groups(self, call: Call, layout: Layout, groups: Tensor, columns: int, skipped: int) -> Tensor:
        """[R, 32, groups] -> [*B, T, columns]."""
        kernels, tensors = _kernels(), len(call.sizes)
        sums = groups.new_empty(*call.batch, tensors, columns)
        kernels.add_groups[(len(groups) * tensors,)](
            groups, layout.firsts, sums, tensors, groups.shape[-1], columns, SKIPPED=skipped, num_warps=1, **OPTIONS
        )
        return sums

    def forward(self, call: Call, inputs: Inputs) -> Advanced:
        kernels, device = _kernels(), inputs.hidden.device
        layout = _layout(call.sizes, device, FORWARD.block)
        rows = inputs.log_lr.numel() // call.n
        hidden, accum, ms, log_lr, update = map(
            torch.empty_like, (inputs.hidden, inputs.accum, inputs.ms, inputs.log_lr, inputs.log_lr)
        )
        attention_update = torch.empty_like(update) if call.attention else None
        groups, work = self._work(layout, update, rows, FORWARD)
        scratch = update.new_empty(work.programs, kernels.SUMMANDS.value, FORWARD.block)
        with torch.cuda.device_of(update):
            kernels.forward[(work.programs,)](
                layout.slots,
                layout.owners,
                inputs.weights,
                0 if inputs.weights.dim() == 1 else inputs.weights.shape[-1],
                self._share(call, layout, inputs, None),
                inputs.grad,
                *inputs[flat.STATE],
                hidden,
                accum,
                ms,
                log_lr,
                update,
                update if attention_update is None else attention_update,
                groups,
                scratch,
                call.n,
                len(call.sizes),
                layout.tiles,
                work.total,
                work.per_program,
                BLOCK=FORWARD.block,
                num_warps=FORWARD.warps,
                maxnreg=FORWARD.registers,
                **options(call),
                **OPTIONS,
            )
            sums = self._add_groups(call, layout, groups, call.columns, 0 if call.products else flat.PRODUCTS)
        return Advanced(hidden, accum, ms, log_lr, update, attention_update, sums)

    def backward(self, call: Call, inputs: Inputs, cotangents: Cotangents) -> tuple[Tensor | None, ...]:
        kernels, device = _kernels(), inputs.hidden.device
        layout = _layout(call.sizes, device, BACKWARD.block)
        rows = inputs.log_lr.numel() // call.n
        like = (inputs.hidden, inputs.accum, inputs.ms, inputs.log_lr, inputs.log_lr, inputs.log_lr)
        given = [torch.zeros_like(b) if a is None else a for a, b in zip(cotangents[:6], like, strict=True)]
        d_sums = cotangents.sums
        if d_sums is None:
            d_sums = inputs.log_lr.new_zeros(rows * len(call.sizes), call.columns)
        slopes = [torch.empty_like(value) for value in inputs[flat.STATE]]
        groups, work = self._work(layout, inputs.log_lr, rows, BACKWARD)
        outer = groups.new_empty(work.programs, kernels.OUTER.value)
        scratch = groups.new_empty(work.programs, kernels.KEPT.value, BACKWARD.block)
        with torch.cuda.device_of(outer):
            kernels.backward[(work.programs,)](
                layout.slots,
                layout.owners,
                inputs.weights,
                self._share(call, layout, inputs, d_sums),
                inputs.grad,
                *inputs[flat.STATE],
                *given,
                *slopes,
                groups,
                outer,
                scratch,
                call.n,
                len(call.sizes),
                layout.tiles,
                work.total,
                work.per_program,
                PART=PART,
                BLOCK=BACKWARD.block,
                num_warps=BACKWARD.warps,
                maxnreg=BACKWARD.registers,
                **options(call),
                **OPTIONS,
            )
            by_tensor = self._add_groups(call, layout, groups, GATE_COLUMNS + 1, 0)
        by_weights = outer.sum(0)[_outer_index(device)]
        of_tensors = by_tensor[..., :GATE_COLUMNS], by_tensor[..., GATE_COLUMNS]
        return (by_weights, *of_tensors, None, None, None, *slopes)


advance_flat = Kernels().advance_flat
