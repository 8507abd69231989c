"""How good meta-parameters are on tasks they are not trained on, beside Adam.

The tasks are of the families of meta-training, most of them of other shapes and many larger; steps are those of
`lopt.HRNN` at its defaults. Everything is drawn from a fixed seed, so that scores of different meta-parameters can be
compared; Adam gets the same data and starts, at each of seven rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lopt.config import HRNNConfig
from lopt.meta.estimators import unflatten
from lopt.meta.tasks import Random, Task
from lopt.meta.tasks import networks as nets
from lopt.meta.unroll import Augment, Draw, Mix, World
from lopt.metaparams import MetaParams
from lopt.options import BASE_DEPTH, BASE_FAN_IN, INIT_LR

ADAM_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SHARE = 0.1  # of the steps, at the end, whose mean loss is the final loss
FLOOR = 1e-8  # of a loss relative to its start


def validation_tasks() -> dict[str, Task]:
    """Name and task; between 200 and 6,000 parameters.

    The last seven have samples like those of real data, and as many: wrong labels that a network can just learn by
    heart, classes that it can tell apart to the end, recurrences that are slow to find what they need.
    """
    relu, tanh, gelu = torch.relu, torch.tanh, torch.nn.functional.gelu
    return {
        "softmax": nets.Linear(24, 8, samples=512, noise=0.1),
        "mlp": nets.MLP((32, 32), relu, features=20, outputs=10, samples=512),
        "mlp_noisy": nets.MLP((32,), relu, features=20, outputs=5, samples=512, noise=0.2),
        "deep": nets.MLP((12,) * 6, relu, features=12, outputs=4, samples=384),
        "conv_bn": nets.Conv((8, 8), 6, samples=192, batch=16),
        "attention": nets.Attention(10, 6, 10, outputs=5, samples=384),
        "recurrent": nets.Recurrent(8, 8, 16, outputs=4, samples=384),
        "gru": nets.GRU(8, 8, 12, outputs=8, samples=384),
        "language": nets.Language(14, 12, 10, batch=16, samples=384),
        "autoencoder": nets.Autoencoder((12, 4, 12), gelu, features=20, samples=384),
        "regression": nets.MLP((24, 24), tanh, features=10, outputs=2, regression=True, samples=384),
        "softmax_wide": nets.Linear(64, 10, samples=768),
        "softmax_wide_noisy": nets.Linear(64, 10, samples=768, noise=0.2),
        "mlp_wide_noisy": nets.MLP((32,), relu, features=64, outputs=10, samples=512, noise=0.2),
        "deep_wide": nets.MLP((24,) + (12,) * 5, relu, features=64, outputs=8, samples=512),
        "autoencoder_wide": nets.Autoencoder((24, 8, 24), gelu, features=64, samples=512),
        "regression_wide": nets.MLP((32, 32), tanh, features=32, outputs=2, regression=True, samples=384),
        "patterns_softmax": nets.Linear(64, 10, samples=1400, modes=3),
        "patterns_mlp": nets.MLP((32,), relu, features=64, outputs=10, samples=1400, modes=3),
        "patterns_mlp_noisy": nets.MLP((32,), relu, features=64, outputs=10, samples=1400, noise=0.2, modes=3),
        "patterns_deep": nets.MLP((16,) * 8, relu, features=64, outputs=10, samples=1400, modes=3),
        "patterns_gru": nets.GRU(8, 8, 24, outputs=10, samples=1400, modes=3),
        "patterns_autoencoder": nets.Autoencoder((32, 8, 32), tanh, features=64, samples=1400, modes=3),
        "language_long": nets.Language(32, 16, 24, batch=8, samples=600),
    }


class Curve:
    """Stands in for an objective: keeps every loss."""

    def __call__(self, losses: Tensor, start: Tensor) -> Tensor:
        """[K, R, P] -> itself."""
        return losses


class Scores(NamedTuple):
    """Per task and row, [P, R]: natural log of the loss relative to the start."""

    final: Tensor  # of the mean loss of the last tenth of the steps
    area: Tensor  # mean over the steps of the log


def scores(losses: Tensor) -> Scores:
    """losses: [K, R, P]; below zero counts as zero, as in meta-training."""
    losses = torch.where(losses.isfinite(), losses, 1e30).clamp(min=0)
    start = losses[0] + 1e-30
    last = max(1, round(SHARE * len(losses)))
    final = (losses[-last:].mean(0) / start + FLOOR).log()
    area = (losses / start + FLOOR).log().mean(0)
    return Scores(final.T, area.T)


def remarks(tasks: Sequence[Task], losses: Tensor) -> list[str]:
    """What of the tasks' losses, [K, R, P], does not count as it is: a line per task and reason, [] as a rule."""
    finite = losses.isfinite()
    reasons = {
        "not finite, and count as diverged": ~finite,
        "below zero, and count as zero: add to the loss what its lowest value is below zero": finite & (losses < 0),
    }
    found = []
    for index, task in enumerate(tasks):
        for reason, of in reasons.items():
            if count := int(of[..., index].sum()):
                found.append(
                    f"{type(task).__name__}: {count} of {of[..., index].numel()} validation losses are {reason}"
                )
    return found


