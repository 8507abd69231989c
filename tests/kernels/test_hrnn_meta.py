"""The fused parameter level of meta-training against the reference: values, derivatives, memory, threads.

The C++ kernels on the CPU, Triton's on a GPU or, compiled for one, simulated (ptx/machine.py), and, in a process with
TRITON_INTERPRET=1 that test_hrnn.py starts, in its interpreter, where a step takes seconds: hence the few and small
cases there.
"""

import dataclasses
import itertools
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lopt import HRNNConfig, MetaParams, native
from lopt.backends import cpu, cpu_flat, flat, reference, triton, triton_flat
from lopt.backends.reference import FlatState, Segments
from lopt.meta.tasks import Random, networks, paper
from lopt.meta.unroll import Augment, Draw, Mix, Objective, World, choose_advance
from lopt.state import SAMPLES

INTERPRETED = triton.interpreted()
CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Target(NamedTuple):
    """Whose kernels are tested, and where."""

    module: ModuleType
    device: torch.device

    @property
    def advance(self):
        return self.module.advance_flat


IN_CPP = pytest.param(
    Target(cpu_flat, CPU),
    id="cpu",
    marks=pytest.mark.skipif(cpu.unusable() is not None, reason=str(cpu.unusable())),
)
ON_CPU = [pytest.param(Target(triton_flat, CPU), id="triton-interpreted") if INTERPRETED else IN_CPP]
ON_GPU, SIMULATED = (
    [pytest.param(Target(triton_flat, device), id=f"triton-{where}", marks=mark)] if not INTERPRETED else []
    for device, where, mark in ((GPU, "gpu", pytest.mark.gpu), (CPU, "simulated", pytest.mark.slow))
)
kernel_test = pytest.mark.parametrize("target", [*ON_CPU, *SIMULATED, *ON_GPU], indirect=True)
compiled_test = pytest.mark.parametrize("target", [*SIMULATED, *ON_GPU], indirect=True)
cpu_test = pytest.mark.parametrize("target", ON_CPU, indirect=True)
gpu_test = pytest.mark.parametrize("target", ON_GPU, indirect=True)
cpp_test = pytest.mark.parametrize("target", [] if INTERPRETED else [IN_CPP], indirect=True)


@pytest.fixture
def target(request, simulate) -> Target:
    if request.param == Target(triton_flat, CPU) and not INTERPRETED:
        simulate("triton")
    elif request.param.module is triton_flat and (reason := triton.unusable()):
        pytest.skip(reason)
    return request.param


CONFIGS = {
    "default": HRNNConfig(),
    "attention": HRNNConfig(level_sizes=(10, 5, 3), attention=True, relative_log_lr="tensor"),
    "bare": HRNNConfig(level_sizes=(10,), gradient_products=False, gradient_shortcut=False),
    "attention_without_shortcut": HRNNConfig(level_sizes=(10, 6), attention=True, gradient_shortcut=False),
    "damped": HRNNConfig(level_sizes=(10, 6), zero_init_lr_weights=False, damping=0.8, damping_decay=0.5),
    "falling_bound": HRNNConfig(zero_init_lr_weights=False, log_lr_min=-5.2, log_lr_min_steps=3.0),
    "bound_by_distance": HRNNConfig(
        zero_init_lr_weights=False, log_lr_min=-5.2, log_lr_min_distance=0.1, log_lr_max_ratio=1.2
    ),
    "fixed_decays": HRNNConfig(level_sizes=(10, 6), learnable_decay=False, learnable_grad_decay=False),
}
SIZES = {"tiny": [3, 1, 2], "mixed": [3, 50, 1, 7, 90], "one": [40], "large": [3000, 7, 5000, 1, 129, 9000]}
CASES = list(itertools.product(CONFIGS, ("tiny", "mixed", "one"), [(), (2,), (2, 2)]))
if INTERPRETED:
    CASES = [("falling_bound", "mixed", ()), ("attention", "tiny", (2,)), ("bare", "tiny", ())]


