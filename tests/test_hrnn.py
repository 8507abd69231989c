"""lopt.HRNN as a torch.optim.Optimizer: what a PyTorch user may rely on, on every backend that runs here."""

import copy
import dataclasses
import gc
import io
import math
import pickle
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import lr_scheduler
from torch.testing._internal.two_tensor import TwoTensor

from lopt import HRNN, HRNNConfig, MetaParams, backends, native
from lopt.backends import reference
from lopt.config import GRADIENT_LIMIT
from lopt.distributed import real
from lopt.hrnn import INIT_LR, OPTIONS
from lopt.state import FACTOR, SAMPLES, rows, sampled

pytestmark = pytest.mark.filterwarnings("error")

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


@pytest.fixture(params=[*PLACES, EMULATED])
def place(request: pytest.FixtureRequest, emulate_cuda: Callable[[], None]) -> Place:
    backend, device = request.param
    if backend == "cuda" and device == "cpu" and native.absent() is None:
        emulate_cuda()
    if reason := backends.unusable(backend):
        pytest.skip(reason)
    return request.param


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


# Options, groups, construction


def test_step_moves_every_parameter_and_keeps_everything_finite(place):
    optimizer = place.hrnn(place.params())
    before = content(optimizer)
    train(optimizer, 3)
    assert_moved(optimizer, before)
    assert all(value.isfinite().all() for value in content(optimizer).values())


def test_step_descends_and_maximize_climbs(place):
    for maximize in (False, True):
        (param,) = place.params((8, 8))
        optimizer = place.hrnn([param], maximize=maximize, init_lr=1e-2)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = param.square().sum()
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
        assert (losses[-1] > losses[0]) is maximize


def test_maximize_equals_descent_on_negated_gradients(place):
    climbing, descending = place.hrnn(place.params(), maximize=True), place.hrnn(place.params())
    for step in range(3):
        train(climbing, range(step, step + 1))
        params = descending.param_groups[0]["params"]
        give_gradients(params, step)
        for param in params:
            param.grad.neg_()
        descending.step()
    assert_same(content(climbing), content(descending))


def test_a_group_may_climb_beside_one_that_descends(place):
    grouped, negated = place.params((4, 3), (5,)), place.params((4, 3), (5,))
    negated[1].grad.neg_()
    optimizers = (place.hrnn([{"params": grouped[:1]}, {"params": grouped[1:], "maximize": True}]), place.hrnn(negated))
    for optimizer in optimizers:
        optimizer.step()
    assert_same(*map(content, optimizers))


def test_lr_multiplies_the_step_and_enters_only_what_rates_may_rise_by(place):
    full, quarter = place.params(), place.params()
    for param in (*full, *quarter):
        param.data.zero_()
    optimizers = place.hrnn(full, meta=None), place.hrnn(quarter, meta=None, lr=0.25)
    for optimizer in optimizers:
        optimizer.step()
    for left, right in zip(full, quarter, strict=True):
        assert torch.equal(left, 4 * right)
        state, slowed = dict(optimizers[0].state[left]), dict(optimizers[1].state[right])
        for name, begin in (("damping", FACTOR), ("distance", 0)):
            assert torch.equal(state.pop(name)[begin:], 2 * slowed.pop(name)[begin:])
        assert_same(state, slowed)


@pytest.mark.parametrize("lr", [0.0, 0.1, torch.tensor(0.02)])
def test_rates_do_not_run_away_while_steps_are_held_back(place, lr):
    """Gradients agree while nothing moves; without an eye on lr that looks like steps that are too short."""
    held, free = place.params((30, 20), (30, 20))
    free.grad.copy_(held.grad)
    optimizer = place.hrnn([{"params": [held], "lr": lr}, {"params": [free]}], meta=None)
    before = held.detach().clone()
    for _ in range(60):
        optimizer.step()
    risen = [float(optimizer.state[param]["log_lr_mean"]) - math.log(INIT_LR) for param in (held, free)]
    assert risen[1] > 2
    assert risen[0] < 4 * float(lr) * risen[1] + 0.1
    assert torch.equal(held, before) == (float(lr) == 0)


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


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lr_0_leaves_every_number_as_it_is(place, weight_decay):
    numbers = torch.tensor([1.0, -math.inf, math.inf, 1e-40, math.nan])
    params = [nn.Parameter(numbers.to(place.device, dtype)) for dtype in (torch.float32, torch.float64, torch.bfloat16)]
    before = [param.detach().clone() for param in params]
    optimizer = place.hrnn(params, lr=0.0, weight_decay=weight_decay)
    train(optimizer, 2)
    for param, old in zip(params, before, strict=True):
        torch.testing.assert_close(param.detach(), old, rtol=0, atol=0, equal_nan=True)


def test_infinite_parameters_stay_where_nothing_decays(place):
    param = nn.Parameter(torch.tensor([1.0, -math.inf, math.inf], device=place.device))
    train(place.hrnn([param]), 2)
    assert param.isfinite().tolist() == [True, False, False] and not param.isnan().any()


def test_a_gradient_of_another_size_than_its_parameter_is_refused(place):
    param = nn.Parameter(torch.zeros(3, device=place.device))
    param.grad = torch.ones_like(param)
    param.data = torch.zeros(5, device=place.device)
    optimizer = place.hrnn([param])
    with pytest.raises(RuntimeError, match=r"shape \(5,\) has a gradient of shape \(3,\)"):
        optimizer.step()


def test_a_conjugate_view_is_a_gradient_too(place):
    value = torch.randn(4, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)).to(place.device)
    left, right = (nn.Parameter(value.clone()) for _ in range(2))
    left.grad, right.grad = value.conj(), value.conj().resolve_conj()
    assert left.grad.is_conj()
    for param in (left, right):
        place.hrnn([param]).step()
    assert torch.equal(left, right)


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


def test_a_learning_rate_in_a_later_group_is_warned_of(place):
    first, second = place.params((3,), (2,))
    optimizer = place.hrnn([first])
    with pytest.warns(UserWarning, match="lr=0.001 multiplies the learned step"):
        optimizer.add_param_group({"params": [second], "lr": 1e-3})


@pytest.mark.parametrize(("name", "value"), [("init_lr", 0.0), ("weight_decay", math.nan)])
def test_a_state_with_options_out_of_range_is_refused_and_nothing_lost(place, name, value):
    optimizer = place.hrnn(place.params())
    optimizer.step()
    saved, before = optimizer.state_dict(), content(optimizer)
    saved["param_groups"][0][name] = value
    with pytest.raises(ValueError, match="Invalid"):
        optimizer.load_state_dict(saved)
    assert_same(before, content(optimizer))
    assert optimizer.param_groups[0][name] != value


def test_a_schedule_that_ends_just_below_0_can_be_saved_and_loaded(place):
    optimizer = place.hrnn(place.params(), meta=None)
    schedule = lr_scheduler.LinearLR(optimizer, 1 / 3, 0.0, 10)
    for step in range(10):
        train(optimizer, range(step, step + 1))
        schedule.step()
    assert -1e-15 < optimizer.param_groups[0]["lr"] < 0
    before = [state["damping"][FACTOR].item() for state in optimizer.state.values()]
    train(optimizer, range(10, 11))
    assert all(state["damping"][FACTOR] == 0 for state in optimizer.state.values()) and max(before) > 0
    other = place.hrnn(place.params(), meta=None)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_an_lr_of_several_elements_is_refused_before_anything_has_moved(place):
    optimizer = place.hrnn(place.params())
    optimizer.step()
    before = content(optimizer)
    optimizer.param_groups[0]["lr"] = torch.tensor([1.0, 2.0])
    with pytest.raises(ValueError, match="Tensor lr must be 1-element"):
        optimizer.step()
    assert_same(before, content(optimizer))


