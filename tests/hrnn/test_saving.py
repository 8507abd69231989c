"""Saving, loading, copying: nothing is lost, and what does not fit is refused before anything is changed."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from lopt import HRNN, HRNNConfig, MetaParams
from lopt.options import OPTIONS

from .common import METAS, PAPER, SHAPES, Place, assert_same, content, through_memory, train

pytestmark = pytest.mark.filterwarnings("error")


# state_dict


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


def test_a_state_is_loaded_whatever_the_default_device_is(place):
    optimizer = place.hrnn(place.params((3,)))
    optimizer.step()
    saved, other = optimizer.state_dict(), place.hrnn(place.params((3,)))
    with torch.device("meta"):
        other.load_state_dict(saved)
    assert_same(content(optimizer), {**content(other), "0.param": content(optimizer)["0.param"]})


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


# What does not fit


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


class Stubborn:
    def __deepcopy__(self, memo):
        raise NotImplementedError("not to be copied")


def test_a_state_that_cannot_be_copied_is_refused_and_nothing_lost(place):
    source, target = place.hrnn(place.params(), lr=0.5), place.hrnn(place.params())
    for optimizer in (source, target):
        train(optimizer, 2)
    saved, before = source.state_dict(), content(target)
    saved["state"][2]["own"] = Stubborn()
    with pytest.raises(NotImplementedError, match="not to be copied"):
        target.load_state_dict(saved)
    assert_same(content(target), before)
    assert target.param_groups[0]["lr"] == 1.0


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
    train(target, 1)
    again = place.hrnn(place.params(), meta="hrnn-10")
    again.load_state_dict(target.state_dict())


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


# Copies and pickles


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
