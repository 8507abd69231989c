"""The three stages as launches of the CUDA kernels in csrc/hrnn_cuda.cu, on a GPU: four a step.

The kernels are written for a target that is either a thread of a GPU or, to check them where there is none, the host:
for tensors on the CPU the stages of this module emulate the launches thread after thread. That is slow, and only tests
call it; `lopt.backends.choose` gives this backend to CUDA tensors alone.

Kernels: csrc/hrnn_gpu.h, csrc/hrnn_step.h. Tests: tests/kernels/test_hrnn.py.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lopt import compact, native
from lopt.backends import coverage, gpu
from lopt.config import DIRECTION_EPS, GRADIENT_LIMIT, HRNNConfig
from lopt.metaparams import MetaParams

STATE_FORMATS = ("float32", "compact")
PROGRAMS = 2048  # chunks, at least, if that many tiles are there to share
CHUNK = 4096  # fewest parameters beyond that: enough to pay for adding up the sums
OLDEST = (8, 0)  # compute capability: shared memory, and what setup.py compiles for


def unusable() -> str | None:
    """Why this backend cannot run on this machine, or None."""
    if reason := native.absent():
        return reason
    if native.load().compiled()["cuda"] is None:
        why = native.left_out().get("cuda", "no nvcc at install")
        return f"its kernels were left out at install: {why}. Reinstall lopt with nvcc on PATH"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU"
    capability, least = torch.cuda.get_device_capability(), least_capability(native.load().compiled()["cuda"])
    if torch.version.hip is not None or capability < least:
        reason = (
            f"its kernels are for Nvidia GPUs of compute capability {least[0]}.{least[1]} or later, and this is "
            f"{torch.cuda.get_device_name()} ({capability[0]}.{capability[1]})"
        )
        return reason if capability < OLDEST else f"{reason}. Reinstall lopt without LOPT_CUDA_ARCHS"
    if error := native.load().gpu_check():
        return f"its kernels cannot be loaded: {error}. A driver older than nvcc's CUDA is the usual reason"
    return None


def least_capability(archs: str) -> tuple[int, int]:
    """Of the GPUs that kernels run on which setup.py compiled for `archs`."""
    numbers = [int(number) for number in re.findall(r"\d+", archs)]
    return max(OLDEST, divmod(min(numbers), 10)) if numbers else OLDEST


def unsupported(config: HRNNConfig) -> str | None:
    """Why this backend cannot run a configuration, or None."""
    return coverage.unsupported(config, _layout()["largest_level"])


@functools.cache
def _layout() -> dict[str, Any]:
    """What the kernels say of their tables, weights and scratch memory."""
    return native.load().gpu_layout()


class Packed:
    """Meta-parameters as the kernels read them.

    Attributes:
        weights: of the parameter level, `Weights` in csrc/hrnn_step.h.
        hidden_limit: of the compact format.
    """

    def __init__(self, meta: MetaParams) -> None:
        scaled, layout = gpu.Scaled(meta), _layout()
        at_once = layout["columns_at_once"]
        groups = [
            gate if index < 2 else gate.roll(-coverage.HIDDEN_SIZE, 0)  # of the candidates the features come first
            for index, gate in enumerate(scaled.inputs.split(coverage.HIDDEN_SIZE, 1))
        ]
        columns = torch.cat(groups, 1).unflatten(1, (-1, at_once)).transpose(0, 1)
        self.weights = torch.zeros(layout["weights_size"], dtype=torch.float32, device=columns.device)
        for name, values in {"gru": columns, **scaled.read_outs}.items():
            begin = layout["weights"][name]
            self.weights[begin : begin + values.numel()] = values.reshape(-1)
        self.bias, self.from_tensor, self.from_global = (
            rows.float().contiguous() for rows in (scaled.bias, scaled.from_tensor, scaled.from_global)
        )
        self.tensor_gru, self.global_gru = scaled.tensor_gru, scaled.global_gru
        self.hidden_limit = compact.limit(meta)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _where(tensor: Tensor) -> tuple[bool, int]:
    """Whether to emulate, and the stream to launch on."""
    return (False, torch.cuda.current_stream().cuda_stream) if tensor.is_cuda else (True, 0)


class Stages(gpu.Stages):
    """Launches of the CUDA kernels."""

    name = "cuda"

    def pack(self, meta: MetaParams) -> Packed:
        return Packed(meta)

    def chunk_sizes(self, numels: Sequence[int]) -> list[int]:
        tile = _layout()["tile"]
        least = min(gpu.round_up(max(sum(numels) // PROGRAMS, 1), tile), CHUNK)
        return [min(max(gpu.round_up(-(-n // gpu.CHUNKS_PER_TENSOR), tile), least), gpu.MOST) for n in numels]

    def shared_size(self) -> int:
        return _layout()["injected_size"]

    def summary_size(self, config: HRNNConfig) -> int:
        return max(config.tensor_size, 1)

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
        config, packed = kept.meta.config, kept.packed
        arguments = {
            "table": table.data_ptr(),
            "chunks": kept.chunks.of.data_ptr(),
            "tensors": kept.tensors,
            "chunk_count": kept.chunks.total,
            "weights": packed.weights.data_ptr(),
            "bias": packed.bias.data_ptr(),
            "from_tensor": packed.from_tensor.data_ptr(),
            "from_global": packed.from_global.data_ptr(),
            "global_hidden": global_hidden.data_ptr(),
            "tensor_size": config.tensor_size,
            "global_size": config.global_size,
            "relative_to_problem": config.relative_log_lr == "problem",
            "attention": config.attention,
            "products": config.gradient_products,
            "damped": config.damping > 0,
            "compact": kept.compact,
            "hidden_limit": packed.hidden_limit,
            "gradient_limit": GRADIENT_LIMIT,
            "grad_scale": _address(grad_scale),
            "skip": skip.data_ptr(),
            "injected": kept.shared.data_ptr(),
            "update": update.data_ptr(),
            "attention_update": _address(attention_update),
            "partials": kept.partials.data_ptr(),
            "tickets": kept.tickets.data_ptr(),
            "sums": sums.data_ptr(),
        }
        native.load().gpu_advance(*_where(sums), arguments)

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
        arguments = {
            "table": table.data_ptr(),
            "tensors": kept.tensors,
            "sums": sums.data_ptr(),
            "tensor_weights": kept.packed.tensor_gru.data_ptr(),
            "global_weights": kept.packed.global_gru.data_ptr(),
            "inputs": config.tensor_input_size,
            "columns": kept.columns.count,
            "squares": kept.columns.direction,
            "tensor_size": config.tensor_size,
            "global_size": config.global_size,
            "attention": config.attention,
            "global_last": config.global_input == "last",
            "direction_eps": DIRECTION_EPS,
            "damping": config.damping,
            "damping_decay": config.damping_decay,
            "gradient_limit": GRADIENT_LIMIT,
            "global_hidden": global_hidden.data_ptr(),
            "update": update.data_ptr(),
            "places": _address(places),
            "skip": skip.data_ptr(),
            "scale": scale.data_ptr(),
            "states": kept.scratch.data_ptr(),
            "ticket": kept.ticket.data_ptr(),
        }
        native.load().gpu_summarise(*_where(sums), arguments)

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
        arguments = {
            "table": table.data_ptr(),
            "chunks": kept.chunks.of.data_ptr(),
            "tensors": kept.tensors,
            "chunk_count": kept.chunks.total,
            "update": update.data_ptr(),
            "attention_update": _address(attention_update),
            "scale": scale.data_ptr(),
            "skip": skip.data_ptr(),
        }
        native.load().gpu_apply(*_where(update), arguments)


advance, summarise, apply, release = Stages().functions()