def _world(
    tasks: Sequence[Task],
    config: HRNNConfig,
    rows: int,
    repeat: int,
    seed: int,
    init_lr: float,
    base_fan_in: float | None,
    base_depth: float | None,
    device: torch.device,
) -> World:
    random = Random(torch.Generator(device).manual_seed(seed), repeat)
    augment = Augment(
        (init_lr, init_lr), 0.0, 0.0, loss_scale=(1.0, 1.0), base_fan_in=base_fan_in, base_depth=base_depth
    )
    return World(Mix(tasks, config, device), rows, random, Draw(1e9), augment, Curve(), staggered=False)


def learned(
    meta: MetaParams,
    tasks: Sequence[Task],
    steps: int,
    *,
    rows: int = 2,
    seed: int = 1,
    init_lr: float = INIT_LR,
    base_fan_in: float | None = BASE_FAN_IN,
    base_depth: float | None = BASE_DEPTH,
) -> Tensor:
    """Losses of training the tasks with the learned optimizer: [K, rows, P]."""
    world = _world(tasks, meta.config, rows, 1, seed, init_lr, base_fan_in, base_depth, meta.device)
    with torch.no_grad():
        named = unflatten(meta.config, meta.flat())
        world.restart(named)
        return world.unroll(named, steps, derivatives=0)


def adam(
    tasks: Sequence[Task], steps: int, *, rows: int = 2, seed: int = 1, rates: Sequence[float] = ADAM_RATES
) -> Tensor:
    """Losses of training the same tasks with Adam: [rates, K, rows, P]."""
    world = _world(tasks, HRNNConfig(), len(rates) * rows, len(rates), seed, INIT_LR, None, None, torch.device("cpu"))
    with torch.no_grad():
        world.restart(MetaParams.init())
    mix, theta = world.mix, world.theta
    lr = torch.tensor(rates).repeat_interleave(rows)[:, None]
    mean, square, losses = torch.zeros_like(theta), torch.zeros_like(theta), []
    for step in range(1, steps + 1):
        batches = [
            task.minibatch(data, world.rows, world.random) for task, data in zip(mix.tasks, world.data, strict=True)
        ]
        loss, grad = mix.evaluate(theta, batches, create_graph=False)
        losses.append(loss)
        mean, square = 0.9 * mean + 0.1 * grad, 0.999 * square + 0.001 * grad.square()
        theta = theta - lr * (mean / (1 - 0.9**step)) / (torch.sqrt(square / (1 - 0.999**step)) + 1e-8)
    return torch.stack(losses).unflatten(1, (len(rates), rows)).movedim(1, 0)
