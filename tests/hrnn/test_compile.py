"""torch.compile of a step."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from lopt import HRNN, HRNNConfig, MetaParams

from .common import Place, assert_same, content, give_gradients, train

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    """What one test has compiled holds backends that the next one no longer has."""
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("change", ["first", "load", "freeze", "add"])
def test_a_compiled_step_follows_what_changes(change):
    def build() -> tuple[list[nn.Parameter], HRNN]:
        params = Place("reference", "cpu").params((3, 2), (3,))
        return params, HRNN(params, fused=None)  # the backend is chosen while it is traced

    (params, compiled), (twins, plain) = build(), build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.compile imports parts of torch that warn of themselves
        step = torch.compile(compiled.step, backend="eager")
        for index in range(3):
            if index == (0 if change == "first" else 1):
                torch.compiler.reset()
            for own, optimizer in ((params, compiled), (twins, plain)):
                give_gradients(own, index)
                if index == 1 and change == "load":
                    optimizer.load_state_dict(optimizer.state_dict())
                if index == 1 and change == "add":
                    own.append(nn.Parameter(torch.ones(2)))
                    own[-1].grad = torch.ones(2)
                    optimizer.add_param_group({"params": own[-1:]})
                if index == 1 and change == "freeze":
                    own[0].requires_grad_(False)
                if index and change == "freeze":
                    own[0].grad = None
            step()
            plain.step()
    assert_same(content(plain), content(compiled))


@pytest.mark.slow
def test_a_number_that_a_scheduler_changes_is_compiled_twice_at_most():
    params = Place("reference", "cpu").params((50, 2), (3,))  # shorter steps of one of them
    optimizer, graphs = HRNN(params), []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    optimizer.step()
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        step = torch.compile(optimizer.step, backend=count)
        for index in range(8):
            give_gradients(params, index)
            step()
            scheduler.step()
    assert len(graphs) <= 2  # the second for a number that is not constant


@pytest.mark.slow
def test_a_compiled_step_equals_the_plain_one():
    place = Place("reference", "cpu")
    meta = MetaParams.init(HRNNConfig((4,), timescales=2, log_ms_features=False))
    plain, compiled = (place.hrnn(place.params((3, 2), (3,)), meta=meta) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.compile imports parts of torch that warn of themselves
        step = torch.compile(compiled.step, backend="eager")
        for index in range(3):
            train(plain, range(index, index + 1))
            give_gradients(compiled.param_groups[0]["params"], index)
            step()
    assert_same(content(plain), content(compiled))


@pytest.mark.slow
def test_a_graph_from_before_a_compiled_step_cannot_be_differentiated_after_it(place):
    (param,) = place.params((3,))
    optimizer = place.hrnn([param])
    loss = param.square().sum()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        torch.compile(optimizer.step, backend="eager")()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
