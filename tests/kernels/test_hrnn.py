"""The GPU kernels, CUDA's and Triton's, against the reference: on a GPU at all sizes, on the CPU at small ones.

On the CPU the CUDA kernels are emulated, and Triton's run in its interpreter; what both are compiled to for a GPU is
simulated, see ptx/machine.py. Whether Triton interprets is decided when it is imported, so the whole file runs once
more in a process of its own with TRITON_INTERPRET=1, which tests these kernels alone, and so does test_hrnn_meta.py.
Bounds are parts of the largest value. In float32 both sides round: one step differs by 2e-6 (measured, largest of all
configurations and quantities below); hence 1e-5.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lopt
from lopt import HRNNConfig, MetaParams, backends, compact, native
from lopt.backends import coverage, cuda, gpu, reference, triton
from lopt.interop import tf1
from lopt.state import SAMPLES, init_global, init_state

from .ptx import launch

INTERPRETED = triton.interpreted()
CPU, GPU = torch.device("cpu"), torch.device("cuda")
RECORDINGS = Path(__file__).parents[1] / "recordings"
AGREE = 1e-5

CONFIGS = {
    "paper": HRNNConfig(),
    "attention_last": HRNNConfig(attention=True, zero_init_lr_weights=False, global_input="last", damping=0.5),
    "bare": HRNNConfig(
        level_sizes=(10, 7),
        gradient_products=False,
        gradient_shortcut=False,
        relative_log_lr="tensor",
        log_lr_max_ratio=1.01,
    ),
    "damped": HRNNConfig(level_sizes=(10, 7), damping=0.9, damping_decay=0.8, log_lr_min=-6.0, log_lr_min_steps=2.0),
    "distance": HRNNConfig(
        attention=True,
        log_lr_min=-6.0,
        log_lr_min_steps=2.0,
        log_lr_min_distance=0.1,
        log_lr_min_distance_limit=0.02,
        log_lr_max_ratio=1.01,
    ),
    "distance_alone": HRNNConfig(level_sizes=(10,), log_lr_min=-6.0, log_lr_min_distance=0.1),
    "one_level": HRNNConfig(level_sizes=(10,), learnable_decay=False),
    "wide": HRNNConfig(level_sizes=(10, 33, 70), learnable_grad_decay=False),
}


class Target(NamedTuple):
    """Whose kernels are tested, and where.

    Attributes:
        compiled: for a GPU: powers, logarithms, quotients and roots are good to 2^-22.
    """

    name: str
    module: ModuleType
    device: torch.device
    compiled: bool


CUDA_ON_CPU = pytest.param(
    (cuda, CPU, False),
    id="cuda-emulated",
    marks=pytest.mark.skipif(native.absent() is not None, reason=str(native.absent())),
)
ON_CPU = [pytest.param((triton, CPU, False), id="triton-interpreted") if INTERPRETED else CUDA_ON_CPU]
ON_GPU, SIMULATED = (
    [
        pytest.param((module, device, True), id=f"{module.__name__.rpartition('.')[2]}-{where}", marks=mark)
        for module in ((cuda, triton) if not INTERPRETED else ())
    ]
    for device, where, mark in ((GPU, "gpu", pytest.mark.gpu), (CPU, "simulated", pytest.mark.slow))
)
kernel_test = pytest.mark.parametrize("target", [*ON_CPU, *SIMULATED, *ON_GPU], indirect=True)
cpu_test = pytest.mark.parametrize("target", [*ON_CPU, *SIMULATED], indirect=True)
compiled_test = pytest.mark.parametrize("target", [*SIMULATED, *ON_GPU], indirect=True)
simulated_test = pytest.mark.parametrize("target", SIMULATED, indirect=True)
gpu_test = pytest.mark.parametrize("target", ON_GPU, indirect=True)


@pytest.fixture
def target(request, emulate_cuda, simulate) -> Target:
    module, device, compiled = request.param
    name = module.__name__.rpartition(".")[2]
    if compiled and device == CPU:
        simulate(name)
    elif (module, device) == (cuda, CPU):
        emulate_cuda()
    elif reason := backends.unusable(name):
        pytest.skip(reason)
    return Target(name, module, device, compiled)


def version(module: str) -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version(module).split(".")[:2])


TRITON = triton.ABSENT is None
OLD = TRITON and version("triton") < (3, 7) and version("numpy") >= (2, 4)  # loops need int(np.array([1]))


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
@pytest.mark.skipif(not TRITON, reason=str(triton.ABSENT))
@pytest.mark.skipif(OLD, reason="the interpreter of triton before 3.7 does not work with numpy 2.4 or later")
@pytest.mark.slow
@pytest.mark.parametrize("file", ["test_hrnn.py", "test_hrnn_meta.py"])
def test_kernels_agree_with_the_reference_in_the_interpreter(file):
    path = str(Path(__file__).with_name(file))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", path]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


class Stages:
    """A model without gradients of its own, stepped by the three stages of a backend."""

    def __init__(self, backend: ModuleType, meta: MetaParams, shapes: list, device: torch.device, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(0)
        self.backend, self.meta, self.config = backend, meta.to(dtype=dtype, device=device), meta.config
        params = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        self.params = [param.to(device=device, dtype=dtype) for param in params]
        self.states = [init_state(param, self.meta, -6.0, dtype=dtype) for param in self.params]
        self.global_hidden = init_global(self.meta, device, dtype=dtype)
        self.numel = [param.numel() for param in self.params]
        columns, directions = reference.sums_columns(self.config).count, 1 + self.config.attention
        self.updates = torch.zeros(directions, sum(self.numel), device=device, dtype=dtype)
        self.update, self.attention_update = self.updates[0], self.updates[1] if self.config.attention else None
        self.sums = torch.zeros(len(shapes), columns, device=device, dtype=dtype)
        self.scale = torch.zeros(len(shapes), directions, device=device, dtype=dtype)
        self.skip = torch.zeros((), device=device)
        self.steps = 0

    def start_amid_a_run(self) -> None:
        """Set every state but the last tensor's to one that a run could have come to."""
        generator = torch.Generator().manual_seed(2)

        def set_(tensor: Tensor, low: float, high: float) -> None:
            tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator, dtype=torch.float64))

        ranges = {
            "hidden": (-1, 1),
            "accum": (-1, 1),
            "ms": (0.01, 1),
            "log_lr": (-9, -3),
            "tensor_hidden": (-1, 1),
            "log_lr_mean": (-7, -6),
            "damping": (0.1, 0.9),
            "distance": (0, 0.3),
            "step": (1, 9),
        }
        for state in self.states[:-1]:
            for name in ranges:
                if name in state:
                    set_(state[name], *ranges[name])
        set_(self.global_hidden, -1, 1)

    def rows(self, name: str) -> list[Tensor]:
        return [state[name] for state in self.states if name in state]

    def step(self, grads: list[Tensor], cast: bool = True) -> None:
        like, self.steps = self.updates, self.steps + 1
        lr: list[float | Tensor] = [1.0] * len(grads)
        lr[1::3] = [0.3 / self.steps] * len(lr[1::3])
        lr[2::3] = [torch.tensor(0.2 * self.steps, device=like.device)] * len(lr[2::3])
        self.backend.advance(
            self.meta,
            [grad.to(like) if cast else grad for grad in grads],
            *map(self.rows, ("hidden", "accum", "ms", "log_lr", "step")),
            self.rows("tensor_hidden"),
            self.global_hidden,
            self.rows("log_lr_mean"),
            self.rows("damping"),
            self.rows("distance"),
            numel=self.numel,
            maximize=[False] * len(grads),
            grad_scale=None,
            skip=self.skip,
            update=self.update,
            attention_update=self.attention_update,
            sums=self.sums,
        )
        self.backend.summarise(
            self.meta,
            self.sums,
            self.rows("tensor_hidden"),
            self.global_hidden,
            self.rows("log_lr_mean"),
            self.rows("damping"),
            self.rows("distance"),
            self.rows("step"),
            numel=self.numel,
            update=self.update,
            places=reference.Segments(self.numel, self.update.device).places if self.rows("distance") else None,
            lr=lr,
            skip=self.skip,
            scale=self.scale,
        )
        self.backend.apply(
            self.meta,
            self.params,
            self.rows("true_param"),
            self.update,
            self.attention_update,
            self.scale,
            self.rows("log_lr_mean"),
            lr=lr,
            weight_decay=[0.1] * len(grads),
            skip=self.skip,
        )

    def values(self) -> dict[str, Tensor]:
        """Everything a step writes; what there is one of per tensor, of all tensors in one."""
        values = {"updates": self.updates, "sums": self.sums, "scale": self.scale, "global_hidden": self.global_hidden}
        values["params"] = torch.cat([param.reshape(-1) for param in self.params])
        for name in self.states[0]:
            values[name] = torch.cat([row.reshape(-1) for row in self.rows(name)])
        return {name: value.double().cpu() for name, value in values.items() if value.numel()}


