"""Recipes: which tasks, estimators, lengths and rates make up a meta-training run. All numbers of a run are here.

A recipe is a list of stages. The default one backpropagates through short unrolls first, which learns a direction in
minutes and learning rates that shrink too early, and goes on with persistent evolution strategies on long episodes: on
all 8,349 meta-parameters, then on the 49 that read the hidden state out; the fewer are perturbed, the less the noise.
The architecture's bound and damping are there from the first step, so that no stage has to learn them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lopt.config import HRNNConfig
from lopt.meta.estimators import ES, PES, Estimator, TruncatedBPTT
from lopt.meta.tasks import Random, Rescaled, Sparse, Sum, Task, paper
from lopt.meta.tasks import networks as nets
from lopt.meta.unroll import Augment, Draw, Mix, Objective, PaperObjective, World
from lopt.train.group import ALONE, Group

ESTIMATORS: dict[str, Callable[[Stage], Estimator]] = {
    "bptt": lambda stage: TruncatedBPTT(second_order=stage.second_order),
    "pes": lambda stage: PES(stage.sigma, stage.reuse, stage.only),
    "es": lambda stage: ES(stage.sigma, stage.only),
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a run with one estimator and one meta-optimizer.

    Args:
        name: shown and logged.
        meta_steps: how many.
        mixes: groups of tasks that take turns, one per meta-step, each with its own world.
        estimator: a name of `ESTIMATORS`.
        rows: copies of a mix; for pes and es both members of the antithetic pairs count.
        unroll: steps between meta-updates. episode: steps, or unrolls if `clock` says so, between restarts of a task.
        optimizer: "adam", or "rmsprop": TensorFlow's, with element-wise clipping.
        lr: of the meta-optimizer. betas: of Adam.
        clip: largest global norm of the meta-gradient (adam), or largest absolute entry (rmsprop).
        warmup: meta-steps over which lr grows linearly. final_lr: share of lr at the end of a cosine; 1: constant.
        objective, augment, full_loss, clock: of the worlds.
        sigma, reuse, only: of the noise of pes and es.
        average: decay of a moving average of the meta-parameters over the stage's second half, with which it ends; 0:
            none. Evolution strategies are noisy, and good points lie between those they visit.
        sampled: take a new world of a random mix after this many episodes, instead of all mixes in turn.

    Raises:
        ValueError: an argument is not what it should be.
    """

    name: str
    meta_steps: int
    mixes: Callable[[], list[list[Task]]]
    estimator: str
    rows: int
    unroll: Draw
    episode: Draw
    lr: float
    optimizer: str = "adam"
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    warmup: int = 0
    final_lr: float = 1.0
    objective: Objective | PaperObjective = Objective()
    augment: Augment = Augment()
    full_loss: bool = False
    clock: str = "steps"
    second_order: bool = False
    sigma: float = 0.01
    reuse: int = 1
    only: tuple[str, ...] = ()
    average: float = 0.0
    sampled: int = 0

    def __post_init__(self) -> None:
        def require(name: str, holds: bool, what: str) -> None:
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r} of stage {self.name!r} must be {what}")

        choices = {"estimator": tuple(ESTIMATORS), "optimizer": ("adam", "rmsprop"), "clock": ("steps", "unrolls")}
        for name, of in choices.items():
            require(name, getattr(self, name) in of, f"one of {', '.join(of)}")
        for name in ("meta_steps", "rows", "reuse"):
            count = getattr(self, name)
            require(name, isinstance(count, int) and count >= 1, "a whole number of at least 1")
        for name in ("unroll", "episode"):
            require(name, isinstance(getattr(self, name), Draw), "a Draw, as Draw(30)")
        require("mixes", callable(self.mixes), "a function that returns lists of tasks")

    def world(
        self, tasks: Sequence[Task], config: HRNNConfig, device: torch.device, random: Random, group: Group = ALONE
    ) -> World:
        """A world of one of the stage's mixes, with this process's share of the rows."""
        return World(
            Mix(tasks, config, device),
            self.rows // group.size,
            random,
            self.episode,
            self.augment,
            self.objective,
            full_loss=self.full_loss,
            clock=self.clock,
            staggered=not self.sampled,
            group=group,
        )

    def lr_at(self, step: int) -> float:
        """Meta-learning rate of meta-step `step` of the stage, counted from 0."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, self.meta_steps))))
        return self.lr * warm * (self.final_lr + (1 - self.final_lr) * cosine)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Stages in their order.

    Args:
        config: the optimizer's architecture.
        stages: one after the other, each from the meta-parameters the last one left.
        minutes: how long it takes on one core, about.
        validate_every: meta-steps between validations.

    Raises:
        ValueError: an argument is not what it should be.
    """

    config: HRNNConfig
    stages: tuple[Stage, ...]
    minutes: float
    validate_every: int = 200

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages=() must be at least one")
        if not self.minutes > 0:
            raise ValueError(f"minutes={self.minutes!r} must be positive")
        if self.validate_every < 1:
            raise ValueError(f"validate_every={self.validate_every!r} must be at least 1")

    @property
    def text(self) -> str:
        """Architecture and stages, names of their mixes included: what a resumed run has to agree with."""
        stages = [{**vars(stage), "mixes": getattr(stage.mixes, "__qualname__", "")} for stage in self.stages]
        return re.sub(" at 0x[0-9a-f]+", "", f"{self.config.to_json()} {stages}")

    def scaled(self, minutes: float | None) -> Recipe:
        """The same with every stage's meta-steps, those of its warm-up too, scaled to another duration."""
        if minutes is None:
            return self
        factor = minutes / self.minutes
        stages = (
            dataclasses.replace(s, meta_steps=max(1, round(factor * s.meta_steps)), warmup=round(factor * s.warmup))
            for s in self.stages
        )
        return dataclasses.replace(self, stages=tuple(stages), minutes=minutes)


