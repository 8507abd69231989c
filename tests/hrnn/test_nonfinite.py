"""Steps that are not taken: non-finite gradients and the overflows of automatic mixed precision."""

import copy
import math

import pytest
import torch
from torch import nn

from lopt import HRNN
from lopt.config import GRADIENT_LIMIT

from .common import METAS, assert_moved, assert_same, content, give_gradients, train, values

pytestmark = pytest.mark.filterwarnings("error")


# Non-finite gradients


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2 * GRADIENT_LIMIT])
@pytest.mark.parametrize("meta", list(METAS))
@pytest.mark.parametrize("which", [0, 2, 3])
def test_a_step_with_a_nonfinite_gradient_is_as_if_it_had_not_been(place, value, meta, which):
    place.skip_unless_supported(METAS[meta])
    clean, hit = (place.hrnn(place.params(), meta=METAS[meta], weight_decay=0.1) for _ in range(2))
    for optimizer in (clean, hit):
        train(optimizer, 2)
    params = hit.param_groups[0]["params"]
    give_gradients(params, 7)
    params[which].grad.view(-1)[-1] = value
    before = content(hit)
    hit.step()
    assert_same(content(hit), before)
    assert hit.skipped_steps == 1
    for optimizer in (clean, hit):
        train(optimizer, range(2, 4))
    assert_same(content(hit), content(clean))
    assert (clean.skipped_steps, hit.skipped_steps) == (0, 1)
    assert copy.deepcopy(hit).skipped_steps == 1


def test_a_nonfinite_first_step_leaves_parameters_and_initial_state(place):
    params = place.params()
    optimizer, lazy = place.hrnn(params), place.hrnn(place.params(), lr=0.0)
    before = values(params)
    params[1].grad[0] = math.nan
    optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
    assert all(value.isfinite().all() for value in content(optimizer).values())
    assert {state["step"].item() for state in optimizer.state.values()} == {0}
    lazy.step()
    assert content(lazy).keys() == content(optimizer).keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_nonfinite_gradients_of_every_dtype_are_seen(place, dtype):
    optimizer = place.hrnn(place.params(dtype=dtype))
    optimizer.param_groups[0]["params"][0].grad[0, 0] = math.inf
    before = values(optimizer.param_groups[0]["params"])
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(param, old) for param, old in zip(optimizer.param_groups[0]["params"], before, strict=True))


def test_a_gradient_at_the_limit_is_taken_and_leaves_finite_state(place):
    params = place.params()
    optimizer = place.hrnn(params)
    before = content(optimizer)
    for _ in range(3):
        params[0].grad.fill_(GRADIENT_LIMIT)
        optimizer.step()
    assert optimizer.skipped_steps == 0
    assert_moved(optimizer, before)
    assert all(value.isfinite().all() for value in content(optimizer).values())


@pytest.mark.parametrize("value", [math.nan, 2 * GRADIENT_LIMIT])
def test_nonfinite_raise_names_the_tensor_and_changes_nothing(place, value):
    params = place.params()
    named = [(f"layer{i}", param) for i, param in enumerate(params)]
    for given, name in ((params, "1 of group 0"), (named, "layer1")):
        optimizer = place.hrnn(given, nonfinite="raise")
        train(optimizer, 1)
        params[1].grad[0] = value
        before = content(optimizer)
        with pytest.raises(RuntimeError, match=rf"gradient of parameter {name}, shape \(6,\), is not finite"):
            optimizer.step()
        assert_same(content(optimizer), before)
        assert optimizer.skipped_steps == 0


# Automatic mixed precision


@pytest.mark.parametrize("shape", [(), (1,)])
def test_found_inf_leaves_parameters_and_all_state_untouched(place, shape):
    optimizer = place.hrnn(place.params())
    train(optimizer, 2)
    before = content(optimizer)
    optimizer.found_inf = torch.ones(shape, device=place.device)
    optimizer.grad_scale = None
    optimizer.step()
    assert_same(content(optimizer), before)
    assert optimizer.skipped_steps == 1
    assert (optimizer.found_inf == 1).all()
    optimizer.found_inf.zero_()
    optimizer.step()
    assert_moved(optimizer, before)
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_grad_scale_divides_the_gradients(place, shape, dtype):
    scaled, plain = place.hrnn(place.params()), place.hrnn(place.params())
    scaled.grad_scale = torch.full(shape, 1024.0, dtype=dtype, device=place.device)
    scaled.found_inf = torch.zeros((), device=place.device)
    for param in scaled.param_groups[0]["params"]:
        param.grad *= 1024  # exact
    for optimizer in (scaled, plain):
        optimizer.step()
    assert_same(content(scaled), content(plain))


def test_the_limit_applies_to_unscaled_gradients(place):
    optimizer = place.hrnn(place.params())
    before = content(optimizer)
    optimizer.grad_scale = torch.full((), 4.0, device=place.device)
    optimizer.param_groups[0]["params"][0].grad[0, 0] = 2 * GRADIENT_LIMIT
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert_moved(optimizer, before)


@pytest.mark.parametrize("unscale", [False, True])
def test_gradscaler_trains_as_without_and_skips_overflows(place, unscale):
    def run(enabled: bool) -> tuple[HRNN, torch.amp.GradScaler]:
        (param,), data = place.params((4, 3)), torch.ones(4, 3, device=place.device)
        optimizer = place.hrnn([param])
        scaler = torch.amp.GradScaler(place.device, init_scale=256.0, growth_interval=1000, enabled=enabled)
        for step in range(6):
            if step == 3 and not enabled:
                continue
            optimizer.zero_grad()
            loss = (param * data).square().sum() * (math.inf if step == 3 else 1.0)
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_([param], 1e6)
            scaler.step(optimizer)
            scaler.update()
        return optimizer, scaler

    (with_scaler, scaler), (without, _) = run(True), run(False)
    assert_same(content(with_scaler), content(without))
    assert with_scaler.skipped_steps == 1
    assert scaler.get_scale() == 128
    assert not hasattr(with_scaler, "found_inf")
    assert not hasattr(with_scaler, "grad_scale")


def test_nonfinite_raise_leaves_overflows_to_the_gradscaler(place):
    (param,) = place.params((4, 3))
    optimizer, scaler = place.hrnn([param], nonfinite="raise"), torch.amp.GradScaler(place.device, init_scale=2.0)
    scaler.scale((param * math.inf).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.skipped_steps == 1
