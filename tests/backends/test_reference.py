"""The reference: its derivatives, its batches, and that its two forms are one rule."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torchgen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lopt import HRNN, HRNNConfig, MetaParams
from lopt.backends import reference
from lopt.backends.reference import FlatState, Segments
from lopt.state import SAMPLES, init_global, init_state, sampled

CONFIGS = {
    "paper": HRNNConfig(level_sizes=(3, 4, 2), timescales=3),
    "attention": HRNNConfig(level_sizes=(3, 4, 2), timescales=2, attention=True, zero_init_lr_weights=False),
    "tensor_mean_last": HRNNConfig(level_sizes=(3, 2, 2), timescales=2, relative_log_lr="tensor", global_input="last"),
    "damped": HRNNConfig(
        level_sizes=(3, 4),
        timescales=2,
        attention=True,
        zero_init_lr_weights=False,
        damping=0.8,
        damping_decay=0.5,
        log_lr_min_steps=2.0,
    ),
    "far": HRNNConfig(
        level_sizes=(2, 3, 2),
        attention=True,
        log_lr_min_distance=0.2,
        log_lr_min_distance_limit=0.5,
        log_lr_max_ratio=1.5,
    ),
    "everything_fed": HRNNConfig(
        level_sizes=(2, 3),
        timescales=2,
        extreme_indicator=True,
        lr_shortcut=True,
        multiple_scale_decays=True,
        gradient_shortcut=False,
        zero_init_lr_weights=False,
    ),
    "bare": HRNNConfig(
        level_sizes=(3,),
        timescales=1,
        gradient_products=False,
        log_ms_features=False,
        relative_log_lr=None,
        dynamic_output_scale=False,
        learnable_decay=False,
    ),
}
SIZES = [3, 1, 2]


def random_state(meta: MetaParams, batch: tuple[int, ...], generator: torch.Generator) -> FlatState:
    """A state from the middle of a run: every entry where the derivatives are smooth."""
    config, n, tensors = meta.config, sum(SIZES), len(SIZES)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*batch, *shape, generator=generator, dtype=torch.float64)

    dynamic = config.dynamic_output_scale
    log_lr = -7 + rand(n)
    return FlatState(
        hidden=2 * rand(config.hidden_size, n) - 1,
        accum=rand(config.timescales, n) - 0.5,
        ms=0.1 + rand(config.timescales, n),
        grad_decay=0.3 + 0.5 * rand(n),
        scale_decay=0.3 + 0.5 * rand(n),
        log_lr=log_lr if dynamic else None,
        log_lr_mean=Segments(SIZES).mean(log_lr) if dynamic else None,
        tensor_hidden=2 * rand(tensors, config.tensor_size) - 1 if config.levels >= 2 else None,
        global_hidden=2 * rand(config.global_size) - 1 if config.levels >= 3 else None,
        damping=rand(tensors, 3) if config.damping else None,
        step=(9 * rand(tensors)).round(),
        distance=rand(tensors, 1 + SAMPLES) if config.log_lr_min_distance else None,
    )


def flatten(result: tuple) -> tuple[torch.Tensor, ...]:
    param, attended, state = result
    return (param, attended, *(value for value in state if value is not None))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# A distance is taken as a constant.
@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if not config.log_lr_min_distance])
def test_derivatives_by_metaparams_gradient_and_state_pass_gradcheck(name, generator):
    config = CONFIGS[name]
    meta = MetaParams.init(config, seed=1, dtype=torch.float64)
    segments, names = Segments(SIZES), list(meta)
    state = random_state(meta, (2,), generator)
    present = [field for field in FlatState._fields if getattr(state, field) is not None]
    grad = torch.randn(2, sum(SIZES), generator=generator, dtype=torch.float64)
    param = torch.randn(2, sum(SIZES), generator=generator, dtype=torch.float64)

    def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = dict(zip(names, inputs, strict=False))
        rest = inputs[len(names) :]
        fields = state._replace(**dict(zip(present, rest[2:], strict=True)))
        return flatten(reference.step(values, config, segments, rest[0], rest[1], fields))

    inputs = [*meta.values(), param, grad, *(getattr(state, field) for field in present)]
    inputs = [value.detach().clone().requires_grad_() for value in inputs]
    assert torch.autograd.gradcheck(run, inputs, atol=1e-6, rtol=1e-4)


def test_second_derivatives_pass_gradgradcheck(generator):
    config = CONFIGS["attention"]
    meta = MetaParams.init(config, seed=1, dtype=torch.float64)
    segments = Segments(SIZES)
    state = random_state(meta, (), generator)
    weight = torch.randn(sum(SIZES), generator=generator, dtype=torch.float64)

    def run(grad: torch.Tensor, readout: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        values = {**meta, "direction.weight": readout}
        param, _, new = reference.step(values, config, segments, weight, grad, state._replace(hidden=hidden))
        return (param * weight).sum() + new.hidden.square().sum()

    grad = torch.randn(sum(SIZES), generator=generator, dtype=torch.float64, requires_grad=True)
    readout = meta["direction.weight"].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(run, (grad, readout, state.hidden.clone().requires_grad_()))


def test_log_lr_is_clipped_and_its_gradient_passes_the_clip(generator):
    config = HRNNConfig(level_sizes=(3, 4, 2), timescales=2, log_lr_min=-9.0, log_lr_max=-8.0)
    meta = MetaParams.init(config, dtype=torch.float64)
    segments, state = Segments(SIZES), random_state(MetaParams.init(config, dtype=torch.float64), (), generator)
    log_lr = state.log_lr.clone().requires_grad_()
    grad = torch.randn(sum(SIZES), generator=generator, dtype=torch.float64)
    _, _, new = reference.step(meta, config, segments, torch.zeros_like(grad), grad, state._replace(log_lr=log_lr))
    momentum = torch.sigmoid(meta["log_lr.momentum"])
    torch.testing.assert_close(new.log_lr, momentum * log_lr + (1 - momentum) * -8.0)
    (passed,) = torch.autograd.grad(new.log_lr.sum(), log_lr, retain_graph=True)
    torch.testing.assert_close(passed, torch.ones_like(passed))


def test_the_lower_bound_of_the_log_lr_follows_the_largest_distance_from_the_start():
    config = HRNNConfig(level_sizes=(3, 4, 2), log_lr_min=-3.0, log_lr_min_steps=4.0, log_lr_min_distance=0.5)
    meta = MetaParams.init(config, dtype=torch.float64)
    shape = (2, 3, 50)  # 300 parameters, of which the samples are every 9.4th
    n, places = math.prod(shape), [index * 300 // SAMPLES for index in range(SAMPLES)]

    def lowest(state: FlatState, **options: float) -> float:
        own = dataclasses.replace(config, **options)
        return reference.log_lr_bounds(own, state.step, state.distance, state.log_lr_mean)[0].item()

    np.testing.assert_array_equal(np.ravel_multi_index(tuple(sampled(shape).T), shape), places)
    segments = Segments([n])
    state = reference.init_flat_state(meta, config, segments, torch.full((n,), -1.0, dtype=torch.float64))
    assert lowest(state) == -3.0
    start = param = torch.zeros(n, dtype=torch.float64)
    grad, largest = torch.linspace(-2, 3, n, dtype=torch.float64), 0.0
    for step in range(30):
        param, _, state = reference.step(meta, config, segments, param, grad if step < 4 else -grad, state)
        away = (param - start)[places].square().mean().sqrt().item()
        largest = max(largest, away)
        assert state.distance[0, 0].item() == pytest.approx(largest)
        expected = max(-3.0 - math.log1p((step + 1) / 4) / 2, math.log(0.5 * largest) - math.log1p(step + 1) / 2)
        assert lowest(state) == pytest.approx(expected)
    assert away < largest and expected > -3.0 - math.log1p((step + 1) / 4) / 2
    far, near = (lowest(state, log_lr_min_distance_limit=share * largest) for share in (1.01, 0.99))
    assert far == expected and near == pytest.approx(expected + math.log(0.99))
    state = state._replace(log_lr=torch.full((n,), -20.0, dtype=torch.float64))  # below the bound
    new = reference.advance_flat(meta, config, segments, grad, state)
    momentum = torch.sigmoid(meta["log_lr.momentum"])
    torch.testing.assert_close(new.log_lr, (momentum * -20.0 + (1 - momentum) * expected).expand(n))


@pytest.mark.parametrize("ratio, lowest, highest", [(0.0, -8.0, 33.0), (2.0, -8.0, 2.0), (1.0, -1.0, 1.0)])
def test_no_log_lr_is_above_a_multiple_of_the_mean_of_its_tensor(ratio, lowest, highest):
    config = HRNNConfig(level_sizes=(3, 4, 2), log_lr_min=lowest, log_lr_max=highest, log_lr_max_ratio=ratio)
    meta = MetaParams.init(config, dtype=torch.float64)
    segments, momentum = Segments(SIZES), torch.sigmoid(meta["log_lr.momentum"])
    log_lr = torch.linspace(-6, 4, sum(SIZES), dtype=torch.float64)
    state = reference.init_flat_state(meta, config, segments, log_lr)
    means = segments.mean(log_lr)
    torch.testing.assert_close(state.log_lr_mean, means)
    bounds = reference.log_lr_bounds(config, state.step, state.distance, means)
    expected = [min(max(mean + math.log(ratio), lowest), highest) if ratio else highest for mean in means.tolist()]
    torch.testing.assert_close(bounds[1], torch.tensor(expected, dtype=torch.float64))
    new = reference.advance_flat(meta, config, segments, torch.zeros_like(log_lr), state)  # which changes no log lr
    clipped = torch.minimum(log_lr.clamp(min=lowest), segments.expand(bounds[1]))
    torch.testing.assert_close(new.log_lr, momentum * log_lr + (1 - momentum) * clipped)
    assert not ratio or (clipped < log_lr).any()


def test_the_lower_bound_of_the_log_lr_falls_with_the_root_of_the_steps(generator):
    config = HRNNConfig(level_sizes=(3, 4, 2), timescales=2, log_lr_min=-5.0, log_lr_min_steps=8.0)
    meta = MetaParams.init(config, dtype=torch.float64)
    segments, momentum = Segments(SIZES), torch.sigmoid(meta["log_lr.momentum"])
    log_lr = torch.full((sum(SIZES),), -20.0, dtype=torch.float64)  # below the bound
    state = reference.init_flat_state(meta, config, segments, log_lr)
    steps = torch.tensor([0.0, 24.0, 792.0], dtype=torch.float64)
    lowest = -5 - segments.expand(torch.tensor([1.0, 2.0, 10.0], dtype=torch.float64).log())
    grad = torch.randn(sum(SIZES), generator=generator, dtype=torch.float64)
    _, _, new = reference.step(meta, config, segments, torch.zeros_like(grad), grad, state._replace(step=steps))
    torch.testing.assert_close(new.log_lr, momentum * log_lr + (1 - momentum) * lowest)
    torch.testing.assert_close(new.step, steps + 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_batched_models_advance_as_each_would_alone(name, generator):
    config = CONFIGS[name]
    segments = Segments(SIZES)
    metas = [MetaParams.init(config, seed=seed, dtype=torch.float64) for seed in range(3)]
    stacked = {key: torch.stack([meta[key] for meta in metas]) for key in metas[0]}
    state = random_state(metas[0], (3,), generator)
    grad, param = torch.randn(2, 3, sum(SIZES), generator=generator, dtype=torch.float64)
    together = flatten(reference.step(stacked, config, segments, param, grad, state))
    shared = flatten(reference.step(metas[0], config, segments, param, grad, state))
    for row in range(3):
        own = FlatState(*(None if value is None else value[row] for value in state))
        alone = flatten(reference.step(metas[row], config, segments, param[row], grad[row], own))
        for left, right in zip(together, alone, strict=True):
            torch.testing.assert_close(left[row], right)
        alone = flatten(reference.step(metas[0], config, segments, param[row], grad[row], own))
        for left, right in zip(shared, alone, strict=True):
            torch.testing.assert_close(left[row], right)


@pytest.mark.parametrize("name", CONFIGS)
def test_stages_over_lists_equal_the_functional_step(name, generator):
    config = CONFIGS[name]
    meta = MetaParams.init(config, seed=4, dtype=torch.float64)
    shapes = [(3,), (), (2, 1)]
    params = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    states = [init_state(param, meta, -7.0, dtype=torch.float64) for param in params]
    global_hidden = init_global(meta, torch.device("cpu"), dtype=torch.float64)
    segments = Segments(SIZES)
    flat = torch.cat([param.reshape(-1) for param in params])
    flat_state = reference.init_flat_state(meta, config, segments, torch.full_like(flat, -7.0))
    columns, directions = reference.sums_columns(config), 1 + config.attention
    attended = flat

    def rows(key: str) -> list[torch.Tensor]:
        return [state[key] for state in states if key in state]

    for _ in range(5):
        grads = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        flat_grad = torch.cat([grad.reshape(-1) for grad in grads])
        flat, attended, flat_state = reference.step(meta, config, segments, flat, flat_grad, flat_state)
        update, attention_update = torch.empty(2, sum(SIZES), dtype=torch.float64)
        attention = attention_update if config.attention else None
        sums = torch.empty(3, columns.count, dtype=torch.float64)
        scale = torch.empty(3, directions, dtype=torch.float64)
        skip = torch.zeros(())
        reference.advance(
            meta,
            grads,
            rows("hidden"),
            rows("accum"),
            rows("ms"),
            rows("log_lr"),
            rows("step"),
            rows("tensor_hidden"),
            global_hidden,
            rows("log_lr_mean"),
            rows("damping"),
            rows("distance"),
            numel=SIZES,
            maximize=[False] * 3,
            grad_scale=None,
            skip=skip,
            update=update,
            attention_update=attention,
            sums=sums,
        )
        reference.summarise(
            meta,
            sums,
            rows("tensor_hidden"),
            global_hidden,
            rows("log_lr_mean"),
            rows("damping"),
            rows("distance"),
            rows("step"),
            numel=SIZES,
            update=update,
            places=segments.places if rows("distance") else None,
            lr=[1.0] * 3,
            skip=skip,
            scale=scale,
        )
        reference.apply(
            meta,
            params,
            rows("true_param"),
            update,
            attention,
            scale,
            rows("log_lr_mean"),
            lr=[1.0] * 3,
            weight_decay=[0.0] * 3,
            skip=skip,
        )
    torch.testing.assert_close(torch.cat([param.reshape(-1) for param in params]), attended)
    hidden = torch.cat([state.reshape(config.hidden_size, -1) for state in rows("hidden")], 1)
    torch.testing.assert_close(hidden, flat_state.hidden)
    if config.levels >= 3:
        torch.testing.assert_close(global_hidden, flat_state.global_hidden)
    if config.damping:
        torch.testing.assert_close(torch.stack(rows("damping")), flat_state.damping)


def test_damping_shortens_steps_and_slows_rising_rates_in_proportion_to_small_gradients(generator):
    config = HRNNConfig(level_sizes=(3, 4, 2), timescales=2, damping=0.5, damping_decay=0.9)
    meta = dict(MetaParams.init(config, dtype=torch.float64))
    meta["log_lr.bias"] = torch.tensor(0.3, dtype=torch.float64)  # every rate rises
    undamped = dataclasses.replace(config, damping=0.0)
    segments, param = Segments(SIZES), torch.zeros(sum(SIZES), dtype=torch.float64)
    state = reference.init_flat_state(meta, config, segments, torch.full_like(param, -7.0))
    grad, squares, weights = torch.randn(param.shape, generator=generator, dtype=torch.float64), [], []
    factor = torch.ones(3, dtype=torch.float64)
    for size in (1.0, 1.0, 0.01, 0.3, 3.0, 0.01):
        free = state._replace(damping=None)
        moved, _, new = reference.step(meta, config, segments, param, size * grad, state)
        whole, _, other = reference.step(meta, undamped, segments, param, size * grad, free)
        rise = segments.expand(factor) * (other.log_lr - state.log_lr)  # by the factor of the step before
        torch.testing.assert_close(new.log_lr, state.log_lr + rise)
        squares = [0.9 * value for value in squares] + [0.1 * segments.mean((size * grad).square())]
        weights = [0.9 * value for value in weights] + [0.1]
        average = sum(squares) / sum(weights)
        factor = (torch.sqrt(squares[-1] / 0.1 / average) / 0.5).clamp(max=1)
        torch.testing.assert_close(moved, segments.expand(factor) * whole)
        state = new
    assert factor.max() < 0.1


def test_damping_holds_a_tensor_that_has_no_gradient_and_bounds_the_largest():
    config = HRNNConfig(level_sizes=(3, 4, 2), timescales=2, damping=0.5)
    before = torch.tensor([[0.0, 0.0, 1.0], [2.0, 0.5, 1.0], [0.0, 0.0, 1.0]])
    after = reference.damp(config, before, torch.tensor([0.0, 0.0, math.inf]))
    assert after[:, 2].tolist() == [0.0, 0.0, 1.0]
    assert after.isfinite().all()


def test_a_timescale_without_a_past_takes_the_gradient_undecayed():
    config = HRNNConfig(timescales=2)
    segments = Segments([2, 2])
    grad = torch.full((4,), 2.0)
    ms = torch.tensor([[0.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    decay = torch.full((4,), 0.5)
    accum, new_ms, _ = reference.scaled_gradients(config, segments, grad, torch.zeros(2, 4), ms, decay, decay)
    square = accum.square() + config.ms_eps
    # First tensor, first timescale: nothing to decay. Second tensor: one value is enough of a past for both.
    torch.testing.assert_close(new_ms[0], torch.tensor([1.0, 1.0, 0.5, 0.5]) * square[0] + 0.5 * ms[0])
    torch.testing.assert_close(new_ms[1], 0.5 * square[1] + 0.5 * ms[1])


def test_segments_refuse_empty_tensors():
    with pytest.raises(ValueError, match="positive"):
        Segments([3, 0])


class Called(TorchDispatchMode):
    """Names of the operators that run, with their overloads, and the dtypes of what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if isinstance(func, torch._ops.OpOverload) and func.namespace == "aten":
            self.names.add(str(func).removeprefix("aten.").removesuffix(".default"))
        made = func(*args, **kwargs or {})
        self.dtypes |= {value.dtype for value in tree_leaves(made) if isinstance(value, torch.Tensor)}
        return made


@pytest.mark.parametrize(
    "options",
    [{}, {"meta": MetaParams.init(HRNNConfig(attention=True)), "maximize": True}, {"state_format": "compact"}],
)
def test_every_operator_of_a_step_is_there_on_apple_gpus(options):
    """The reference is what runs there; PyTorch's own table says which operators do."""
    yaml = pytest.importorskip("yaml")
    table = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    entries = {entry["func"].split("(")[0]: entry for entry in yaml.safe_load(table.read_text())}

    def there(name: str) -> bool:
        entry = entries[name]
        entry = entries[entry.get("structured_delegate", name)]
        keys = [key.strip() for keys in entry.get("dispatch", ["Composite"]) for key in keys.split(",")]
        return any(key == "MPS" or key.startswith("Composite") for key in keys)

    assert not there("take") and there("add.Tensor")  # the table is understood
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 5))
    optimizer = HRNN(model.parameters(), backend="reference", weight_decay=0.1, **options)
    with Called() as called:
        for _ in range(2):
            for param in model.parameters():
                param.grad = torch.ones_like(param)
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    assert len(called.names) > 30 and torch.float32 in called.dtypes and torch.float64 not in called.dtypes
    assert [name for name in called.names if not there(name)] == []
