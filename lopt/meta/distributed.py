"""Meta-training by several processes: `torchrun --nproc-per-node N -m lopt meta-train ...`.

The rows of every world are shared out equally. All processes draw the same random numbers from the same seed and keep
their part, so the result is that of one process with all rows, up to rounding. Evolution strategies exchange losses
alone: every process draws all perturbations. Backpropagation exchanges the mean meta-gradient.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Group:
    """Processes that advance together; one alone without `torchrun`.

    Attributes:
        rank: of this process, 0 writes files. size: number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @classmethod
    def from_environment(cls) -> Group:
        """The group that `torchrun` has announced in the environment, joined over gloo; else this process alone."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    def leave(self) -> None:
        """Leave the group, at the end of the process."""
        if self.size > 1:
            dist.destroy_process_group()

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes of a tensor of any shape."""
        if self.size == 1:
            return values
        sums = values.detach().cpu()
        dist.all_reduce(sums)
        return (sums / self.size).to(values.device)

    def gather(self, values: Tensor) -> list[Tensor]:
        """The tensor of every process, in the order of their ranks."""
        if self.size == 1:
            return [values]
        own = values.detach().cpu().contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own)
        return [part.to(values.device) for part in parts]

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag whether a process has raised it."""
        if self.size == 1:
            return list(flags)
        raised = torch.tensor([float(flag) for flag in flags])
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return [value > 0 for value in raised.tolist()]

    def from_first(self, value: Any) -> Any:
        """What process 0 has: anything that can be pickled."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def to_first(self, value: Any) -> list[Any]:
        """What every process has, at process 0; empty at the others."""
        if self.size == 1:
            return [value]
        parts: list[Any] = [None] * self.size
        dist.gather_object(value, parts if self.rank == 0 else None)
        return parts if self.rank == 0 else []


ALONE = Group()
