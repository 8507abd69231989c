"""Unrolls: many tasks in one row equal each task alone, and the original's meta-steps are reproduced."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import lopt
from lopt import HRNNConfig, MetaParams
from lopt.backends import reference
from lopt.backends.reference import FlatState, Segments
from lopt.interop.tf1 import RMSProp, load_recording
from lopt.interop.tf1_names import config_of
from lopt.meta.estimators import TruncatedBPTT
from lopt.meta.tasks import Data, Params, Random, Task, networks, paper
from lopt.meta.unroll import Augment, Draw, Mix, Objective, PaperObjective, World
from lopt.state import SAMPLES

RECORDINGS = Path(__file__).parents[1] / "recordings"
CONFIGS = {
    "paper": HRNNConfig(level_sizes=(4, 5, 6)),
    "last_tensor": HRNNConfig(level_sizes=(4, 5, 6), global_input="last", relative_log_lr="tensor", timescales=2),
    "attention": HRNNConfig(level_sizes=(3, 4, 2), attention=True, zero_init_lr_weights=False),
    "two_levels": HRNNConfig(level_sizes=(4, 5), damping=0.8, log_lr_min=-6.5, log_lr_min_steps=2.0),
    "far": HRNNConfig(
        level_sizes=(4, 5), damping=0.8, log_lr_min_steps=2.0, log_lr_min_distance=0.01, log_lr_max_ratio=1.05
    ),
    "one_level": HRNNConfig(level_sizes=(4,), dynamic_output_scale=False, relative_log_lr=None),
}


def plain(config: HRNNConfig, tasks: list[Task], rows: int = 2, **options: object) -> World:
    random = Random(torch.Generator().manual_seed(0), repeat=1)
    return World(Mix(tasks, config), rows, random, Draw(1000), Augment(), Objective(), **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_tasks_side_by_side_advance_as_each_would_alone(name):
    config = CONFIGS[name]
    meta = MetaParams.init(config, seed=1, dtype=torch.float64)
    tasks = [paper.Quadratic(3), networks.Linear(4, 3), paper.Bowl(2.0)]
    mix = Mix(tasks, config)
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(2, *shape, generator=generator, dtype=torch.float64)

    n, tensors = mix.segments.total, len(mix.segments)
    log_lr = -7 + rand(n)
    state = FlatState(
        hidden=2 * rand(config.hidden_size, n) - 1,
        accum=rand(config.timescales, n) - 0.5,
        ms=0.1 + rand(config.timescales, n),
        grad_decay=0.3 + 0.5 * rand(n),
        scale_decay=0.3 + 0.5 * rand(n),
        log_lr=log_lr if config.dynamic_output_scale else None,
        log_lr_mean=mix.segments.mean(log_lr) if config.dynamic_output_scale else None,
        tensor_hidden=2 * rand(tensors, config.tensor_size) - 1 if config.levels > 1 else None,
        global_hidden=2 * rand(len(tasks), config.global_size) - 1 if config.levels > 2 else None,
        damping=rand(tensors, 3) if config.damping else None,
        step=(9 * rand(tensors)).round(),
        distance=rand(tensors, 1 + SAMPLES) if config.log_lr_min_distance else None,
    )
    theta, grad = rand(n), rand(n) - 0.5
    moved, attended, new = mix.step(meta, mix.advance_meta(meta), theta, grad, state)
    first_tensor = 0
    for p, task in enumerate(tasks):
        params = slice(*mix.problems.bounds[p])
        own = slice(first_tensor, first_tensor + len(task.shapes))
        first_tensor = own.stop
        cut = {"tensor_hidden": own, "log_lr_mean": own, "damping": own, "step": own}
        cut |= {"distance": own, "global_hidden": p}

        def part(values: FlatState, params: slice = params, cut: dict = cut) -> FlatState:
            return FlatState(
                *(
                    None if value is None else value[:, cut[field]] if field in cut else value[..., params]
                    for field, value in zip(FlatState._fields, values, strict=True)
                )
            )

        alone = reference.step(meta, config, Segments(task.sizes), theta[:, params], grad[:, params], part(state))
        torch.testing.assert_close((moved[:, params], attended[:, params]), alone[:2])
        for field, ours, theirs in zip(FlatState._fields, part(new), alone[2], strict=True):
            if theirs is not None:
                torch.testing.assert_close(ours, theirs, msg=field)


class Recorded(Task):
    """The recordings' quadratic, from its recorded start."""

    def __init__(self, recording: dict[str, np.ndarray]) -> None:
        self.w, self.y = (torch.from_numpy(recording[f"problem/{name}"]) for name in "Wy")
        self.points = [torch.from_numpy(recording[f"param0/{i}"]) for i in range(2)]
        self.shapes = tuple(tuple(point.shape) for point in self.points)

    def start(self, count: int, random: Random, data: Data) -> list[Tensor]:
        return [point[None].clone() for point in self.points]

    def loss(self, params: Params, data: Data) -> Tensor:
        return 0.5 * (self.w @ torch.cat([param.flatten(1) for param in params], 1)[..., None] - self.y).square().sum(
            (1, 2)
        )