def test_each_group_has_its_own_options(place):
    params = place.params((4, 3), (4, 3), (4, 3))
    for param in params[1:]:
        param.data.copy_(params[0])
        param.grad.copy_(params[0].grad)
    before = values(params)
    optimizer = place.hrnn(
        [
            {"params": params[:1]},
            {"params": params[1:2], "lr": 0.0},
            {"params": params[2:], "maximize": True, "init_lr": 1e-2},
        ],
        init_lr=1e-3,
    )
    optimizer.step()
    moved = [(param - old).abs().max().item() for param, old in zip(params, before, strict=True)]
    assert moved[1] == 0
    assert moved[2] == pytest.approx(10 * moved[0], rel=0.5)


@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["float", "tensor"])
def test_steps_of_wide_tensors_are_shorter_by_their_fan_in(place, kind):
    shapes, shares = ((3, 40), (2, 400), (2, 20, 2, 2), (200,), (), (3, 80)), (1, 0.1, 0.5, 1, 1, 0.5)
    narrow, wide, plain = place.params(*shapes), place.params(*shapes), place.params(*shapes)
    rates = [2.0 * share for share in shares]
    optimizers = (
        place.hrnn(wide, lr=kind(2.0), weight_decay=0.1),
        place.hrnn(
            [{"params": [param], "lr": rate, "base_fan_in": None} for param, rate in zip(narrow, rates, strict=True)],
            weight_decay=0.1,
        ),
        place.hrnn([{"params": plain, "base_fan_in": None}], lr=2.0, weight_decay=0.1),
    )
    for optimizer in optimizers:
        train(optimizer, 3)
    torch.testing.assert_close(wide, narrow, rtol=1e-6, atol=1e-9)
    moved = [not torch.equal(one, other) for one, other in zip(wide, plain, strict=True)]
    assert moved == [share < 1 for share in shares]


@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["float", "tensor"])
def test_steps_of_many_matrices_are_shorter_by_the_root_of_their_number(place, kind):
    shapes = ((3, 40), (3,), (2, 80), (), (2, 2, 2))  # of a fan-in of 80 steps are half as long besides
    deep, plain = place.params(*shapes), place.params(*shapes)
    rates = [2.0 * share for share in (0.5, 0.5, 0.25, 0.5, 0.5)]
    optimizers = (
        place.hrnn(deep[:2], lr=kind(2.0), base_depth=0.75),
        place.hrnn([{"params": [param], "lr": rate} for param, rate in zip(plain, rates, strict=True)], **FREE),
    )
    optimizers[0].add_param_group({"params": deep[2:]})
    for optimizer in optimizers:
        train(optimizer, 3)
    torch.testing.assert_close(deep, plain, rtol=1e-6, atol=1e-9)
    as_many = place.hrnn(place.params(*shapes), base_depth=3)
    free = place.hrnn(place.params(*shapes), base_depth=None)
    for optimizer in (as_many, free):
        train(optimizer, 3)
    assert_same(content(as_many), content(free))


def test_frozen_matrices_do_not_shorten_steps_until_they_are_trained(place):
    whole = place.params(*[(3, 4)] * 4)
    trained = place.params(*[(3, 4)] * 4)[:2]
    optimizer, alone = place.hrnn(whole, base_depth=1), place.hrnn(trained, base_depth=1)
    for param in whole[2:]:
        param.requires_grad_(False).grad = None
    for step in range(2):
        give_gradients(trained, step)
        give_gradients(whole[:2], step)
        alone.step()
        optimizer.step()
    assert [torch.equal(one, other) for one, other in zip(whole, trained, strict=False)] == [True, True]
    for param in whole[2:]:
        param.requires_grad_(True)
    thawed = place.hrnn([param.detach().clone().requires_grad_() for param in whole], base_depth=1)
    thawed.load_state_dict(optimizer.state_dict())
    for each in (optimizer, thawed):
        train(each, 2)
    assert_same(content(optimizer), content(thawed))


