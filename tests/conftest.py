"""Shared by all tests: what runs only on some machines says so; programs of several processes and their outcomes."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from lopt import backends, native
from lopt.backends import cuda


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip(f"needs a CUDA device: torch {torch.__version__} finds none")


@pytest.fixture(autouse=True)
def _kernel_faults_end_here(request: pytest.FixtureRequest) -> Iterator[None]:
    """A kernel's fault reaches the process late and stays: without this, tests that come after would fail of it."""
    yield
    if not request.node.get_closest_marker("gpu"):
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # pytest-xdist names the test and goes on in another process
        pytest.exit(f"{request.node.nodeid} has ended the process's CUDA context: {error}", returncode=1)


@pytest.fixture(params=native.runnable())
def isa(request: pytest.FixtureRequest):
    """Every instruction set that runs here, in use while the test is."""
    native.load().use_isa(request.param)
    yield request.param
    native.load().use_isa("")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch's operators run on one thread while the test does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", name="run_processes")
def _run_processes() -> Callable[..., None]:
    return run_processes


@pytest.fixture(name="failures_of")
def _failures_of() -> Callable[[str, Path, int], list[str]]:
    return failures_of


def run_processes(
    program: str,
    arguments: Sequence[Sequence[str]],
    environments: Sequence[Mapping[str, str]],
    folder: Path,
    timeout: float,
) -> None:
    """Run a Python file as one process per entry and wait for all; what each prints is in said-<rank>.txt of `folder`.

    arguments, environments: of each process, the latter beside this one's. timeout: seconds until all are killed.
    """
    common = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with contextlib.ExitStack() as files:
        processes = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", program, *own],
                env=common | environment,
                stdout=files.enter_context(open(folder / f"said-{rank}.txt", "w")),
                stderr=subprocess.STDOUT,
            )
            for rank, (own, environment) in enumerate(zip(arguments, environments, strict=True))
        ]
        end = time.monotonic() + timeout
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
            process.kill()
            process.wait()


def failures_of(check: str, folder: Path, processes: int) -> list[str]:
    """What went wrong with a check in any process; skips the test where the check was skipped.

    Each process leaves outcomes-<rank>.json: check -> None, "skipped: " and why, or an error.
    """
    failures = []
    for rank in range(processes):
        path = folder / f"outcomes-{rank}.json"
        outcomes = json.loads(path.read_text()) if path.exists() else {}
        outcome = outcomes.get(check, "not reached")
        if outcome is not None and outcome.startswith("skipped: "):
            pytest.skip(outcome.removeprefix("skipped: "))
        if outcome is not None:
            said = (folder / f"said-{rank}.txt").read_text()[-2000:]
            failures.append(f"process {rank}: {outcomes.get(check, f'{outcome}, see the check before it. {said}')}")
    return failures


@pytest.fixture
def emulate_cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function after which the CUDA kernels' emulation can be asked for on the CPU, where HRNN never chooses it."""

    def emulate() -> None:
        monkeypatch.setitem(backends.BACKENDS, "cuda", backends.Backend(cuda.__name__, "cpu"))
        monkeypatch.setattr(cuda, "unusable", lambda: None)

    return emulate
