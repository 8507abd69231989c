"""What HRNN is made of: parameters, groups, options, meta-parameters and a backend, and what it refuses."""

import io
import math
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lopt import HRNN, MetaParams, backends

from .common import METAS, PAPER, Place, assert_moved, assert_same, content, train

pytestmark = pytest.mark.filterwarnings("error")


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
        ({"min_lr": 1e-3, "annealed": True}, "min_lr=0.001 is the whole bound .* leave annealed at False"),
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


@pytest.mark.parametrize("name", ["meta", "min_lr", "annealed", "state_format", "backend", "nonfinite"])
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


def test_a_learning_rate_in_a_later_group_is_warned_of(place):
    first, second = place.params((3,), (2,))
    optimizer = place.hrnn([first])
    with pytest.warns(UserWarning, match="lr=0.001 multiplies the learned step"):
        optimizer.add_param_group({"params": [second], "lr": 1e-3})


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


def test_an_optimizer_is_made_under_a_fake_tensor_mode():
    meta = MetaParams.resolve("hrnn-10")
    with FakeTensorMode():
        optimizer = HRNN([nn.Parameter(torch.zeros(3, 4))], meta=meta)
    assert optimizer.param_groups[0]["meta_digest"] == meta.digest


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


def test_optimizer_prints_its_options():
    assert "weight_decay: 0.5" in repr(HRNN([nn.Parameter(torch.zeros(2))], weight_decay=0.5))


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


def test_an_empty_group_and_a_frozen_integer_parameter_do_no_harm(place):
    (param,) = place.params((3,))
    frozen = nn.Parameter(torch.zeros(4, dtype=torch.uint8, device=place.device), requires_grad=False)
    optimizer = place.hrnn([{"params": []}, {"params": [param, frozen]}])
    optimizer.step()
    assert optimizer.state[param]["step"] == 1
    assert frozen not in optimizer.state


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