def test_min_lr_bounds_what_learned_rates_approach(place):
    torch.manual_seed(0)
    params, options, steps = (place.params(), place.params()), {"meta": None, "init_lr": 0.1}, 10
    bounded, free = place.hrnn(params[0], min_lr=0.5, **options), place.hrnn(params[1], **options)
    for _ in range(steps):
        for one, other in zip(*params, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        bounded.step()
        free.step()
    lowest = [min(state["log_lr"].min().item() for state in each.state.values()) for each in (bounded, free)]
    momentum = torch.sigmoid(bounded.meta["log_lr.momentum"]).item()
    assert lowest[0] >= math.log(0.5) + momentum**steps * math.log(0.1 / 0.5) - 1e-5 > lowest[1]


def test_the_weights_own_bound_gives_way_to_a_smaller_init_lr_and_to_that_alone(place):
    own = math.log(1e-3)
    meta = MetaParams.init(HRNNConfig(log_lr_min=own))
    params = place.params()

    def bound(optimizer: HRNN) -> float:
        return optimizer.config.log_lr_min

    low = place.hrnn(params, meta=meta, init_lr=1e-5)
    low.step()
    assert bound(low) == math.log(1e-5)
    assert min(state["log_lr"].min().item() for state in low.state.values()) == pytest.approx(math.log(1e-5), abs=1e-4)
    assert bound(place.hrnn(params, meta=meta)) == own
    assert bound(place.hrnn(params, meta=meta, init_lr=1e-5, min_lr=1e-4)) == math.log(1e-4)
    grown = place.hrnn(params[:1], meta=meta)
    grown.step()
    grown.add_param_group({"params": params[1:], "init_lr": 1e-4})
    assert bound(grown) == math.log(1e-4)
    resumed = place.hrnn(params, meta=meta)
    resumed.load_state_dict(low.state_dict())
    assert bound(resumed) == bound(copy.deepcopy(low)) == math.log(1e-5)


def test_a_smaller_init_lr_holds_a_falling_bound_until_it_has_fallen_as_far(place):
    config = HRNNConfig(log_lr_min=math.log(1e-3), log_lr_min_steps=100.0)
    params, meta = place.params(), MetaParams.init(config)

    def lowest(optimizer: HRNN, step: float) -> float:
        config = optimizer.config
        found = reference.lowest_log_lr(config, torch.tensor(step, dtype=torch.float64), None)
        return config.log_lr_min if found is None else found.item()

    own, low = place.hrnn(params, meta=meta), place.hrnn(params, meta=meta, init_lr=1e-5)
    assert lowest(low, 0) == math.log(1e-5)
    assert lowest(low, 1e9) == pytest.approx(lowest(own, 1e9), abs=1e-2) and lowest(own, 1e9) < math.log(1e-6)
    tiny = place.hrnn(params, meta=meta, init_lr=1e-250)
    tiny.step()
    assert lowest(tiny, 0) == pytest.approx(lowest(tiny, 1e9)) == math.log(1e-250)
    held = place.hrnn(params, meta=meta, init_lr=1e-5, min_lr=1e-4)
    assert lowest(held, 0) == lowest(held, 1e9) == math.log(1e-4)


@pytest.mark.parametrize("lr", [0.25, 2.0])
def test_the_distance_is_how_far_sampled_parameters_have_come_in_any_memory_order(place, lr):
    config = HRNNConfig(log_lr_min_steps=1.0, log_lr_min_distance=4.0)
    orders = [(6, 2, 3, 5), (40, 3), (7,), (), (3, 4)]
    params = place.params(*orders) + place.params((9, 2), dtype=torch.complex64)
    params[0].data = params[0].data.to(memory_format=torch.channels_last)
    params[1].data = params[1].data.T.contiguous().T
    starts = [real(param.detach()).clone() for param in params]
    optimizer = place.hrnn(params, meta=MetaParams.init(config, seed=1), lr=lr, init_lr=0.01, **FREE)
    for step in range(6):
        give_gradients(params, step)
        params[4].grad = params[4].grad if step % 2 else None  # what takes part changes, and
        if step == 3:  # memory order too
            params[0].data, params[1].data = params[0].data.contiguous(), params[1].data.contiguous()
            give_gradients(params, step)
        optimizer.step()
        for param, start in zip(params, starts, strict=True):
            if param not in optimizer.state:
                continue
            largest, *away = optimizer.state[param]["distance"].cpu().unbind()
            place_of = tuple(torch.from_numpy(sampled(start.shape)).T)
            expected = ((start - real(param.detach())) * min(2 * lr, 1.0) / lr)[place_of].cpu()
            atol = 2 * (step + 1) * 4 * 2**-23  # twice the roundings of parameters below 4, and of as many sums
            torch.testing.assert_close(torch.stack(away), expected.expand(SAMPLES), rtol=1e-5, atol=atol)
            assert largest >= expected.square().mean().sqrt() - atol
    assert optimizer.state[params[0]]["log_lr"].min() > math.log(0.01)  # the bound is above where rates started


def test_a_bound_by_distance_gives_way_to_min_lr_and_not_to_a_small_init_lr(place):
    meta = MetaParams.init(HRNNConfig(log_lr_min=math.log(1e-5), log_lr_min_distance=0.1))
    params = place.params()
    held = place.hrnn(params, meta=meta, min_lr=1e-4)
    held.step()
    assert held.config.log_lr_min_distance == held.config.log_lr_min_steps == 0
    assert not any("distance" in state for state in held.state.values())
    tiny = place.hrnn(params, meta=meta, init_lr=1e-7)
    assert tiny.config == dataclasses.replace(meta.config, log_lr_min=math.log(1e-7))
    with pytest.raises(ValueError, match="lacks distance.*min_lr"):
        place.hrnn(params, meta=meta).load_state_dict(held.state_dict())


def test_weight_decay_shrinks_by_lr_times_decay_times_the_learned_rate(place):
    plain, decayed = place.params(), place.params()
    optimizers = place.hrnn(plain, lr=0.5), place.hrnn(decayed, lr=0.5, weight_decay=3.0)
    before = values(plain)
    for optimizer in optimizers:
        optimizer.step()
    for left, right, old in zip(plain, decayed, before, strict=True):
        rate = optimizers[0].state[left]["log_lr_mean"].exp()
        assert_same(optimizers[0].state[left], optimizers[1].state[right])
        # Two float32 roundings of values below 4, on each side.
        torch.testing.assert_close(left - right, 0.5 * 3.0 * rate * old, rtol=0, atol=4 * 4 * 2**-24)


def test_weight_decay_takes_a_parameter_at_most_to_zero(place):
    decayed, zero = place.params(), place.params()
    for param in zero:
        param.data.zero_()
    for params, weight_decay in ((decayed, 1e9), (zero, 0.0)):
        place.hrnn(params, weight_decay=weight_decay).step()
    for left, right in zip(decayed, zero, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=0)


def test_lr_zero_leaves_parameters_exactly_unchanged_and_creates_all_state(place):
    for meta in METAS.values():
        place.skip_unless_supported(meta)
        params = place.params()
        optimizer = place.hrnn(params, meta=meta, lr=0.0, weight_decay=0.1)
        before = values(params)
        optimizer.step()
        assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
        assert all(set(optimizer.state[param]) == {row.name for row in rows(meta.config)} for param in params)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_tensor_lr_of_any_dimension_equals_the_float(place, shape):
    with_float, with_tensor = place.hrnn(place.params(), lr=0.5), place.hrnn(place.params(), lr=torch.full(shape, 0.5))
    for optimizer in (with_float, with_tensor):
        train(optimizer, 3)
    assert_same(content(with_float), content(with_tensor))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1"),
        ({"lr": math.nan}, "Invalid learning rate: nan"),
        ({"lr": math.inf}, "Invalid learning rate: inf"),
        ({"lr": torch.tensor([0.1, 0.1])}, "Tensor lr must be 1-element"),
        ({"weight_decay": -1}, "Invalid weight_decay value: -1"),
        ({"init_lr": 0.0}, "Invalid init_lr: 0"),
        ({"base_fan_in": 0}, "Invalid base_fan_in: 0"),
        ({"base_depth": -1}, "Invalid base_depth: -1"),
        ({"min_lr": 0}, "Invalid min_lr: 0"),
        ({"min_lr": math.inf}, "Invalid min_lr: inf"),
        ({"lr": "1"}, "Invalid learning rate: '1'"),
        ({"weight_decay": "0.1"}, "Invalid weight_decay value: '0.1'"),
        ({"init_lr": None}, "Invalid init_lr: None"),
        ({"base_fan_in": "40"}, "Invalid base_fan_in: '40'"),
        ({"base_depth": "2"}, "Invalid base_depth: '2'"),
        ({"min_lr": "x"}, "Invalid min_lr: 'x'"),
        ({"foreach": True}, "no foreach implementation"),
        ({"differentiable": True}, "no differentiable implementation"),
        ({"nonfinite": "ignore"}, "nonfinite='ignore' must be one of skip, raise"),
        ({"backend": "abacus"}, "backend='abacus' is not one of .*reference"),
    ],
)
def test_construction_refuses_what_it_cannot_do(options, message):
    param = nn.Parameter(torch.zeros(2))
    for params in ([param], [{"params": [param], "lr": 1.0, "init_lr": 1e-3, "weight_decay": 0.0}]):
        with pytest.raises(ValueError, match=message):
            HRNN(params, **options)


@pytest.mark.parametrize("name", ["meta", "min_lr", "state_format", "backend", "nonfinite"])
def test_a_group_refuses_what_is_of_the_whole_optimizer(name):
    params = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    with pytest.raises(ValueError, match=f"{name} is of the whole optimizer, not of a group"):
        HRNN([{"params": params, name: None}])
    optimizer = HRNN(params[:1])
    with pytest.raises(ValueError, match=f"{name} is of the whole optimizer, not of a group"):
        optimizer.add_param_group({"params": params[1:], name: None})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (torch.zeros(2), TypeError, "params argument given to the optimizer should be an iterable of Tensors or dicts"),
        ([], ValueError, "optimizer got an empty parameter list"),
        ([nn.Parameter(torch.zeros(1)) * 2], ValueError, "can't optimize a non-leaf Tensor"),
        (
            [("a", nn.Parameter(torch.zeros(1))), nn.Parameter(torch.zeros(1))],
            ValueError,
            "Some param names are missing",
        ),
    ],
)
def test_construction_speaks_as_torch_does_about_bad_parameters(params, error, message):
    with pytest.raises(error, match=message):
        HRNN(params)


