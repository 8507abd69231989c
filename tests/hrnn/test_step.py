"""A step and what happens around it: who takes part, where its state lies, closures, hooks, defaults of torch."""

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from lopt import HRNN
from lopt.state import rows

from .common import assert_moved, assert_same, content, give_gradients, train

pytestmark = pytest.mark.filterwarnings("error")


# Who takes part


def test_step_moves_every_parameter_and_keeps_everything_finite(place):
    optimizer = place.hrnn(place.params())
    before = content(optimizer)
    train(optimizer, 3)
    assert_moved(optimizer, before)
    assert all(value.isfinite().all() for value in content(optimizer).values())


def test_parameters_without_gradient_are_untouched_and_have_no_state(place):
    params = place.params()
    params[1].grad = None
    before = params[1].detach().clone()
    optimizer = place.hrnn(params)
    optimizer.step()
    assert torch.equal(params[1], before)
    assert params[1] not in optimizer.state or not optimizer.state[params[1]]
    for param in params:
        param.grad = None
    everything = content(optimizer)
    optimizer.step()
    assert_same(content(optimizer), everything)
    assert optimizer.skipped_steps == 0


def test_a_parameter_may_take_part_in_some_steps_only(place):
    params = place.params()
    optimizer = place.hrnn(params)
    for step in range(6):
        give_gradients(params, step)
        params[step % 2].grad = None
        optimizer.step()
    assert [optimizer.state[param]["step"].item() for param in params] == [3, 3, 6, 6]


def test_parameters_that_take_turns_do_not_set_up_every_step_anew(place, monkeypatch):
    params = place.params()
    optimizer = place.hrnn(params)
    make, made = HRNN._make_plan, []
    monkeypatch.setattr(HRNN, "_make_plan", lambda *args: made.append(args) or make(*args))
    for step in range(8):
        give_gradients(params, step)
        params[step % 2].grad = None
        optimizer.step()
    assert len(made) == 2
    for param in params:  # more sets than are kept
        give_gradients(params, 0)
        param.grad = None
        optimizer.step()
    assert len(optimizer._plans[params[0].device]) == 2


def test_a_step_reads_the_tensors_that_are_there_now(place):
    params, others = place.params(), place.params()
    optimizer = place.hrnn(params)
    for step in range(5):
        give_gradients(params, step)
        give_gradients(others, step)
        fresh = place.hrnn(others)  # knows of no step before
        if step:
            fresh.load_state_dict(optimizer.state_dict())
        if step == 2:  # state that someone put in the place of what was there
            for name in ("hidden", "ms", "tensor_hidden"):
                optimizer.state[params[0]][name] = optimizer.state[params[0]][name] * 0.5
                fresh.state[others[0]][name] *= 0.5
        if step == 3:  # the same parameter, elsewhere in memory
            params[1].data = params[1].data.clone()
        if step == 4:
            params[3].grad = others[3].grad = None
        optimizer.step()
        fresh.step()
        assert_same(content(optimizer), content(fresh))


def test_an_added_group_joins_the_training_and_the_global_state(place):
    first, second = place.params((4, 3), (5,))
    optimizer = place.hrnn([first])
    train(optimizer, 2)
    optimizer.add_param_group({"params": [second], "lr": 0.5})
    train(optimizer, 2)
    assert optimizer.state[second]["step"] == 2
    assert optimizer.state[first]["step"] == 4
    assert optimizer.state[first]["global_hidden"] is optimizer.state[second]["global_hidden"]


def test_tied_weights_are_one_parameter(place):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.Embedding(5, 3), nn.Linear(3, 5)
            self.decode.weight = self.encode.weight

    model = Tied().to(place.device)
    weight, bias = (nn.Parameter(param.detach().clone()) for param in (model.encode.weight, model.decode.bias))
    words = torch.tensor([0, 3, 3, 1], device=place.device)
    optimizers = place.hrnn(model.parameters()), place.hrnn([weight, bias])
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model.decode(model.encode(words)).square().sum().backward()
        nn.functional.linear(nn.functional.embedding(words, weight), weight, bias).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert len(optimizers[0].state) == 2
    assert model.decode.weight is model.encode.weight
    assert_same(content(optimizers[0]), content(optimizers[1]))


@pytest.mark.parametrize("state_format", ["float32", "compact"])
def test_what_has_had_no_gradient_stays_and_goes_from_its_first_one_on(place, state_format):
    """As the rows of an embedding that never come, its padding, inputs that are always 0 and masked gradients."""
    (param,) = place.params((6, 3))
    start, mask = param.detach().clone(), torch.ones(6, 1, device=place.device)
    mask[:3] = 0
    optimizer = HRNN([param], backend=place.backend, state_format=state_format)
    for step in range(6):
        give_gradients([param], step)
        param.grad *= mask
        optimizer.step()
    assert torch.equal(param[:3], start[:3])
    assert (param[3:] != start[3:]).all()
    for step in (6, 7):
        before = param.detach().clone()
        give_gradients([param], step)
        if step == 7:
            param.grad *= mask
        optimizer.step()
        assert (param != before).all()  # in the second of averages of past gradients


def test_the_papers_rule_moves_what_has_had_no_gradient(place):
    (param,) = place.params((2, 3))
    start = param.detach().clone()
    param.grad[0] = 0
    place.hrnn([param]).step()
    assert (param != start).all()


def test_a_gradient_of_0_at_first_is_no_past_to_average_with(place):
    (param,) = place.params((5, 4))
    gradient = param.grad.clone()
    param.grad.zero_()
    optimizer = place.hrnn([param], meta=None)
    before = param.detach().clone()
    optimizer.step()
    assert torch.equal(param, before)
    param.grad.copy_(gradient)
    optimizer.step()
    accum = optimizer.state[param]["accum"]
    assert torch.equal(accum, gradient.float().expand_as(accum))


