"""One model trained by the processes of a group, each on its share of every batch.

    ddp   every process holds the whole model; gradients are averaged while they are computed
    fsdp  parameters, gradients and optimizer state are sharded (FSDP2); a module is whole only while it runs

The batch of a step is the same set of images for any number of processes, and their gradients are averaged, so training
is that of one process to float32 rounding. Only BatchNorm sees the difference: it normalises with the statistics of
the part of a batch that it is given, and those that are kept for evaluation are process 0's. `sync_bn` makes it
normalise with those of all processes.

A checkpoint holds whole tensors, as those of one process do, and goes on with any number of processes in either mode.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lopt.distributed import is_dtensor, spread
from lopt.train.config import Config
from lopt.train.group import Group

MODES = ("ddp", "fsdp")
UNIT = 1_000_000  # parameters, at least, of a module that is gathered as one; as FSDP1's size_based_auto_wrap_policy


def own_device(name: str) -> torch.device:
    """The device of this process: `cuda` is the one that `torchrun` numbered it for."""
    device = torch.device(name)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def join(device: torch.device) -> Group:
    """The group of this process: gloo for agreements, NCCL for tensors on GPUs."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return Group.from_environment("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def prepare(model: nn.Module, config: Config, group: Group) -> None:
    """What has to happen to a model before its optimizer is made, in place."""
    if group.size == 1 or config.parallel != "fsdp":
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (group.size,))
    for module in (*_units(model), model):
        fully_shard(module, mesh=mesh)


def unable_to_shard(device: torch.device) -> str | None:
    """Why FSDP2 cannot train on a device, or None."""
    if device.type == "cpu" and torch.__version__ < "2.9":  # gloo sums where it is to average
        return f"on CPUs FSDP2's gradients are right from PyTorch 2.9 on, this is {torch.__version__}"
    return None


def wrap(model: nn.Module, config: Config, group: Group) -> nn.Module:
    """What to call for a forward pass that is trained."""
    if group.size == 1 or config.parallel == "fsdp":
        return model
    device = next(model.parameters()).device
    ids = [device] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids)


def _units(model: nn.Module) -> list[nn.Module]:
    """Modules of at least UNIT parameters that no other of the list holds, inner ones first."""
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> int:
        """Parameters of a module that no unit has."""
        whole = isinstance(module, nn.MultiheadAttention)  # it reads the weights of its children without calling them
        left = sum(param.numel() for param in module.parameters(recurse=whole))
        left += 0 if whole else sum(map(visit, module.children()))
        if left < UNIT or isinstance(module, nn.ModuleList | nn.ModuleDict) or module is model:
            return left
        found.append(module)
        return 0

    visit(model)
    return found


@contextlib.contextmanager
def gradients(forward: Any, exchanged: bool) -> Iterator[None]:
    """Around forward and backward pass. exchanged: whether gradients are averaged, as in the last part of a batch."""
    if hasattr(forward, "set_requires_gradient_sync"):
        forward.set_requires_gradient_sync(exchanged)
    alone = not exchanged and isinstance(forward, nn.parallel.DistributedDataParallel)
    with forward.no_sync() if alone else contextlib.nullcontext():
        yield


def share_buffers(model: nn.Module, group: Group) -> None:
    """Process 0's buffers for all: BatchNorm's statistics are of what each process has seen."""
    if group.size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def reshard(model: nn.Module) -> None:
    """Give back what a forward pass without a backward pass has gathered."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]


def gathered(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict with whole tensors, those that were sharded on the CPU; without them in processes other than 0. All
    processes of the group have to call."""
    from torch.distributed.tensor import DTensor

    def whole(tensor: Tensor) -> Tensor | None:
        full = tensor.full_tensor()  # type: ignore[attr-defined]
        return full.cpu() if dist.get_rank() == 0 else None

    return tree_map_only(DTensor, whole, state)


def load_model(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load whole tensors into a model that may be sharded. Raises RuntimeError when they do not fit."""
    own = model.state_dict()
    model.load_state_dict({name: _sharded_like(own.get(name), value) for name, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load whole tensors into an optimizer whose parameters may be sharded, and which goes on with torch's kernels of
    its own choice: a fused one may take no shards. Raises ValueError when they do not fit."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    entries = {
        key: {name: _sharded_like(params[key], value) for name, value in entry.items()} if key < len(params) else entry
        for key, entry in state["state"].items()
    }
    groups = [dict(group) for group in state["param_groups"]]
    for group, own in zip(groups, optimizer.param_groups, strict=False):
        group |= {name: own[name] for name in ("foreach", "fused") if name in own}
    optimizer.load_state_dict({**state, "state": entries, "param_groups": groups})


def _sharded_like(own: Tensor | None, value: Any) -> Any:
    if is_dtensor(own) and isinstance(value, Tensor) and value.shape == own.shape:
        return spread(own, value.to(own.device), 0)
    return value
