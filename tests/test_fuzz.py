"""Whatever is done to an optimizer, in whatever order: no crash that is not a clear error, no NaN, an exact resume.

LOPT_FUZZ_EXAMPLES sets the number of examples, 2,000 by default.
"""

import copy
import io
import math
import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lopt import HRNN, HRNNConfig, MetaParams, backends

EXAMPLES = int(os.environ.get("LOPT_FUZZ_EXAMPLES", "2000"))
METAS = {
    "paper": MetaParams.init(HRNNConfig(), seed=1),
    "attention": MetaParams.init(HRNNConfig(attention=True), seed=2),
    "shipped": MetaParams.resolve(None),
    "wild": MetaParams.init(HRNNConfig(), seed=3).map(lambda tensor: 4 * tensor),  # saturated gates, long steps
}
BACKENDS = [
    name
    for name, reason in backends.available().items()
    if reason is None and backends.BACKENDS[name].device in ("*", "cpu")
]
SHAPES = [(), (1,), (3,), (17,), (2, 3), (0,), (2, 0), (3, 1, 2), (2, 3, 2, 2), (1, 16)]
DTYPES = [torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64]
LAYOUTS = ["contiguous", "transposed", "gaps", "channels_last"]
GRADIENTS = ["normal", "none", "zero", "tiny", "huge", "expanded", "transposed", "nan", "inf", "beyond"]


def laid_out(value: Tensor, layout: str) -> Tensor:
    if layout == "transposed" and value.dim() >= 2:
        return value.mT.contiguous().mT
    if layout == "gaps" and value.dim() >= 1:
        return value.new_zeros(*value.shape, 2)[..., 0].copy_(value)
    if layout == "channels_last" and value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    return value


def gradient(param: Tensor, kind: str, generator: torch.Generator) -> Tensor | None:
    if kind == "none":
        return None
    wide = torch.complex128 if param.is_complex() else torch.float64
    value = torch.randn(param.shape, generator=generator, dtype=wide)
    value = value * {"zero": 0.0, "tiny": 1e-30, "huge": 1e17}.get(kind, 1.0)
    if kind == "expanded" and value.numel() > 0:
        value = value.flatten()[0].expand(param.shape)
    value = value.to(param.dtype)
    if kind in ("nan", "inf", "beyond") and value.numel() > 0:
        value.view(-1)[-1] = torch.tensor({"nan": math.nan, "inf": -math.inf, "beyond": 1e19}[kind]).to(value.dtype)
    return laid_out(value, kind)


@st.composite
def parameters(draw: Any) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    params = []
    for shape, dtype, layout in draw(
        st.lists(
            st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.sampled_from(LAYOUTS)),
            min_size=1,
            max_size=3,
        )
    ):
        wide = torch.complex128 if dtype.is_complex else torch.float64
        value = torch.randn(shape, generator=generator, dtype=wide).to(dtype)
        params.append(nn.Parameter(laid_out(value, layout)))
    return params


options = st.fixed_dictionaries(
    {},
    optional={
        "lr": st.sampled_from([0.0, 0.5, 1.0, 2.0, torch.tensor(0.5)]),
        "init_lr": st.sampled_from([1e-30, 1e-3, 0.1, 1e10]),
        "weight_decay": st.sampled_from([0.0, 0.1, 1e9]),
        "base_fan_in": st.sampled_from([None, 0.5, 20]),
        "base_depth": st.sampled_from([None, 0.5, 4]),
        "maximize": st.booleans(),
    },
)
gradients = st.sampled_from(GRADIENTS + ["normal"] * 8)
actions = st.one_of(
    st.tuples(st.just("step"), st.lists(gradients, min_size=1, max_size=4), st.integers(0, 99)),
    st.tuples(st.just("step"), st.just(["normal"]), st.integers(0, 99)),
    st.tuples(st.sampled_from(["resume", "deepcopy", "zero_grad", "eval_train", "grad_none", "found_inf", "move"])),
    st.tuples(st.just("lr"), st.sampled_from([0.0, 0.3, 1.5])),
    st.tuples(st.just("group"), parameters(), options),
)


def content(optimizer: HRNN) -> list[Tensor]:
    """Copies of all parameters and all state, in their order."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = [optimizer.state[param][name] for param in params for name in sorted(optimizer.state.get(param, {}))]
    return [value.detach().clone() for value in (*params, *states)]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Bitwise, NaN and infinity of half-precision parameters included."""
    return len(left) == len(right) and all(
        torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        for a, b in zip(left, right, strict=True)
    )