# State


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_state_is_float32_and_laid_out_as_its_table_says(place, dtype):
    params = (
        place.params(dtype=dtype)
        if not dtype.is_complex
        else [nn.Parameter(torch.view_as_complex(param.data)) for param in place.params((4, 3, 2))]
    )
    optimizer = place.hrnn(params)
    train(optimizer, 1)
    for param in params:
        shape = torch.view_as_real(param).shape if dtype.is_complex else param.shape
        for row in rows(optimizer.config):
            value, size = optimizer.state[param][row.name], row.size(optimizer.config)
            assert value.dtype == torch.float32
            assert value.shape == (*(() if size is None else (size,)), *(shape if row.per == "parameter" else ()))


def test_all_parameters_share_one_global_state(place):
    params = place.params()
    optimizer = place.hrnn(params)
    optimizer.step()
    assert len({id(optimizer.state[param]["global_hidden"]) for param in params}) == 1


def test_state_whose_memory_is_exchanged_is_followed(place):
    """As offloading to another device and back does."""
    results = []
    for moved in (False, True):
        optimizer = place.hrnn(place.params())
        for step in range(4):
            train(optimizer, range(step, step + 1))
            if moved:
                for state in optimizer.state.values():
                    for value in state.values():
                        value.data = value.data.clone()
        results.append(content(optimizer))
    assert_same(*results)


def test_state_that_was_moved_away_and_back_one_by_one_shares_its_global_state_again(place):
    runs = []
    for moved in (False, True):
        params = place.params((3,), (2,), (4,))
        optimizer = place.hrnn(params)
        optimizer.step()
        if moved:
            for state in optimizer.state.values():
                for name, value in state.items():
                    state[name] = value.clone()
        for step in range(1, 5):
            give_gradients(params, step)
            params[step % 3].grad = None
            optimizer.step()
        runs.append(content(optimizer))
        assert len({id(state["global_hidden"]) for state in optimizer.state.values()}) == 1
    assert_same(*runs)


@pytest.mark.parametrize("head_first", [False, True])
def test_state_that_was_removed_is_freed(place, head_first):
    body, head = place.params((40, 30), (5,))
    optimizer = place.hrnn([{"params": [body]}, {"params": [head]}])
    if head_first:
        gradient, body.grad = body.grad, None
        optimizer.step()
        body.grad = gradient
    optimizer.step()
    hidden = weakref.ref(optimizer.state[body]["hidden"])
    del optimizer.state[body], optimizer.param_groups[0]
    optimizer.step()
    gc.collect()
    assert hidden() is None


def test_a_moved_parameter_is_refused_with_a_cure_that_works(place):
    params = place.params()
    optimizer = place.hrnn(params)
    train(optimizer, 2)
    expected = copy.deepcopy(optimizer)
    # As if the model had come here from a device without memory: the state is left behind.
    states = {param: dict(optimizer.state[param]) for param in params}
    for param in params:
        optimizer.state[param] = {name: value.to("meta") for name, value in states[param].items()}
    with pytest.raises(RuntimeError, match=r"optimizer.load_state_dict\(optimizer.state_dict\(\)\)"):
        optimizer.step()
    for param in params:
        optimizer.state[param] = {name: value.cpu() for name, value in states[param].items()}
    optimizer.load_state_dict(optimizer.state_dict())
    for either in (optimizer, expected):
        train(either, range(2, 4))
    assert_same(content(optimizer), content(expected))


def test_a_parameter_of_another_shape_than_its_state_is_refused(place):
    (param,) = place.params((4, 3))
    optimizer = place.hrnn([param])
    optimizer.step()
    param.grad = None
    for shape in ((5, 3), (12,), (3, 4)):
        param.data = torch.zeros(shape, device=place.device)
        give_gradients([param], 1)
        with pytest.raises(RuntimeError, match=r"has shape .* its state was made for \(4, 3\)"):
            optimizer.step()


# Around a step


def test_closure_runs_once_with_gradients_enabled_and_its_loss_is_returned(place):
    (param,) = place.params((3,))
    optimizer, calls = place.hrnn([param]), []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    expected = param.square().sum().item()
    with torch.no_grad():
        assert optimizer.step(closure).item() == expected
    assert calls == [True]
    assert optimizer.step() is None
    param.grad = None
    assert optimizer.step(lambda: 3.0) == 3.0


def test_step_hooks_run_around_every_step(place):
    optimizer, calls = place.hrnn(place.params()), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(optimizer, 2)
    assert calls == ["before", "after"] * 2


def test_the_default_dtype_does_not_change_a_step(place):
    results = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            optimizer = place.hrnn(place.params())
            train(optimizer, 2)
            results.append(content(optimizer))
        finally:
            torch.set_default_dtype(torch.float32)
    assert_same(*results)


def test_the_default_device_does_not_matter_to_a_step(place):
    results = []
    for device in ("cpu", place.device, "meta"):
        params = place.params()
        with torch.device(device):
            optimizer = place.hrnn(params)
            optimizer.step()
        give_gradients(params, 1)
        with torch.device(device):
            optimizer.step()
        results.append(content(optimizer))
    for result in results[1:]:
        assert_same(result, results[0])


def test_autocast_does_not_change_a_step(place):
    results = []
    for enabled in (False, True):
        optimizer = place.hrnn(place.params())
        with torch.autocast(place.device, torch.bfloat16, enabled=enabled):
            train(optimizer, 3)
        results.append(content(optimizer))
    assert_same(*results)


def test_a_graph_from_before_a_step_cannot_be_differentiated_after_it(place):
    (param,) = place.params((3,))
    optimizer = place.hrnn([param])
    loss = param.square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
