"""The tests of HRNN as a torch.optim.Optimizer: what a PyTorch user may rely on, on every backend that runs here."""

from collections.abc import Callable

import pytest

from lopt import backends, native

from .common import EMULATED, PLACES, Place


@pytest.fixture(params=[*PLACES, EMULATED])
def place(request: pytest.FixtureRequest, emulate_cuda: Callable[[], None]) -> Place:
    backend, device = request.param
    if backend == "cuda" and device == "cpu" and native.absent() is None:
        emulate_cuda()
    if reason := backends.unusable(backend):
        pytest.skip(reason)
    return request.param