def gradients(shapes: list, steps: int) -> list[list[Tensor]]:
    """Gradients of very different sizes, float64; every third step some are exactly zero."""
    generator = torch.Generator().manual_seed(1)

    def scale(t: int, index: int) -> float:
        return 0.0 if t % 3 == 2 and index % 2 == 0 else 10.0 ** (index % 8 - 4)

    return [
        [
            torch.randn(shape, generator=generator, dtype=torch.float64) * scale(t, index)
            for index, shape in enumerate(shapes)
        ]
        for t in range(steps)
    ]


def error(value: Tensor, right: Tensor) -> float:
    """Largest difference as a part of the largest value; inf if either is not finite."""
    worst = (value - right).abs().max() / right.abs().max().clamp(min=1e-30)
    return float(worst) if worst.isfinite() else float("inf")


@kernel_test
@pytest.mark.parametrize("name", CONFIGS)
def test_stages_agree_with_the_reference(target, name):
    shapes = [(3, 100), (7,), ()] if name == "paper" else [(7,), (2, 3)]
    meta = MetaParams.init(CONFIGS[name], seed=3)
    assert target.module.unsupported(meta.config) is None
    ours, right = (
        Stages(backend, meta, shapes, target.device, torch.float32) for backend in (target.module, reference)
    )
    for run in (ours, right):
        run.start_amid_a_run()
        run.step(gradients(shapes, 1)[0])
    expected = right.values()
    for key, value in ours.values().items():
        assert error(value, expected[key]) < AGREE, key


