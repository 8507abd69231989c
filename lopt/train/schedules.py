"""Schedules of lr by name: share of the steps done -> factor of lr."""

from __future__ import annotations

import math
from collections.abc import Callable

COOLDOWN = 0.2  # of the steps


def cosine(done: float) -> float:
    """From 1 to 0, half of a wave."""
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def cooldown(done: float) -> float:
    """1, over the last part of the steps linearly to 0; Hägele et al. 2024, arXiv 2405.18392."""
    return max(0.0, min(1.0, (1 - done) / COOLDOWN))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": cosine,
    "cooldown": cooldown,
}
