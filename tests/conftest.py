"""Shared by all tests: what runs only on some machines says so."""

import pytest
import torch

from lopt import native


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip(f"needs a CUDA device: torch {torch.__version__} finds none")


@pytest.fixture(params=native.runnable())
def isa(request: pytest.FixtureRequest):
    """Every instruction set that runs here, in use while the test is."""
    native.load().use_isa(request.param)
    yield request.param
    native.load().use_isa("")
