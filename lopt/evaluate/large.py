"""Networks 50 times as large as the others, 75,000 to 1.1 million parameters, of the same kinds and on the same data.

The code is the source of Python's `dataclasses`, so that another Python's results are another task's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from lopt.evaluate.tasks import MLP, Conv, ResNet, RowsGRU, Task, TextGRU, TextTransformer, Transformer

TASKS: dict[str, Callable[[], Task]] = {
    "mlp-1024": lambda: Task("digits", MLP(64, 1024, 1024, 10)),
    "deep-256": lambda: Task("digits", MLP(64, *[256] * 6, 10)),
    "noise-512": lambda: Task("digits", MLP(64, 512, 512, 10), wrong=0.2),
    "conv-256": lambda: Task("digits", Conv(64, 128, 256, 10), batch=16),
    "resnet-64": lambda: Task("digits", ResNet(64, 3, 10), batch=16),
    "gru-rows-256": lambda: Task("digits", RowsGRU(256, 10)),
    "transformer-128": lambda: Task("digits", Transformer(128, 4, 4, 10), batch=16),
    "autoencoder-512": lambda: Task(
        "digits", MLP(64, 512, 128, 32, 128, 512, 64, activation=torch.tanh), reproduce=True
    ),
    "flower-256": lambda: Task("flower", MLP(32, 256, 256, 3, activation=F.gelu)),
    "text-gru-256": lambda: Task("text", TextGRU(44, 64, 256), batch=8),
    "code-transformer": lambda: Task("code", TextTransformer(96, 64, 128, 4, 4), batch=8),
}