def test_an_absent_backend_is_refused_by_name_with_what_is_usable():
    (param,) = Place("reference", "cpu").params((2,))
    for name in (name for name, reason in backends.available().items() if reason is not None):
        with pytest.raises((ValueError, RuntimeError), match=f"{name}.*reference"):
            HRNN([param], backend=name).step()


def test_every_backend_of_the_table_can_be_asked_for_by_name(place):
    (param,) = place.params((3,))
    optimizer = place.hrnn([param])
    optimizer.step()
    assert optimizer.backend == place.backend
    assert optimizer.state[param]["step"] == 1


@pytest.mark.parametrize(("lr", "count"), [(1e-3, 1), (0.05, 1), (0.06, 0), (1.0, 0), (0.0, 0)])
def test_a_float_lr_that_looks_like_a_learning_rate_warns_once(lr, count):
    params = [{"params": [nn.Parameter(torch.zeros(2))]}, {"params": [nn.Parameter(torch.zeros(2))]}]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        HRNN(params, lr=lr)
    assert [f"lr={lr} multiplies the learned step" in str(warning.message) for warning in caught] == [True] * count
    assert all(warning.filename == __file__ for warning in caught)


def test_a_group_lr_that_looks_like_a_learning_rate_warns_and_a_tensor_does_not():
    with pytest.warns(UserWarning, match="lr=0.001 multiplies"):
        HRNN([{"params": [nn.Parameter(torch.zeros(2))], "lr": 1e-3}])
    HRNN([nn.Parameter(torch.zeros(2))], lr=torch.tensor(1e-3))


def test_fused_false_takes_the_reference_and_none_the_fastest(place):
    fastest = backends.choose(torch.device(place.device), PAPER.config).__name__
    for fused, expected in ((False, "reference"), (None, fastest)):
        (param,) = place.params((3,))
        optimizer = HRNN([param], meta=PAPER, fused=fused)
        optimizer.step()
        assert optimizer._plans[param.device][0].backend.__name__.endswith(expected)


def test_fused_true_never_falls_back_to_the_reference():
    (param,) = Place("reference", "cpu").params((3,))
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating point Tensors"):
        HRNN([param], fused=True, backend="reference").step()
    assert torch.equal(param, before)


def test_fused_true_on_meta_tensors_raises_torchs_own_text():
    param = nn.Parameter(torch.empty(3, device="meta"))
    param.grad = torch.empty(3, device="meta")
    with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating point Tensors"):
        HRNN([param], fused=True).step()


def test_step_on_meta_tensors_makes_the_state_without_memory():
    param = nn.Parameter(torch.empty(1000, 1000, device="meta"))
    param.grad = torch.empty(1000, 1000, device="meta")
    optimizer = HRNN([param])
    optimizer.step()
    assert {value.device.type for value in optimizer.state[param].values()} == {"meta"}


def test_optimizer_can_be_made_before_its_model_has_memory(place):
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    HRNN(model.parameters())
    model = model.to_empty(device=place.device)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = place.hrnn(model.parameters())
    before = content(optimizer)
    train(optimizer, 1)
    assert_moved(optimizer, before)


def test_meta_is_given_as_object_or_file_and_both_train_alike(place, tmp_path):
    PAPER.save(tmp_path / "trained.safetensors")
    optimizers = [
        place.hrnn(place.params(), meta=meta)
        for meta in (PAPER, tmp_path / "trained.safetensors", str(tmp_path / "trained.safetensors"))
    ]
    for optimizer in optimizers:
        train(optimizer, 2)
        assert_same(content(optimizer), content(optimizers[0]))


def test_meta_names_shipped_weights_and_none_takes_a_default():
    for name in MetaParams.shipped():
        assert HRNN([nn.Parameter(torch.zeros(2))], meta=name).config == MetaParams.resolve(name).config
    assert isinstance(HRNN([nn.Parameter(torch.zeros(2))]).meta, MetaParams)


def test_an_unknown_meta_is_refused_by_name():
    with pytest.raises(FileNotFoundError, match="meta='no-such-weights' is neither a file nor the name of"):
        HRNN([nn.Parameter(torch.zeros(2))], meta="no-such-weights")


def test_double_precision_metaparams_are_used_in_the_precision_of_the_state(place):
    single, double = place.hrnn(place.params()), place.hrnn(place.params(), meta=PAPER.to(dtype=torch.float64))
    for optimizer in (single, double):
        train(optimizer, 2)
    assert_same(content(single), content(double))


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


def test_optimizer_prints_its_options():
    assert "weight_decay: 0.5" in repr(HRNN([nn.Parameter(torch.zeros(2))], weight_decay=0.5))


def test_an_added_group_joins_the_training_and_the_global_state(place):
    first, second = place.params((4, 3), (5,))
    optimizer = place.hrnn([first])
    train(optimizer, 2)
    optimizer.add_param_group({"params": [second], "lr": 0.5})
    train(optimizer, 2)
    assert optimizer.state[second]["step"] == 2
    assert optimizer.state[first]["step"] == 4
    assert optimizer.state[first]["global_hidden"] is optimizer.state[second]["global_hidden"]


def test_a_refused_group_leaves_the_optimizer_as_it_was(place):
    first, second = place.params((4, 3), (5,))
    optimizer = place.hrnn([first])
    for group in ({"params": [second], "lr": -1.0}, {"params": [first]}):
        with pytest.raises(ValueError, match="Invalid learning rate|some parameters appear in more than one"):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


def test_a_parameter_listed_twice_warns_and_is_stepped_once(place):
    first, second = place.params((4, 3), (5,)), place.params((4, 3), (5,))
    with pytest.warns(UserWarning, match="a parameter group with duplicate parameters"):
        twice = place.hrnn([first[0], first[1], first[0]])
    once = place.hrnn(second)
    for optimizer in (twice, once):
        train(optimizer, 2)
    assert_same(content(twice), content(once))


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


def test_an_empty_group_and_a_frozen_integer_parameter_do_no_harm(place):
    (param,) = place.params((3,))
    frozen = nn.Parameter(torch.zeros(4, dtype=torch.uint8, device=place.device), requires_grad=False)
    optimizer = place.hrnn([{"params": []}, {"params": [param, frozen]}])
    optimizer.step()
    assert optimizer.state[param]["step"] == 1
    assert frozen not in optimizer.state


def test_an_integer_parameter_with_a_gradient_is_refused(place):
    frozen = nn.Parameter(torch.zeros(4, dtype=torch.int32, device=place.device), requires_grad=False)
    frozen.grad = torch.ones_like(frozen)
    with pytest.raises(TypeError, match=r"shape \(4,\) has dtype torch.int32"):
        place.hrnn([frozen]).step()


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


# Shapes, strides, dtypes


def test_zero_element_and_zero_dimensional_parameters_step_beside_others(place):
    params = place.params((0,), (3, 0, 2), (), (1,), (4, 3))
    optimizer = place.hrnn(params)
    before = values(params)
    train(optimizer, 2)
    moved = [not torch.equal(param, old) for param, old in zip(params, before, strict=True)]
    assert moved == [False, False, True, True, True]
    assert all(value.isfinite().all() for value in content(optimizer).values())
    resumed = place.hrnn(place.params((0,), (3, 0, 2), (), (1,), (4, 3)))
    resumed.load_state_dict(optimizer.state_dict())
    only_empty = place.hrnn(place.params((0,)))
    only_empty.step()


