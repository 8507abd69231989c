"""What the options of a group do to its steps: lr, where rates start and end, shapes, weight decay, maximize."""

import copy
import dataclasses
import math
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from lopt import HRNN, HRNNConfig, MetaParams
from lopt.backends import reference
from lopt.distributed import real
from lopt.options import ANNEALED, INIT_LR
from lopt.state import FACTOR, SAMPLES, rows, sampled

from .common import FREE, METAS, assert_same, content, give_gradients, train, values

pytestmark = pytest.mark.filterwarnings("error")


# lr


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


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("meta", list(METAS))
def test_lr_0_leaves_every_number_as_it_is_and_creates_all_state(place, meta, weight_decay):
    place.skip_unless_supported(METAS[meta])
    # The attended point is computed, by kernels without subnormal numbers.
    tiny = 1e-30 if METAS[meta].config.attention and place.backend != "reference" else 1e-40
    numbers = torch.tensor([1.0, -math.inf, math.inf, tiny, math.nan])
    params = [nn.Parameter(numbers.to(place.device, dtype)) for dtype in (torch.float32, torch.float64, torch.bfloat16)]
    before = values(params)
    optimizer = place.hrnn(params, meta=METAS[meta], lr=0.0, weight_decay=weight_decay)
    train(optimizer, 2)
    for param, old in zip(params, before, strict=True):
        torch.testing.assert_close(param.detach(), old, rtol=0, atol=0, equal_nan=True)
        assert set(optimizer.state[param]) == {row.name for row in rows(METAS[meta].config)}


def test_an_lr_of_several_elements_is_refused_before_anything_has_moved(place):
    optimizer = place.hrnn(place.params())
    optimizer.step()
    before = content(optimizer)
    optimizer.param_groups[0]["lr"] = torch.tensor([1.0, 2.0])
    with pytest.raises(ValueError, match="Tensor lr must be 1-element"):
        optimizer.step()
    assert_same(before, content(optimizer))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_tensor_lr_of_any_dimension_equals_the_float(place, shape):
    with_float, with_tensor = place.hrnn(place.params(), lr=0.5), place.hrnn(place.params(), lr=torch.full(shape, 0.5))
    for optimizer in (with_float, with_tensor):
        train(optimizer, 3)
    assert_same(content(with_float), content(with_tensor))


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SequentialLR of older versions of torch warns of its own steps
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


# Shapes and numbers of matrices


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


def test_matrices_without_gradients_that_join_or_leave_a_group_count_from_the_next_step_on(place):
    params = place.params((3, 2), *[(2, 2)] * 3)
    for param in params[1:]:
        param.grad = None
    optimizer = place.hrnn(params[:1], base_depth=1)
    for step, present in enumerate((1, 4, 2)):
        optimizer.param_groups[0]["params"][:] = params[:present]
        same, before = copy.deepcopy(optimizer), params[0].detach().clone()
        for each in (optimizer, same):
            give_gradients(each.param_groups[0]["params"][:1], step)
            each.step()
        assert torch.equal(params[0], same.param_groups[0]["params"][0]), present
        assert not torch.equal(params[0], before)


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


# Bounds of learned rates


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
    del grown.param_groups[1]
    give_gradients(params[:1], 1)
    grown.step()
    assert bound(grown) == bound(copy.deepcopy(grown)) == own
    low.param_groups[0]["init_lr"] = 1e-6
    low.step()
    assert bound(low) == bound(copy.deepcopy(low)) == math.log(1e-6)
    low.param_groups[0]["init_lr"] = 0.0
    with pytest.raises(ValueError, match="Invalid init_lr: 0"):
        low.step()
    low.param_groups.clear()
    low.step()


def test_a_smaller_init_lr_holds_a_falling_bound_until_it_has_fallen_as_far(place):
    config = HRNNConfig(log_lr_min=math.log(1e-3), log_lr_min_steps=100.0)
    params, meta = place.params(), MetaParams.init(config)

    def lowest(optimizer: HRNN, step: float) -> float:
        mean = torch.zeros((), dtype=torch.float64)
        return reference.log_lr_bounds(optimizer.config, torch.full_like(mean, step), None, mean)[0].item()

    own, low = place.hrnn(params, meta=meta), place.hrnn(params, meta=meta, init_lr=1e-5)
    assert lowest(low, 0) == math.log(1e-5)
    assert lowest(low, 1e9) == pytest.approx(lowest(own, 1e9), abs=1e-2) and lowest(own, 1e9) < math.log(1e-6)
    tiny = place.hrnn(params, meta=meta, init_lr=1e-250)
    tiny.step()
    assert lowest(tiny, 0) == pytest.approx(lowest(tiny, 1e9)) == math.log(1e-250)
    held = place.hrnn(params, meta=meta, init_lr=1e-5, min_lr=1e-4)
    assert lowest(held, 0) == lowest(held, 1e9) == math.log(1e-4)


