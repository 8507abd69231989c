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
        averages, currents = (_tensors(each) for each in (self.model, model))
        floating = [index for index, tensor in enumerate(averages) if tensor.is_floating_point()]
        weight = 1 - self.decay if self.updates else 1.0
        torch._foreach_lerp_([averages[index] for index in floating], [currents[index] for index in floating], weight)
        for average, current in zip(averages, currents, strict=True):
            if not average.is_floating_point():
                average.copy_(current)  # counts
        self.updates += 1


def _tensors(model: nn.Module) -> list[Tensor]:
    return [local(tensor).detach() for tensor in (*model.parameters(), *model.buffers())]
