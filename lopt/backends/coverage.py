"""What the fused kernels, those of all backends alike, are written for."""

from __future__ import annotations

import torch

from lopt.config import HRNNConfig

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # enum Dtype in csrc, lopt.kernels

HIDDEN_SIZE = 10
NEEDED = {
    "timescales": 4,
    "log_ms_features": True,
    "extreme_indicator": False,
    "lr_shortcut": False,
    "multiple_scale_decays": False,
    "dynamic_output_scale": True,
}  # other options may have any value


def unsupported(config: HRNNConfig, largest_level: int | None = None) -> str | None:
    """Why no fused kernel runs a configuration, or None.

    Args:
        config: the architecture.
        largest_level: most hidden units of a tensor or global GRU, None where there is no limit.
    """
    obstacles = [
        f"{name}={getattr(config, name)!r} instead of {value!r}"
        for name, value in NEEDED.items()
        if getattr(config, name) != value
    ]
    if config.hidden_size != HIDDEN_SIZE:
        obstacles.insert(0, f"level_sizes[0]={config.hidden_size} instead of {HIDDEN_SIZE}")
    if largest_level is not None and max(config.level_sizes) > largest_level:
        obstacles.append(f"level_sizes={config.level_sizes} beyond {largest_level}")
    if config.relative_log_lr is None:
        obstacles.append("relative_log_lr=None instead of 'problem' or 'tensor'")
    return f"its kernels do not do {', '.join(obstacles)}" if obstacles else None
