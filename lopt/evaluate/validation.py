"""What meta-parameters and defaults are chosen by: networks small and large, on data of no other suite.

The classes of the patches of a photograph are clusters of them, so that they can be told apart to the end, as digits
can; the code is the source of Python's `typing`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from lopt.evaluate.tasks import MLP, Conv, ResNet, RowsGRU, Task, TextTransformer, Transformer

SMALL: dict[str, Callable[[], Task]] = {
    "patches-softmax": lambda: Task("patches", MLP(64, 10)),
    "patches-mlp": lambda: Task("patches", MLP(64, 32, 10)),
    "patches-deep": lambda: Task("patches", MLP(64, *[16] * 8, 10)),
    "patches-noise": lambda: Task("patches", MLP(64, 32, 10), wrong=0.2),
    "patches-noise-64": lambda: Task("patches", MLP(64, 64, 10), wrong=0.3),
    "patches-autoencoder": lambda: Task("patches", MLP(64, 32, 8, 32, 64, activation=torch.tanh), reproduce=True),
    "patches-autoencoder-relu": lambda: Task("patches", MLP(64, 48, 12, 48, 64), reproduce=True),
    "patches-gru": lambda: Task("patches", RowsGRU(16, 10)),
    "patches-norm": lambda: Task("patches", MLP(64, 32, 32, 10, activation=F.gelu, normed=True)),
}

LARGE: dict[str, Callable[[], Task]] = {
    "patches-mlp-1024": lambda: Task("patches", MLP(64, 1024, 1024, 10)),
    "patches-deep-256": lambda: Task("patches", MLP(64, *[256] * 6, 10)),
    "patches-noise-512": lambda: Task("patches", MLP(64, 512, 512, 10), wrong=0.2),
    "patches-conv-128": lambda: Task("patches", Conv(64, 128, 10), batch=16),
    "patches-resnet-64": lambda: Task("patches", ResNet(64, 3, 10), batch=16),
    "patches-transformer-128": lambda: Task("patches", Transformer(128, 4, 4, 10), batch=16),
    "patches-gru-256": lambda: Task("patches", RowsGRU(256, 10)),
    "patches-autoencoder-512": lambda: Task(
        "patches", MLP(64, 512, 128, 32, 128, 512, 64, activation=torch.tanh), reproduce=True
    ),
    "typing-transformer": lambda: Task("typing", TextTransformer(96, 64, 128, 4, 4), batch=8),
}

TASKS = {**SMALL, **LARGE}
