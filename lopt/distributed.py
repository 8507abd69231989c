"""Parameters of which each process holds a shard: DTensors, as FSDP2's `fully_shard` and tensor parallelism make them.

The stages of a step see local shards. What they need of the other processes is summed over those that share a tensor:

    agree       before `advance`: which parameters have a gradient on any process, and whether any gradient is
                non-finite. State is updated in place, so this has to be known before the first value is written.
                4 bytes, and 4 more per parameter.
    Shards.sum  between `advance` and `summarise`: the sums over whole tensors and the updates of sampled parameters,
                228 bytes per tensor for the shipped meta-parameters. What follows of them is the same on every process.

There are two because `advance` makes the sums in the very pass over memory that overwrites the state, and what it
overwrites follows neither from the new state nor from the gradient. For a flag that came with the sums, a copy of the
state would have to be kept, or a second pass made: 76 bytes per parameter, to save a message that is mostly latency.
On two gloo processes of one busy machine with two cores, for the 161 tensors of ResNet-50, `agree` sends for 0.4 to
8 ms and `Shards.sum` for 0.5 to 4 ms (least and median), beside a step of 1.6 to 2.3 s. On a mesh of several dimensions
each of the two is one all-reduce for every dimension along which a tensor is sharded.

Every process takes part in both at every step, whatever gradients it has, so none waits for another in vain. A
gradient that is missing here and present elsewhere counts as zero here; one that is missing everywhere leaves its
parameter alone. All processes list the same parameters in the same order.

State per parameter (see lopt/state.py) is a DTensor sharded like its parameter, one dimension further in where it has
a leading one; state per tensor and the global state are plain tensors, the same on every process.

A mean square is non-zero after the first step, unless ms_eps is 0: then each shard decides for itself whether it has a
past to average with, and a step may differ from that of the whole tensor.

Tests: tests/test_distributed.py.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lopt.config import GRADIENT_LIMIT
from lopt.state import sampled

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Peers(NamedTuple):
    """Processes that hold shards of the same tensors, and the type of device over which they communicate."""

    group: dist.ProcessGroup
    device: str


class Shards(NamedTuple):
    """The tensors of one step, of which this process holds shards.

    Attributes:
        params, grads: T parameters that take part on any process, and their gradients' local shards, real numbers.
        numel: parameters of each whole tensor.
        empty: those of which nothing is here.
        rows: which of the tensors each set of processes shares.
        skip: [] other than 0: a gradient is non-finite on some process.
    """

    params: list[Tensor]
    grads: list[Tensor]
    numel: list[int]
    empty: list[int]
    rows: dict[Peers, list[int]]
    skip: Tensor

    def take(self, indices: Sequence[int]) -> Shards:
        """Some of the tensors, in their order."""
        place = {index: position for position, index in enumerate(indices)}
        rows = {peers: [place[row] for row in rows if row in place] for peers, rows in self.rows.items()}
        return Shards(
            [self.params[index] for index in indices],
            [self.grads[index] for index in indices],
            [self.numel[index] for index in indices],
            [place[index] for index in self.empty if index in place],
            {peers: own for peers, own in rows.items() if own},
            self.skip,
        )

    def nonempty(self) -> Shards:
        """Those of the tensors that have values on any process."""
        return self.take([index for index, count in enumerate(self.numel) if count > 0])

    def sum(self, sums: Tensor, update: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Complete the sums over each tensor, [T, K], in place, and the updates of sampled parameters.

        Args:
            update: [n]. places: [T, SAMPLES] where in it sampled parameters stand, below 0: not here; None without
                distances.

        Returns:
            The updates of all sampled parameters in one vector, the same on every process, and where they stand there.
        """
        for row in self.empty:
            sums[row].zero_()
        table = sums
        if places is not None:
            table = torch.cat([sums, torch.where(places < 0, 0.0, update[places])], 1)
        for peers, rows in self.rows.items():
            _sum(table, rows, peers)
        if places is None:
            return update, None
        sums.copy_(table[:, : sums.shape[1]])
        sample = table[:, sums.shape[1] :].reshape(-1)
        return sample, torch.arange(len(sample), device=places.device).view_as(places)

    def sampled(self, index: int) -> np.ndarray:
        """`lopt.state.sampled` of a whole tensor as indices of its local shard, below 0 for what is not there."""
        param = self.params[index]
        indices = sampled(real(param).shape)
        if is_dtensor(param):
            for dim, size in enumerate(param.shape):
                here, place = _along(param, dim), np.full(size, -1)
                place[here] = np.arange(len(here))
                indices[:, dim] = place[indices[:, dim]]
        return indices


