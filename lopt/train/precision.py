"""Automatic mixed precision: 16-bit matrix products and convolutions, float32 parameters, gradients and losses."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """In which precision a model runs, and how its loss is scaled.

    amp: one of DTYPES, or None for float32. In fp16 small gradients would vanish, so the loss is scaled up, and a step
    whose gradients overflow is left out and lowers the scale.
    """

    def __init__(self, amp: str | None, device: torch.device) -> None:
        self.device, self.dtype = device, None if amp is None else DTYPES[amp]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Around the forward pass, the loss left out."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.scaler.step(optimizer)
        self.scaler.update()