@pytest.mark.parametrize("path", sorted(RECORDINGS.glob("metagrad_*.npz")), ids=lambda path: path.stem)
def test_meta_steps_equal_those_recorded_from_the_original(path):
    recording = load_recording(path)
    config = config_of(json.loads(str(recording["config_json"])))
    meta = MetaParams.from_tf({key[5:]: value for key, value in recording.items() if key.startswith("meta/")}, config)
    random = Random(torch.Generator().manual_seed(0))
    world = World(Mix([Recorded(recording)], config), 1, random, Draw(1e9), Augment(), PaperObjective(), full_loss=True)
    estimator, optimizer = TruncatedBPTT(second_order=bool(recording["second"])), RMSProp(lr=1e-3)
    log_lr = torch.cat([torch.from_numpy(recording[f"loglr0/{i}"]).reshape(1, -1) for i in range(2)], 1)
    world._draw = lambda task, p, out: out.copy_(log_lr)  # type: ignore[method-assign]
    for unroll in range(2):
        world.length = [0.5] if unroll == 0 else [1e9]
        world.age = [1.0] if unroll == 0 else world.age
        estimate = estimator(meta, world, int(recording["K"]))
        recorded_loss = recording[f"u{unroll}/metaobj"]
        assert estimate.loss == pytest.approx(float(recorded_loss), rel=1e-5)
        grads = MetaParams.from_flat(config, estimate.grad)
        meta = optimizer.step(meta, grads)
        for kind, values in (("dmeta", grads), ("meta_after", meta)):
            for name, value in values.to_tf().items():
                expected = recording[f"u{unroll}/{kind}/{name}"]
                assert np.abs(value - expected).max() <= 1e-4 * np.abs(expected).max(), (unroll, kind, name)


def test_tasks_restart_on_their_own_clocks_and_gradients_reach_initial_states():
    config = CONFIGS["paper"]
    meta = MetaParams.init(config)
    world = plain(config, [paper.Quadratic(3), paper.Bowl(1.0)])
    estimator = TruncatedBPTT()
    estimator(meta, world, 2)
    world.length, world.age = [100.0, 2.0], [2.0, 2.0]
    before = world.theta.clone(), world.state.hidden.clone(), world.start.clone()
    first = MetaParams.from_flat(config, estimator(meta, world, 2).grad)
    assert world.age == [4.0, 2.0]
    assert torch.equal(world.start[:, 0], before[2][:, 0])
    assert not torch.equal(world.start[:, 1], before[2][:, 1])
    for level in range(3):
        assert first[f"level{level}.init"].abs().max() > 0
    world.length = [100.0, 100.0]
    second = MetaParams.from_flat(config, estimator(meta, world, 2).grad)
    assert second["level0.init"].abs().max() == 0
    assert second["level0.gates.weight"].abs().max() > 0


