"""Who does the arithmetic: one table, one choice.

Every backend is a module with the three stages `advance`, `summarise` and `apply` of one signature (see
`lopt.backends.reference`), `unusable() -> str | None`, `unsupported(config) -> str | None`, and `STATE_FORMATS`, which
formats of state it steps.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import NamedTuple

import torch

from lopt.config import HRNNConfig


class Backend(NamedTuple):
    """One line of the table.

    Attributes:
        module: its Python module.
        device: type of the tensors it runs on, "*" for all.
    """

    module: str
    device: str


def interpreted() -> bool:
    """Whether Triton's interpreter is asked for, in the words that Triton knows."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


BACKENDS = {
    "cuda": Backend("lopt.backends.cuda", "cuda"),
    "triton": Backend("lopt.backends.triton", "cuda"),
    "cpu": Backend("lopt.backends.cpu", "cpu"),
    "reference": Backend("lopt.backends.reference", "*"),
}  # fastest first
if interpreted():  # then they run, slowly, on the CPU: for tests, never chosen unasked
    del BACKENDS["triton"]
    BACKENDS["triton"] = Backend("lopt.backends.triton", "cpu")


def _module(name: str) -> ModuleType:
    return importlib.import_module(BACKENDS[name].module)


def state_formats(name: str) -> tuple[str, ...]:
    """Which of `lopt.state.FORMATS` a backend steps."""
    formats: tuple[str, ...] = _module(name).STATE_FORMATS
    return formats


def unusable(name: str) -> str | None:
    """Why a backend cannot run on this machine, or None."""
    return _module(name).unusable()


def available() -> dict[str, str | None]:
    """Every backend, and None if it is usable on this machine or else the reason."""
    return {name: unusable(name) for name in BACKENDS}


def _obstacle(name: str, device: torch.device, config: HRNNConfig, state_format: str) -> str | None:
    if reason := unusable(name):
        return reason
    if BACKENDS[name].device not in ("*", device.type):
        return f"it runs on {BACKENDS[name].device} tensors and the parameters are on {device.type}"
    if state_format not in state_formats(name):
        return f"it has no kernels for state_format={state_format!r}"
    return _module(name).unsupported(config)


def choose(
    device: torch.device, config: HRNNConfig, requested: str | None = None, state_format: str = "float32"
) -> ModuleType:
    """The backend for parameters on a device.

    Args:
        device: of the parameters.
        config: architecture of the optimizer.
        requested: the name of a backend that has to be it, or None: the fastest usable.
        state_format: one of `lopt.state.FORMATS`.

    Raises:
        ValueError: there is no backend of the requested name.
        RuntimeError: the requested backend cannot run here, or not with this configuration; the message says why.
    """
    if requested is None:
        return _module(next(name for name in BACKENDS if _obstacle(name, device, config, state_format) is None))
    check_name(requested)
    if obstacle := _obstacle(requested, device, config, state_format):
        usable = [name for name in BACKENDS if _obstacle(name, device, config, state_format) is None]
        raise RuntimeError(
            f"backend {requested!r} cannot be used: {obstacle}. "
            f"Usable here: {', '.join(usable)}; or pass backend=None for the fastest"
        )
    return _module(requested)


def check_name(name: str | None) -> None:
    """Raise ValueError unless `name` is None or in the table."""
    if name is not None and name not in BACKENDS:
        raise ValueError(
            f"backend={name!r} is not one of {', '.join(BACKENDS)}; pass backend=None for the fastest usable"
        )
