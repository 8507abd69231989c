"""GPU kernels on the CPU, as their compilers made them: see ptx/machine.py."""

import shutil
from collections.abc import Callable

import pytest

from lopt import native
from lopt.backends import triton

from .ptx import launch


@pytest.fixture(scope="session")
def cuda_ptx(tmp_path_factory) -> launch.Cuda:
    """The CUDA kernels, compiled by nvcc; their launches run on the CPU."""
    return launch.Cuda(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def simulate(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, emulate_cuda: Callable[[], None]
) -> Callable[..., None]:
    """A function after which the backend of a name, "cuda" or "triton", takes CPU tensors and runs compiled kernels.

    Triton compiles for a GPU of compute capability `capability`. Skips the test where there is no compiler.
    """
    launch.LAUNCHES.clear()

    def install(name: str, capability: int = 90) -> None:
        if name == "triton":
            if reason := triton.ABSENT or ("Triton interprets in this process" if triton.interpreted() else None):
                pytest.skip(reason)
            return launch.install_triton(monkeypatch, capability)
        if reason := native.absent() or (None if shutil.which("nvcc") else "nvcc is not on PATH"):
            pytest.skip(reason)
        emulate_cuda()
        launch.install_cuda(monkeypatch, request.getfixturevalue("cuda_ptx"))

    return install
