"""`lopt.HRNN`, the hierarchical-RNN learned optimizer behind the interface of torch.optim."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lopt import backends
from lopt.backends.reference import sums_columns
from lopt.config import GRADIENT_LIMIT, HRNNConfig
from lopt.metaparams import MetaParams
from lopt.state import init_global, init_state, like_parameter, rows

NONFINITE = ("skip", "raise")
LIKELY_A_LEARNING_RATE = 0.05


class _Tensors(NamedTuple):
    """The tensors that take part in a step on one device, as parallel lists with one entry per tensor."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Tensor]]
    maximize: list[bool]
    lr: list[float | Tensor]
    weight_decay: list[float]

    def state(self, name: str) -> list[Tensor]:
        """One kind of state of every tensor; empty where the architecture has no such kind."""
        return [state[name] for state in self.states] if name in self.states[0] else []


class HRNN(Optimizer):
    """Hierarchical-RNN learned optimizer: a small GRU per parameter, tensor and model reads gradients, writes updates.

    Wichrowska et al. 2017, "Learned Optimizers that Scale and Generalize". There is no learning rate to tune: each
    parameter's step length is learned and adapts while training.

    Args:
        params: parameters or parameter groups, real or complex, any floating dtype; the state is float32.
        lr: factor of the learned step, a float or a tensor with one element. Leave it at 1.0; schedules scale it.
        meta: meta-parameters: `MetaParams`, a path to a file, the name of shipped weights, or None for the default ones.
        init_lr: learning rate that every parameter starts from; it is adapted within the first 50-100 steps.
        weight_decay: decoupled, in AdamW's units: a step shrinks a tensor by lr * weight_decay * its learned rate.
        maximize: climb instead of descend.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the fastest usable on each parameter's device.
        nonfinite: what to do with a gradient that is NaN, infinite or beyond 1e18: "skip" leaves parameters and all state
            untouched in that step and counts it in `skipped_steps`; "raise" raises naming the tensor.
        foreach, differentiable: unsupported, raise if true.
        fused: None or True take a fused kernel where there is one (True insists), False the reference.
        capturable: accepted; the step needs no host synchronisation either way.

    Raises:
        ValueError: an argument is out of range; the message names it.
        RuntimeError: the requested backend cannot run here, or a gradient is sparse.

    Note:
        The state is 76 bytes per parameter. All tensors on a device share one global state, so the order of tensors in
        floating-point sums, and nothing else, ties a result to the order of the parameters.

        With meta-parameters that use attention the parameters hold, during training, the point at which gradients are
        wanted. Call `optimizer.eval()` before evaluating or saving the model, `optimizer.train()` before going on.
    """

    _step_supports_amp_scaling = True
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1.0,
        *,
        meta: MetaParams | str | os.PathLike[str] | None = None,
        init_lr: float = 1e-3,
        weight_decay: float = 0.0,
        maximize: bool = False,
        backend: str | None = None,
        nonfinite: str = "skip",
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        if nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite={nonfinite!r} must be one of {', '.join(NONFINITE)}")
        backends.check_name(backend)
        self.meta = MetaParams.resolve(meta)
        self.nonfinite = nonfinite
        self.backend = backend
        self._skipped: Tensor | None = None
        self._workspace: dict[torch.device, Tensor] = {}
        defaults = {
            "lr": lr, "init_lr": init_lr, "weight_decay": weight_decay, "maximize": maximize, "foreach": foreach,
            "fused": fused, "capturable": capturable, "differentiable": differentiable, "train_mode": True,
        }
        _check_group(defaults)
        if not isinstance(lr, Tensor) and 0 < lr <= LIKELY_A_LEARNING_RATE:
            warnings.warn(
                f"lr={lr} multiplies the learned step, which has its own learning rate: leave lr at 1.0. "
                f"To choose where the learned rate starts, pass init_lr={lr}.", stacklevel=2)
        super().__init__(params, defaults)

    @property
    def config(self) -> HRNNConfig:
        """Architecture of the meta-parameters."""
        return self.meta.config

    @property
    def skipped_steps(self) -> int:
        """Steps that changed nothing because of a non-finite gradient, since this object was made."""
        return 0 if self._skipped is None else int(self._skipped.item())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own, as `torch.optim.Optimizer.add_param_group` does.

        Raises:
            ValueError: an option of the group is out of range.
            TypeError: a parameter is not of a floating or complex dtype.
        """
        if isinstance(param_group, dict):
            _check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for index, param in enumerate(self.param_groups[-1]["params"]):
            if not (param.is_floating_point() or param.is_complex()):
                self.param_groups.pop()
                raise TypeError(f"parameter {index} of the group has dtype {param.dtype}; HRNN optimizes floating and complex "
                                f"tensors: leave it out")

    def __getstate__(self) -> dict[str, Any]:
        own = {"meta": self.meta, "nonfinite": self.nonfinite, "backend": self.backend, "_skipped": self._skipped}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._workspace = {}
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._share_global_hidden()

    def _share_global_hidden(self) -> None:
        """Make the states of all parameters on a device hold the same global tensor, as copies and loads undo."""
        shared: dict[torch.device, Tensor] = {}
        for state in self.state.values():
            if "global_hidden" in state:
                hidden = state["global_hidden"]
                state["global_hidden"] = shared.setdefault(hidden.device, hidden)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned. The state keeps its own dtype, whatever the parameters' is.

        Raises:
            ValueError: the groups do not match, or a state has another architecture or shape; nothing is changed then.
        """
        loaded: dict[str, Any] = {}

        def capture(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
            loaded.update(state_dict)
            self._check_loadable(state_dict)

        handle = self.register_load_state_dict_pre_hook(capture)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        sizes = {row.name: row.size(self.config) for row in rows(self.config, "parameter")} | {"attended": None}
        for index, param in self._indexed(loaded):
            for name, value in loaded["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    # Undo the cast to the parameter's dtype, and share no memory with the dictionary.
                    value = value.detach().to(device=param.device, copy=True)
                    self.state[param][name] = like_parameter(value, _real(param), sizes[name]) if name in sizes else value
        self._share_global_hidden()

    def _indexed(self, state_dict: dict[str, Any]) -> Iterable[tuple[Any, Tensor]]:
        """Pairs of a parameter's key in a state dictionary and the parameter."""
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        return zip(keys, params, strict=False)

    def _check_loadable(self, state_dict: dict[str, Any]) -> None:
        expected = {row.name: row for row in rows(self.config)}
        for index, param in self._indexed(state_dict):
            state = state_dict["state"].get(index, {})
            if state and (missing := [name for name in expected if name not in state]):
                raise ValueError(f"the state of parameter {index} lacks {missing}: it was saved by another optimizer, or by "
                                 f"HRNN with another architecture; pass the same meta as when it was saved")
            for name, value in state.items():
                if name not in expected or not isinstance(value, Tensor):
                    continue
                size = expected[name].size(self.config)
                outer = () if size is None else (size,)
                shape = (*outer, *_real(param).shape) if expected[name].per == "parameter" else outer
                if tuple(value.shape) != shape:
                    raise ValueError(f"{name!r} of parameter {index} has shape {tuple(value.shape)} in the state to load and "
                                     f"must be {shape}: another model, or another architecture of the optimizer")

    def train(self, mode: bool = True) -> None:
        """Put the point at which gradients are wanted into the parameters. Does nothing without attention."""
        for group in self.param_groups:
            if group["train_mode"] == mode:
                continue
            group["train_mode"] = mode
            for param in group["params"]:
                state = self.state.get(param, {})
                if "true_param" not in state:
                    continue
                with torch.no_grad():
                    if mode:
                        param.copy_(state.pop("attended"))
                    else:
                        state["attended"] = param.detach().clone()
                        _real(param).copy_(state["true_param"])

    def eval(self) -> None:
        """Put the optimized parameters into the model, for evaluation and saving. Does nothing without attention."""
        self.train(False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Perform one step on the parameters that have a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: a gradient is sparse, the optimizer is in `eval` mode while using attention, or, with
                nonfinite="raise", a gradient is not finite. Parameters and state are as before.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        by_device: dict[torch.device, _Tensors] = {}
        for group in self.param_groups:
            self._init_group(group, by_device)
        if self.nonfinite == "raise" and found_inf is None:
            self._raise_nonfinite()
        skip = torch.zeros(()) if len(by_device) != 1 else torch.zeros((), device=next(iter(by_device)))
        if found_inf is not None:
            skip = skip + found_inf.to(skip.device).reshape(())
        if len(by_device) > 1:
            # One device's overflow must hold back the others before any of them has moved.
            for tensors in by_device.values():
                for grad in tensors.grads:
                    skip = skip + (~_within_limit(grad, grad_scale)).to(device=skip.device, dtype=skip.dtype)
        for device, tensors in by_device.items():
            skip = skip.to(device)
            self._step_device(device, tensors, skip, grad_scale)
        if self._skipped is None:
            self._skipped = torch.zeros((), device=skip.device)
        self._skipped = self._skipped.to(skip.device).add_(skip != 0)
        return loss

    def _init_group(self, group: dict[str, Any], by_device: dict[torch.device, _Tensors]) -> None:
        """Sort a group's tensors with a gradient by device, making their state at the first sight of them."""
        if self.config.attention and not group["train_mode"]:
            raise RuntimeError("step() was called in eval mode: the parameters hold the point to evaluate, not the one at which "
                               "gradients are wanted. Call optimizer.train() before the training step")
        lr, weight_decay, maximize = group["lr"], group["weight_decay"], group["maximize"]
        for param in group["params"]:
            grad = param.grad
            if grad is None:
                continue
            if grad.layout != torch.strided:
                raise RuntimeError("HRNN does not support sparse gradients: use sparse=False in the embedding, or another "
                                   "optimizer for its parameters")
            param, state = _real(param), self.state[param]
            if grad.is_complex():
                grad = torch.view_as_real(grad)
            if not state:
                self._init_state(param, state, group["init_lr"])
            if param.numel() == 0:
                continue
            hidden = state["hidden"]
            if hidden.device != param.device or hidden.shape[1:] != param.shape:
                raise RuntimeError(
                    f"a parameter has shape {tuple(param.shape)} on {param.device}, its state was made for "
                    f"{tuple(hidden.shape[1:])} on {hidden.device}. After moving a model call "
                    f"optimizer.load_state_dict(optimizer.state_dict()); after changing shapes make another optimizer")
            if hidden.stride()[1:] != param.stride():
                for row in rows(self.config, "parameter"):
                    state[row.name] = like_parameter(state[row.name], param, row.size(self.config))
            tensors = by_device.get(param.device)
            if tensors is None:
                tensors = by_device[param.device] = _Tensors([], [], [], [], [], [])
            tensors.params.append(param)
            tensors.grads.append(grad)
            tensors.states.append(state)
            tensors.maximize.append(maximize)
            tensors.lr.append(lr)
            tensors.weight_decay.append(weight_decay)

    def _init_state(self, param: Tensor, state: dict[str, Tensor], init_lr: float) -> None:
        log_lr = min(max(math.log(init_lr), self.config.log_lr_min), self.config.log_lr_max)
        shared = next((other["global_hidden"] for other in self.state.values()
                       if "global_hidden" in other and other["global_hidden"].device == param.device), None)
        state.update(init_state(param, self.meta, log_lr))
        if self.config.levels >= 3:
            state["global_hidden"] = init_global(self.meta, param.device) if shared is None else shared

    def _step_device(self, device: torch.device, tensors: _Tensors, skip: Tensor, grad_scale: Tensor | None) -> None:
        """The three stages, for all tensors of one device at once."""
        config = self.config
        count, numel = len(tensors.params), [param.numel() for param in tensors.params]
        total, columns = sum(numel), sums_columns(config).count
        directions = 1 + config.attention
        sizes = [total] * directions + [count * columns, count * directions]
        buffer = self._workspace.get(device)
        if buffer is None or buffer.numel() != sum(sizes):
            buffer = self._workspace[device] = torch.empty(sum(sizes), device=device)
        *updates, sums, scale = buffer.split(sizes)
        attention_update = updates[1] if config.attention else None
        sums, scale = sums.view(count, columns), scale.view(count, directions)
        backend = self._choose_backend(device)
        step, log_lr_mean, tensor_hidden = tensors.state("step"), tensors.state("log_lr_mean"), tensors.state("tensor_hidden")
        global_hidden = tensors.states[0].get("global_hidden", skip.new_empty(0))
        backend.advance(
            self.meta, tensors.grads, tensors.state("hidden"), tensors.state("accum"), tensors.state("ms"),
            tensors.state("log_lr"), step, tensor_hidden, global_hidden, log_lr_mean, numel=numel,
            maximize=tensors.maximize, grad_scale=grad_scale, skip=skip, update=updates[0],
            attention_update=attention_update, sums=sums)
        backend.summarise(
            self.meta, sums, tensor_hidden, global_hidden, log_lr_mean, step, numel=numel, skip=skip, scale=scale)
        backend.apply(
            self.meta, tensors.params, tensors.state("true_param"), updates[0], attention_update, scale, log_lr_mean,
            lr=tensors.lr, weight_decay=tensors.weight_decay, skip=skip)

    def _choose_backend(self, device: torch.device) -> Any:
        requested, fused = self.backend, self.defaults["fused"]
        if requested is None and fused is False:
            requested = "reference"
        backend = backends.choose(device, self.config, requested)
        if fused and backend.__name__.endswith(".reference"):
            raise RuntimeError(f"fused=True needs a kernel, and none is usable for these meta-parameters on {device.type}: "
                               f"see `lopt info`, or leave fused at None")
        return backend

    def _raise_nonfinite(self) -> None:
        for position, group in enumerate(self.param_groups):
            for index, param in enumerate(group["params"]):
                if param.grad is not None and not _within_limit(param.grad, None):
                    name = group["param_names"][index] if "param_names" in group else f"{index} of group {position}"
                    raise RuntimeError(f"the gradient of parameter {name}, shape {tuple(param.shape)}, is not finite. Nothing was "
                                       f"changed; nonfinite='skip' would pass over such steps")


def _real(param: Tensor) -> Tensor:
    """A complex parameter as pairs of real ones."""
    return torch.view_as_real(param) if param.is_complex() else param


def _within_limit(grad: Tensor, grad_scale: Tensor | None) -> Tensor:
    """Whether no value of a gradient counts as non-finite: [], bool."""
    if grad_scale is not None:
        grad = grad * grad_scale.to(grad.device).reciprocal()
    return (grad.abs() <= GRADIENT_LIMIT).all()


def _check_group(group: dict[str, Any]) -> None:
    """Raise ValueError if an option of a parameter group is out of range."""
    lr, init_lr, weight_decay = group["lr"], group["init_lr"], group["weight_decay"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    elif not 0 <= lr < math.inf:
        raise ValueError(f"Invalid learning rate: {lr}; it is a finite factor >= 0 of the learned step")
    if not 0 < init_lr < math.inf:
        raise ValueError(f"Invalid init_lr: {init_lr}; it is the positive learning rate to start from")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}; it must be finite and >= 0")
    for name in ("foreach", "differentiable"):
        if group[name]:
            raise ValueError(f"HRNN has no {name} implementation: leave {name} at its default")
