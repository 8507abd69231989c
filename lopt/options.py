"""Options of `lopt.HRNN`'s parameter groups: defaults, ranges, and what they make of a step and of learned rates."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lopt.metaparams import MetaParams

INIT_LR, BASE_FAN_IN, BASE_DEPTH = 3e-3, 40, 2  # defaults
ANNEALED = 5 / 3  # where lr falls to 0 in the end, the bound by distance is this much higher
LIKELY_A_LEARNING_RATE = 0.05

OPTIONS = {
    "lr": 1.0,
    "init_lr": INIT_LR,
    "weight_decay": 0.0,
    "base_fan_in": BASE_FAN_IN,
    "base_depth": BASE_DEPTH,
    "maximize": False,
    "foreach": None,
    "fused": None,
    "capturable": False,
    "differentiable": False,
    "train_mode": True,
}  # of a parameter group, with their defaults

OWN_OPTIONS = {"init_lr", "base_fan_in", "base_depth", "train_mode"}  # those that no other optimizer's groups have

Group = dict[str, Any]


def check_group(group: Group) -> None:
    """Raise ValueError if an option of a parameter group is out of range."""
    lr, init_lr, weight_decay = group["lr"], group["init_lr"], group["weight_decay"]
    if isinstance(lr, Tensor):
        _check_one(lr)
        lr = 1.0 if lr.is_meta else lr.item()
    if not _is(lr, lambda value: 0 <= value < math.inf):
        raise ValueError(f"Invalid learning rate: {lr!r}; it is a finite factor >= 0 of the learned step")
    if not _is(init_lr, lambda value: 0 < value < math.inf):
        raise ValueError(f"Invalid init_lr: {init_lr!r}; it is the positive learning rate to start from")
    if not _is(weight_decay, lambda value: 0 <= value < math.inf):
        raise ValueError(f"Invalid weight_decay value: {weight_decay!r}; it must be finite and >= 0")
    if (base := group["base_fan_in"]) is not None and not _is(base, lambda value: 0 < value):
        raise ValueError(f"Invalid base_fan_in: {base!r}; it is a positive number of inputs, or None for no limit")
    if (base := group["base_depth"]) is not None and not _is(base, lambda value: 0 < value):
        raise ValueError(f"Invalid base_depth: {base!r}; it is a positive number of matrices, or None for no limit")
    for name in ("foreach", "differentiable"):
        if group[name]:
            raise ValueError(f"HRNN has no {name} implementation: leave {name} at its default")


def warn_of_small(groups: Sequence[Group]) -> None:
    """Warn of an lr that looks like another optimizer's."""
    factors = [group["lr"] for group in groups if not isinstance(group["lr"], Tensor)]
    if small := [lr for lr in factors if 0 < lr <= LIKELY_A_LEARNING_RATE]:
        warnings.warn(
            f"lr={small[0]} multiplies the learned step, which has its own learning rate: leave lr at 1.0. "
            f"To choose where the learned rate starts, pass init_lr={small[0]}.",
            stacklevel=3,
        )


def shortening(fan_in: int, matrices: int, base_fan_in: float | None, base_depth: float | None) -> float:
    """What the steps of a tensor are multiplied by for its own inputs and the number of all matrices, at most 1."""
    width = 1.0 if base_fan_in is None else min(1.0, base_fan_in / max(fan_in, 1))
    return width if base_depth is None else width * min(1.0, math.sqrt(base_depth / max(matrices, 1)))


def rates_of(groups: Sequence[Group], fan_in: Sequence[int], matrices: int) -> list[float | Tensor]:
    """Factor of the learned step of each tensor: its group's lr, less for a wide tensor or one among many.

    Args:
        groups: of each of T tensors. fan_in: of each, the inputs of the whole tensor.
        matrices: how many tensors of two or more dimensions are trained, in this step or not.

    Raises:
        ValueError: an lr is a tensor of several elements.
    """
    products: dict[tuple[int, float], Tensor] = {}
    rates: list[float | Tensor] = []
    for group, inputs in zip(groups, fan_in, strict=True):
        lr = group["lr"]
        if isinstance(lr, Tensor):
            _check_one(lr)  # before anything has moved
        factor = shortening(inputs, matrices, group["base_fan_in"], group["base_depth"])
        if factor < 1:
            if isinstance(lr, Tensor):  # one launch for each of a few widths
                key = (id(lr), factor)
                if key not in products:
                    products[key] = lr * factor
                lr = products[key]
            else:
                lr = lr * factor
        rates.append(lr)
    return rates


def lowered(meta: MetaParams, init_lr: float) -> MetaParams:
    """The same meta-parameters with a bound that is nowhere above where rates start."""
    config = meta.config
    # What falls with the root of the steps is there exp(2 * above) times later; what follows the distance starts at 0.
    later = math.exp(min(2 * (config.log_lr_min - math.log(init_lr)), 60))
    return bounded(meta, init_lr, steps=config.log_lr_min_steps * later, distance=config.log_lr_min_distance)


def raised(meta: MetaParams) -> MetaParams:
    """The same meta-parameters with the bound by distance that suits an lr which falls to 0 in the end."""
    distance = ANNEALED * meta.config.log_lr_min_distance
    return MetaParams(dataclasses.replace(meta.config, log_lr_min_distance=distance), meta)


def bounded(meta: MetaParams, min_lr: float, *, steps: float, distance: float) -> MetaParams:
    """The same meta-parameters with another bound below the learned rates.

    Args:
        min_lr: the bound, a learning rate. steps, distance: `log_lr_min_steps` and `log_lr_min_distance` of it.

    Raises:
        ValueError: `min_lr` is no positive number below the upper bound.
    """
    if not _is(min_lr, lambda value: 0 < value < math.inf and math.log(value) < meta.config.log_lr_max):
        raise ValueError(
            f"Invalid min_lr: {min_lr!r}; it is a positive learning rate below {math.exp(meta.config.log_lr_max):.3g}"
        )
    config = dataclasses.replace(
        meta.config,
        log_lr_min=math.log(min_lr),
        log_lr_min_steps=steps,
        log_lr_min_distance=distance,
        log_lr_min_distance_limit=meta.config.log_lr_min_distance_limit if distance else 0.0,
    )
    return MetaParams(config, meta)


def _check_one(lr: Tensor) -> None:
    if lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")


def _is(value: Any, in_range: Callable[[Any], bool]) -> bool:
    """Whether a value is a number in a range."""
    try:
        return bool(in_range(value))
    except TypeError:
        return False
