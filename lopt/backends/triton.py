"""The three stages as launches of the Triton kernels in kernels/hrnn.py, on a GPU: four a step.

With TRITON_INTERPRET=1 in the environment before Triton is imported, the kernels run in Triton's interpreter, slowly,
on CPU tensors: that is how tests/kernels/test_hrnn.py checks them without a GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import math
import os
import shutil
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from lopt import compact
from lopt.backends import coverage, gpu, interpreted
from lopt.config import DIRECTION_EPS, GRADIENT_LIMIT, HRNNConfig
from lopt.metaparams import MetaParams


class Tile(NamedTuple):
    """What a kernel handles at a time: parameters, by how many warps, with at most how many registers per thread."""

    block: int
    warps: int
    registers: int | None


# Of `advance`: two parameters per thread, three programs per multiprocessor; `python -m lopt.bench.sass` shows others.
TILE = Tile(256, 4, 168)
STREAM = Tile(1024, 4, None)  # of the kernels that only pass over memory
CHUNK = 2048  # fewest parameters: enough to pay for adding up the sums
STATE_FORMATS = ("float32", "compact")
LARGEST_LEVEL = 1024  # hidden units
OLDEST = (3, 6)  # version of Triton


def _absent() -> str | None:
    """Why the kernels cannot be imported, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install lopt[triton]"
    for package in ("triton", "pytorch-triton"):  # the latter of PyTorch's nightly builds
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(package)
            if tuple(map(int, version.split(".")[:2])) < OLDEST:
                return f"triton {version} is older than {'.'.join(map(str, OLDEST))}, which PyTorch 2.10 brings"
    return None


ABSENT = _absent()  # found out once: torch.compile, which traces `unusable`, cannot trace how


def unusable() -> str | None:
    """Why this backend cannot run on this machine, or None."""
    if ABSENT:
        return ABSENT
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton compiles with gcc or clang, and neither is on PATH; the environment variable CC names another"
    major, minor = torch.cuda.get_device_capability()
    if torch.version.hip is not None or major < 7:
        return (
            f"its kernels are for Nvidia GPUs of compute capability 7.0 or later, and this is "
            f"{torch.cuda.get_device_name()} ({major}.{minor})"
        )
    return None


def unsupported(config: HRNNConfig) -> str | None:
    """Why this backend cannot run a configuration, or None."""
    return coverage.unsupported(config, LARGEST_LEVEL)


def _kernels() -> ModuleType:
    """The kernels; importing them needs Triton."""
    return importlib.import_module("lopt.kernels.hrnn")


class Packed:
    """Meta-parameters as the kernels read them.

    Attributes:
        weights: [720] of the parameter level, see lopt.kernels.hrnn.
        bias: [32], from_tensor: [H1, 32], from_global: [H2, 32]: what is injected into the parameter level.
        levels: the tensor and the global GRU, in the order of `MetaParams.flat`.
    """

    def __init__(self, meta: MetaParams) -> None:
        scaled = gpu.Scaled(meta)
        zeros, read_outs = scaled.zeros, scaled.read_outs
        inputs = scaled.inputs.clone()
        inputs[14:17] *= -2 * math.log(2)  # the feature is log2(rms_4 / rms_s)
        reset, update, candidate = inputs.split(10, 1)
        limit = compact.limit(meta)
        step = zeros(1) + limit / compact.HIDDEN_STEPS
        scalars = ("log_lr_bias", "momentum", "log2_step_offset", "attention_factor", "ms_eps", "rms_eps")
        self.weights = gpu.join(
            [
                torch.cat([reset, zeros(1, 10)]).reshape(22, 5, 2).transpose(0, 1),
                torch.cat([update.reshape(21, 5, 2), candidate.reshape(21, 5, 2)], 2).transpose(0, 1),
                torch.stack([read_outs["direction"], read_outs["log_lr"], read_outs["attention"], zeros(10)], 1),
                read_outs["decay"],
                read_outs["direction_shortcut"],
                read_outs["attention_shortcut"],
                read_outs["decay_bias"],
                *(read_outs[name] for name in (*scalars, "log_lr_min", "log_lr_max")),
                step,
                1 / step,
            ]
        )
        self.bias, self.from_tensor, self.from_global = map(
            self._inject, (scaled.bias[None], scaled.from_tensor, scaled.from_global)
        )
        self.levels = torch.cat([scaled.tensor_gru, scaled.global_gru])

    @staticmethod
    def _inject(rows: Tensor) -> Tensor:
        """Columns reset | update | candidate, 10 each, in the order of lopt.kernels.hrnn.BIAS: [rows, 32]."""
        reset, update, candidate = rows.split(10, 1)
        pairs = torch.cat([update.reshape(-1, 5, 2), candidate.reshape(-1, 5, 2)], 2)
        return torch.cat([reset, rows.new_zeros(len(rows), 2), pairs.reshape(-1, 20)], 1).float().contiguous()