VARIANTS: dict[str, dict[str, Any]] = {  # name -> options of the architecture
    "no-tensor-rnn": {"level_sizes": (10,)},  # the global one reads the tensors' states and goes with it
    "no-global-rnn": {"level_sizes": (10, 20)},
    "one-timescale": {"timescales": 1, "gradient_products": False, "log_ms_features": False},
    "no-shortcut": {"gradient_shortcut": False},
    "no-relative-lr": {"relative_log_lr": None},
    "attention": {"attention": True},
}


def varied(recipe: Recipe, names: Sequence[str]) -> Recipe:
    """The recipe for another architecture, names of `VARIANTS`; everything else is the same."""
    for name in sorted(names, key=list(VARIANTS).index, reverse=True):
        recipe = dataclasses.replace(recipe, config=dataclasses.replace(recipe.config, **VARIANTS[name]))
    return recipe


def _function(name: str) -> Task:
    return paper.Function2D(*paper.FUNCTIONS_2D[name])


def _mixes(noise: float, batch: tuple[int, int]) -> list[list[Task]]:
    """Six mixes of about ten tasks and 1,000 parameters.

    Args:
        noise: scale of label noise and gradient noise, 0 to 1.
        batch: smallest and largest minibatch.
    """
    small, large = batch
    relu, tanh, sigmoid, gelu = torch.relu, torch.tanh, torch.sigmoid, torch.nn.functional.gelu
    return [
        [
            nets.MLP((14,), relu, batch=large, noise=0.1 * noise),
            nets.MLP((8, 8), tanh, batch=small, features=10),
            nets.Attention(6, 5, 6, batch=large // 2),
            nets.Linear(10, 4, batch=small, noise=0.4 * noise),
            nets.MLP((8,), sigmoid, regression=True, outputs=2, noise=0.3 * noise),
            paper.Quadratic(20),
            _function("rosenbrock"),
            paper.Norm(12, 1.5),
        ],
        [
            nets.Conv((4, 4), batch=small // 2, noise=0.1 * noise),
            nets.MLP((10, 10, 10), relu, features=8, batch=large),
            nets.Autoencoder((6, 3, 6), features=8, batch=small),
            nets.Recurrent(6, 5, 8, batch=large, noise=0.2 * noise),
            nets.Linear(8, 1, regression=True, batch=small, noise=0.5 * noise),
            paper.Bowl(5.0),
            Rescaled(paper.Quadratic(12), (0.03, 30.0)),
            _function("ackley"),
            _function("branin"),
        ],
        [
            nets.MLP((8, 8, 8), relu, nets.batch_norm, residual=True, features=8, batch=large, noise=0.2 * noise),
            nets.NextToken(10, 5, batch=small),
            nets.MLP((16,), gelu, features=9, batch=small, noise=0.3 * noise),
            nets.MLP((6, 6, 6, 6), relu, features=6, outputs=3, batch=large),
            paper.Quadratic(10),
            Sparse(paper.Quadratic(10), 0.9),
            _function("beale"),
            _function("styblinski_tang"),
            paper.MatMul(2, 7),
        ],
        [
            nets.MLP((10, 6), tanh, nets.layer_norm, batch=large, noise=0.1 * noise),
            nets.Attention(5, 6, 6, batch=small),
            nets.Autoencoder((4,), relu, features=10, batch=large),
            nets.MLP((12, 12), relu, features=6, outputs=2, regression=True, batch=small, noise=0.2 * noise),
            nets.Linear(12, 6, batch=large, noise=0.1 * noise),
            _function("booth"),
            _function("michalewicz"),
            Sum(paper.Quadratic(5), paper.Norm(6, 3.0), _function("matyas")),
        ],
        [
            nets.Conv((3, 5), norm=False, batch=small // 2),
            nets.MLP((20,), relu, batch=small, noise=0.4 * noise),
            nets.MLP((8, 8), sigmoid, features=8, outputs=3, batch=large),
            nets.Recurrent(5, 6, 6, batch=small),
            nets.MLP((6, 6), gelu, nets.batch_norm, features=10, batch=small),
            paper.Quadratic(30),
            paper.Bowl(0.1, 0.7),
            _function("logsumexp"),
        ],
        [
            nets.MLP((7, 7, 7, 7, 7), relu, residual=True, features=7, batch=large, noise=0.1 * noise),
            nets.MLP((24,), tanh, features=6, outputs=1, regression=True, batch=large),
            nets.NextToken(8, 4, batch=large),
            nets.Linear(16, 8, batch=small, noise=0.2 * noise),
            nets.Conv((4,), batch=small // 2, noise=0.3 * noise),
            Rescaled(nets.MLP((8,), relu, features=8, batch=large), (0.1, 10.0)),
            paper.Norm(14, 2.0),
            _function("rosenbrock"),
        ],
    ]


def clean_mixes() -> list[list[Task]]:
    """Little label noise, large minibatches."""
    return _mixes(0.2, (24, 48))


def noisy_mixes() -> list[list[Task]]:
    """Label noise up to 40 %, minibatches down to 6."""
    return _mixes(1.0, (12, 32))


def pattern_mixes() -> list[list[Task]]:
    """Samples around patterns, up to 64 inputs: classes that can be told apart to the end, wrong labels that can be
    learned by heart; longer sequences."""
    relu, tanh, gelu = torch.relu, torch.tanh, torch.nn.functional.gelu
    return [
        [
            nets.Linear(64, 10, samples=512, modes=3),
            nets.MLP((24,), relu, features=36, outputs=8, samples=384, noise=0.2, modes=2),
            nets.MLP((12,) * 7, relu, features=36, outputs=8, samples=384, batch=24, modes=3),
            nets.GRU(6, 6, 14, outputs=8, samples=384, batch=24, modes=2),
            nets.Autoencoder((20, 6, 20), tanh, features=36, samples=384, modes=3),
        ],
        [
            nets.Linear(40, 6, samples=384, noise=0.1, modes=2),
            nets.MLP((32,), relu, features=16, outputs=6, samples=128, batch=16, noise=0.3, modes=2),
            nets.MLP((16, 16), tanh, features=49, outputs=8, samples=384, modes=3),
            nets.MLP((14, 14), gelu, nets.layer_norm, features=36, outputs=6, samples=256, batch=24, modes=2),
            nets.MLP((20, 20), relu, features=25, outputs=2, regression=True, samples=256, noise=0.1, modes=3),
            nets.Language(16, 10, 12, batch=10, samples=256),
        ],
        [
            nets.MLP((16,), relu, features=64, outputs=10, samples=512, batch=24, modes=2),
            nets.MLP((10,) * 8, relu, features=25, outputs=6, samples=256, batch=24, modes=2),
            nets.GRU(5, 5, 10, outputs=5, samples=256, batch=16, modes=3),
            nets.Autoencoder((12, 4, 12), relu, features=25, samples=256, modes=3),
            nets.Conv((6, 8), 6, norm=False, outputs=6, samples=192, batch=12),
            nets.Language(12, 8, 10, batch=8, samples=192),
        ],
    ]


def hard_mixes() -> list[list[Task]]:
    """The noisy ones, four of what is hard to train, and those of patterns: deep narrow networks, recurrences with and
    without gates, few samples, normalisation, more data than parameters, many inputs."""
    relu, tanh, gelu = torch.relu, torch.tanh, torch.nn.functional.gelu
    return [
        *noisy_mixes(),
        [
            nets.MLP((8,) * 6, relu, features=8, batch=24),
            nets.MLP((10,) * 5, tanh, features=8, outputs=6, batch=16),
            nets.Recurrent(6, 10, 8, batch=24),
            nets.MLP((16, 16), relu, features=10, outputs=1, regression=True, samples=48, batch=16, noise=0.3),
            nets.Conv((4, 4, 4), norm=False, batch=8),
            nets.Linear(12, 8, samples=96, batch=16),
        ],
        [
            nets.GRU(6, 5, 7, outputs=6, batch=24),
            nets.GRU(8, 4, 5, outputs=3, batch=16, noise=0.1),
            nets.Language(10, 8, 7, batch=12),
            nets.Language(6, 5, 5, batch=24),
            nets.MLP((10,) * 8, relu, features=12, outputs=5, batch=24),
            nets.MLP((16,), tanh, features=10, outputs=1, regression=True, samples=96, batch=24, noise=0.6),
        ],
        [
            nets.Conv((5, 5, 5, 5), 6, outputs=5, batch=12),
            nets.Linear(32, 10, samples=384),
            nets.Autoencoder((12, 4, 12), relu, features=20, samples=256),
            nets.MLP((20, 12), relu, features=20, outputs=8, samples=384, batch=24),
            nets.MLP((10,) * 3, relu, nets.batch_norm, residual=True, features=10, outputs=6, batch=16),
        ],
        [
            nets.Linear(56, 8, samples=512),
            nets.MLP((20,), relu, features=48, outputs=6, samples=256, noise=0.2),
            nets.MLP((16,) + (10,) * 4, relu, features=48, outputs=5, samples=384, batch=24),
            nets.Autoencoder((16, 6, 16), tanh, features=48, samples=384),
            nets.MLP((24, 20), gelu, features=28, outputs=2, regression=True, samples=256, batch=24, noise=0.1),
            nets.Conv((8, 8), norm=False, outputs=6, samples=128, batch=12),
        ],
        *pattern_mixes(),
    ]


def long_mixes() -> list[list[Task]]:
    """What takes thousands of steps: noise that can be learned by heart, autoencoders, deep narrow networks, linear
    classifiers of classes that can be told apart."""
    relu, tanh, gelu = torch.relu, torch.tanh, torch.nn.functional.gelu
    return [
        [
            nets.MLP((40,), relu, features=10, samples=64, batch=16, noise=0.3),
            nets.MLP((24, 20), relu, features=12, outputs=5, samples=96, batch=12, noise=0.2),
            nets.MLP((32,), tanh, features=10, outputs=1, regression=True, samples=64, batch=16, noise=0.4),
            nets.Linear(24, 6, samples=96, batch=12),
            nets.Linear(16, 8, batch=24),
            nets.Conv((4, 4), samples=48, batch=6, noise=0.2),
        ],
        [
            nets.Autoencoder((12, 4, 12), relu, features=20, samples=256),
            nets.Autoencoder((8,), gelu, features=14, samples=192, batch=24),
            nets.MLP((8,) * 6, relu, features=8, batch=24),
            nets.MLP((10,) * 8, relu, features=12, outputs=5, batch=24),
            nets.MLP((20, 12), relu, features=20, outputs=8, samples=384, batch=24),
            nets.MLP((8, 8, 8), relu, nets.batch_norm, residual=True, features=8, noise=0.1),
        ],
        [
            nets.MLP((16,), gelu, features=9, batch=12, noise=0.4),
            nets.GRU(6, 5, 7, outputs=6, batch=24),
            nets.Recurrent(6, 5, 8, noise=0.2),
            nets.MLP((16, 16), relu, features=10, outputs=1, regression=True, samples=96, batch=16, noise=0.1),
            nets.Attention(6, 5, 6, batch=12, noise=0.1),
            nets.MLP((16, 16), tanh, features=10, samples=128, batch=16),
        ],
        [
            nets.Linear(48, 8, samples=384),
            nets.Linear(40, 5, samples=256, batch=16),
            nets.MLP((10,) * 7, relu, features=10, outputs=6, samples=384, batch=24),
            nets.MLP((9,) * 6, tanh, features=12, outputs=5, samples=256, batch=16),
            nets.Autoencoder((10, 3, 10), tanh, features=16, samples=256, batch=24),
            nets.Language(10, 8, 7, batch=12),
        ],
    ]


def paper_mixes() -> list[list[Task]]:
    """Each of the original's 101 tasks alone."""
    return [[task] for tasks in paper.paper_tasks().values() for task in tasks]


# Epsilons so small that gradients of any scale look alike; damping; a floor of 3e-3 / sqrt(1 + step / 100) or 0.15
# of the distance from the start, at most 1, / sqrt(1 + step), the larger; no rate above 8 times its tensor's mean.
SHIPPED_CONFIG = HRNNConfig(
    ms_eps=1e-24,
    rms_eps=1e-30,
    log_lr_min=math.log(3e-3),
    log_lr_min_steps=100.0,
    log_lr_min_distance=0.15,
    log_lr_min_distance_limit=1.0,
    log_lr_max_ratio=8.0,
    damping=0.7,
    damping_decay=0.98,
)

REFINE_STAGE = Stage(
    "refine",
    2400,
    hard_mixes,
    "pes",
    rows=64,
    reuse=20,
    unroll=Draw(30),
    episode=Draw(200, 3000),
    lr=4e-4,
    warmup=20,
    final_lr=0.05,
    average=0.99,
    objective=Objective(floor=1e-3, cap=2.0),
)

# What a parameter's hidden state is read by in every architecture: decays, direction, learning rate.
READOUTS = ("*_decay.*", "direction.*", "log_lr.*", "log_step.*")

DEFAULT = Recipe(
    config=SHIPPED_CONFIG,
    minutes=70,
    validate_every=100,
    stages=(
        Stage(
            "backprop",
            220,
            clean_mixes,
            "bptt",
            rows=16,
            unroll=Draw(15, 27),
            episode=Draw(50, 300),
            lr=2e-3,
            warmup=30,
            final_lr=0.05,
        ),
        Stage(
            "evolve",
            600,
            clean_mixes,
            "pes",
            rows=48,
            reuse=10,
            unroll=Draw(30),
            episode=Draw(100, 2000),
            lr=1e-3,
            final_lr=0.5,
            objective=Objective(floor=1e-3, cap=4.0),
        ),
        dataclasses.replace(REFINE_STAGE, meta_steps=3000, lr=1.2e-3, final_lr=0.04),
        dataclasses.replace(
            REFINE_STAGE, name="readouts", meta_steps=800, only=READOUTS, sigma=0.03, lr=2e-3, average=0.98
        ),
    ),
)

# From trained meta-parameters on: `lopt meta-train --recipe refine --start hrnn-13`.
REFINE = Recipe(config=SHIPPED_CONFIG, minutes=60, validate_every=150, stages=(REFINE_STAGE,))

# For long trainings: `lopt meta-train --recipe lengthen --start hrnn-13`. On the parameter level's 749
# meta-parameters alone evolution strategies have far less variance than on all of them.
LENGTHEN = Recipe(
    config=SHIPPED_CONFIG,
    minutes=40,
    validate_every=150,
    stages=(
        Stage(
            "lengthen",
            1500,
            long_mixes,
            "pes",
            rows=48,
            reuse=40,
            only=("level0.init", "level0.gates.*", "level0.candidate.*", *READOUTS),
            sigma=0.015,
            unroll=Draw(30),
            episode=Draw(300, 6000),
            lr=6e-4,
            warmup=20,
            final_lr=0.05,
            average=0.98,
            objective=Objective(floor=1e-4, cap=2.0),
        ),
    ),
)

# The original draws initial log learning rates as u + o, uniform in [-6.9, -2.3] each; here they have the same mean and
# standard deviations.
PAPER = Recipe(
    config=HRNNConfig(global_input="last"),
    minutes=4000,
    validate_every=2000,
    stages=(
        Stage(
            "paper",
            200_000,
            paper_mixes,
            "bptt",
            rows=1,
            unroll=Draw(50, mean=200),
            episode=Draw(1, mean=40),
            clock="unrolls",
            optimizer="rmsprop",
            lr=1e-6,
            clip=1e4,
            objective=PaperObjective(),
            full_loss=True,
            second_order=True,
            sampled=5,
            augment=Augment((1e-4, 1e-4), 1.33, 1.33, loss_scale=(1.0, 1.0), base_fan_in=None, base_depth=None),
        ),
    ),
)

RECIPES = {"default": DEFAULT, "refine": REFINE, "lengthen": LENGTHEN, "paper": PAPER}
