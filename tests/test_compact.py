"""The compact state: what 16 bits resolve, steps beside float32 state, checkpoints from one format into the other.

What GPU kernels make of it: tests/kernels/test_hrnn.py.
"""

import copy
import math

import pytest
import torch
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import lopt
from lopt import HRNN, HRNNConfig, MetaParams, backends, compact, native
from lopt.backends import reference
from lopt.state import FORMATS, bytes_per_parameter, convert, init_state, rows

BACKENDS = [name for name in ("reference", "cpu") if backends.unusable(name) is None]
META = MetaParams.init(HRNNConfig(), 1)
ATTENTION = MetaParams.init(HRNNConfig(attention=True), 2)


def random_state(n: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ms = 10 ** (torch.rand(4, n, generator=generator) * 48 - 24)
    ms[:, : n // 8] = 0
    accum = torch.randn(4, n, generator=generator) * ms.sqrt()
    return {"hidden": torch.rand(10, n, generator=generator) * 2 - 1, "accum": accum, "ms": ms}


def test_numbers_come_back_to_within_half_a_step_of_their_16_bits():
    state = random_state(4096)
    back = compact.decode(compact.encode(state, 1.0), 1.0)
    assert (back["hidden"] - state["hidden"]).abs().max() <= 0.5 / 32767 * 1.001
    some = state["ms"] > 0
    assert torch.equal(back["ms"] > 0, some)
    # Half a step, and roundings of float32 where it is widest, at 80 octaves: the logarithm's and both products', 2^-18
    # octaves each.
    assert (back["ms"][some] / state["ms"][some]).log2().abs().max() <= 0.5 / compact.MS_STEPS + 3 * 2**-18
    error = (back["accum"] - state["accum"]).abs()
    # Half a unit of float16's 11 bits, or of its smallest subnormal.
    assert torch.all(error <= state["accum"].abs() * 2**-10.9 + 2**-24.9 * state["ms"].sqrt() * 1.01)


def test_numbers_out_of_range_saturate():
    state = {
        "hidden": torch.tensor([[5.0], [-5.0]]),
        "accum": torch.tensor([[1e18], [-1e18]]),
        "ms": torch.tensor([[1e-30], [3e38]]),
    }
    back = compact.decode(compact.encode(state, 2.0), 2.0)
    assert back["hidden"].flatten().tolist() == [2.0, -2.0]
    assert back["ms"].flatten().tolist() == [2.0**-80, 2.0**80]
    assert all(torch.isfinite(value).all() for value in back.values())


def test_limit_is_a_power_of_two_that_bounds_the_initial_hidden_state():
    meta = MetaParams.init(HRNNConfig(), 1)
    assert compact.limit(meta) == 1.0
    flat = meta.flat().clone()
    offset = MetaParams.layout(meta.config)["level0.init"][0]
    flat[offset] = -2.5
    assert compact.limit(MetaParams.from_flat(meta.config, flat)) == 4.0


def test_state_takes_forty_bytes():
    assert bytes_per_parameter(META.config, "compact") == 40
    assert bytes_per_parameter(META.config) == 76
    param = torch.zeros(3, 5, requires_grad=True)
    param.grad = torch.ones(3, 5)
    optimizer = HRNN([param], meta=META, state_format="compact")
    optimizer.step()
    state = optimizer.state[param]
    kinds = rows(META.config, "parameter")
    assert sum(state[row.name].nbytes for row in kinds) == 40 * 15
    assert all(state[row.name].dtype == row.dtype("compact") for row in kinds)


def train(state_format: str, backend: str, steps: int, *, meta=META, n=2048, dtype=torch.float32):
    """Updates in units of the learning rate, [steps, n], and the optimizer, on gradients of six decades."""
    generator = torch.Generator().manual_seed(3)
    param = torch.nn.Parameter(torch.zeros(n, dtype=dtype))
    optimizer = HRNN([param], meta=meta, state_format=state_format, backend=backend)
    scale = 10 ** (torch.rand(n, generator=generator) * 6 - 3)
    updates = []
    for _ in range(steps):
        before = param.detach().double()
        param.grad = ((torch.randn(n, generator=generator) + 0.3) * scale).to(dtype)
        optimizer.step()
        updates.append((param.detach().double() - before) / optimizer.state[param]["log_lr"].double().exp())
    return torch.stack(updates), optimizer


def trained_linear(state_format: str, steps: int) -> tuple[torch.nn.Module, HRNN]:
    """A small model after some steps, and its optimizer."""
    model = torch.nn.Linear(5, 3)
    optimizer = HRNN(model.parameters(), meta=META, state_format=state_format)
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.sin(torch.arange(40.0) * (step + 1)).reshape(8, 5)).square().sum().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("meta", [META, None], ids=["untrained", "shipped"])
@pytest.mark.parametrize(("backend", "steps"), [(name, {"reference": 200, "cpu": 1000}[name]) for name in BACKENDS])
def test_updates_stay_within_two_thousandths_of_those_with_float32_state(backend, steps, meta):
    exact, _ = train("float32", backend, steps, meta=meta)
    updates, optimizer = train("compact", backend, steps, meta=meta)
    error = ((updates - exact).square().mean() / exact.square().mean()).sqrt()
    assert error <= 2e-3
    assert error > 1e-5  # or it would not be compact
    assert optimizer.skipped_steps == 0


@pytest.mark.skipif(not native.runnable(), reason="lopt._C is not built")
@pytest.mark.parametrize("meta", [META, ATTENTION], ids=["default", "attention"])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 517])
def test_kernel_makes_the_same_codes_as_the_reference(n, meta):
    """Where rounding of the float32 in between moves a number across a boundary, a code may be the next one."""
    grad = torch.randn(n, generator=torch.Generator().manual_seed(n)) * 1e-2
    results = {}
    for isa in (None, *native.runnable()):
        native.load().use_isa(isa or "")
        param = torch.nn.Parameter(torch.zeros(n))
        optimizer = HRNN([param], meta=meta, state_format="compact", backend="cpu" if isa else "reference")
        for _ in range(3):
            param.grad = grad.clone()
            optimizer.step()
        results[isa] = optimizer.state[param]
    native.load().use_isa("")
    for isa in native.runnable():
        for name in ("hidden", "ms"):
            difference = (results[isa][name].int() - results[None][name].int()).abs()
            assert difference.max() <= 2, (isa, name)
            assert (difference > 0).float().mean() <= 0.05 + 1 / n, (isa, name)
        torch.testing.assert_close(results[isa]["accum"].float(), results[None]["accum"].float(), rtol=4e-3, atol=1e-6)
        torch.testing.assert_close(results[isa]["log_lr"], results[None]["log_lr"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_timescale_without_a_past_is_told_by_its_code_for_zero(backend):
    """A step on zeros leaves ms at (1 - 0) * ms_eps; with ms_eps = 0 it stays zero, and steps go on."""
    meta = MetaParams.init(HRNNConfig(ms_eps=0.0), 1)
    param = torch.nn.Parameter(torch.zeros(7))
    optimizer = HRNN([param], meta=meta, state_format="compact", backend=backend)
    param.grad = torch.zeros(7)
    optimizer.step()
    assert torch.all(optimizer.state[param]["ms"] == compact.MS_ZERO)
    exact, _ = train("float32", backend, 5, meta=meta, n=64)
    updates, _ = train("compact", backend, 5, meta=meta, n=64)
    torch.testing.assert_close(updates, exact, rtol=0.05, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_of_other_dtypes(backend, dtype):
    _, optimizer = train("compact", backend, 5, n=33, dtype=dtype)
    (state,) = optimizer.state.values()
    assert state["hidden"].dtype == torch.int16
    assert torch.isfinite(state["log_lr"]).all()


@pytest.mark.parametrize(("saved", "loaded"), [("float32", "compact"), ("compact", "float32"), ("compact", "compact")])
def test_a_checkpoint_of_either_format_loads_into_either(saved, loaded):
    _, source = train(saved, BACKENDS[-1], 20, n=64)
    checkpoint = copy.deepcopy(source.state_dict())
    param = torch.nn.Parameter(torch.zeros(64))
    target = HRNN([param], meta=META, state_format=loaded)
    target.load_state_dict(checkpoint)
    state, (expected,) = target.state[param], source.state.values()
    for row in rows(META.config):
        assert state[row.name].dtype == row.dtype(loaded)
    back = convert(state, META, saved)
    # Going through the compact format once more changes nothing; from float32 it costs half a step.
    tolerances = {"hidden": 2e-5, "ms": 2e-3, "accum": 1e-3} if saved == "float32" else dict.fromkeys(state, 0.0)
    for name in ("hidden", "ms", "accum"):
        relative = 0.0 if name == "hidden" else tolerances[name]
        absolute = tolerances[name] if name == "hidden" else 1e-12
        torch.testing.assert_close(back[name].double(), expected[name].double(), rtol=relative, atol=absolute)
    param.grad = torch.ones(64)
    target.step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_any_size_that_the_format_holds_make_the_same_steps(backend):
    """Mean squares are held up to 2^80, that of gradients of 1e12; beyond it learned rates rise, and stay finite."""
    moved = {}
    for size in (1e-9, 1.0, 1e11, 1e16):
        param = torch.nn.Parameter(torch.zeros(64))
        optimizer = HRNN([param], state_format="compact", backend=backend)
        generator = torch.Generator().manual_seed(5)
        for _ in range(50):
            param.grad = torch.randn(64, generator=generator) * size
            optimizer.step()
        assert optimizer.skipped_steps == 0
        moved[size] = param.abs().mean().item()
    # Rounding differs from size to size: 2e-3 of a step.
    assert abs(moved[1e-9] / moved[1.0] - 1) <= 2e-3
    assert abs(moved[1e11] / moved[1.0] - 1) <= 2e-3
    assert math.isfinite(moved[1e16])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("said", [True, False])
def test_mean_squares_saved_with_other_codes_are_converted(backend, said):
    _, source = train("compact", backend, 20, n=64)
    checkpoint = copy.deepcopy(source.state_dict())
    (state,), (group,) = checkpoint["state"].values(), checkpoint["param_groups"]
    assert group["ms_steps"] == compact.MS_STEPS
    # 512 codes per octave, or the 256 of a file that says nothing, for what are powers of two in both.
    octaves = torch.arange(4 * 64).remainder(60).sub(30).reshape(4, 64)
    state["ms"] = (octaves * (512 if said else compact.MS_STEPS_UNSAID)).to(torch.int16)
    if said:
        group["ms_steps"] = 512
    else:
        del group["ms_steps"]
    for state_format in ("compact", "float32"):
        param = torch.nn.Parameter(torch.zeros(64))
        target = HRNN([param], meta=META, state_format=state_format, backend=backend)
        target.load_state_dict(checkpoint)
        assert target.param_groups[0].get("ms_steps") == (compact.MS_STEPS if state_format == "compact" else None)
        found = convert(target.state[param], META, "float32")
        torch.testing.assert_close(found["ms"], torch.exp2(octaves.float()), rtol=1e-5, atol=0)
        accum = state["accum"].float() * torch.exp2(octaves / 2)
        torch.testing.assert_close(found["accum"], accum, rtol=2**-10, atol=0)
        torch.testing.assert_close(found["hidden"], state["hidden"] / 32767, rtol=2**-22, atol=0)


def test_float32_state_is_told_by_its_dtype_whatever_its_group_says():
    """`set_optimizer_state_dict` fills in what a file does not say from the optimizer that loads it."""
    _, source = train("float32", BACKENDS[-1], 20, n=64)
    _, target = train("compact", BACKENDS[-1], 2, n=64)
    content = copy.deepcopy(source.state_dict())
    content["param_groups"][0]["ms_steps"] = compact.MS_STEPS
    target.load_state_dict(content)
    (found,), (expected,) = target.state.values(), source.state.values()
    for name, value in compact.encode(expected, compact.limit(META)).items():
        assert torch.equal(found[name], value)


@pytest.mark.filterwarnings("ignore:torch.distributed is ", "ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("loaded", FORMATS)
@pytest.mark.parametrize("saved", FORMATS)
def test_a_distributed_checkpoint_is_not_read_into_tensors_of_the_other_format(tmp_path, saved, loaded):
    """It is copied into the tensors that are there, which changes their dtype: codes would be taken for numbers."""
    model, source = trained_linear(saved, 5)
    distributed_checkpoint.save(get_optimizer_state_dict(model, source), checkpoint_id=tmp_path)
    model, target = trained_linear(loaded, 0)
    content = get_optimizer_state_dict(model, target)
    if (saved, loaded) == ("float32", "compact"):
        with pytest.raises(distributed_checkpoint.CheckpointException, match="ms_steps"):
            distributed_checkpoint.load(content, checkpoint_id=tmp_path)
        return
    distributed_checkpoint.load(content, checkpoint_id=tmp_path)
    if (saved, loaded) == ("compact", "float32"):
        before = copy.deepcopy(target.state_dict())
        with pytest.raises(ValueError, match="saved in the format compact and .* of the format float32: read it for "):
            set_optimizer_state_dict(model, target, content)
        assert str(target.state_dict()) == str(before)
        return
    set_optimizer_state_dict(model, target, content)
    for own, state in zip(target.state.values(), source.state.values(), strict=True):
        for row in rows(META.config):
            assert own[row.name].dtype == row.dtype(loaded)
            assert torch.equal(own[row.name], state[row.name])


@pytest.mark.parametrize(("saved", "read"), [("float32", "compact"), ("compact", "float32")])
def test_numbers_of_a_format_in_tensors_of_the_other_are_refused_and_nothing_is_changed(saved, read):
    _, source = trained_linear(saved, 5)
    _, target = trained_linear(read, 2)
    before, content = copy.deepcopy(target.state_dict()), copy.deepcopy(source.state_dict())
    content["param_groups"][0].pop("ms_steps", None)
    for state in content["state"].values():
        for row in rows(META.config):
            state[row.name] = state[row.name].to(row.dtype(read))
    with pytest.raises(ValueError, match=f"saved in the format {saved} and .* of the format {read}: read it for "):
        target.load_state_dict(content)
    assert str(target.state_dict()) == str(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_resuming_is_exact(backend):
    def model_and_optimizer():
        param = torch.nn.Parameter(torch.linspace(-1, 1, 40))
        return param, HRNN([param], meta=META, state_format="compact", backend=backend)

    def steps(param, optimizer, begin, end):
        for step in range(begin, end):
            param.grad = torch.sin(torch.arange(40.0) * (step + 1))
            optimizer.step()

    param, optimizer = model_and_optimizer()
    steps(param, optimizer, 0, 20)
    other, resumed = model_and_optimizer()
    steps(other, resumed, 0, 10)
    later, again = model_and_optimizer()
    later.data.copy_(other.data)
    again.load_state_dict(resumed.state_dict())
    steps(later, again, 10, 20)
    assert torch.equal(later, param)


def test_copies_keep_the_format():
    _, optimizer = train("compact", BACKENDS[-1], 2, n=8)
    assert copy.deepcopy(optimizer).state_format == "compact"


def test_unknown_format_and_a_backend_without_it_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="state_format='int4' must be one of float32, compact"):
        HRNN([torch.zeros(1, requires_grad=True)], state_format="int4")
    monkeypatch.setattr(reference, "STATE_FORMATS", ("float32",))
    with pytest.raises(RuntimeError, match="it has no kernels for state_format='compact'"):
        backends.choose(torch.device("cpu"), META.config, "reference", "compact")


def test_initial_state_is_the_same_in_both_formats():
    param = torch.zeros(6)
    exact = init_state(param, META, math.log(1e-3))
    small = convert(init_state(param, META, math.log(1e-3), state_format="compact"), META, "float32")
    torch.testing.assert_close(small["hidden"], exact["hidden"], rtol=0, atol=0.5 / 32767 * 1.001)
    assert torch.equal(small["ms"], exact["ms"])
    assert torch.equal(small["accum"], exact["accum"])
    assert lopt.HRNN.state_format == "float32"