@kernel_test
def test_dtypes_groups_and_tensor_lr_agree_with_the_reference(target):
    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    starts = [torch.randn(4, 3, generator=generator) for _ in dtypes]
    grads = [torch.randn(4, 3, generator=generator) for _ in dtypes]
    results = []
    for backend in (target.name, "reference"):
        copies = [start.to(target.device, dtype, copy=True) for start, dtype in zip(starts, dtypes, strict=True)]
        params = [torch.nn.Parameter(copy) for copy in copies]
        groups = [
            {"params": params[:2], "lr": torch.tensor(0.7, device=target.device, dtype=torch.float64)},
            {"params": params[2:], "weight_decay": 0.3, "maximize": True, "lr": 0.5},
        ]
        optimizer = lopt.HRNN(groups, meta=MetaParams.init(seed=3), init_lr=0.1, backend=backend)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.t().contiguous().t().to(target.device, param.dtype)  # lies otherwise than the parameter
        optimizer.step()
        results.append(params)
    for start, ours, right in zip(starts, *results, strict=True):
        assert not torch.equal(right.detach().cpu().double(), start.double())
        eps = max(torch.finfo(right.dtype).eps, 1e-6)
        torch.testing.assert_close(ours, right, rtol=eps, atol=eps)


def state_of(optimizer: lopt.HRNN) -> list[Tensor]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [value.clone() for param in params for value in (param.detach(), *optimizer.state[param].values())]


@kernel_test
def test_a_step_with_an_overflow_changes_nothing(target):
    params = [torch.nn.Parameter(torch.ones(n, device=target.device)) for n in (3, 2)]
    optimizer = lopt.HRNN(params, meta=MetaParams.init(seed=3), backend=target.name)

    def step(*grads: list[float]) -> None:
        for param, grad in zip(params, grads, strict=True):
            param.grad = torch.tensor(grad, device=target.device)
        optimizer.step()

    step([1.0, -2.0, 3.0], [1.0, 1.0])
    before = state_of(optimizer)
    for poison in ("nan", "-inf", "1e19"):
        step([1.0, float(poison), 3.0], [1.0, 1.0])
    step([float("nan")] * 3, [float("nan")] * 2)
    optimizer.found_inf = torch.ones((), device=target.device)
    step([1.0] * 3, [1.0] * 2)
    assert all(torch.equal(left, right) for left, right in zip(before, state_of(optimizer), strict=True))
    assert optimizer.skipped_steps == 5


@kernel_test
def test_scaled_gradients_take_the_same_step(target):
    results = []
    for factor in (1.0, 1024.0):
        param = torch.nn.Parameter(torch.ones(3, device=target.device))
        optimizer = lopt.HRNN([param], meta=MetaParams.init(seed=3), backend=target.name)
        param.grad = torch.tensor([1.0, -2.0, 3.0], device=target.device) * factor
        optimizer.grad_scale, optimizer.found_inf = (
            torch.full((), value, device=target.device) for value in (factor, 0.0)
        )
        optimizer.step()
        results.append(param)
    assert torch.equal(*results)


@kernel_test
def test_a_timescale_without_a_past_takes_the_gradient_undecayed(target):
    meta, shapes = MetaParams.init(HRNNConfig(level_sizes=(10,)), seed=3), [(300,)]
    ours, right = (
        Stages(backend, meta, shapes, target.device, torch.float32) for backend in (target.module, reference)
    )
    for run in (ours, right):
        for state in run.states:
            state["step"].fill_(1)
            state["ms"][2:] = 1e-3
            state["ms"][1, 299] = 1e-3  # one value, behind the first that are looked at, is enough of a past
        run.step(gradients(shapes, 1)[0])
    for key, value in ours.values().items():
        assert error(value, right.values()[key]) < AGREE, key