class Stages(gpu.Stages):
    """Launches of the Triton kernels."""

    name = "triton"

    def pack(self, meta: MetaParams) -> Packed:
        return Packed(meta)

    def chunk_sizes(self, numels: Sequence[int]) -> list[int]:
        return [min(max(gpu.round_up(-(-n // gpu.CHUNKS_PER_TENSOR), TILE.block), CHUNK), gpu.MOST) for n in numels]

    def shared_size(self) -> int:
        return _kernels().SHARED.value

    def summary_size(self, config: HRNNConfig) -> int:
        return 2 * self._width(config)

    @staticmethod
    def _width(config: HRNNConfig) -> int:
        widest = max(config.tensor_input_size, config.tensor_size, config.global_size)
        return 1 << (widest - 1).bit_length()

    def launch_advance(
        self,
        kept: gpu.Advance,
        table: Tensor,
        kind: int,
        global_hidden: Tensor,
        grad_scale: Tensor | None,
        skip: Tensor,
        update: Tensor,
        attention_update: Tensor | None,
        sums: Tensor,
    ) -> None:
        kernels, config, packed, chunks = _kernels(), kept.meta.config, kept.packed, kept.chunks
        scale = kept.one if grad_scale is None else grad_scale
        kernels.prepare[(kept.tensors + chunks.total,)](
            table,
            kept.tensors,
            chunks.of,
            kept.shared,
            packed.weights,
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
            DAMPED=config.damping > 0,
            LOG_LR_MIN_STEPS=config.log_lr_min_steps,
            LOG_LR_MIN_DISTANCE=config.log_lr_min_distance,
            LOG_LR_MIN_DISTANCE_LIMIT=config.log_lr_min_distance_limit,
            LOG_LR_MAX_RATIO=config.log_lr_max_ratio,
            COMPACT=kept.compact,
            KIND=kind,
            BLOCK=STREAM.block,
            num_warps=STREAM.warps,
            enable_fp_fusion=True,
        )
        count = kernels.ROWS if config.gradient_products else kernels.ROWS_WITHOUT_PRODUCTS
        kernels.advance[(chunks.total,)](
            table,
            kept.tensors,
            chunks.of,
            packed.weights,
            kept.shared,
            skip,
            scale,
            update,
            update if attention_update is None else attention_update,
            kept.partials,
            kept.tickets,
            sums,
            KIND=kind,
            ATTENTION=int(config.attention),
            DAMPED=int(config.damping > 0),
            GRADIENT_SHORTCUT=config.gradient_shortcut,
            COUNT=count.value,
            COMPACT=kept.compact,
            BLOCK=TILE.block,
            THREADS=TILE.block if interpreted() else 32 * TILE.warps,
            num_warps=TILE.warps,
            maxnreg=TILE.registers,
            enable_fp_fusion=True,
        )

    def launch_summarise(
        self,
        kept: gpu.Summarise,
        table: Tensor,
        sums: Tensor,
        global_hidden: Tensor,
        update: Tensor,
        places: Tensor | None,
        skip: Tensor,
        scale: Tensor,
    ) -> None:
        config = kept.meta.config
        _kernels().summarise[(kept.tensors,)](
            table,
            kept.tensors,
            sums,
            kept.packed.levels,
            global_hidden,
            update,
            kept.ticket if places is None else places,
            skip,
            scale,
            kept.scratch,
            kept.ticket,
            EPS=DIRECTION_EPS,
            DAMPING=config.damping,
            DAMPING_DECAY=config.damping_decay,
            DISTANCE=config.log_lr_min_distance > 0,
            LIMIT=GRADIENT_LIMIT,
            INPUTS=config.tensor_input_size,
            COLUMNS=kept.columns.count,
            SQUARES=kept.columns.direction,
            ATTENTION=int(config.attention),
            TENSOR_SIZE=config.tensor_size,
            GLOBAL_SIZE=config.global_size,
            LAST=config.global_input == "last",
            WIDTH=self._width(config),
            num_warps=4,
            enable_fp_fusion=True,
        )

    def launch_apply(
        self,
        kept: gpu.Apply,
        table: Tensor,
        kind: int,
        update: Tensor,
        attention_update: Tensor | None,
        scale: Tensor,
        skip: Tensor,
    ) -> None:
        _kernels().apply[(kept.chunks.total,)](
            table,
            kept.tensors,
            kept.chunks.of,
            update,
            update if attention_update is None else attention_update,
            scale,
            skip,
            KIND=kind,
            ATTENTION=int(attention_update is not None),
            BLOCK=STREAM.block,
            num_warps=STREAM.warps,
            enable_fp_fusion=True,
        )


advance, summarise, apply, release = Stages().functions()
