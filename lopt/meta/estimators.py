"""Estimators of the gradient of the meta-loss by the meta-parameters, one interface.

An estimator restarts the tasks of a world whose episodes are over, advances it by one unroll and returns the meta-loss
and its gradient. Truncated backpropagation has little variance and ignores what happens after an unroll (and, of first
order, how gradients change with parameters). Persistent evolution strategies (Vicol, Metz, Sohl-Dickstein 2021) have no
such bias, at any length of the episodes, and more variance; plain evolution strategies see single unrolls.
Checked by tests/meta/test_estimators.py.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lopt.config import HRNNConfig
from lopt.meta.unroll import World
from lopt.metaparams import MetaParams


class Estimate(NamedTuple):
    """Meta-loss and meta-gradient of one unroll."""

    loss: float  # mean over rows, weighted over tasks
    losses: Tensor  # [P], mean over rows
    grad: Tensor  # [M], in the order of MetaParams.flat


class Estimator(Protocol):
    """What the three estimators have in common."""

    repeat: int  # copies that must share random numbers: `Random(generator, repeat)` of the worlds

    def __call__(self, meta: MetaParams, world: World, steps: int) -> Estimate:
        """Advance `world` by `steps` steps under `meta`, possibly perturbed, and estimate the meta-gradient."""
        ...


def unflatten(config: HRNNConfig, flat: Tensor) -> dict[str, Tensor]:
    """Vectors of meta-parameters, [*B, M], as the mapping that the update rule takes."""
    out = {}
    for name, (offset, shape) in MetaParams.layout(config).items():
        out[name] = flat[..., offset : offset + math.prod(shape)].reshape((*flat.shape[:-1], *shape))
    return out


def chosen(config: HRNNConfig, only: Sequence[str]) -> Tensor:
    """[M], bool: which meta-parameters have one of some names, with wildcards.

    Raises:
        ValueError: a name is none of this architecture's.
    """
    layout = MetaParams.layout(config)
    if unknown := [pattern for pattern in only if not fnmatch.filter(layout, pattern)]:
        raise ValueError(f"only={unknown[0]!r}: no meta-parameter has this name; there are {', '.join(layout)}")
    named = [any(fnmatch.fnmatch(name, pattern) for pattern in only) for name in layout]
    counts = [math.prod(shape) for _, shape in layout.values()]
    return torch.tensor(named).repeat_interleave(torch.tensor(counts))


def _estimate(world: World, losses: Tensor, grad: Tensor) -> Estimate:
    """losses: [R, P], of all processes. grad: [M]."""
    mean = losses.mean(0)
    return Estimate((mean * world.mix.weights).sum().item(), mean, grad)


class TruncatedBPTT:
    """Backpropagation through one unroll.

    Args:
        second_order: differentiate through the tasks' gradients as well.
    """

    repeat = 1

    def __init__(self, *, second_order: bool = False) -> None:
        self.second_order = second_order

    def __call__(self, meta: MetaParams, world: World, steps: int) -> Estimate:
        flat = meta.flat().detach().requires_grad_()
        named = unflatten(meta.config, flat)
        world.restart(named)
        losses = world.unroll(named, steps, derivatives=2 if self.second_order else 1)
        (grad,) = torch.autograd.grad((losses.mean(0) * world.mix.weights).sum(), flat)
        return _estimate(world, torch.cat(world.group.gather(losses.detach())), world.group.mean(grad))


class _EvolutionStrategy:
    """Antithetic pairs of perturbed optimizers: row i and row i + R/2 see the same world.

    Args:
        sigma: standard deviation of the perturbation of every meta-parameter.
        only: names of the meta-parameters to perturb, with wildcards; none: all. The gradient of the others is zero.
    """

    repeat = 2

    def __init__(self, sigma: float = 0.01, only: Sequence[str] = ()) -> None:
        self.sigma, self.only = sigma, only

    def _noise(self, meta: MetaParams, world: World) -> Tensor:
        generator, pairs = world.random.generator, world.rows // 2 * world.group.size
        noise = self.sigma * torch.randn(pairs, meta.count, generator=generator, device=generator.device)
        return noise * chosen(meta.config, self.only).to(noise) if self.only else noise

    def _losses(self, meta: MetaParams, world: World, steps: int, noise: Tensor) -> tuple[Tensor, list[int]]:
        """[R, P] under perturbed meta-parameters, of the pairs of all processes, and the tasks that were restarted."""
        if world.rows % 2 or world.random.repeat != 2:
            raise ValueError(
                f"antithetic pairs need an even number of rows of Random(.., repeat=2), got {world.rows} rows, "
                f"repeat={world.random.repeat}"
            )
        with torch.no_grad():
            flat, own = meta.flat(), noise.chunk(world.group.size)[world.group.rank]
            named = unflatten(meta.config, torch.cat([flat + own, flat - own]))
            restarted = world.restart(named)
            parts = world.group.gather(world.unroll(named, steps, derivatives=0))
            halves = zip(*(part.chunk(2) for part in parts), strict=True)
            return torch.cat([torch.cat(half) for half in halves]), restarted


class ES(_EvolutionStrategy):
    """Evolution strategies on single unrolls. Both members of a pair start each of them from the first one's state."""

    def __call__(self, meta: MetaParams, world: World, steps: int) -> Estimate:
        noise = self._noise(meta, world)
        losses, _ = self._losses(meta, world, steps, noise)
        world.copy_first_half()
        plus, minus = losses.chunk(2)
        slope = ((plus - minus) * world.mix.weights).sum(-1) / (2 * self.sigma**2)
        return _estimate(world, losses, slope @ noise / len(noise))


class PES(_EvolutionStrategy):
    """Persistent evolution strategies: an unroll's loss is credited to all noise since the task's start.

    Noise that stays for several unrolls adds up to less over an episode, and its effects to more: less variance, no
    bias (Li, Swersky, Ryu, Xie, Zemel 2023, "Variance-Reduced Gradient Estimation via Noise-Reuse in Online Evolution
    Strategies").

    Args:
        sigma, only: as above.
        reuse: unrolls of a world under the same noise. 1: the original estimator.
    """

    def __init__(self, sigma: float = 0.01, reuse: int = 1, only: Sequence[str] = ()) -> None:
        super().__init__(sigma, only)
        self.reuse = reuse

    def __call__(self, meta: MetaParams, world: World, steps: int) -> Estimate:
        noise = world.noise if world.noise_age < self.reuse else None
        if fresh := noise is None:
            noise = self._noise(meta, world)
        losses, restarted = self._losses(meta, world, steps, noise)
        if world.perturbation is None:
            world.perturbation = noise.new_zeros(len(noise), len(world.mix), meta.count)
        if fresh:
            world.noise_age = 0
            world.perturbation += noise[:, None]
        world.perturbation[:, restarted] = noise[:, None]
        world.noise, world.noise_age = noise, world.noise_age + 1
        plus, minus = losses.chunk(2)
        slope = (plus - minus) * world.mix.weights / (2 * self.sigma**2)  # [R/2, P]
        grad = slope.flatten() @ world.perturbation.flatten(0, 1) / len(noise)
        return _estimate(world, losses, grad)