def test_gradients_are_never_written(place):
    params = place.params()
    params[0].grad = torch.randn(1, device=place.device).expand_as(params[0])
    params[3].grad = params[3].grad.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    before = [(param.grad, param.grad.clone(), param.grad._version) for param in params]
    place.hrnn(params, maximize=True, weight_decay=0.1).step()
    for param, (grad, value, version) in zip(params, before, strict=True):
        assert param.grad is grad
        assert torch.equal(grad, value)
        assert grad._version == version


def test_an_expanded_gradient_steps_like_its_values_written_out(place):
    results = []
    for written_out in (False, True):
        params = place.params()
        optimizer = place.hrnn(params, weight_decay=0.1)
        for step in range(3):
            give_gradients(params, step)
            for param in params:
                grad = param.grad.flatten()[0].expand_as(param)
                param.grad = grad.clone(memory_format=torch.contiguous_format) if written_out else grad
            optimizer.step()
        results.append(content(optimizer))
    assert_same(*results)


def layouts(base: Tensor) -> dict[str, Tensor]:
    """The values of a [4, 3, 5, 2] tensor in several memory layouts."""
    gap = torch.zeros(9, 3, 5, 4, dtype=base.dtype, device=base.device)
    return {
        "contiguous": base.clone(),
        "channels_last": base.clone(memory_format=torch.channels_last),
        "permuted": base.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "view_into_larger": gap[1:8:2, :, :, 1:3].copy_(base),
    }


@pytest.mark.parametrize("meta", [PAPER, ATTENTION], ids=["paper", "attention"])
@pytest.mark.parametrize("layout", ["channels_last", "permuted", "view_into_larger"])
def test_memory_layout_of_parameter_and_gradient_does_not_matter(place, layout, meta):
    place.skip_unless_supported(meta)
    (start,), other = place.params((4, 3, 5, 2)), place.params((7,))[0]
    results = []
    for param_layout, grad_layout in (
        ("contiguous", "contiguous"),
        (layout, layout),
        (layout, "contiguous"),
        ("contiguous", layout),
    ):
        param = nn.Parameter(layouts(start.detach())[param_layout])
        assert param.stride() == layouts(start.detach())[param_layout].stride()
        beside = nn.Parameter(other.detach().clone())
        optimizer = place.hrnn([param, beside], meta=meta, weight_decay=0.1)
        for step in range(3):
            give_gradients([param, beside], step)
            param.grad = layouts(param.grad)[grad_layout]
            optimizer.step()
        results.append(content(optimizer))
    for result in results[1:]:
        # The order of summation differs: one float32 rounding of 120 addends enters every step's means.
        for name, value in result.items():
            torch.testing.assert_close(value, results[0][name], rtol=1e-4, atol=1e-5)


def test_storage_around_a_view_is_untouched(place):
    storage = torch.full((6, 10), 7.0, device=place.device)
    param = storage[1:5, 2:6].requires_grad_()
    outside = torch.ones(6, 10, dtype=torch.bool, device=place.device)
    outside[1:5, 2:6] = False
    optimizer = place.hrnn([param])
    train(optimizer, 2)
    assert (storage.detach()[outside] == 7).all()
    assert (storage.detach()[~outside] != 7).all()


def test_state_lies_in_memory_like_its_parameter(place):
    param = nn.Parameter(place.params((4, 3, 5, 2))[0].detach().to(memory_format=torch.channels_last))
    optimizer = place.hrnn([param])
    train(optimizer, 1)
    for name in ("hidden", "accum", "ms"):
        assert optimizer.state[param][name][0].stride() == param.stride()
        assert optimizer.state[param][name].stride(0) == param.numel()
    assert optimizer.state[param]["log_lr"].stride() == param.stride()


def test_state_follows_a_model_into_another_memory_format(place):
    def run(convert: bool) -> tuple[HRNN, dict[str, Tensor]]:
        model = nn.Conv2d(3, 4, 3).to(place.device)
        with torch.no_grad():
            for param, value in zip(model.parameters(), place.params((4, 3, 3, 3), (4,)), strict=True):
                param.copy_(value)
        optimizer = place.hrnn(model.parameters())
        train(optimizer, 2)
        if convert:
            model.to(memory_format=torch.channels_last)
            assert model.weight.stride() != nn.Conv2d(3, 4, 3).weight.stride()
        train(optimizer, range(2, 4))
        return optimizer, content(optimizer)

    (optimizer, converted), (_, plain) = run(True), run(False)
    weight = optimizer.param_groups[0]["params"][0]
    assert optimizer.state[weight]["hidden"][0].stride() == weight.stride()
    for name, value in converted.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-4, atol=1e-5)


def test_mixed_dtypes_step_together_as_they_would_in_float32(place):
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    mixed = [param.to(dtype).detach().requires_grad_() for param, dtype in zip(place.params(), dtypes, strict=True)]
    plain = [param.detach().float().requires_grad_() for param in mixed]
    optimizers = place.hrnn(mixed), place.hrnn(plain)
    give_gradients(mixed, 0)
    for param, same in zip(mixed, plain, strict=True):
        same.grad = param.grad.float()
    for optimizer in optimizers:
        optimizer.step()
    for param, same in zip(mixed, plain, strict=True):
        assert param.dtype == param.grad.dtype
        atol = 1e-6 if param.dtype == torch.float64 else 0
        rtol = 2**-22 if place.backend == "triton" else 0  # it may round a product and a sum once or twice
        torch.testing.assert_close(param.float(), same.to(param.dtype).float(), rtol=rtol, atol=atol)
        assert_same(optimizers[0].state[param], optimizers[1].state[same])


def test_a_double_parameter_moves_by_less_than_float32_resolves(place):
    (param,) = place.params((8,), dtype=torch.float64)
    param.data.fill_(1e6)
    place.hrnn([param], init_lr=1e-4).step()
    moved = (param - 1e6).abs()
    assert (moved > 0).all()
    assert moved.max() < torch.finfo(torch.float32).eps * 1e6


@pytest.mark.parametrize("meta", [PAPER, ATTENTION], ids=["paper", "attention"])
def test_a_complex_parameter_is_optimized_as_pairs_of_reals(place, meta):
    place.skip_unless_supported(meta)
    pairs = place.params((4, 3, 2), (5, 2))
    numbers = [nn.Parameter(torch.view_as_complex(param.detach().clone())) for param in pairs]
    real, complex_ = place.hrnn(pairs, meta=meta, weight_decay=0.1), place.hrnn(numbers, meta=meta, weight_decay=0.1)
    for step in range(4):
        give_gradients(pairs, step)
        for number, pair in zip(numbers, pairs, strict=True):
            number.grad = torch.view_as_complex(pair.grad)
        for optimizer in (real, complex_):
            optimizer.step()
        if step == 2:
            complex_.eval()
            complex_.load_state_dict(copy.deepcopy(complex_.state_dict()))
            complex_.train()
    for pair, number in zip(pairs, numbers, strict=True):
        assert torch.equal(pair, torch.view_as_real(number))
        assert_same(real.state[pair], complex_.state[number])


def test_sparse_gradients_are_refused_with_a_cure(place):
    embedding = nn.Embedding(5, 3, sparse=True).to(place.device)
    embedding(torch.tensor([1, 2], device=place.device)).sum().backward()
    before = embedding.weight.detach().clone()
    for nonfinite in ("skip", "raise"):
        with pytest.raises(RuntimeError, match="does not support sparse gradients: use sparse=False"):
            place.hrnn(embedding.parameters(), nonfinite=nonfinite).step()
    assert torch.equal(embedding.weight, before)


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


