"""Rows that a stranger can trust: what was timed, in which unit, with its spread, on which device, at which commit."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement; the fields are the columns of results.csv.

    Attributes:
        op: what was run, such as "step". case: on what, such as "resnet50".
        backend: by whom: a backend of lopt, or a competitor. threads: of the CPU; 0 on a GPU.
        n: parameters. tensors: how many tensors they are in. dtype: of the parameters.
        unit: of p20, p50 and p80, the quantiles over the rounds.
        device, commit, date: where, which code, when.
    """

    op: str
    case: str
    backend: str
    threads: int
    n: int
    tensors: int
    dtype: str
    unit: str
    p20: float
    p50: float
    p80: float
    device: str
    commit: str
    date: str


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """20, 50 and 80 % quantile of at least one sample."""
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return cuts[1], statistics.median(samples), cuts[7]


def default_path() -> Path:
    """bench/results.csv in a checkout, results.csv in the working directory for an installed package."""
    return FOLDER / "results.csv" if (FOLDER.parent / "setup.py").exists() else Path("results.csv")


def device_name(device: torch.device) -> str:
    """The processor's or GPU's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def commit() -> str:
    """Short hash of the checkout's commit, with "+" if it has changes. Outside of one, LOPT_COMMIT or "unknown"."""
    try:
        git = ["git", "-C", str(FOLDER)]
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "--", ":!*results.csv"], capture_output=True, text=True
        )
        return name.strip() + ("+" if dirty.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("LOPT_COMMIT", "unknown")


def today() -> str:
    """The date, ISO 8601, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def append(rows: Sequence[Row], path: Path) -> None:
    """Add rows to a CSV file, with the header when the file is new.

    Raises:
        ValueError: the file has other columns.
    """
    names = [field.name for field in dataclasses.fields(Row)]
    if path.exists() and path.stat().st_size:
        with open(path, newline="") as file:
            header = next(csv.reader(file))
        if header != names:
            raise ValueError(f"{path} has the columns {header}, these rows have {names}: give another file by --out")
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        for row in rows:
            values = dataclasses.asdict(row)
            writer.writerow(values | {key: f"{values[key]:.4g}" for key in ("p20", "p50", "p80")})


def load(path: Path) -> list[Row]:
    """Rows of a CSV file that `append` wrote."""
    kinds = {"int": int, "float": float, "str": str}
    with open(path, newline="") as file:
        return [
            Row(**{field.name: kinds[str(field.type)](line[field.name]) for field in dataclasses.fields(Row)})
            for line in csv.DictReader(file)
        ]
