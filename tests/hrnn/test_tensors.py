"""Parameters and gradients of every shape, memory order and dtype, and those that are refused."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from lopt import HRNN, MetaParams

from .common import ATTENTION, PAPER, assert_same, content, give_gradients, train, values

pytestmark = pytest.mark.filterwarnings("error")


# Shapes and memory


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


def test_a_gradient_of_another_size_than_its_parameter_is_refused(place):
    param = nn.Parameter(torch.zeros(3, device=place.device))
    param.grad = torch.ones_like(param)
    param.data = torch.zeros(5, device=place.device)
    optimizer = place.hrnn([param])
    with pytest.raises(RuntimeError, match=r"shape \(5,\) has a gradient of shape \(3,\)"):
        optimizer.step()


# Dtypes


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


def test_an_integer_parameter_with_a_gradient_is_refused(place):
    frozen = nn.Parameter(torch.zeros(4, dtype=torch.int32, device=place.device), requires_grad=False)
    frozen.grad = torch.ones_like(frozen)
    with pytest.raises(TypeError, match=r"shape \(4,\) has dtype torch.int32"):
        place.hrnn([frozen]).step()


# Complex numbers, negation and conjugation that autograd puts off


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


def test_a_conjugate_view_is_a_gradient_too(place):
    value = torch.randn(4, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)).to(place.device)
    left, right = (nn.Parameter(value.clone()) for _ in range(2))
    left.grad, right.grad = value.conj(), value.conj().resolve_conj()
    assert left.grad.is_conj()
    for param in (left, right):
        place.hrnn([param]).step()
    assert torch.equal(left, right)


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


# Tensors without memory of their own


def test_sparse_gradients_are_refused_with_a_cure(place):
    embedding = nn.Embedding(5, 3, sparse=True).to(place.device)
    embedding(torch.tensor([1, 2], device=place.device)).sum().backward()
    before = embedding.weight.detach().clone()
    for nonfinite in ("skip", "raise"):
        with pytest.raises(RuntimeError, match="does not support sparse gradients: use sparse=False"):
            place.hrnn(embedding.parameters(), nonfinite=nonfinite).step()
    assert torch.equal(embedding.weight, before)


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


@pytest.mark.parametrize(
    "kinds",
    [
        lambda name, value: name != "step",
        lambda name, value: value.numel() > 1,
        lambda name, value: name == "ms",
        lambda name, value: name == "true_param",
        lambda name, value: name in ("damping", "distance"),
    ],
    ids=["all but the step", "all but scalars", "ms", "true_param", "damping and distance"],
)
@pytest.mark.parametrize("meta", [None, ATTENTION], ids=["shipped", "attention"])
def test_kinds_of_state_may_be_given_other_memory_between_steps(place, meta, kinds):
    """As those do who keep state elsewhere meanwhile; the old memory is kept so that a use of it is no crash."""
    place.skip_unless_supported(MetaParams.resolve(meta))
    moved, stayed = (place.hrnn(place.params(), meta=meta) for _ in range(2))
    old = []
    for step in range(4):
        for optimizer in (moved, stayed):
            train(optimizer, range(step, step + 1))
        for state in moved.state.values():
            for name, value in state.items():
                if kinds(name, value):
                    old.append(value.data)
                    value.data = value.data.clone()
    assert_same(content(moved), content(stayed))
