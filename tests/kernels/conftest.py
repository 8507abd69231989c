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
def simulate(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Callable[[str], None]:
    """A function after which the backend of a name, "cuda" or "triton", takes CPU tensors and runs compiled kernels."""

    launch.LAUNCHES.clear()

    def install(name: str) -> None:
        if name == "triton":
            if triton.ABSENT:
                pytest.skip(triton.ABSENT)
            return launch.install_triton(monkeypatch)
        if reason := native.absent() or (None if shutil.which("nvcc") else "nvcc is not on PATH"):
            pytest.skip(reason)
        request.getfixturevalue("cuda_ptx").install(monkeypatch)

    return install
