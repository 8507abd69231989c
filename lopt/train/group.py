"""Processes that advance together, as `torchrun` starts them; one alone is a group too.

What is agreed upon travels over gloo, on the CPU: agreeing never waits for a GPU.
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
    def from_environment(cls, backend: str = "gloo") -> Group:
        """The group that `torchrun` has announced in the environment, joined; else this process alone.

        Args:
            backend: of `torch.distributed`, with gloo for tensors on the CPU.
        """
        if announced() < 2:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group(backend)
        return cls(dist.get_rank(), dist.get_world_size())

    def leave(self) -> None:
        """Leave the group, at the end of the process."""
        if self.size > 1:
            self.max([0.0])  # none leaves while another still waits for it
            dist.destroy_process_group()

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes of a tensor of any shape."""
        if self.size == 1:
            return values
        sums = values.detach().to("cpu", copy=True)  # all_reduce works in place
        dist.all_reduce(sums)
        return sums.to(values.device)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes of a tensor of any shape."""
        return values if self.size == 1 else self.sum(values) / self.size

    def gather(self, values: Tensor) -> list[Tensor]:
        """The tensor of every process, in the order of their ranks."""
        if self.size == 1:
            return [values]
        own = values.detach().cpu().contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own)
        return [part.to(values.device) for part in parts]

    def max(self, values: Sequence[float]) -> list[float]:
        """For each value the largest that a process has."""
        if self.size == 1:
            return list(values)
        largest = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag whether a process has raised it."""
        return [value > 0 for value in self.max(flags)]

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


def announced() -> int:
    """How many processes `torchrun` has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))