def test_a_graph_from_before_a_step_cannot_be_differentiated_after_it(place):
    (param,) = place.params((3,))
    optimizer = place.hrnn([param])
    loss = param.square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_made_of_tensors_are_for_the_reference(place):
    def make() -> nn.Parameter:
        values = torch.linspace(-1, 1, 5, device=place.device)
        param = nn.Parameter(TwoTensor(values.clone(), values.clone()))
        param.grad = TwoTensor(torch.ones_like(values), torch.ones_like(values))
        return param

    param = make()
    if place.backend != "reference":
        with pytest.raises(TypeError, match="is a TwoTensor, .* pass backend='reference'"):
            place.hrnn([param]).step()
        return
    (plain,) = place.params((5,))
    plain.data, plain.grad = param.detach().a.clone(), torch.ones(5, device=place.device)
    for own in (param, plain):
        place.hrnn([own]).step()
    assert torch.equal(param.detach().a, plain.detach())


def test_gradients_without_memory_of_their_own_are_refused(place):
    (param,) = place.params((5,))
    values = torch.ones(5, device=place.device)
    param.grad = TwoTensor(values.clone(), values.clone())
    if place.backend == "reference":
        return
    before = param.detach().clone()
    with pytest.raises(TypeError, match="is a TwoTensor without memory of its own, and kernels cannot read it"):
        place.hrnn([param]).step()
    assert torch.equal(param, before)


def test_memory_refuses_what_construction_refuses():
    with pytest.raises(TypeError, match="an iterable of tensors or of groups, got a tensor"):
        HRNN.memory(torch.zeros(3, 4, requires_grad=True))
    with pytest.raises(ValueError, match="state_format='compct' must be one of"):
        HRNN.memory([torch.zeros(3, requires_grad=True)], state_format="compct")


@pytest.mark.parametrize("meta", list(METAS))
def test_memory_foretells_the_bytes_of_state_and_of_a_checkpoint(meta):
    params = Place("reference", "cpu").params((40, 50), (50,), (), (0,), (4, 3, 5, 2))
    frozen = nn.Parameter(torch.zeros(1000), requires_grad=False)
    optimizer = HRNN([*params, frozen], meta=METAS[meta])
    optimizer.step()
    held = {value.data_ptr(): value.nbytes for state in optimizer.state.values() for value in state.values()}
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    expected = sum(held.values()), 4 * sum(map(torch.numel, params)) * (1 + optimizer.config.attention)
    groups = [{"params": [("first", params[0]), *enumerate(params[1:])]}, {"params": frozen}]
    for given in (params, [*params, frozen], groups, [param.to("meta") for param in params]):
        found = HRNN.memory(given, meta=METAS[meta])
        assert (found.state, found.buffers) == expected
        assert found.checkpoint == pytest.approx(file.tell(), rel=0.02)


# Saving, loading, copying


def through_memory(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("meta", "dtype"),
    [
        ("paper", torch.float32),
        ("attention", torch.bfloat16),
        ("two_levels", torch.float64),
        ("no_log_lr", torch.float16),
    ],
)
def test_resumed_run_equals_uninterrupted_run(place, meta, dtype):
    place.skip_unless_supported(METAS[meta])
    options: dict[str, Any] = {"meta": METAS[meta], "weight_decay": 0.01}
    whole = place.hrnn(place.params(dtype=dtype), **options)
    train(whole, 100)
    first = place.hrnn(place.params(dtype=dtype), **options)
    train(first, 50)
    saved = through_memory(first.state_dict())
    params = [param.detach().clone().requires_grad_() for param in first.param_groups[0]["params"]]
    second = place.hrnn(params, **options)
    second.load_state_dict(saved)
    train(second, range(50, 100))
    assert_same(content(second), content(whole))


def test_state_dict_survives_a_round_trip_unchanged(place):
    optimizer = place.hrnn(place.params(dtype=torch.bfloat16))
    train(optimizer, 2)
    saved = optimizer.state_dict()
    loaded = through_memory(saved)
    fresh = place.hrnn(place.params(dtype=torch.bfloat16))
    fresh.load_state_dict(loaded)
    again = fresh.state_dict()
    assert again["param_groups"] == saved["param_groups"]
    for key, state in saved["state"].items():
        assert_same(state, again["state"][key])


def test_loading_shares_no_memory_with_the_dictionary(place):
    source, target = place.hrnn(place.params()), place.hrnn(place.params(seed=1))
    train(source, 2)
    before = content(source)
    target.load_state_dict(source.state_dict())
    train(target, range(2, 4))
    assert_same(content(source), before)
    assert len({id(state["global_hidden"]) for state in target.state.values()}) == 1


def test_loaded_state_is_put_into_the_memory_order_of_its_parameter(place):
    source, target = (place.hrnn(place.params((6, 5), (2, 3, 4))) for _ in range(2))
    train(source, 2)
    saved = copy.deepcopy(source.state_dict())
    for state in saved["state"].values():
        for name in ("accum", "ms", "log_lr"):
            state[name] = state[name].mT.contiguous().mT
    target.load_state_dict(saved)
    assert all(state[name].is_contiguous() for state in target.state.values() for name in ("accum", "ms", "log_lr"))
    for param, moved in zip(target.state, source.state, strict=True):
        param.data.copy_(moved)
    for optimizer in (source, target):
        train(optimizer, range(2, 4))
    assert_same(content(source), content(target))


def test_state_saved_before_the_first_step_loads(place):
    fresh, other = place.hrnn(place.params()), place.hrnn(place.params())
    other.load_state_dict(through_memory(fresh.state_dict()))
    for optimizer in (fresh, other):
        train(optimizer, 2)
    assert_same(content(fresh), content(other))


def test_loaded_options_replace_those_of_the_groups(place):
    source, target = place.hrnn(place.params(), lr=0.25, weight_decay=0.5), place.hrnn(place.params())
    target.load_state_dict(source.state_dict())
    assert (target.param_groups[0]["lr"], target.param_groups[0]["weight_decay"]) == (0.25, 0.5)


def test_a_dictionary_with_missing_options_or_a_plain_step_number_loads(place):
    source, target = place.hrnn(place.params()), place.hrnn(place.params(), lr=0.5)
    train(source, 2)
    saved = copy.deepcopy(source.state_dict())
    for group in saved["param_groups"]:
        for name in ("maximize", "init_lr", "train_mode", "fused", "lr"):
            del group[name]
    for state in saved["state"].values():
        state["step"] = state["step"].item()
    target.load_state_dict(saved)
    train(target, 1)
    assert target.param_groups[0]["lr"] == 0.5
    assert {state["step"].item() for state in target.state.values()} == {3}


@pytest.mark.parametrize("other", [torch.optim.AdamW, torch.optim.SGD])
def test_the_groups_of_another_optimizer_are_refused(other):
    params = Place("reference", "cpu").params((3, 4))
    optimizer = HRNN(params)
    train(optimizer, 2)
    before, groups = content(optimizer), copy.deepcopy(optimizer.param_groups)
    with pytest.raises(ValueError, match=r"groups to load have .*lr, .* and nothing of HRNN's"):
        optimizer.load_state_dict(other(params, lr=3e-4).state_dict())
    assert_same(content(optimizer), before)
    assert [group.keys() for group in groups] == [group.keys() for group in optimizer.param_groups]