def make_meta(
    config: HRNNConfig,
    dtype: torch.dtype,
    batch: tuple[int, ...] = (),
    spread: float = 0.1,
    device: torch.device = CPU,
) -> dict[str, Tensor]:
    """Meta-parameters near their initial values, none of them zero."""
    generator = torch.Generator().manual_seed(1)
    noise = {
        name: torch.randn((*batch, *value.shape), generator=generator, dtype=torch.float64)
        for name, value in MetaParams.init(config, seed=1).items()
    }
    meta = MetaParams.init(config, seed=1, dtype=torch.float64)
    return {name: (meta[name] + spread * noise[name]).to(device, dtype).requires_grad_() for name in meta}


CONSTANT = ("step", "distance")  # nothing is differentiated by them


def make_state(
    config: HRNNConfig, segments: Segments, dtype: torch.dtype, batch: tuple[int, ...], device: torch.device = CPU
) -> tuple[Tensor, FlatState]:
    """A gradient and a state in the middle of a training run, all of which needs a gradient."""
    generator = torch.Generator().manual_seed(2)
    n, tensors, s = segments.total, len(segments), config.timescales

    def rand(*shape: int) -> Tensor:
        return torch.rand(*batch, *shape, generator=generator, dtype=torch.float64)

    log_lr = -6 + rand(n)
    state = FlatState(
        hidden=2 * rand(config.hidden_size, n) - 1,
        accum=rand(s, n) - 0.5,
        ms=0.1 + rand(s, n),
        grad_decay=0.3 + 0.5 * rand(n),
        scale_decay=0.3 + 0.5 * rand(n),
        log_lr=log_lr,
        log_lr_mean=Segments(segments.sizes).mean(log_lr),
        tensor_hidden=2 * rand(tensors, config.tensor_size) - 1 if config.levels > 1 else None,
        global_hidden=2 * rand(config.global_size) - 1 if config.levels > 2 else None,
        damping=rand(tensors, 3) if config.damping else None,
        step=(9 * rand(tensors)).round(),
        distance=0.2 * rand(tensors, 1 + SAMPLES) if config.log_lr_min_distance else None,
    )
    given = {
        name: value.to(device, dtype).requires_grad_(name not in CONSTANT)
        for name, value in state._asdict().items()
        if value is not None
    }
    return (rand(n) - 0.5).to(device, dtype), state._replace(**given)


def leaves(meta: dict[str, Tensor], state: FlatState) -> dict[str, Tensor]:
    return meta | {name: value for name, value in state._asdict().items() if value is not None and value.requires_grad}


def derivatives(advance, meta, config, segments, grad, state) -> dict[str, Tensor]:
    """All outputs and the derivative of a random combination of them by all leaves."""
    new = advance(meta, config, segments, grad, state)
    generator = torch.Generator().manual_seed(3)
    results = {f"new {name}": value for name, value in zip(new._fields, new, strict=True) if value is not None}
    loss = sum(
        (value * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)).sum()
        for value in results.values()
    )
    by = leaves(meta, state)
    slopes = torch.autograd.grad(loss, by.values(), allow_unused=True)
    return {name: value.detach() for name, value in results.items()} | {
        name: slope for name, slope in zip(by, slopes, strict=True) if slope is not None
    }


