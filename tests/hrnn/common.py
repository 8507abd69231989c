"""Shared by the tests of HRNN: backends and the devices they run on, gradients, the comparison of two optimizers."""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lopt import HRNN, HRNNConfig, MetaParams, backends

SHAPES = ((6, 5), (6,), (), (2, 3, 3, 2))
PAPER = MetaParams.init(HRNNConfig(), seed=1)
ATTENTION = MetaParams.init(HRNNConfig(attention=True), seed=1)
METAS = {
    "paper": PAPER,
    "attention": ATTENTION,
    "two_levels": MetaParams.init(HRNNConfig(level_sizes=(10, 20)), seed=1),
    "no_log_lr": MetaParams.init(HRNNConfig(dynamic_output_scale=False, relative_log_lr=None), seed=1),
}


FREE: dict[str, Any] = {"base_fan_in": None, "base_depth": None}  # steps of all tensors are as long


class Place(NamedTuple):
    """A backend and a device it runs on."""

    backend: str
    device: str

    def params(self, *shapes: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
        """Parameters with a gradient each; SHAPES without arguments."""
        generator = torch.Generator().manual_seed(seed)
        draws = [torch.randn(tuple(shape), generator=generator, dtype=torch.float64) for shape in shapes or SHAPES]
        params = [nn.Parameter(draw.to(self.device, dtype)) for draw in draws]
        give_gradients(params, 0)
        return params

    def hrnn(self, params: Any, **options: Any) -> HRNN:
        """The optimizer on this backend, with meta-parameters that differ from the default ones."""
        return HRNN(params, **{"meta": PAPER, "backend": self.backend} | options)

    def skip_unless_supported(self, meta: MetaParams) -> None:
        """Skip where the backend has no kernel for an architecture."""
        try:
            backends.choose(torch.device(self.device), meta.config, self.backend)
        except RuntimeError as error:
            pytest.skip(str(error))


PLACES = [
    pytest.param(Place(name, device), id=f"{name}-{device}", marks=[pytest.mark.gpu] if device == "cuda" else [])
    for name, backend in backends.BACKENDS.items()
    for device in ("cpu", "cuda")
    if backend.device in ("*", device)
]
EMULATED = pytest.param(Place("cuda", "cpu"), id="cuda-emulated")


def give_gradients(params: Sequence[Tensor], step: int) -> None:
    """Gradients that depend on the step alone."""
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        dtype = torch.complex128 if param.is_complex() else torch.float64
        param.grad = torch.randn(param.shape, generator=generator, dtype=dtype).to(param.device, param.dtype)


def train(optimizer: HRNN, steps: range | int) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in range(steps) if isinstance(steps, int) else steps:
        give_gradients(params, step)
        optimizer.step()


def content(optimizer: HRNN) -> dict[str, Tensor]:
    """Copies of all parameters and all state under readable names."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    tensors = {f"{i}.param": param.detach().clone() for i, param in enumerate(params)}
    for i, param in enumerate(params):
        for name, value in optimizer.state.get(param, {}).items():
            tensors[f"{i}.{name}"] = value.clone()
    return tensors


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Bitwise."""
    assert left.keys() == right.keys()
    assert [name for name in left if left[name].dtype != right[name].dtype] == []
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def assert_moved(optimizer: HRNN, before: dict[str, Tensor]) -> None:
    after = content(optimizer)
    still = [name for name in before if name.endswith(".param") and torch.equal(before[name], after[name])]
    assert not still


def values(params: Sequence[Tensor]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def through_memory(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
