"""Attended parameters: train() puts them into the model, eval() the optimized ones."""

import copy

import pytest
import torch
from torch import nn

from .common import ATTENTION, assert_same, content, through_memory, train, values

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_eval_shows_the_optimized_parameters_and_train_restores_the_attended_exactly(place, dtype):
    place.skip_unless_supported(ATTENTION)
    params = place.params(dtype=dtype)
    optimizer = place.hrnn(params, meta=ATTENTION)
    train(optimizer, 3)
    attended = content(optimizer)
    for _ in range(2):
        optimizer.eval()
    for param in params:
        assert torch.equal(param, optimizer.state[param]["true_param"].to(dtype))
    assert any(not torch.equal(param, attended[f"{i}.param"]) for i, param in enumerate(params))
    for _ in range(2):
        optimizer.train()
    assert_same(content(optimizer), attended)


def test_stepping_in_eval_mode_is_refused_and_changes_nothing(place):
    place.skip_unless_supported(ATTENTION)
    optimizer = place.hrnn(place.params(), meta=ATTENTION)
    train(optimizer, 1)
    optimizer.eval()
    before = content(optimizer)
    with pytest.raises(RuntimeError, match=r"in eval mode.*Call optimizer.train\(\)"):
        optimizer.step()
    assert_same(content(optimizer), before)
    optimizer.train()
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_saved_in_eval_mode_resumes_exactly(place, dtype):
    place.skip_unless_supported(ATTENTION)
    optimizer = place.hrnn(place.params(dtype=dtype), meta=ATTENTION)
    train(optimizer, 2)
    optimizer.eval()
    saved = through_memory({"model": values(optimizer.param_groups[0]["params"]), "optimizer": optimizer.state_dict()})
    resumed = place.hrnn([nn.Parameter(value) for value in saved["model"]], meta=ATTENTION)
    resumed.load_state_dict(saved["optimizer"])
    for either in (optimizer, resumed, copy.deepcopy(resumed)):
        either.train()
        train(either, range(2, 4))
        assert_same(content(either), content(optimizer))


def test_a_run_saved_in_eval_mode_without_its_attended_points_goes_on_from_the_optimized_ones(place):
    """As torch.distributed.checkpoint reads it: the kinds of state that the optimizer which loads already has."""
    place.skip_unless_supported(ATTENTION)
    optimizer = place.hrnn(place.params(), meta=ATTENTION)
    train(optimizer, 2)
    optimizer.eval()
    saved = through_memory(optimizer.state_dict())
    for state in saved["state"].values():
        del state["attended"]
    resumed = place.hrnn(values(optimizer.param_groups[0]["params"]), meta=ATTENTION)
    with pytest.warns(UserWarning, match=r"saved in eval mode .* To resume exactly, save after optimizer.train\(\)"):
        resumed.load_state_dict(saved)
    shown = values(resumed.param_groups[0]["params"])
    resumed.train()
    assert all(map(torch.equal, values(resumed.param_groups[0]["params"]), shown))
    train(resumed, range(2, 4))


def test_without_attention_train_and_eval_change_nothing_and_stepping_goes_on(place):
    optimizer = place.hrnn(place.params())
    train(optimizer, 1)
    before = content(optimizer)
    optimizer.eval()
    assert_same(content(optimizer), before)
    optimizer.step()


def test_modes_may_be_switched_before_the_first_step(place):
    place.skip_unless_supported(ATTENTION)
    switched, plain = place.hrnn(place.params(), meta=ATTENTION), place.hrnn(place.params(), meta=ATTENTION)
    switched.eval()
    switched.train()
    for optimizer in (switched, plain):
        train(optimizer, 2)
    assert_same(content(switched), content(plain))
