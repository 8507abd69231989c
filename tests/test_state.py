"""The table of the optimizer's state: names, sizes, initial values and memory order."""

import pytest
import torch

from lopt import HRNNConfig, MetaParams
from lopt.state import (
    ROWS,
    bytes_per_parameter,
    empty_rows,
    init_global,
    init_state,
    like_parameter,
    rows,
    strides,
)

CONFIGS = {
    "paper": (HRNNConfig(), 76),
    "attention": (HRNNConfig(attention=True), 80),
    "two_levels": (HRNNConfig(level_sizes=(10, 20)), 76),
    "one_level": (HRNNConfig(level_sizes=(6,), timescales=2), 44),
    "no_log_lr": (HRNNConfig(dynamic_output_scale=False, relative_log_lr=None), 72),
}


def param_layouts() -> dict[str, torch.Tensor]:
    """Parameters of every memory layout that matters."""
    values = torch.arange(120.0).reshape(2, 3, 4, 5)
    return {
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(3, 0, 2),
        "contiguous": values,
        "channels_last": values.to(memory_format=torch.channels_last),
        "permuted": values.permute(2, 0, 3, 1),
        "single": values[:, :1, :, :1].contiguous().permute(3, 1, 0, 2),
        "gaps": values[:, ::2, :, 1:3],
        "expanded": values[:1, :, :1].expand(2, 3, 4, 5),
    }


@pytest.mark.parametrize(("config", "size"), CONFIGS.values(), ids=CONFIGS)
def test_state_has_the_kinds_shapes_and_bytes_of_the_table(config, size):
    meta, param = MetaParams.init(config), torch.randn(3, 4, dtype=torch.bfloat16)
    state = init_state(param, meta, -7.0)
    expected = {row.name: row for row in rows(config) if row.per != "model"}
    assert set(state) == set(expected)
    for name, row in expected.items():
        outer = () if row.size(config) is None else (row.size(config),)
        assert state[name].shape == (*outer, *(param.shape if row.per == "parameter" else ()))
        assert state[name].dtype == torch.float32
        assert state[name].is_contiguous()
    per_parameter = sum(state[name].nbytes for name, row in expected.items() if row.per == "parameter")
    assert per_parameter == param.numel() * bytes_per_parameter(config) == param.numel() * size


@pytest.mark.parametrize("config", [config for config, _ in CONFIGS.values()], ids=CONFIGS)
def test_initial_values_are_those_of_the_metaparams(config):
    meta, param = MetaParams.init(config, seed=2), torch.randn(3, 4)
    state = init_state(param, meta, -7.0)
    assert torch.equal(state["hidden"], meta["level0.init"][:, None, None].expand(-1, 3, 4))
    assert not state["accum"].any()
    assert not state["ms"].any()
    assert state["step"] == 0
    if config.dynamic_output_scale:
        assert (state["log_lr"] == -7).all()
        assert state["log_lr_mean"] == -7
    if config.attention:
        assert torch.equal(state["true_param"], param)
    if config.levels >= 2:
        assert torch.equal(state["tensor_hidden"], meta["level1.init"])
    hidden = init_global(meta, param.device)
    assert torch.equal(hidden, meta["level2.init"] if config.levels >= 3 else torch.empty(0))


def test_state_shares_no_memory_with_metaparams_or_parameter():
    meta, param = MetaParams.init(HRNNConfig(attention=True)), torch.randn(1)
    state = init_state(param, meta, -7.0) | {"global_hidden": init_global(meta, param.device)}
    before = [tensor.clone() for tensor in (*meta.values(), param)]
    for value in state.values():
        value.fill_(9)
    assert all(torch.equal(tensor, old) for tensor, old in zip((*meta.values(), param), before, strict=True))


@pytest.mark.parametrize("layout", param_layouts())
def test_slices_of_the_state_lie_like_the_parameter_without_its_gaps(layout):
    param = param_layouts()[layout]
    for size in (None, 10):
        state = empty_rows(param, size)
        slices = [state] if size is None else state
        assert state.shape == (param.shape if size is None else (size, *param.shape))
        assert state.stride() == strides(param, size)
        if layout not in ("gaps", "expanded"):
            assert all(part.stride() == param.stride() for part in slices)
        if param.numel():
            # Compact: every memory cell is used exactly once.
            assert state.untyped_storage().nbytes() == 4 * state.numel()
            numbers = torch.arange(state.numel()).reshape(state.shape)
            assert torch.equal(state.copy_(numbers), numbers)


@pytest.mark.parametrize("layout", param_layouts())
@pytest.mark.parametrize("given", ["contiguous", "channels_last", "strided"])
def test_like_parameter_keeps_the_values_and_takes_the_order(layout, given):
    param = param_layouts()[layout]
    for size in (None, 4):
        shape = param.shape if size is None else (size, *param.shape)
        values = torch.randn(shape)
        tensor = {
            "contiguous": values,
            "channels_last": values.mT.contiguous().mT if values.dim() > 1 else values,
            "strided": torch.stack([values, values], -1)[..., 0],
        }[given]
        ordered = like_parameter(tensor, param)
        assert torch.equal(ordered, values)
        assert ordered.stride() == strides(param, size)
        assert like_parameter(ordered, param) is ordered


def test_every_kind_of_state_is_in_the_table_once():
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    assert {row.per for row in ROWS} == {"parameter", "tensor", "model"}
