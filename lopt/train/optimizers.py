"""The optimizers that `lopt train` compares, and what each has where the options do not say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lopt import HRNN, backends
from lopt.train.config import Config


def _hrnn(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    options = {"init_lr": config.init_lr, "min_lr": config.min_lr, "state_format": config.state_format}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    optimizer = HRNN(
        model.parameters(),
        lr=config.lr,
        weight_decay=config.weight_decay,
        meta=config.meta,
        backend=config.backend,
        annealed=config.schedule != "constant" and config.min_lr is None,
        **given,
    )
    # Raises here, not at the first step.
    backends.choose(torch.device(config.device), optimizer.config, config.backend, optimizer.state_format)
    return optimizer


def _adamw(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)


def _sgd(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    # A loss scaler waits for the device before every step of an optimizer that does not unscale for itself, as the
    # fused one does. That one takes no shards.
    fused = config.amp == "fp16" and config.parallel != "fsdp"
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=0.9,
        nesterov=True,
        weight_decay=config.weight_decay,
        **{"fused" if fused else "foreach": True},
    )
    for param in model.parameters() if fused else ():
        # If the first step overflows, torch's fused one leaves the momentum that it has allocated unset.
        optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
    return optimizer


@dataclass(frozen=True)
class OptimizerChoice:
    label: str
    make: Callable[[nn.Module, Config], torch.optim.Optimizer]
    lr: float
    weight_decay: float
    schedule: str


OPTIMIZERS = {
    "hrnn": OptimizerChoice("HRNN", _hrnn, lr=1.0, weight_decay=0.0, schedule="cooldown"),
    "adamw": OptimizerChoice("AdamW", _adamw, lr=1e-3, weight_decay=1e-2, schedule="cosine"),
    "sgd": OptimizerChoice("SGD", _sgd, lr=0.1, weight_decay=5e-4, schedule="cosine"),
}