def is_dtensor(tensor: Any) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor, found out without importing what makes them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of real numbers, others as they are. A view."""
    if not tensor.is_complex():
        return tensor
    return like(tensor, torch.view_as_real(local(tensor)), 0) if is_dtensor(tensor) else torch.view_as_real(tensor)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a DTensor; other tensors as they are."""
    if not is_dtensor(tensor):
        return tensor
    shard = tensor._local_tensor  # the same object each time: `to_local` makes another of a parameter
    if hasattr(shard, "wait"):  # it may still be on its way from another process
        shard = shard.wait()
    return shard.detach() if shard.requires_grad else shard


def layout(param: Tensor) -> tuple[Any, ...]:
    """What decides, beside a local shard, which part of a DTensor it is; () for other tensors."""
    return (param.shape, tuple(param.placements), param.device_mesh) if is_dtensor(param) else ()


def like(param: DTensor, shard: Tensor, outer: int) -> Tensor:
    """A DTensor sharded like `param`, of a local shard with `outer` leading dimensions more."""
    from torch.distributed.tensor import DTensor

    inner = (*param.shape, *shard.shape[outer + param.dim() :])
    shape = torch.Size((*shard.shape[:outer], *inner))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        shard, param.device_mesh, placements(param, outer), run_check=False, shape=shape, stride=stride
    )


def placements(param: DTensor, outer: int) -> list[Any]:
    """How state with `outer` leading dimensions more than its parameter lies on the parameter's mesh."""
    moved: list[Any] = []
    placement: Any
    for placement in param.placements:
        if placement.is_partial():
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} is a DTensor of partial sums, {tuple(param.placements)}: "
                f"redistribute it as Shard or Replicate before it is optimized"
            )
        moved.append(placement if placement.is_replicate() else _shard(placement, placement.dim + outer))
    return moved


def spread(param: DTensor, value: Tensor, outer: int) -> Tensor:
    """A state to load, a whole tensor or a DTensor, sharded like `param` with `outer` leading dimensions more."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = param.device_mesh
    if is_dtensor(value) and value.device_mesh != mesh:
        value = whole(value)
    if not is_dtensor(value):
        value = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return _carried(value).redistribute(mesh, placements(param, outer)).to(value.dtype)


def whole(value: Tensor) -> Tensor:
    """All of a DTensor, on every process; other tensors as they are."""
    return _carried(value).full_tensor().to(value.dtype) if is_dtensor(value) else value


def _carried(value: DTensor) -> DTensor:
    """In a dtype that gloo and NCCL carry, which int16, of compact state, is not."""
    return cast("DTensor", value.to(torch.int32)) if value.dtype == torch.int16 else value


def _along(param: DTensor, dim: int) -> np.ndarray:
    """Which indices of a dimension of a DTensor are in its local shard, in their order."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = param.device_mesh
    placements: list[Any] = [Replicate()] * mesh.ndim
    placement: Any
    for mesh_dim, placement in enumerate(param.placements):
        if not placement.is_replicate() and placement.dim == dim:
            placements[mesh_dim] = _shard(placement, 0)
    whole = torch.arange(param.shape[dim], device=mesh.device_type)
    spread_out = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return local(spread_out.redistribute(mesh, placements)).cpu().numpy()


def _shard(placement: Any, dim: int) -> Any:
    """The same placement along another dimension."""
    from torch.distributed.tensor import Shard

    if hasattr(placement, "split_factor"):  # sharded over an outer mesh dimension last, as FSDP2 after another
        return type(placement)(dim, split_factor=placement.split_factor)
    return Shard(dim)


def any_sharded(params: Sequence[Tensor]) -> bool:
    """Whether a parameter is a DTensor."""
    return any(map(is_dtensor, params))