def test_an_init_lr_that_is_edited_in_its_group_is_where_rates_start(place):
    (param,) = place.params((3,))
    optimizer = HRNN([param], backend=place.backend, base_depth=None)
    assert optimizer.config.log_lr_min > math.log(1e-5)
    optimizer.param_groups[0]["init_lr"] = 1e-5
    optimizer.step()
    assert optimizer.state[param]["log_lr"].exp().max() < 1e-4


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
    bound = {"log_lr_min_distance": 0.1, "log_lr_min_distance_limit": 2.0}
    meta = MetaParams.init(HRNNConfig(log_lr_min=math.log(1e-5), **bound))
    params = place.params()
    held = place.hrnn(params, meta=meta, min_lr=1e-4)
    held.step()
    assert held.config == dataclasses.replace(
        meta.config, log_lr_min=math.log(1e-4), log_lr_min_distance=0.0, log_lr_min_distance_limit=0.0
    )
    assert not any("distance" in state for state in held.state.values())
    tiny = place.hrnn(params, meta=meta, init_lr=1e-7)
    assert tiny.config == dataclasses.replace(meta.config, log_lr_min=math.log(1e-7))
    with pytest.raises(ValueError, match="lacks distance.*min_lr"):
        place.hrnn(params, meta=meta).load_state_dict(held.state_dict())


def test_annealed_raises_the_bound_by_distance_and_leaves_the_rest(place):
    config = HRNNConfig(log_lr_min_steps=1.0, log_lr_min_distance=4.0)  # high enough to bind from the second step on
    higher = dataclasses.replace(config, log_lr_min_distance=ANNEALED * 4.0)
    untrained = MetaParams.init(config, seed=1)

    def trained(meta: MetaParams, **options: bool) -> HRNN:
        optimizer = place.hrnn(place.params(), meta=meta, init_lr=0.01, **options)
        for step in range(6):
            if step == 3:
                optimizer = pickle.loads(pickle.dumps(optimizer))
            give_gradients(optimizer.param_groups[0]["params"], step)
            optimizer.step()
        return optimizer

    plain, annealed, expected = (
        trained(untrained),
        trained(untrained, annealed=True),
        trained(MetaParams(higher, untrained)),
    )
    assert (plain.config, annealed.config) == (config, higher)
    groups = zip(*(each.param_groups[0]["params"] for each in (plain, annealed, expected)), strict=True)
    for before, param, same in groups:
        assert torch.equal(param, same) and not torch.equal(param, before)
    plain.load_state_dict(annealed.state_dict())  # either goes on from the other's state
    assert plain.config == config
    assert place.hrnn(place.params(), meta=MetaParams.init(), annealed=True).config == HRNNConfig()  # no such bound


def test_rates_of_weights_that_no_gradient_holds_back_fall_in_the_end():
    """A vector added to the weights of all classes leaves the loss as it was, and steps of one length do add one."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.zeros(100, 64))
    optimizer = HRNN([weight])
    largest = []
    for _ in range(2):
        for _ in range(5_000):
            inputs = torch.randn(16, 64, generator=generator).relu()
            classes = torch.randint(100, (16,), generator=generator)  # there is nothing to be learned
            nn.functional.cross_entropy(inputs @ weight.T, classes).backward()
            optimizer.step()
            optimizer.zero_grad()
        largest.append(optimizer.state[weight]["log_lr"].max().exp().item())
    assert weight.mean() < -1
    assert largest[1] < 0.85 * largest[0]  # the root of the steps is 1.41 times as long


# Weight decay


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


def test_infinite_parameters_stay_where_nothing_decays(place):
    param = nn.Parameter(torch.tensor([1.0, -math.inf, math.inf], device=place.device))
    train(place.hrnn([param]), 2)
    assert param.isfinite().tolist() == [True, False, False] and not param.isnan().any()


# maximize


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