def gru_of_halves(config: HRNNConfig, halves: Tensor) -> Callable[..., Tensor]:
    """`reference.gru` with inputs of its products rounded to float16 for the parameters of the mask `halves`, [n]."""
    full = reference.gru
    relative = slice(*(config.features.index(name) for name in ("log_ms_1", "relative_log_lr")))

    def rounded(x: Tensor) -> Tensor:
        return torch.where(halves, x.half().to(x), x)

    def gru(meta, name, x, h, injected, *, columns):
        if name != "level0":
            return full(meta, name, x, h, injected, columns=columns)
        log_ms = rounded(x[relative] - x[relative][-1])  # as the kernels have them; reference: to their mean
        x = torch.cat([rounded(x[: relative.start]), log_ms - log_ms.mean(0), rounded(x[relative.stop :])])

        def affine(part, state):
            weight, bias = meta[f"level0.{part}.weight"], meta[f"level0.{part}.bias"]
            return weight.mT @ torch.cat([x, rounded(state)]) + bias[:, None]

        reset, update, above = injected.chunk(3)
        reset, update = torch.sigmoid(affine("gates", h) + torch.cat([reset, update])).chunk(2)
        return update * h + (1 - update) * torch.tanh(affine("candidate", reset * h) + above)

    return gru


@kernel_test
@pytest.mark.parametrize(
    "config",
    [HRNNConfig(), HRNNConfig(attention=True, zero_init_lr_weights=False, ms_eps=0.0), CONFIGS["bare"]],
    ids=["paper", "attention_without_eps", "bare"],
)
@pytest.mark.parametrize("beyond", [False, True], ids=["", "bias_beyond_float16"])
def test_compact_state_has_the_codes_of_the_reference(target, config, beyond, monkeypatch):
    """Where rounding of the float32 in between moves a number across a boundary, a code may be a few further.

    CUDA's kernel multiplies in float16 where parameters fill warps and all weights are in its range. There a number may
    be rounded to the next float16: 2^-10 of it, 16 codes of what the slopes of the gates, at most 1/2, leave of that.
    """
    meta, sizes = MetaParams.init(config, seed=3), (37,) if INTERPRETED else (1, 37, 516, 1300)
    furthest = 8 if target.compiled else 4  # a GPU's powers, logarithms and quotients are good to 2^-22
    if beyond:
        if target.module is not cuda:
            pytest.skip("only CUDA's kernel multiplies in float16")
        meta["level0.gates.bias"][10] = 1e5
    elif target.module is cuda:
        warp, furthest = 32 * cuda._layout()["pack"], 16
        halves = [torch.arange(n) < (n // warp * warp if n % 4 == 0 else 0) for n in (*sizes, 5)]
        monkeypatch.setattr(reference, "gru", gru_of_halves(config, torch.cat(halves).to(target.device)))
    results = []
    for backend in ("reference", target.name):
        params = [torch.nn.Parameter(torch.zeros(n, device=target.device)) for n in (*sizes, 5)]
        optimizer = lopt.HRNN(params, meta=meta, state_format="compact", backend=backend)
        generator = torch.Generator().manual_seed(0)
        for step in range(2 if INTERPRETED else 4):
            for param in params:
                param.grad = (torch.randn(param.shape, generator=generator) * 1e-2).to(target.device)
            if step == 0:
                params[-1].grad.zero_()
            optimizer.step()
            if step == 0 and config.ms_eps == 0:  # its mean squares have no past yet
                assert torch.all(optimizer.state[params[-1]]["ms"] == compact.MS_ZERO)
        states = [optimizer.state[param] for param in params]
        results.append({name: torch.cat([state[name].flatten() for state in states]).cpu() for name in states[0]})
    right, ours = results
    for name in ("hidden", "ms"):
        assert ours[name].dtype == torch.int16
        difference = (ours[name].int() - right[name].int()).abs()
        assert difference.max() <= (furthest if name == "hidden" else 4), name
        assert (difference > 0).float().mean() <= 0.05, name
    # 16 codes of a hidden state move what an average forgets by up to 16 / 32767 of what there is of it.
    atol = 1e-6 if furthest == 4 else 4e-3
    torch.testing.assert_close(ours["accum"].float(), right["accum"].float(), rtol=8e-3, atol=atol)
    torch.testing.assert_close(ours["log_lr"], right["log_lr"], rtol=1e-6, atol=1e-6)


@kernel_test
def test_updates_with_compact_state_stay_within_two_thousandths_of_those_with_float32_state(target):
    if INTERPRETED:
        pytest.skip("takes the interpreter minutes")
    size, steps = (4100, 200) if target.device == GPU else (260, 50)  # fills warps, and a rest
    moved = []
    for state_format in ("float32", "compact"):
        param = torch.nn.Parameter(torch.zeros(size, device=target.device))
        optimizer = lopt.HRNN([param], meta=MetaParams.init(seed=3), state_format=state_format, backend=target.name)
        generator = torch.Generator().manual_seed(3)
        scale = 10 ** (torch.rand(size, generator=generator) * 6 - 3)
        updates = []
        for _ in range(steps):
            before = param.detach().double()
            param.grad = ((torch.randn(size, generator=generator) + 0.3) * scale).to(target.device)
            optimizer.step()
            updates.append((param.detach().double() - before) / optimizer.state[param]["log_lr"].double().exp())
        moved.append(torch.stack(updates))
    error = ((moved[1] - moved[0]).square().mean() / moved[0].square().mean()).sqrt()
    assert 1e-5 < error <= 2e-3  # not compact, if it is less


@cpu_test
@pytest.mark.parametrize("name", ["traj_b_attention", "traj_s_class_defaults"])
def test_replayed_trajectory_equals_the_recording(target, name, tmp_path):
    recording = tf1.load_recording(RECORDINGS / f"{name}.npz")
    steps = 2
    outcomes = ("param/", "attend/", "grads/", "state/")
    short = {
        key: array[:steps] if key.startswith(outcomes) or key == "global" else array for key, array in recording.items()
    }
    short["T"] = np.array(steps)
    np.savez(tmp_path / "short.npz", **short)
    errors = tf1.compare(short, tf1.replay(tmp_path / "short.npz", target.name))
    assert max(errors.values()) <= tf1.TOLERANCE, errors


@pytest.mark.parametrize(
    "options",
    [
        {"level_sizes": (9, 20, 20)},
        {"timescales": 3},
        {"log_ms_features": False},
        {"relative_log_lr": None},
        {"multiple_scale_decays": True},
        {"lr_shortcut": True},
        {"extreme_indicator": True},
        {"level_sizes": (10, 2000)},
    ],
)
def test_a_configuration_without_kernels_is_refused_by_name(options):
    assert next(iter(options)) in coverage.unsupported(HRNNConfig(**options), triton.LARGEST_LEVEL)
    assert triton.unsupported(HRNNConfig(**options)) is not None


@pytest.mark.skipif(INTERPRETED or native.absent() is not None, reason="there is nothing to choose between")
def test_cuda_tensors_take_cuda_then_triton_then_the_reference(monkeypatch):
    monkeypatch.setattr(cuda, "unusable", lambda: None)
    monkeypatch.setattr(triton, "unusable", lambda: None)
    assert backends.choose(GPU, HRNNConfig()) is cuda
    assert backends.choose(GPU, HRNNConfig(), "triton") is triton
    assert backends.choose(GPU, HRNNConfig(timescales=3)) is reference
    monkeypatch.setattr(cuda, "unusable", lambda: "no nvcc at install")
    assert backends.choose(GPU, HRNNConfig()) is triton
    with pytest.raises(RuntimeError, match="'cuda' cannot be used: no nvcc at install"):
        backends.choose(GPU, HRNNConfig(), "cuda")


def test_triton_that_is_too_old_or_cannot_compile_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    for found, reason in (("3.3.1", "triton 3.3.1 is older than 3.6"), ("3.6.0", None), ("3.10.0+git1234", None)):
        monkeypatch.setattr(triton.importlib.metadata, "version", lambda _, found=found: found)
        monkeypatch.setattr(triton, "ABSENT", triton._absent())
        assert (triton.unusable() or "").startswith(reason or "") and (triton.unusable() is None) == (reason is None)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert "gcc or clang" in triton.unusable()
    monkeypatch.setenv("CC", "/opt/cc")
    assert triton.unusable() is None


@pytest.mark.skipif(native.absent() is not None or "cuda" not in native.left_out(), reason="CUDA kernels were built")
def test_cuda_kernels_that_were_left_out_say_why_and_the_cure():
    assert "Reinstall lopt with" in (cuda.unusable() or "")


@pytest.mark.parametrize(
    ("archs", "least"),
    [("80,90,100,120", (8, 0)), ("90", (9, 0)), ("120;89", (8, 9)), ("100a", (10, 0)), ("75", (8, 0)), ("all", (8, 0))],
)
def test_cuda_kernels_run_from_the_least_capability_on_that_they_were_compiled_for(archs, least):
    assert cuda.least_capability(archs) == least


def test_neither_interpretation_nor_emulation_is_chosen_unasked():
    assert backends.choose(CPU, HRNNConfig()).__name__ not in (triton.__name__, cuda.__name__)
    for name in ("cuda",) if INTERPRETED else ("cuda", "triton"):
        with pytest.raises(RuntimeError, match=f"'{name}' cannot be used"):
            backends.choose(CPU, HRNNConfig(), name)


@pytest.mark.skipif(native.absent() is not None, reason=str(native.absent()))
def test_the_cuda_kernels_have_the_tables_that_are_sent_to_them():
    layout = native.load().gpu_layout()
    assert layout["samples"] == SAMPLES
    for name, columns in (("advance", gpu.AdvanceColumn), ("summary", gpu.SummaryColumn), ("apply", gpu.ApplyColumn)):
        assert layout[name] == [column.name for column in columns]
    assert layout["partials"] == gpu.PARTIALS


def test_a_table_is_sent_again_only_where_it_changed():
    table = gpu.Table(2, 3, CPU)
    first = table.follow({0: [1, 2, 3], 1: [4, 5, 6]})
    assert first.tolist() == [[1, 2, 3], [4, 5, 6]]
    first.fill_(-1)  # a second sending would overwrite it
    assert table.follow({0: [1, 2, 3]}).tolist() == [[-1] * 3] * 2
    assert table.follow({1: [4, 5, 7]}).tolist() == [[1, 2, 3], [4, 5, 7]]


def test_chunks_cover_every_parameter_once_and_are_whole_tiles_of_16_bytes():
    numels = [1, 511, 512, 513, 100_003, 40_000_000]
    sizes = (cuda if native.absent() is None else triton).Stages().chunk_sizes(numels)
    chunks = gpu.Chunks(numels, sizes, CPU)
    assert all(size % 4 == 0 for size in sizes)
    assert torch.bincount(chunks.of).tolist() == chunks.counts
    for n, size, count in zip(numels, sizes, chunks.counts, strict=True):
        assert (count - 1) * size < n <= count * size
    assert chunks.offsets == [0, *torch.tensor(numels).cumsum(0).tolist()[:-1]]


@cpu_test
def test_sums_over_several_chunks_and_unaligned_tensors_agree_with_the_reference(target):
    if INTERPRETED:
        pytest.skip("takes the interpreter minutes")
    # The second tensor's part of the flat updates begins at an odd index, and its gradient at no multiple of 16 bytes.
    meta, shapes = MetaParams.init(CONFIGS["attention_last"], seed=3), [(5001,), (20_000,), (2052,)]
    ours, right = (Stages(backend, meta, shapes, CPU, torch.float32) for backend in (target.module, reference))
    for grads in gradients(shapes, 2):
        ours.step([torch.cat([torch.zeros(1), grad.float()])[1:] for grad in grads])
        right.step(grads)
    for key, value in ours.values().items():
        assert error(value, right.values()[key]) < AGREE, key


@cpu_test
def test_emulated_error_to_float64_is_at_most_twice_that_of_float32(target):
    if INTERPRETED:
        pytest.skip("takes the interpreter minutes")
    within_twice_of_float32(target, CONFIGS["paper"], [1, 2, 3, 4, 5, 511, 512, 513, 4096], 20)


SIZES = [1, 2, 15, 16, 17, 255, 256, 257, 2047, 2048, 2049, 4096, 100_003]


def within_twice_of_float32(target: Target, config: HRNNConfig, sizes: list[int], steps: int) -> None:
    """Assert that the kernels are at most twice as far from float64 as PyTorch in float32, and what few values vary.

    Powers, logarithms, quotients and roots of a GPU are good to 2^-22 or so, which is another AGREE.
    """
    meta, shapes = MetaParams.init(config, seed=3), [(size,) for size in sizes]
    ours = Stages(target.module, meta, shapes, target.device, torch.float32)
    single, double = (Stages(reference, meta, shapes, target.device, dtype) for dtype in (torch.float32, torch.float64))
    for grads in gradients(shapes, steps):
        for run in (ours, single, double):
            run.step(grads)
    right, rounded, floor = double.values(), single.values(), AGREE if target.compiled else 2e-6
    for key, value in ours.values().items():
        assert error(value, right[key]) <= 2 * error(rounded[key], right[key]) + max(floor, steps * 1e-8), key


@gpu_test
@pytest.mark.parametrize("name", CONFIGS)
def test_error_to_float64_is_at_most_twice_that_of_float32(target, name):
    within_twice_of_float32(target, CONFIGS[name], SIZES, 20)


@gpu_test
def test_error_to_float64_stays_small_over_a_thousand_steps(target):
    within_twice_of_float32(target, CONFIGS["paper"], [4096, 4095], 1000)


@compiled_test
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_gradients_of_any_alignment_agree_with_the_reference(target, dtype):
    meta, shapes = MetaParams.init(seed=3), [(4096,), (517,), (2048,)] if target.device == GPU else [(512,), (37,)]
    ours, right = (
        Stages(backend, meta, shapes, target.device, torch.float32) for backend in (target.module, reference)
    )
    for shift, grads in enumerate(gradients(shapes, 8)):
        moved = [torch.cat([torch.zeros(shift), grad]).to(target.device, dtype)[shift:] for grad in grads]
        ours.step(moved, cast=False)
        right.step(moved)
    for key, value in ours.values().items():
        assert error(value, right.values()[key]) < 2 * AGREE, key  # of float32's roundings and of a GPU's functions


@gpu_test
def test_each_of_two_devices_takes_its_own_step(target):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    results = []
    for index in range(2):
        param = torch.nn.Parameter(torch.linspace(-1, 1, 1000, device=f"cuda:{index}"))
        optimizer = lopt.HRNN([param], meta=MetaParams.init(seed=3), backend=target.name)
        for _ in range(3):  # with the other device as the current one
            param.grad = param.detach().cos()
            with torch.cuda.device(1 - index):
                optimizer.step()
        results.append(param.detach().cpu())
    assert torch.equal(*results)


@gpu_test
def test_sums_over_many_chunks_agree_with_the_reference(target):
    meta, shapes = MetaParams.init(seed=3), [(9_000_001,), (3,)]
    ours, right = (
        Stages(backend, meta, shapes, target.device, torch.float32) for backend in (target.module, reference)
    )
    grads = gradients(shapes, 1)[0]
    for run in (ours, right):
        run.step(grads)
    for key, value in ours.values().items():
        assert error(value, right.values()[key]) < AGREE, key


@kernel_test
@pytest.mark.parametrize("state_format", ["float32", "compact"])
def test_a_tensor_of_equal_parts_is_stepped_alike_in_all_of_them(target, state_format):
    """On a GPU there are so many that offsets into the state need 64 bits."""
    if state_format not in target.module.STATE_FORMATS:
        pytest.skip(f"{target.name} has no kernels for the {state_format} state")
    size, copies = (1 << 20, 206) if target.device == GPU else (1 << 10, 3)
    generator = torch.Generator().manual_seed(0)
    values, grad = (torch.randn(size, generator=generator).to(target.device) for _ in range(2))
    whole, part = torch.nn.Parameter(values.repeat(copies)), torch.nn.Parameter(values.clone())
    if target.device == GPU:
        assert HRNNConfig().hidden_size * whole.numel() > 2**31
        needed = 100 * whole.numel()  # state 76, parameter 4, gradient 4, update 4, and what PyTorch keeps
        if (free := torch.cuda.mem_get_info()[0]) < needed:
            pytest.skip(f"needs {needed / 1e9:.0f} GB of GPU memory, {free / 1e9:.0f} GB are free")
    for param in (whole, part):
        optimizer = lopt.HRNN([param], meta=MetaParams.init(seed=3), backend=target.name, state_format=state_format)
        for _ in range(2):
            param.grad = grad.repeat(param.numel() // size)
            optimizer.step()
        for name, value in {"param": param.detach(), **optimizer.state[param]}.items():
            if value.numel() >= size:
                parts = value.reshape(-1, param.numel() // size, size)
                assert all(torch.equal(parts[:, i], parts[:, 0]) for i in (1, -1) if parts.shape[1] > 1), name
    assert not torch.equal(part, values)
    # Means over more values are rounded otherwise: their error is a part AGREE of a step, which is about init_lr.
    torch.testing.assert_close(whole.detach()[:size], part.detach(), rtol=2**-23, atol=AGREE * 1e-3)


def make_model(target: Target, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, lopt.HRNN, Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(65, 129), torch.nn.ReLU(), torch.nn.Linear(129, 1)).to(
        target.device, dtype
    )
    optimizer = lopt.HRNN(model.parameters(), backend=target.name)
    return model, optimizer, torch.randn(32, 65, device=target.device, dtype=dtype)


def train_step(model: torch.nn.Module, optimizer: lopt.HRNN, batch: Tensor, set_to_none: bool = True) -> None:
    optimizer.zero_grad(set_to_none=set_to_none)
    model(batch).square().mean().backward()
    optimizer.step()


@gpu_test
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_step_does_not_synchronise_even_with_gradients_at_other_addresses(target, dtype):
    model, optimizer, batch = make_model(target, dtype)
    for _ in range(2):
        train_step(model, optimizer, batch)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            elsewhere = [param.grad for param in model.parameters()]
            train_step(model, optimizer, batch)
            assert len(elsewhere) == 4
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Operators(TorchDispatchMode):
    """Takes down the names of what PyTorch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@kernel_test
def test_a_step_launches_little_beside_its_kernels(target):
    if INTERPRETED:
        pytest.skip("the interpreter itself asks PyTorch for much")
    model, optimizer, batch = make_model(target)
    for _ in range(2):
        train_step(model, optimizer, batch, set_to_none=False)
    with Operators() as operators:
        optimizer.step()
    counted = "_local_scalar_dense" if target.device == CPU else "add_"  # the skipped steps
    launched = [name.split(".")[1] for name in operators.names if name.startswith("aten.")]
    assert launched == ["zero_", counted]


@simulated_test
def test_a_step_is_four_launches_however_many_tensors_there_are(target):
    for tensors in (1, 40):
        params = [torch.nn.Parameter(torch.ones(5)) for _ in range(tensors)]
        optimizer = lopt.HRNN(params, meta=MetaParams.init(seed=3), backend=target.name)
        for param in params:
            param.grad = torch.ones(5)
        optimizer.step()
        before = len(launch.LAUNCHES)
        optimizer.step()
        names = launch.LAUNCHES[before:]
        assert len(names) == 4
        assert all(name in full for name, full in zip(("prepare", "advance", "summarise", "apply"), names, strict=True))


@gpu_test
def test_a_step_allocates_nothing_after_the_first(target):
    model, optimizer, batch = make_model(target)
    for _ in range(3):
        train_step(model, optimizer, batch, set_to_none=False)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    optimizer.step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@compiled_test
def test_two_runs_are_bitwise_equal(target):
    sizes, steps = ((1_000_003, 4096, 5), 20) if target.device == GPU else ((9001, 4096, 5), 2)
    results = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n, generator=generator).to(target.device)) for n in sizes]
        optimizer = lopt.HRNN(params, meta=MetaParams.init(seed=3), backend=target.name)
        for _ in range(steps):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).to(target.device)
            optimizer.step()
        results.append(state_of(optimizer))
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))


@gpu_test
@pytest.mark.parametrize("set_to_none", [True, False])
def test_replays_of_a_cuda_graph_equal_ordinary_steps(target, set_to_none):
    torch.cuda.synchronize()
    runs = []
    for captured in (True, False):
        model, optimizer, batch = make_model(target)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                train_step(model, optimizer, batch, set_to_none)
        torch.cuda.current_stream().wait_stream(stream)
        if captured:
            graph = torch.cuda.CUDAGraph()
            if set_to_none:
                optimizer.zero_grad(set_to_none=True)
            with torch.cuda.graph(graph):
                train_step(model, optimizer, batch, set_to_none)
        for _ in range(5):
            graph.replay() if captured else train_step(model, optimizer, batch, set_to_none)
        # An ordinary step between replays must not spoil the graph, nor the graph the step.
        if captured:
            static = [param.grad for param in model.parameters()]
            train_step(model, optimizer, batch, True)
            for param, grad in zip(model.parameters(), static, strict=True):
                param.grad = grad
            graph.replay()
        else:
            train_step(model, optimizer, batch, True)
            train_step(model, optimizer, batch, set_to_none)
        torch.cuda.synchronize()
        runs.append(state_of(optimizer))
    for left, right in zip(*runs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


@gpu_test
@pytest.mark.parametrize("lr", [1.0, torch.tensor(1.0)], ids=["float", "tensor"])
def test_one_cuda_graph_holds_several_steps(target, lr):
    runs = []
    for captured in (True, False):
        model, optimizer, batch = make_model(target)
        for group in optimizer.param_groups:
            group["lr"] = lr.to(target.device) if isinstance(lr, Tensor) else lr
        train_step(model, optimizer, batch, False)
        optimizer.step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph) if captured else contextlib.nullcontext():
            for _ in range(4):
                optimizer.step()
        if captured:
            graph.replay()
        torch.cuda.synchronize()
        runs.append(state_of(optimizer))
    for left, right in zip(*runs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


@gpu_test
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_capture_before_an_ordinary_step_says_what_to_do(target):
    model, optimizer, batch = make_model(target)
    model(batch).square().mean().backward()
    with (
        pytest.raises(RuntimeError, match="run an ordinary optimizer step before each capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()
    optimizer.step()
    assert optimizer.skipped_steps == 0


@gpu_test
def test_ordinary_steps_over_other_parameters_leave_a_cuda_graph_its_memory(target):
    runs = []
    for captured in (True, False):
        model, optimizer, batch = make_model(target)
        for _ in range(3):
            train_step(model, optimizer, batch, set_to_none=False)
        static = [param.grad for param in model.parameters()]
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
        filling = []
        for without in range(4):
            for place, (param, grad) in enumerate(zip(model.parameters(), static, strict=True)):
                param.grad = None if place == without else grad
            optimizer.step()
            # Memory of what was freed would be given to these, and a replay would write into them.
            filling += [torch.zeros(n, device=target.device) for n in (1, 5, 200, 20_000)]
        for param, grad in zip(model.parameters(), static, strict=True):
            param.grad = grad
        graph.replay() if captured else optimizer.step()
        torch.cuda.synchronize()
        assert all(not values.any() for values in filling)
        runs.append(state_of(optimizer))
    for left, right in zip(*runs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


@gpu_test
def test_grad_scaler_skips_an_overflow_and_goes_on(target):
    model, optimizer, batch = make_model(target)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = model(batch).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert 0 < optimizer.skipped_steps < 60
    assert all(value.isfinite().all() for value in state_of(optimizer))


@gpu_test
def test_compiled_step_equals_the_ordinary_one(target):
    runs = []
    for compiled in (True, False):
        model, optimizer, batch = make_model(target)
        train_step(model, optimizer, batch)
        step = torch.compile(optimizer.step, fullgraph=True) if compiled else optimizer.step
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.compile imports parts of torch that warn of themselves
            for _ in range(3):
                optimizer.zero_grad(set_to_none=False)
                model(batch).square().mean().backward()
                step()
        runs.append(state_of(optimizer))
    for left, right in zip(*runs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