def distance(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.double().cpu(), theirs.double().cpu()
    return float((ours - theirs).norm() / (theirs.norm() + 1e-30))


@cpu_test
@pytest.mark.parametrize(("name", "sizes", "batch"), CASES, ids=str)
def test_one_step_agrees_with_the_reference_in_float64(target, name, sizes, batch, monkeypatch):
    monkeypatch.setattr(triton_flat, "PROGRAMS", 1)  # which then adds up several tiles, of several rows
    config, segments = CONFIGS[name], Segments(SIZES[sizes])
    meta = make_meta(config, torch.float64)
    inputs = make_state(config, segments, torch.float64, batch)
    theirs = derivatives(reference.advance_flat, meta, config, segments, *inputs)
    ours = derivatives(target.advance, meta, config, segments, *inputs)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert distance(ours[key], value) < 1e-12, key


@cpp_test
@pytest.mark.parametrize("name", ["default", "attention"])
def test_gradcheck_in_float64(target, name):
    config, segments = CONFIGS[name], Segments([2, 1])
    config = dataclasses.replace(config, level_sizes=(10, 2, 2))
    meta = make_meta(config, torch.float64)
    grad, state = make_state(config, segments, torch.float64, ())
    used = derivatives(reference.advance_flat, meta, config, segments, grad, state)
    by = {key: value for key, value in leaves(meta, state).items() if key in used}

    def advance(*values: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(by, values, strict=True))
        new = target.advance(
            {key: given.get(key, value) for key, value in meta.items()},
            config,
            segments,
            grad,
            FlatState(*(given.get(key, value) for key, value in zip(FlatState._fields, state, strict=True))),
        )
        return tuple(value for value in new if value is not None)

    assert torch.autograd.gradcheck(advance, tuple(by.values()), fast_mode=True, atol=1e-6)


def unroll(
    advance,
    config: HRNNConfig,
    dtype: torch.dtype,
    sizes: list[int],
    steps: int,
    batch: tuple[int, ...],
    device: torch.device = CPU,
) -> dict[str, Tensor]:
    """First-order meta-gradients of a quadratic bowl's loss over an unroll from the first step on."""
    segments = Segments(sizes, device)
    meta = make_meta(config, dtype, spread=0.02, device=device)
    generator = torch.Generator().manual_seed(4)
    theta = torch.randn(*batch, segments.total, generator=generator, dtype=torch.float64).to(device, dtype)
    log_lr = -5 + torch.rand(theta.shape, generator=generator, dtype=torch.float64)
    log_lr = log_lr.to(device, dtype).requires_grad_()
    state = reference.init_flat_state(meta, config, segments, log_lr)
    loss = torch.zeros((), dtype=dtype, device=device)
    for _ in range(steps):
        noise = torch.randn(theta.shape, generator=generator, dtype=torch.float64).to(device, dtype)
        grad = theta.detach() + 0.1 * noise
        new = advance(meta, config, segments, grad, state)
        higher = state.tensor_hidden, state.global_hidden, state.damping, state.distance
        sample = segments.sample(new.update)
        summary = reference.summarise_flat(meta, config, new.sums, segments.lengths, *higher, sample)
        theta = theta - segments.expand(summary.scale[..., 0]) * new.update
        loss = loss + theta.square().mean()
        state = state.after(new, flat.read_decays(meta, config, new.hidden), summary, segments)
    by = meta | {"log_lr": log_lr}
    slopes = torch.autograd.grad(loss, by.values(), allow_unused=True)
    return {name: slope for name, slope in zip(by, slopes, strict=True) if slope is not None}


@kernel_test
@pytest.mark.parametrize("batch", [()] if INTERPRETED else [(), (3,)], ids=str)
@pytest.mark.parametrize("name", ["default"] if INTERPRETED else CONFIGS)
def test_meta_gradients_of_an_unroll_agree_in_float32(target, name, batch):
    slow = target == Target(triton_flat, CPU)
    steps, sizes = (4, SIZES["mixed"][:3]) if slow else (20, SIZES["mixed"])
    exact = unroll(reference.advance_flat, CONFIGS[name], torch.float64, sizes, steps, batch)
    ours = unroll(target.advance, CONFIGS[name], torch.float32, sizes, steps, batch, target.device)
    assert ours.keys() == exact.keys()
    worst = {key: distance(ours[key], value) for key, value in exact.items()}
    all_ours, all_exact = (
        torch.cat([values[key].double().cpu().flatten() for key in exact]) for values in (ours, exact)
    )
    assert distance(all_ours, all_exact) < 1e-5, worst
    assert max(worst.values()) < 1e-4, worst


@cpp_test
@pytest.mark.parametrize("name", ["default", "attention"])
def test_float64_unroll_agrees(target, name):
    exact = unroll(reference.advance_flat, CONFIGS[name], torch.float64, SIZES["mixed"], 20, (2,))
    ours = unroll(target.advance, CONFIGS[name], torch.float64, SIZES["mixed"], 20, (2,))
    for key, value in exact.items():
        assert distance(ours[key], value) < 1e-10, key


@cpu_test
def test_the_clip_passes_gradients_as_if_it_were_not_there(target):
    config, segments = dataclasses.replace(CONFIGS["default"], log_lr_min=-5.625, log_lr_max=-5.375), Segments([30])
    meta = make_meta(config, torch.float64)
    inputs = make_state(config, segments, torch.float64, ())
    theirs = derivatives(reference.advance_flat, meta, config, segments, *inputs)
    ours = derivatives(target.advance, meta, config, segments, *inputs)
    for key, value in theirs.items():
        assert distance(ours[key], value) < 1e-12, key
    assert ours["log_lr.bias"] != 0


@kernel_test
def test_meta_parameters_of_their_own_for_each_row(target):
    config, segments = CONFIGS["default"], Segments(SIZES["tiny" if INTERPRETED else "mixed"], target.device)
    meta = make_meta(config, torch.float32, batch=(3,), device=target.device)
    meta = {name: value.detach() for name, value in meta.items()}
    grad, state = make_state(config, segments, torch.float32, (3,), target.device)
    with torch.no_grad():
        ours = target.advance(meta, config, segments, grad, state)
        theirs = reference.advance_flat(meta, config, segments, grad, state)
    for ours_, theirs_ in zip(ours, theirs, strict=True):
        if theirs_ is not None:
            assert distance(ours_, theirs_) < 2e-6


@cpu_test
def test_second_order_goes_to_the_reference(target):
    config, segments = CONFIGS["default"], Segments([5])
    meta = make_meta(config, torch.float64)
    grad, state = make_state(config, segments, torch.float64, ())
    grad.requires_grad_()
    new = target.advance(meta, config, segments, grad, state)
    (slope,) = torch.autograd.grad(new.update.sum(), grad, create_graph=True)
    assert slope.requires_grad


@cpu_test
def test_mean_squares_without_a_past(target):
    config, segments = CONFIGS["default"], Segments([20, 20])
    meta = make_meta(config, torch.float64)
    grad, state = make_state(config, segments, torch.float64, ())
    ms = state.ms.detach().clone()
    ms[:2, :20] = 0
    state = state._replace(ms=ms.requires_grad_())
    theirs = derivatives(reference.advance_flat, meta, config, segments, grad, state)
    ours = derivatives(target.advance, meta, config, segments, grad, state)
    for key, value in theirs.items():
        assert distance(ours[key], value) < 1e-12, key


@kernel_test
def test_what_a_step_keeps_for_its_derivative(target):
    config, n, steps = CONFIGS["default"], 100 if INTERPRETED else 4000, 3
    segments = Segments([n], target.device)
    meta = make_meta(config, torch.float32, device=target.device)
    grad, state = make_state(config, segments, torch.float32, (), target.device)
    state = state.detach()
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape[-1:] == (n,):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    kept, alive = [], []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for _ in range(steps):
            new = target.advance(meta, config, segments, grad.clone(), state)
            alive.append(new)
            grad_decay, scale_decay = flat.read_decays(meta, config, new.hidden)
            state = state._replace(
                hidden=new.hidden,
                accum=new.accum,
                ms=new.ms,
                log_lr=new.log_lr,
                grad_decay=grad_decay,
                scale_decay=scale_decay,
            )
            kept.append(sum(storages.values()) / n)
    # The new hidden state is kept by the next step too. The first step's decays were given, not read out.
    assert kept[0] <= 40 + 88
    assert kept[1] - kept[0] <= 80
    assert kept[2] - kept[1] <= 80


@cpp_test
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_number_of_threads_changes_nothing(target, dtype, monkeypatch):
    config, segments = CONFIGS["default"], Segments([3000, 7, 5000, 1, 9000])
    meta = make_meta(config, dtype)
    inputs = make_state(config, segments, dtype, (2,))
    results = []
    for count in (1, 2, 3):
        # Of the kernels alone: on some machines PyTorch's own products around them depend on their threads.
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        results.append(derivatives(target.advance, meta, config, segments, *inputs))
    for key, value in results[0].items():
        assert all(torch.equal(value, other[key]) for other in results[1:]), key


@cpp_test
@pytest.mark.parametrize("isa", native.load().compiled()["isas"] if native.absent() is None else [])
def test_every_instruction_set(target, isa):
    config, segments = CONFIGS["attention"], Segments(SIZES["mixed"])
    meta = make_meta(config, torch.float64)
    inputs = make_state(config, segments, torch.float64, (2,))
    theirs = derivatives(reference.advance_flat, meta, config, segments, *inputs)
    single = {name: value.detach().float().requires_grad_() for name, value in meta.items()}
    grad, state = make_state(config, segments, torch.float32, (2,))
    try:
        native.load().use_isa(isa)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        ours = derivatives(target.advance, single, config, segments, grad, state)
    finally:
        native.load().use_isa("")
    for key, value in theirs.items():
        assert distance(ours[key], value) < 2e-5, key


@kernel_test
def test_meta_training_uses_it(target):
    assert choose_advance(CPU) is cpu_flat.advance_flat
    assert choose_advance(GPU) is triton_flat.advance_flat
    gradients = []
    for advance in (target.advance, reference.advance_flat):
        meta = make_meta(CONFIGS["default"], torch.float32, spread=0.02, device=target.device)
        mix = Mix([paper.Quadratic(3), networks.Linear(4, 3)], CONFIGS["default"], target.device)
        assert mix.advance is choose_advance(target.device)
        mix.advance = advance
        random = Random(torch.Generator(target.device).manual_seed(0), repeat=1)
        world = World(mix, 1 if INTERPRETED else 2, random, Draw(1000), Augment(), Objective())
        world.restart(meta)
        world.unroll(meta, 1 if INTERPRETED else 3, derivatives=0)
        value = world.unroll(meta, 2 if INTERPRETED else 10, derivatives=1)
        slopes = torch.autograd.grad(value.sum(), meta.values(), allow_unused=True)
        gradients.append(torch.cat([slope.flatten() for slope in slopes if slope is not None]))
    assert distance(*gradients) < 1e-4  # both are rounded


@compiled_test
@pytest.mark.parametrize("batch", [(), (70,)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_one_step_agrees_with_the_reference_in_float32(target, name, batch):
    """In float32, whose rounding moves the derivatives by up to 1e-5 of themselves; 1e-4 where terms cancel.

    With damping a rise may round away, and its derivative with it: that of one in ten thousand values of many rows.
    """
    if target.device == CPU:
        batch = (3,) if batch else ()
    config, segments = CONFIGS[name], Segments(SIZES["mixed" if target.device == CPU else "large"], target.device)
    results = []
    for advance, dtype in ((target.advance, torch.float32), (reference.advance_flat, torch.float64)):
        meta = make_meta(config, dtype, device=target.device)
        results.append(
            derivatives(advance, meta, config, segments, *make_state(config, segments, dtype, batch, target.device))
        )
    ours, exact = results
    assert ours.keys() == exact.keys()
    worst = {key: distance(ours[key], value) for key, value in exact.items()}
    most, usual = (5e-3, 1e-5) if config.damping else (1e-4, 2e-6)
    assert max(worst.values()) < most, worst
    assert sorted(worst.values())[len(worst) // 2] < usual, worst


@compiled_test
def test_two_derivatives_are_bitwise_equal(target):
    sizes, rows = ("mixed", 2) if target.device == CPU else ("large", 40)
    arguments = CONFIGS["attention"], torch.float32, SIZES[sizes], 3, (rows,), target.device
    runs = [unroll(target.advance, *arguments) for _ in "ab"]
    assert all(torch.equal(value, runs[1][key]) for key, value in runs[0].items())