def saved_and_loaded(optimizer: HRNN) -> HRNN:
    """Another optimizer of copies of the parameters that loaded the state from a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    groups = []
    for group in optimizer.param_groups:
        copies = [nn.Parameter(torch.empty_like(param).copy_(param)) for param in group["params"]]
        for own, param in zip(copies, group["params"], strict=True):
            own.data = param.detach().clone() if own.stride() == param.stride() else copy.deepcopy(param.detach())
            own.grad = param.grad
        groups.append({"params": copies})
    defaults = {
        name: optimizer.defaults[name]
        for name in ("lr", "init_lr", "weight_decay", "base_fan_in", "base_depth", "maximize")
    }
    resumed = HRNN(groups, meta=optimizer.meta, backend=optimizer.backend, **defaults)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    return resumed


def step(optimizer: HRNN, kinds: list[str], seed: int) -> None:
    """A step with gradients of the given kinds; if one is not finite, nothing may change."""
    generator = torch.Generator().manual_seed(seed)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for index, param in enumerate(params):
        param.grad = gradient(param, kinds[index % len(kinds)], generator)
    taking_part = [param for param in params if param.grad is not None and param.numel() > 0]
    limit = 1e18
    finite = all(
        bool(((torch.view_as_real(g) if g.is_complex() else g).float().abs() <= limit).all())
        for g in (param.grad for param in taking_part)
    )
    before, skipped = [param.detach().clone() for param in params], optimizer.skipped_steps
    counts = [optimizer.state[param]["step"].item() if param in optimizer.state else 0 for param in taking_part]
    optimizer.step()
    assert optimizer.skipped_steps == skipped + (not finite)
    for param, count in zip(taking_part, counts, strict=True):
        assert optimizer.state[param]["step"].item() == count + finite
    if not finite:
        assert same(before, [param.detach() for param in params])


def act(optimizer: HRNN, action: tuple[Any, ...]) -> HRNN:
    """Do one thing; returns the optimizer to go on with."""
    kind, *arguments = action
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if kind == "step":
        step(optimizer, *arguments)
    elif kind == "resume":
        before = content(optimizer)
        optimizer = saved_and_loaded(optimizer)
        assert same(content(optimizer), before)
    elif kind == "deepcopy":
        before = content(optimizer)
        optimizer = copy.deepcopy(optimizer)
        assert same(content(optimizer), before)
    elif kind == "zero_grad":
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
    elif kind == "grad_none":
        before = content(optimizer)
        optimizer.zero_grad()
        optimizer.step()
        assert same(content(optimizer), before)
    elif kind == "eval_train":
        before = content(optimizer)
        optimizer.eval()
        optimizer.train()
        assert same(content(optimizer), before)
    elif kind == "found_inf":
        before, optimizer.found_inf, optimizer.grad_scale = content(optimizer), torch.ones(()), torch.full((), 2.0)
        seen = {param for param in params if param in optimizer.state}
        optimizer.step()
        del optimizer.found_inf, optimizer.grad_scale
        if all(param in seen for param in optimizer.state):
            assert same(content(optimizer), before)
    elif kind == "move":  # as a model that changes its memory format
        for param in params:
            if param.dim() >= 2:
                param.data = param.data.mT.contiguous().mT
    elif kind == "lr":
        for group in optimizer.param_groups:
            group["lr"] = arguments[0]
    elif kind == "group":
        given, own_options = arguments
        copies = [nn.Parameter(laid_out(param.detach().clone(), "contiguous")) for param in given]
        optimizer.add_param_group({"params": copies, **copy.deepcopy(own_options)})
    return optimizer


@pytest.mark.filterwarnings("ignore:lr=.* multiplies the learned step")
@given(
    params=parameters(),
    options=options,
    backend=st.sampled_from([BACKENDS[0]] * 4 + BACKENDS),
    meta=st.sampled_from(list(METAS)),
    actions=st.lists(actions, min_size=1, max_size=4),
    cut=st.integers(0, 3),
)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="LOPT_FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
    database=None,
)
def test_any_order_of_calls_keeps_state_finite_and_resumes_exactly(
    params: list[nn.Parameter],
    options: dict[str, Any],
    backend: str,
    meta: str,
    actions: list[tuple[Any, ...]],
    cut: int,
) -> None:
    params = [nn.Parameter(param.detach().clone(memory_format=torch.preserve_format)) for param in params]
    optimizer = HRNN(params, meta=METAS[meta], backend=backend, **copy.deepcopy(options))
    resumed: HRNN | None = None
    finite = True  # parameters of half precision may overflow at a learning rate of 1e10, and be NaN from then on
    for position, action in enumerate(actions):
        if position == cut:
            resumed = saved_and_loaded(optimizer)
        optimizer = act(optimizer, action)
        if resumed is not None:
            resumed = act(resumed, copy.deepcopy(action))
        for state in optimizer.state.values():
            for name, value in state.items():
                assert name in ("true_param", "attended") or value.isfinite().all(), name
        params = [param for group in optimizer.param_groups for param in group["params"]]
        assert not finite or all(not param.isnan().any() for param in params)
        finite = all(param.isfinite().all() for param in params)
    if resumed is not None:
        assert same(content(optimizer), content(resumed))
