"""Weights averaged over the steps, which often classify better than the last ones."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from lopt.distributed import local


class Average:
    """Exponential moving average of a model's parameters and buffers: average = decay average + (1 - decay) model.

    The first update copies. As `torch.optim.swa_utils.AveragedModel` with `use_buffers`, which however waits for the
    device at every update and takes no model of which some tensors are sharded and others not.

    Attributes:
        model: a copy of the model, with the average for its parameters and buffers.
        updates: taken so far.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.model = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's tensors of this moment into the average."""
        (averages, counts), (currents, current_counts) = _tensors(self.model), _tensors(model)
        torch._foreach_lerp_(averages, currents, 1 - self.decay if self.updates else 1.0)
        if counts:
            torch._foreach_copy_(counts, current_counts)
        self.updates += 1


def _tensors(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """What this process holds of parameters and buffers: floating tensors, and counts."""
    tensors = [local(tensor).detach() for tensor in (*model.parameters(), *model.buffers())]
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    return floating, [tensor for tensor in tensors if not tensor.is_floating_point()]
