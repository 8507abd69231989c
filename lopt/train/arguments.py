"""Values of command-line options, checked where they are parsed, and the device that one of them names."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch

from lopt.train import TrainError, parallel


def whole(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number of `least` or more."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
        return int(text)

    return parse


def number(text: str, allowed: Callable[[float], bool], kind: str) -> float:
    """A finite number that is `allowed`; `kind` says in an error what it has to be."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and allowed(value)):
        raise argparse.ArgumentTypeError(f"{text!r} is not {kind}")
    return value


def positive(text: str) -> float:
    """A number above 0."""
    return number(text, lambda value: value > 0, "a positive number")


def not_negative(text: str) -> float:
    """A number of at least 0."""
    return number(text, lambda value: value >= 0, "a positive or zero number")


def share(text: str) -> float:
    """A number of at least 0 and below 1."""
    return number(text, lambda value: 0 <= value < 1, "a number of at least 0 and below 1")


def decay(text: str) -> float:
    """A number between 0 and 1."""
    return number(text, lambda value: 0 < value < 1, "a number between 0 and 1")


def checked_device(name: str | None) -> str:
    """The name of a device that can be used; None: a GPU if there is one. Raises TrainError."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=parallel.own_device(name)).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TrainError(f"device {name!r} cannot be used ({reason}): choose another --device, such as cpu") from error
    return name


def current_device(name: str | None) -> torch.device:
    """The same as a device, the current one from now on: where events are recorded and what `synchronize` waits for."""
    device = parallel.own_device(checked_device(name))
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device