def test_augmentations_leave_the_task_as_it_is():
    """A common scale of parameters, learning rates and loss is not noticed, up to epsilons."""
    config = HRNNConfig(level_sizes=(4, 5, 6), ms_eps=1e-30, rms_eps=1e-30)
    meta = MetaParams.init(config, seed=2)
    results = []
    for factor, loss_scale in ((1.0, 1.0), (8.0, 1024.0)):
        random = Random(torch.Generator().manual_seed(0))
        augment = Augment(
            lr=(1e-2 / factor, 1e-2 / factor), scale=(factor, factor), loss_scale=(loss_scale, loss_scale)
        )
        world = World(
            Mix([networks.MLP((6,)), paper.Quadratic(4)], config), 3, random, Draw(1000), augment, Objective()
        )
        world.restart(meta)
        start = world.theta.clone()
        world.unroll(meta, 10, derivatives=0)
        results.append(world.theta)
    moved = (results[0] - start).abs().max()
    assert (results[0] - results[1]).abs().max() < 1e-3 * moved


@pytest.mark.parametrize("task", [networks.Linear(48, 3, samples=32), networks.Attention(5, 4, 12, samples=32)])
def test_steps_are_those_of_the_front_end(task: networks.Network):
    """Of tensors as torch.nn has them, with fewer, as many and more inputs than `base_fan_in`."""
    config = HRNNConfig(level_sizes=(4, 5, 6), ms_eps=1e-30, rms_eps=1e-30, log_lr_min=-9.0)
    meta = MetaParams.init(config, seed=2)
    random = Random(torch.Generator().manual_seed(0))
    augment = Augment((3e-2, 3e-2), 0.0, 0.0, loss_scale=(1.0, 1.0), base_fan_in=20, base_depth=2)
    world = World(Mix([task], config), 1, random, Draw(1000), augment, Objective())
    world.restart(meta)
    parts = [part.view(shape) for part, shape in zip(world.theta[0].split(task.sizes), task.shapes, strict=True)]
    inputs_first = [  # torch.nn's tables have their inputs last
        len(shape) == 2 and not (isinstance(task, networks.Attention) and place < 2)
        for place, shape in enumerate(task.shapes)
    ]
    params = [
        torch.nn.Parameter((part.T if flip else part).clone()) for part, flip in zip(parts, inputs_first, strict=True)
    ]
    optimizer = lopt.HRNN(params, meta=meta, init_lr=3e-2, base_fan_in=20, base_depth=2, backend="reference")
    for _ in range(4):
        optimizer.zero_grad()
        seen = [(param.T if flip else param)[None] for param, flip in zip(params, inputs_first, strict=True)]
        task.loss(seen, world.data[0]).sum().backward()
        optimizer.step()
    start = world.theta
    world.unroll(meta, 4, derivatives=0)
    ours = torch.cat([(param.T if flip else param).flatten() for param, flip in zip(params, inputs_first, strict=True)])
    # float32 beside other kernels; of fan-ins above 20 a step is 20 / 48 or 20 / 24 as long.
    assert (world.theta[0] - ours.detach()).abs().max() < 1e-3 * (world.theta - start).abs().max()


@pytest.mark.parametrize("staggered", [True, False])
def test_only_staggered_worlds_cut_their_first_episodes_short(staggered):
    config = CONFIGS["paper"]
    world = plain(config, [paper.Bowl(1.0), paper.Quadratic(3)], staggered=staggered)
    for first in (True, False):
        world.restart(MetaParams.init(config))
        assert [length < 1000 for length in world.length] == [staggered and first] * 2
        world.age = list(world.length)


@pytest.mark.parametrize("beyond", ["infinite", "NaN"])
def test_a_task_whose_loss_overflows_counts_as_the_cap_and_stays_finite(beyond):
    class Cliff(Task):
        shapes = ((2,),)

        def start(self, count: int, random: Random, data: Data) -> list[Tensor]:
            return [torch.tensor([[1.0, -2.0]]).repeat(count, 1)]

        def loss(self, params: Params, data: Data) -> Tensor:
            high = torch.exp(torch.exp(50 * params[0])).sum(-1)
            return high - high if beyond == "NaN" else high

    config = CONFIGS["paper"]
    world = plain(config, [Cliff(), paper.Bowl(1.0)])
    meta = MetaParams.init(config)
    estimate = TruncatedBPTT()(meta, world, 3)
    assert estimate.losses[0] == world.objective.cap
    assert estimate.grad.isfinite().all()
    assert all(values.isfinite().all() for values in (world.theta, *world.state) if values is not None)