def test_a_state_of_other_meta_parameters_is_refused_and_says_of_which(place):
    source, target = (place.hrnn(place.params(), meta=name) for name in ("hrnn-9", "hrnn-10"))
    train(source, 2)
    train(target, 2)
    before = content(target)
    with pytest.raises(ValueError, match=r"meta-parameters, .* or hrnn-9 or .*, than .*, hrnn-10, and"):
        target.load_state_dict(source.state_dict())
    assert_same(content(target), before)
    own = place.hrnn(place.params(), meta=MetaParams.init(target.config, seed=3))
    with pytest.raises(ValueError, match=r"than this optimizer's, not shipped ones, "):
        own.load_state_dict(source.state_dict())
    saved = source.state_dict()
    del saved["param_groups"][0]["meta_digest"]
    with pytest.warns(UserWarning, match="does not say with which meta-parameters .* this optimizer's, hrnn-10;"):
        target.load_state_dict(saved)
    assert target.param_groups[0]["meta_digest"] == MetaParams.resolve("hrnn-10").digest


def test_groups_and_empty_states_of_other_meta_parameters_are_no_obstacle(place):
    source = place.hrnn(place.params(), meta="hrnn-9")
    target = HRNN(source.param_groups, meta="hrnn-10", backend=place.backend)
    assert target.param_groups[0]["meta_digest"] == MetaParams.resolve("hrnn-10").digest
    target.load_state_dict(source.state_dict())  # before the first step


def test_an_optimizer_is_made_under_a_fake_tensor_mode():
    meta = MetaParams.resolve("hrnn-10")
    with FakeTensorMode():
        optimizer = HRNN([nn.Parameter(torch.zeros(3, 4))], meta=meta)
    assert optimizer.param_groups[0]["meta_digest"] == meta.digest


def test_a_state_loads_whatever_file_and_bound_its_meta_parameters_have(place, tmp_path):
    source = place.hrnn(place.params())
    train(source, 2)
    source.meta.save(tmp_path / "copy.safetensors")
    for options in ({"meta": tmp_path / "copy.safetensors"}, {"min_lr": 1e-4}, {"init_lr": 1e-4}):
        target = place.hrnn(place.params(), **options)
        target.load_state_dict(through_memory(source.state_dict()))
        assert target.param_groups[0]["meta_digest"] == source.param_groups[0]["meta_digest"]


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ("two_levels", "lacks global_hidden: it was saved by another optimizer, or by HRNN with another architecture"),
        ("attention", "has, beyond this architecture, true_param"),
        (
            "timescales",
            r"'hidden' of parameter 0 has shape \(10, 6, 5\) in the state to load and must have \(12, 6, 5\)",
        ),
        ("model", r"'hidden' of parameter 0 has shape \(10, 3\) in the state to load and must have \(10, 6, 5\)"),
        ("adamw", "nothing of HRNN's"),
        ("groups", "different number of parameter groups"),
        ("sizes", "doesn't match the size of optimizer's group"),
    ],
)
def test_state_of_another_architecture_or_model_is_refused_and_nothing_is_changed(place, saved, message):
    params, options = place.params(), {}
    if saved == "adamw":
        source: torch.optim.Optimizer = torch.optim.AdamW(params)
    elif saved in METAS:
        source = HRNN(params, meta=METAS[saved], backend="reference")
    elif saved == "timescales":
        source = place.hrnn(params)
        options = {"meta": MetaParams.init(HRNNConfig((12, 20, 20))), "backend": "reference"}
    elif saved == "model":
        source = place.hrnn(place.params((3,), (6,), (), (2, 3, 3, 2)))
    elif saved == "groups":
        source = place.hrnn([{"params": params[:2]}, {"params": params[2:]}])
    else:
        source = place.hrnn(params[:3])
    source.step()
    target = place.hrnn(place.params(), **options)
    target.step()
    before, groups = content(target), copy.deepcopy(target.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=message):
        target.load_state_dict(source.state_dict())
    assert_same(content(target), before)
    assert target.state_dict()["param_groups"] == groups
    target.step()


def test_load_hooks_of_the_user_see_and_may_change_what_is_loaded(place):
    source, target = place.hrnn(place.params()), place.hrnn(place.params(dtype=torch.bfloat16))
    train(source, 2)
    seen = []

    def halve(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = {key: dict(value, ms=value["ms"] / 2) for key, value in state_dict["state"].items()}
        return dict(state_dict, state=state)

    def double(optimizer: Any) -> None:
        for state in optimizer.state.values():
            seen.append(state["hidden"].dtype)
            state["accum"] *= 2

    target.register_load_state_dict_pre_hook(halve)
    target.register_load_state_dict_post_hook(double)
    target.load_state_dict(source.state_dict())
    assert seen == [torch.float32] * len(SHAPES)
    for left, right in zip(source.state.values(), target.state.values(), strict=True):
        assert torch.equal(left["ms"], 2 * right["ms"])
        assert torch.equal(2 * left["accum"], right["accum"])


def test_names_of_parameters_are_kept_and_loaded(place):
    params = place.params()
    named = place.hrnn([(f"layer{i}", param) for i, param in enumerate(params)])
    named.step()
    saved = through_memory(named.state_dict())
    assert saved["param_groups"][0]["param_names"] == ["layer0", "layer1", "layer2", "layer3"]
    unnamed = place.hrnn(place.params())
    unnamed.load_state_dict(saved)
    unnamed.step()


def test_state_of_the_users_own_travels_along(place):
    source, target = place.hrnn(place.params()), place.hrnn(place.params())
    train(source, 1)
    for state in source.state.values():
        state["note"], state["average"] = {"seen": 3}, torch.ones(2, dtype=torch.float64, device=place.device)
    target.load_state_dict(source.state_dict())
    for left, right in zip(source.state.values(), target.state.values(), strict=True):
        assert right["note"] == left["note"]
        assert right["note"] is not left["note"]
        assert torch.equal(right["average"], left["average"])
        assert right["average"] is not left["average"]
    train(target, range(1, 2))


def pickled(optimizer: HRNN) -> HRNN:
    return pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_copy_goes_on_like_the_original_and_apart_from_it(place, duplicate, steps):
    original = place.hrnn(place.params(), weight_decay=0.1, nonfinite="raise")
    train(original, steps)
    scheduler = lr_scheduler.StepLR(original, 1)  # puts a wrapper of step() on the instance
    duplicated = duplicate(original)
    train(duplicated, range(steps, steps + 2))
    train(original, range(steps, steps + 2))
    assert_same(content(original), content(duplicated))
    scheduler.step()
    assert duplicated._step_supports_amp_scaling
    assert (duplicated.backend, duplicated.nonfinite) == (place.backend, "raise")
    assert duplicated.config == original.config
    assert len({id(state["global_hidden"]) for state in duplicated.state.values()}) == 1
    before = content(original)
    train(duplicated, 1)
    assert_same(content(original), before)


def test_a_copy_has_every_public_attribute():
    def public(optimizer: HRNN) -> set[str]:
        return {name for name in vars(optimizer) if not name.startswith("_")}

    optimizer = HRNN([nn.Parameter(torch.zeros(2))])
    assert public(optimizer) == public(copy.deepcopy(optimizer))


def test_skipped_steps_are_counted_on_from_a_pickle_of_another_version_or_device(place):
    optimizer = place.hrnn(place.params((3,)))
    optimizer.param_groups[0]["params"][0].grad[0] = math.nan
    optimizer.step()
    for counts in (torch.tensor(2.0), {torch.device("cuda"): torch.tensor(2.0)}, {}):  # loaded with map_location
        state = {**optimizer.__getstate__(), "_skipped": counts}
        other = HRNN.__new__(HRNN)
        other.__setstate__(state)
        other.step()
        assert other.skipped_steps == (3 if counts != {} else 1)


def test_matrices_that_left_their_group_no_longer_count(place):
    pruned, fresh = place.params(*[(3, 3)] * 6), place.params(*[(3, 3)] * 6)[:1]
    optimizer, alone = place.hrnn(pruned, base_depth=1), place.hrnn(fresh, base_depth=1)
    optimizer.param_groups[0]["lr"] = 0.0  # that of the first step
    alone.param_groups[0]["lr"] = 0.0
    for own, given in ((optimizer, pruned), (alone, fresh)):
        own.step()
        own.param_groups[0]["params"] = given[:1]
        own.param_groups[0]["lr"] = 1.0
    assert optimizer.state[pruned[0]].keys() == alone.state[fresh[0]].keys()
    for name, value in alone.state[fresh[0]].items():  # the global state has seen more tensors
        optimizer.state[pruned[0]][name] = value.clone()
    for param in (pruned[0], fresh[0]):
        give_gradients([param], 1)
    optimizer.step()
    alone.step()
    assert torch.equal(pruned[0], fresh[0])


def test_a_pickle_of_a_version_with_fewer_options_still_steps(place):
    optimizer = place.hrnn(place.params())
    train(optimizer, 1)
    state = optimizer.__getstate__()
    for options in (state["defaults"], *state["param_groups"]):
        for name in set(OPTIONS) - {"lr", "foreach"}:
            del options[name]
    for name in ("nonfinite", "backend", "_skipped"):
        del state[name]
    old = HRNN.__new__(HRNN)
    old.__setstate__(state)
    old.step()
    assert old.param_groups[0]["init_lr"] == 3e-3
    assert old.skipped_steps == 0
    old.add_param_group({"params": place.params((2,))})


def test_distributed_checkpoint_functions_restore_the_state_without_a_process_group(place):
    from torch.distributed.checkpoint import state_dict as dcp

    def build() -> tuple[nn.Module, HRNN]:
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(place.device)
        return model, place.hrnn(model.parameters(), meta=PAPER)

    for flat in (False, True):
        options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
        (model, optimizer), (_, other) = build(), build()
        train(optimizer, 3)
        saved = through_memory(dcp.get_optimizer_state_dict(model, optimizer, options=options))
        twin, other = build()
        twin.load_state_dict(model.state_dict())
        dcp.set_optimizer_state_dict(twin, other, saved, options=options)
        for either in (optimizer, other):
            train(either, range(3, 5))
        assert_same(content(optimizer), content(other))


# Schedules

SCHEDULERS: dict[str, Callable[[HRNN], lr_scheduler.LRScheduler]] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda step: 0.9),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [1, 3]),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, total_iters=2),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, total_iters=4),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.9),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 5),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 5),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 3),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.1, 1.0, 2, cycle_momentum=False),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 1.0, 8, cycle_momentum=False),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, total_iters=2), lr_scheduler.ExponentialLR(opt, 0.9)], [2]
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(opt, total_iters=2), lr_scheduler.ExponentialLR(opt, 0.9)]
    ),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0),
    "SWALR": lambda opt: torch.optim.swa_utils.SWALR(opt, 0.5, 3),
}


