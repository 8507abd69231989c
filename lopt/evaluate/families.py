"""Families of small networks on digits: each differs from the others of its family in one respect alone.

Wichrowska et al. 2017 train such networks on MNIST; here they are small enough for hundreds of trainings on one core.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from lopt.evaluate.tasks import MLP, Conv, Task

NETWORKS: dict[str, Callable[[], Task]] = {
    "mlp-relu-2": lambda: Task("digits", MLP(64, 32, 32, 10)),
    "mlp-sigmoid-2": lambda: Task("digits", MLP(64, 32, 32, 10, activation=torch.sigmoid)),
    "mlp-elu-2": lambda: Task("digits", MLP(64, 32, 32, 10, activation=F.elu)),
    "mlp-8": lambda: Task("digits", MLP(64, 8, 10)),
    "mlp-16": lambda: Task("digits", MLP(64, 16, 10)),
    "mlp-128": lambda: Task("digits", MLP(64, 128, 10)),
    "mlp-16x2": lambda: Task("digits", MLP(64, *[16] * 2, 10)),
    "mlp-16x4": lambda: Task("digits", MLP(64, *[16] * 4, 10)),
    "conv-tanh": lambda: Task("digits", Conv(8, 16, 10, activation=torch.tanh), batch=16),
    "conv-sigmoid": lambda: Task("digits", Conv(8, 16, 10, activation=torch.sigmoid), batch=16),
    "conv-elu": lambda: Task("digits", Conv(8, 16, 10, activation=F.elu), batch=16),
    "conv-4-8": lambda: Task("digits", Conv(4, 8, 10), batch=16),
    "conv-16-32": lambda: Task("digits", Conv(16, 32, 10), batch=16),
    "conv-8": lambda: Task("digits", Conv(8, 10), batch=16),
    "conv-8-16-16": lambda: Task("digits", Conv(8, 16, 16, 10), batch=16),
}

# What varies -> its values -> names of tasks; some tasks are those of the suite digits.
FAMILIES: dict[str, dict[str, str]] = {
    "activation, 2 layers of 32": {
        "ReLU": "mlp-relu-2",
        "ELU": "mlp-elu-2",
        "tanh": "mlp-tanh",
        "sigmoid": "mlp-sigmoid-2",
    },
    "width of 1 layer": {"8": "mlp-8", "16": "mlp-16", "32": "mlp-relu", "128": "mlp-128"},
    "layers of 16": {"1": "mlp-16", "2": "mlp-16x2", "4": "mlp-16x4", "8": "deep-relu"},
    "activation, 2 convolutions": {
        "ReLU": "conv",
        "ELU": "conv-elu",
        "tanh": "conv-tanh",
        "sigmoid": "conv-sigmoid",
    },
    "channels of 2 convolutions": {"4, 8": "conv-4-8", "8, 16": "conv", "16, 32": "conv-16-32"},
    "convolutions": {"1": "conv-8", "2": "conv", "3": "conv-8-16-16"},
}

TASKS = tuple(dict.fromkeys(name for members in FAMILIES.values() for name in members.values()))