def within_limit(grads: Iterable[Tensor], grad_scale: Tensor | None, device: torch.device) -> Tensor:
    """Whether no value of real gradients is beyond the limit, in the arithmetic of the stages: [] on `device`, bool."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        if grad.numel() > 0:
            alike.setdefault((grad.device, grad.dtype), []).append(grad)
    if not alike:
        return torch.ones((), dtype=torch.bool, device=device)
    norms = [torch.nn.utils.get_total_norm(group, math.inf).to(device, torch.float32) for group in alike.values()]
    largest = torch.stack(norms).amax()
    if grad_scale is not None:
        largest = largest * grad_scale.to(device=device, dtype=torch.float32).reshape(()).reciprocal()
    return largest <= GRADIENT_LIMIT


@torch.no_grad()
def agree(params: Sequence[Tensor], found_inf: Tensor | None, grad_scale: Tensor | None, *, exchange: bool) -> Shards:
    """Find out, with all processes, which parameters take part in a step, and whether it has to be skipped.

    Args:
        params: all parameters of the optimizer, in the same order on every process.
        found_inf, grad_scale: of GradScaler, or None.
        exchange: whether to ask the others which gradients they have, at the cost of waiting for the device. Without,
            a parameter has a gradient everywhere or nowhere.

    Raises:
        RuntimeError: a gradient is no DTensor where its parameter is one.
    """
    grads = [_gradient(param) for param in params]
    device = next(param.device for param in params if is_dtensor(param))
    overflow = torch.zeros((), device=device) if found_inf is None else local(found_inf).reshape(()).to(device)
    overflow = overflow + ~within_limit((grad for grad in grads if grad is not None), grad_scale, device)
    asked = params if exchange else []
    present = [grad is not None for grad in grads]
    flags = torch.cat([overflow.float()[None], torch.tensor(present[: len(asked)]).to(overflow)])
    for peers, rows in _peers(params).items():
        _sum(flags, [0, *(1 + row for row in rows if row < len(asked))], peers)
    if exchange:
        present = [count > 0 for count in flags.tolist()[1:]]
    taking_part: list[Tensor] = []
    own: list[Tensor] = []
    empty: list[int] = []
    for param, grad, takes_part in zip(params, grads, present, strict=True):
        if takes_part:
            shard = real(local(param))
            if shard.numel() == 0:
                empty.append(len(own))
            own.append(torch.zeros_like(shard) if grad is None else grad)
            taking_part.append(param)
    numel = [param.numel() * (1 + param.is_complex()) for param in taking_part]
    return Shards(taking_part, own, numel, empty, _peers(taking_part), flags[0])


def _gradient(param: Tensor) -> Tensor | None:
    """The local shard of a parameter's gradient as real numbers, None without one."""
    grad = param.grad
    if grad is None:
        return None
    if is_dtensor(param):
        if not is_dtensor(grad):
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} is a DTensor and its gradient is not: make the gradient "
                f"one with torch.distributed.tensor.distribute_tensor"
            )
        if grad.placements != param.placements:
            grad = grad.redistribute(param.device_mesh, param.placements)
    return real(local(grad).resolve_neg().resolve_conj())


def _peers(params: Sequence[Tensor]) -> dict[Peers, list[int]]:
    """Which of the parameters are sharded over which processes; a replica has what it needs."""
    rows: dict[Peers, list[int]] = {}
    for index, param in enumerate(params):
        if is_dtensor(param):
            mesh = param.device_mesh
            for dim, placement in enumerate(param.placements):
                if not placement.is_replicate() and mesh.size(dim) > 1:
                    rows.setdefault(Peers(mesh.get_group(dim), mesh.device_type), []).append(index)
    return rows


@functools.lru_cache(maxsize=64)
def _index(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """Rows of a table, on its device: sending them at every step would make the step wait."""
    return torch.tensor(rows, device=device)


def _sum(table: Tensor, rows: list[int], peers: Peers) -> None:
    """Add up rows of a table, [T] or [T, K], over processes, in place. All of them get the same bits."""
    index = None if len(rows) == len(table) else _index(tuple(rows), table.device)
    part = (table if index is None else table[index]).to(peers.device)
    dist.all_reduce(part, group=peers.group)
    if index is None:
        table.copy_(part)
    else:
        table[index] = part.to(table.device)
