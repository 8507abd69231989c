"""`lopt info`: versions, how lopt._C was built, which backend does the arithmetic, and what a model's state takes."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import re
from pathlib import Path

import torch

import lopt
from lopt import backends, native
from lopt.train.arguments import whole

PACKAGES = ("triton", "numpy", "safetensors")
DEVICES = ("cpu", "cuda")
DRIVER = Path("/proc/driver/nvidia/version")

Rows = list[tuple[str, str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lopt info`."""
    parser.add_argument("--model", metavar="NAME", help="print what training it needs: a name as for `lopt train`")
    parser.add_argument("--classes", type=whole(1), default=1000, help="of that model, %(default)s by default")


def run(args: argparse.Namespace) -> int:
    """Print the report. Returns 0."""
    print(report() if args.model is None else table(memory(args.model, args.classes)))
    return 0


def report() -> str:
    """The text of `lopt info`: four tables, a line of text per fact."""
    sections = {
        "versions": versions(),
        "lopt._C, the compiled kernels": build(),
        "backends, fastest first": [
            (name, f"no: {reason}" if reason else "usable") for name, reason in backends.available().items()
        ],
        "chosen for the default configuration": [(device, chosen(device)) for device in DEVICES],
    }
    return table(sections)


def table(sections: dict[str, Rows]) -> str:
    """Titles, and under each its rows, in two columns."""
    width = max(len(name) for rows in sections.values() for name, _ in rows)
    return "\n\n".join(
        "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in rows)]) for title, rows in sections.items()
    )


def versions() -> Rows:
    """Version of lopt, of Python, of what lopt depends on, and of the CUDA runtime and driver."""
    rows = [
        ("lopt", f"{lopt.__version__} from {native.FOLDER}"),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", torch.__version__),
    ]
    for name in PACKAGES:
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    return [*rows, ("CUDA runtime", torch.version.cuda or "none, torch was built without"), ("CUDA driver", _driver())]


def build() -> Rows:
    """How lopt._C was compiled and what runs of it here, or why there is none."""
    if reason := native.absent():
        return [("built", f"no: {reason}")]
    module, left_out = native.load(), native.left_out()
    compiled = module.compiled()
    openmp, cuda = compiled["openmp"], compiled["cuda"]
    return [
        ("compiler", compiled["compiler"]),
        ("instruction sets", f"{' '.join(compiled['isas'])}, this processor runs {module.isa()}"),
        ("OpenMP", f"{torch.get_num_threads()} threads" if openmp else f"no: {left_out.get('openmp', 'left out')}"),
        ("CUDA kernels", f"for {cuda}" if cuda else f"no: {left_out.get('cuda', 'left out')}"),
    ]


def chosen(device: str) -> str:
    """Name of the backend that `HRNN` takes for parameters on a device, or why that device has none."""
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    name = backends.choose(torch.device(device), lopt.HRNNConfig()).__name__.rpartition(".")[2]
    return f"{name} on {torch.cuda.get_device_name()}" if device == "cuda" else name


def memory(model: str, classes: int) -> dict[str, Rows]:
    """What `HRNN` needs beside a model, its parameters and their gradients.

    Raises:
        TrainError: there is no such model.
        ImportError: the package that has it is not installed.
    """
    from lopt.train import models

    network, _, _ = models.build(model, classes, 3, None)
    params = list(network.parameters())
    needed = lopt.HRNN.memory(params)
    small = lopt.HRNN.memory(params, state_format="compact")
    count = sum(map(torch.numel, params))
    return {
        f"{model} for {classes:,} classes": [
            ("parameters", f"{count:,} in {len(params):,} tensors"),
            ("state", f"{_size(needed.state)}, {needed.state / count:.3g} bytes per parameter"),
            ("compact state", f"{_size(small.state)}, {small.state / count:.3g} bytes per parameter"),
            ("update", f"{_size(needed.buffers)} more while training"),
            ("checkpoint", f"{_size(needed.checkpoint)} of optimizer state, to 2 %"),
        ]
    }


def _size(count: int) -> str:
    """Bytes in the largest decimal unit that leaves a number of 1 or more."""
    units = [(1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")]
    scale, unit = next((scale, unit) for scale, unit in units if count >= scale or scale == 1)
    return f"{count / scale:.3g} {unit}"


def _driver() -> str:
    try:
        found = re.search(r"\s(\d+\.\d+(\.\d+)*)\s", DRIVER.read_text())
    except OSError:
        return "none"
    return found[1] if found else "unknown"
