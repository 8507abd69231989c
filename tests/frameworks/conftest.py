"""Shared by the tests of training frameworks: one small problem, and the comparison of two models."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

STEPS = 6


class Regression(nn.Module):
    """x: [n, 3], y: [n] -> the loss and predictions [n], by the names that transformers.Trainer reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 1))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        prediction = self.body(x)[:, 0]
        return {"loss": (prediction - y).square().mean(), "logits": prediction}


def examples(count: int = 4 * STEPS) -> list[dict[str, Tensor]]:
    """The same ones every time."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 3, generator=generator)
    return [{"x": x, "y": x.sum()} for x in inputs]


@pytest.fixture(name="regression")
def _regression() -> type[Regression]:
    return Regression


@pytest.fixture(name="data")
def _data() -> list[dict[str, Tensor]]:
    return examples()


@pytest.fixture(name="assert_trained_alike")
def _assert_trained_alike() -> Callable[[nn.Module, nn.Module], None]:
    return assert_trained_alike


def assert_trained_alike(left: nn.Module, right: nn.Module) -> None:
    """Bitwise, and both elsewhere than where they began."""
    start = Regression().state_dict()
    for (name, value), (_, other) in zip(left.named_parameters(), right.named_parameters(), strict=True):
        assert torch.equal(value, other), name
        assert not torch.equal(value, start[name.removeprefix("model.")]), name