def test_every_scheduler_of_torch_is_tried_below():
    assert set(lr_scheduler.__all__) - {"LRScheduler"} <= SCHEDULERS.keys()


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_scheduled_lr_is_the_one_used(place, name):
    """Displacements of a run under a schedule equal those of a run where lr is set by hand."""
    scheduled, by_hand = place.hrnn(place.params(), meta=None), place.hrnn(place.params(), meta=None)
    scheduler, factors = SCHEDULERS[name](scheduled), []
    for step in range(6):
        by_hand.param_groups[0]["lr"] = float(scheduled.param_groups[0]["lr"])
        factors.append(by_hand.param_groups[0]["lr"])
        for optimizer in (scheduled, by_hand):
            train(optimizer, range(step, step + 1))
        scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
    assert len(set(factors)) > 1
    assert_same(content(scheduled), content(by_hand))


def test_a_schedule_of_a_tensor_lr_equals_that_of_a_float(place):
    runs = []
    for lr in (1.0, torch.tensor(1.0)):
        optimizer = place.hrnn(place.params(), meta=None, lr=lr)
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)  # exact in float32
        for step in range(4):
            train(optimizer, range(step, step + 1))
            scheduler.step()
        runs.append(content(optimizer))
    assert_same(*runs)


@pytest.mark.parametrize("schedule", [lr_scheduler.CyclicLR, lr_scheduler.OneCycleLR])
def test_schedules_of_a_momentum_are_refused_by_torch(schedule):
    with pytest.raises(ValueError, match="optimizer must support momentum"):
        schedule(HRNN([nn.Parameter(torch.zeros(2))]), 0.1, 8)


# Attention


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


def test_gradients_that_negate_what_is_in_memory_are_read_with_their_sign(place):
    """As autograd makes them for real parts of a conjugate."""
    (plain,), (lazy,) = place.params(()), place.params(())
    negated = torch.complex(torch.zeros(()), plain.grad.cpu()).conj().imag.to(place.device)
    assert negated.is_neg() or place.device != "cpu"
    plain.grad = -plain.grad
    lazy.grad = negated
    for param in (plain, lazy):
        place.hrnn([param]).step()
    assert torch.equal(plain, lazy)


def test_a_parameter_that_negates_what_is_in_memory_is_refused():
    param = nn.Parameter(torch.complex(torch.ones(2), torch.ones(2)).conj().imag)
    assert param.is_neg()
    param.grad = torch.ones(2)
    with pytest.raises(TypeError, match="make it of its resolve_neg"):
        HRNN([param]).step()


def test_freezing_what_had_no_gradient_counts_at_once_and_resumes_exactly(place):
    def run(resume: bool) -> dict[str, Tensor]:
        params = place.params((3, 2), (2, 2), (2, 3))
        params[2].grad = None
        optimizer = place.hrnn(params, base_depth=1)
        optimizer.step()
        params[2].requires_grad_(False)
        if resume:
            saved, optimizer = optimizer.state_dict(), place.hrnn(params, base_depth=1)
            optimizer.load_state_dict(saved)
        give_gradients(params[:2], 1)
        optimizer.step()
        return content(optimizer)

    assert_same(run(False), run(True))


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


def test_an_init_lr_that_is_edited_in_its_group_is_where_rates_start(place):
    (param,) = place.params((3,))
    optimizer = HRNN([param], backend=place.backend, base_depth=None)
    assert optimizer.config.log_lr_min > math.log(1e-5)
    optimizer.param_groups[0]["init_lr"] = 1e-5
    optimizer.step()
    assert optimizer.state[param]["log_lr"].exp().max() < 1e-4


def test_a_state_is_loaded_whatever_the_default_device_is(place):
    optimizer = place.hrnn(place.params((3,)))
    optimizer.step()
    saved, other = optimizer.state_dict(), place.hrnn(place.params((3,)))
    with torch.device("meta"):
        other.load_state_dict(saved)
    assert_same(content(optimizer), {**content(other), "0.param": content(optimizer)["0.param"]})


# torch.compile


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
