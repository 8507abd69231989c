"""`lopt.HRNN`, the hierarchical-RNN learned optimizer behind the interface of torch.optim."""

from __future__ import annotations

import copy
import functools
import math
import operator
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lopt import backends, compact, distributed
from lopt.backends.addresses import are
from lopt.backends.reference import sums_columns
from lopt.config import GRADIENT_LIMIT, HRNNConfig
from lopt.distributed import Shards, real, within_limit
from lopt.metaparams import MetaParams
from lopt.options import (
    BASE_DEPTH,
    BASE_FAN_IN,
    INIT_LR,
    OPTIONS,
    OWN_OPTIONS,
    Group,
    bounded,
    check_group,
    lowered,
    raised,
    rates_of,
    warn_of_small,
)
from lopt.state import (
    FORMATS,
    ROWS,
    SAMPLES,
    bytes_per_parameter,
    convert,
    init_global,
    init_state,
    like_parameter,
    rows,
    sampled,
    strides,
)

NONFINITE = ("skip", "raise")
OF_THE_WHOLE = {"meta", "min_lr", "annealed", "state_format", "backend", "nonfinite"}  # options, not a group's
ATTENDED = "attended"  # in eval mode, with attention: where gradients are wanted, as the parameters are at other times
PLANS = 2  # of a device: parameters may take turns in having gradients
FILE_RECORD, FILE_HEAD = 252, 750  # bytes of torch's file format per tensor and per file, about


class _Listed(NamedTuple):
    """The tensors that take part in a step, gradients left out; the next step has the same, as a rule."""

    tensors: list[Tensor]  # of each parameter: itself and its state, one behind the other
    columns: dict[str, tuple[Tensor, ...]]  # the same by kind, T each
    sizes: list[int]  # T
    fan_in: list[int]  # T, of the whole tensors where these are shards
    devices: dict[torch.device, list[int]]  # numbers of the tensors on each
    orders: list[tuple[Any, ...]]  # T, shape and strides of the state of a parameter, and of what it is a shard
    counts: list[int]  # of all parameters of each group
    matrices: list[Tensor]  # those of them with two or more dimensions


class _Plan(NamedTuple):
    """What all steps over tensors of the same sizes on one device have in common."""

    backend: ModuleType
    meta: MetaParams
    sizes: list[int]  # T, of what is on this device
    orders: list[tuple[Any, ...]]  # T, likewise
    places: Tensor | None  # [T, SAMPLES] in `update`, of sampled parameters, where there is a distance; see `_places`
    skip: Tensor  # []
    update: Tensor  # [n]
    attention_update: Tensor | None  # [n]
    sums: Tensor  # [T, K]
    scale: Tensor  # [T, 1], with attention [T, 2]

    def fits(self, sizes: list[int], orders: list[tuple[Any, ...]]) -> bool:
        """Whether it is for such tensors."""
        return self.sizes == sizes and self.orders == orders


class Memory(NamedTuple):
    """Bytes that an optimizer needs on one process, all parameters and their gradients left out.

    Attributes:
        state: kept between steps.
        buffers: kept beside it, for the update of a step.
        checkpoint: size of a file of `torch.save(optimizer.state_dict())`, to 2 %.
    """

    state: int
    buffers: int
    checkpoint: int


class HRNN(Optimizer):
    """Hierarchical-RNN learned optimizer: a small GRU per parameter, tensor and model reads gradients, writes updates.

    Wichrowska et al. 2017, "Learned Optimizers that Scale and Generalize". Direction and step length of each parameter
    are what the meta-parameters make of its gradients: trained ones, as are shipped, adapt the step length while the
    model trains; untrained ones (`MetaParams.init()`) take RMS-normalised steps of init_lr / e.

    Args:
        params: parameters or parameter groups, real or complex, any floating dtype; the state is float32.
        lr: factor of the learned step, a float or a tensor with one element. Leave it at 1.0; schedules scale it. Below
            0.5, learned rates rise slower too, in proportion, or they would make up for it.
        meta: meta-parameters: `MetaParams`, a path to a file, the name of shipped weights; None: hrnn-13.
        init_lr: learning rate that every parameter starts from.
        weight_decay: decoupled, in AdamW's units: a step shrinks a tensor by lr * weight_decay * its learned rate.
        base_fan_in: the step of a tensor of more inputs, the product of its dimensions behind the first, is multiplied
            by base_fan_in / inputs, as Adam's is in "Tensor Programs V" (Yang, Hu et al. 2022): a step of one length
            moves a layer's output the more the wider the layer is, and meta-training knows narrow ones. None: the same
            for all, the paper's rule.
        base_depth: with more matrices than this, parameters of two or more dimensions that require a gradient, all
            steps are multiplied by the root of base_depth / matrices, as Adam's are by depth in "Tensor Programs VI"
            (Yang, Yu, Zhu, Hayou 2024): the steps of many layers add up in the output, and meta-training knows few.
            None: the paper's rule.
        min_lr: no learned rate falls below it; None: below what the meta-parameters say. For the shipped ones that is
            the larger of 3e-3 / sqrt(1 + step / 100), or less where a group's init_lr is, and of 0.15 of a tensor's
            largest distance from its start, but at most of 1, over sqrt(1 + step). Theirs, too, is an upper bound: 8
            times the geometric mean of a tensor's rates.
        annealed: say True where a schedule takes lr to 0 in the end, by a cooldown, linearly or as a cosine: the bound
            by distance is then 5/3 as high, 0.25 for the shipped weights. What larger steps leave of the gradients'
            noise goes as lr falls; with a constant lr it stays.
        maximize: climb instead of descend.
        state_format: "float32", or "compact": 40 bytes of state per parameter instead of 76, at 16 bits a number; a
            step's numbers then differ by about 1e-3 of themselves. A checkpoint of either loads into either, but for
            `torch.distributed.checkpoint`, which reads into tensors of the same format alone.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the fastest usable on each parameter's device.
        nonfinite: what a gradient that is NaN, infinite or beyond 1e18 does: with "skip" the step leaves parameters and
            all state untouched and is counted in `skipped_steps`; "raise" raises naming the tensor.
        foreach, differentiable: unsupported, raise if true.
        fused: None or True take a fused kernel where there is one (True insists), False the reference.
        capturable: the step needs no host synchronisation either way, unless parameters are sharded: then it waits
            once to learn which have a gradient on any process. True promises all or none, and spares the wait.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Note:
        The state is 76 bytes per parameter, compact 40. All tensors on a device share one global state, so the order of
        tensors in floating-point sums, and nothing else, ties a result to the order of the parameters.

        Parameters may be DTensors, as `torch.distributed.fsdp.fully_shard` makes them; the result is that of training
        whole ones. A step then has two all-reduces, of 4 bytes and 228 bytes per tensor: see `lopt.distributed`.

        With meta-parameters that use attention the parameters hold, during training, the point at which gradients are
        wanted. Call `optimizer.eval()` before evaluating or saving the model, `optimizer.train()` before going on.
    """

    _step_supports_amp_scaling = True
    _made = False  # groups are not those of the constructor any more
    nonfinite: str = "skip"
    state_format: str = "float32"
    backend: str | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1.0,
        *,
        meta: MetaParams | str | os.PathLike[str] | None = None,
        init_lr: float = INIT_LR,
        weight_decay: float = 0.0,
        base_fan_in: float | None = BASE_FAN_IN,
        base_depth: float | None = BASE_DEPTH,
        min_lr: float | None = None,
        annealed: bool = False,
        maximize: bool = False,
        state_format: str = "float32",
        backend: str | None = None,
        nonfinite: str = "skip",
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        if nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite={nonfinite!r} must be one of {', '.join(NONFINITE)}")
        _check_format(state_format)
        backends.check_name(backend)
        options = {
            "lr": lr,
            "init_lr": init_lr,
            "weight_decay": weight_decay,
            "base_fan_in": base_fan_in,
            "base_depth": base_depth,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "differentiable": differentiable,
            "train_mode": True,
        }
        check_group(options)
        if annealed and min_lr is not None:
            raise ValueError(f"min_lr={min_lr!r} is the whole bound of the learned rates: leave annealed at False")
        self.meta = MetaParams.resolve(meta)
        self.state_format = state_format
        self._mark(options)
        if annealed:
            self.meta = raised(self.meta)
        if min_lr is not None:
            self.meta = bounded(self.meta, min_lr, steps=0.0, distance=0.0)
        self._given = self.meta, min_lr is not None
        self.nonfinite = nonfinite
        self.backend = backend
        self._skipped: dict[torch.device, Tensor] = {}
        self._captured: dict[int, _Plan] = {}
        self._prepare()
        super().__init__(params, options)
        warn_of_small(self.param_groups)
        self._made = True

    def _prepare(self) -> None:
        """Set what follows from the meta-parameters and is not saved."""
        names = [row.name for row in rows(self.config)]
        self._columns = ("param", *names)  # what `_init_group` lists of each tensor beside its gradient
        self._read_state = operator.itemgetter(*names)
        self._listed: _Listed | None = None
        self._plans: dict[torch.device, list[_Plan]] = {}  # the last used first
        self._states = 0  # parameters that had state when the plan last changed
        self._metas: dict[torch.device, MetaParams] = {}  # the meta-parameters there, one vector, as operators take it
        self._sharded: bool | None = None  # whether a parameter is a DTensor; found out at the next step

    @staticmethod
    def memory(
        params: Iterable[Any],
        *,
        meta: MetaParams | str | os.PathLike[str] | None = None,
        state_format: str = "float32",
    ) -> Memory:
        """What training these parameters will need, before it starts. Tensors on the meta device will do.

        Args:
            params: as for the optimizer; those that require a gradient count. Of a DTensor its local shard does.
            meta, state_format: as for the optimizer.

        Raises:
            TypeError, ValueError: an argument is not what it should be.
        """
        if isinstance(params, Tensor):
            raise TypeError("params must be an iterable of tensors or of groups, got a tensor: give it in a list")
        _check_format(state_format)
        config = MetaParams.resolve(meta).config
        given = [entry["params"] if isinstance(entry, dict) else [entry] for entry in params]
        listed = [group if isinstance(group, Tensor) else list(group) for group in given]
        entries = [entry for group in listed for entry in ([group] if isinstance(group, Tensor) else group)]
        unique = dict.fromkeys(entry[1] if isinstance(entry, tuple) else entry for entry in entries)
        tensors = [real(distributed.local(param)) for param in unique if param.requires_grad]
        values = sum(tensor.numel() for tensor in tensors)
        small = 4 * sum(row.size(config) or 1 for row in rows(config, "tensor"))
        models = 4 * config.global_size * len({tensor.device for tensor in tensors})
        state = values * bytes_per_parameter(config, state_format) + small * len(tensors) + models
        records = len(tensors) * (len(rows(config, "parameter")) + len(rows(config, "tensor"))) + bool(models)
        return Memory(state, 4 * values * (1 + config.attention), state + FILE_RECORD * records + FILE_HEAD)

    @property
    def config(self) -> HRNNConfig:
        """Architecture of the meta-parameters."""
        return self.meta.config

    @property
    def skipped_steps(self) -> int:
        """Steps that changed nothing because of a non-finite gradient, since this object was made."""
        return sum(map(int, self._skipped.values()))

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters with options of their own, as `torch.optim.Optimizer.add_param_group` does.

        Raises:
            ValueError: an option of the group is out of range.
        """
        if isinstance(param_group, dict):
            if misplaced := sorted(param_group.keys() & OF_THE_WHOLE):
                raise ValueError(f"{misplaced[0]} is of the whole optimizer, not of a group: pass it to HRNN")
            check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        self._sharded, self._listed = None, None
        self._bound()
        # Torch warns of a parameter listed twice; it is stepped once.
        group = self.param_groups[-1]
        self._mark(group)
        first = sorted({param: index for index, param in reversed(list(enumerate(group["params"])))}.values())
        for key in group.keys() & {"params", "param_names"}:
            group[key] = [group[key][index] for index in first]
        if self._made:
            warn_of_small([group])

    def _mark(self, options: dict[str, Any]) -> None:
        """Have a group, which may be another optimizer's, say what the state beside it in a file is made with."""
        options["meta_digest"] = self.meta.digest
        options.pop("ms_steps", None)
        if self.state_format == "compact":
            options["ms_steps"] = compact.MS_STEPS

    def _bound(self) -> None:
        """Keep the meta-parameters' own bound of the learned rates from lying above where a group's rates start."""
        meta, asked_for = self._given
        lowest = self._lowest = self._lowest_init_lr()
        if not asked_for and meta.config.log_lr_min > math.log(lowest):
            meta = lowered(meta, lowest)
        if meta.config != self.meta.config:
            self.meta, self._plans, self._metas = meta, {}, {}

    def _lowest_init_lr(self) -> float:
        return min([group["init_lr"] for group in self.param_groups], default=self.defaults["init_lr"])

    def __getstate__(self) -> dict[str, Any]:
        own = ("meta", "nonfinite", "state_format", "backend", "_skipped", "_given")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        counts = self.__dict__.get("_skipped", {})
        self._skipped = {}
        for count in counts.values() if isinstance(counts, dict) else (counts,):  # they may have been loaded elsewhere
            self._skipped[count.device] = count + self._skipped.get(count.device, 0)
        self.__dict__.setdefault("_captured", {})
        self.__dict__.setdefault("_given", (self.meta, False))
        self._prepare()
        self._made = True
        for options in (self.defaults, *self.param_groups):
            for name, default in OPTIONS.items():
                options.setdefault(name, self.defaults.get(name, default))
            self._mark(options)
        self._bound()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a copy of what `state_dict` returned, converted to this optimizer's state format.

        The state stays float32, or compact, whatever the parameters' dtype is.

        Raises:
            ValueError: the groups do not match, or are another optimizer's or of other meta-parameters, or an option is
                out of range, or a state has another architecture or shape, or was read into tensors of the other
                format; nothing is changed then.
        """
        loaded: dict[Tensor, dict[str, Any]] = {}

        # Torch casts state to the parameter's dtype, so it is given the groups alone: `take` runs after every other
        # pre-hook, `put` before every other post-hook.
        def take(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            if foreign := [group for group in state_dict["param_groups"] if not group.keys() & OWN_OPTIONS]:
                found = ", ".join(sorted(foreign[0].keys() - {"params"}))
                raise ValueError(
                    f"the groups to load have {found} and nothing of HRNN's: they were saved by another optimizer, "
                    f"with other learning rates. Load the model alone"
                )
            self._check_options(state_dict["param_groups"])
            keys = [(key, group) for group in state_dict["param_groups"] for key in group["params"]]
            params = [param for group in self.param_groups for param in group["params"]]
            rest = dict(state_dict["state"])
            entries = []
            for (key, group), param in zip(keys, params, strict=False):
                if state := rest.pop(key, None):
                    self._check_loadable(key, param, state)
                    entries.append((param, state, group))
            if entries:
                self._check_digest(state_dict["param_groups"])
            loaded.update(self._converted(entries))
            return {**state_dict, "state": rest}

        def put(_: Optimizer) -> None:
            self.state.update(loaded)

        hooks = self.register_load_state_dict_pre_hook(take), self.register_load_state_dict_post_hook(put, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _converted(self, entries: Sequence[tuple[Tensor, dict[str, Any], Group]]) -> dict[Tensor, dict[str, Any]]:
        """Each parameter with a copy of the state to load for it, as this optimizer has it."""
        converted: dict[Tensor, dict[str, Any]] = {}
        shared: dict[torch.device, Tensor] = {}
        without = False
        for param, state, group in entries:
            part = {name: distributed.local(state[name]) for name in ("hidden", "ms")}
            codes = compact.saved_codes(part, compact.limit(self.meta), group.get("ms_steps"))
            state = convert(state, self.meta, self.state_format, ms_steps=codes)
            if "true_param" in state and ATTENDED not in state and not group.get("train_mode", True):
                state[ATTENDED], without = state["true_param"], True
            own = converted[param] = {name: self._loaded(name, value, param) for name, value in state.items()}
            if "global_hidden" in own:
                own["global_hidden"] = shared.setdefault(param.device, own["global_hidden"])
        if without:
            warnings.warn(
                "the state to load was saved in eval mode and comes without the points at which gradients were wanted, "
                "as torch.distributed.checkpoint reads it: the next step takes them at the optimized parameters. To "
                "resume exactly, save after optimizer.train()",
                stacklevel=2,
            )
        return converted

    def _check_options(self, groups: Sequence[Group]) -> None:
        """Raise ValueError if an option of a group is out of range; lr is left out, as schedules end just below 0."""
        for group in groups:
            check_group({**self.defaults, **group, "lr": 1.0})

    def _check_digest(self, groups: Sequence[Group]) -> None:
        """Raise ValueError if groups to load are of other meta-parameters; warn of groups that do not say."""
        own = self.defaults["meta_digest"]
        for digest in (group.get("meta_digest") for group in groups):
            if digest is None:
                warnings.warn(
                    f"the state to load does not say with which meta-parameters it was made and is taken for one of "
                    f"this optimizer's, {MetaParams.known_as(own)}; earlier versions of lopt had other defaults. If it "
                    f"is of others, pass them as meta",
                    stacklevel=2,
                )
            elif digest != own:
                raise ValueError(
                    f"the state to load was made with other meta-parameters, {MetaParams.known_as(digest)}, than this "
                    f"optimizer's, {MetaParams.known_as(own)}, and means nothing to them: pass the same meta to HRNN "
                    f"as then, or do not load it"
                )

    def _check_loadable(self, key: Any, param: Tensor, state: dict[str, Any]) -> None:
        self._check_readable(distributed.local(param))
        expected = {row.name: row for row in rows(self.config)}
        missing = [name for name in expected if name not in state]
        surplus = [row.name for row in ROWS if row.name in state and row.name not in expected]
        if missing or surplus:
            raise ValueError(
                f"the state of parameter {key} {'lacks' if missing else 'has, beyond this architecture,'} "
                f"{', '.join(missing or surplus)}: it was saved by another optimizer, or by HRNN with another "
                f"architecture; pass the same meta, and min_lr, as when it was saved"
            )
        for name, row in expected.items():
            size = row.size(self.config)
            outer, inner = () if size is None else (size,), real(param).shape if row.per == "parameter" else ()
            found = tuple(getattr(state[name], "shape", ()))
            if found != (*outer, *inner):
                raise ValueError(
                    f"{name!r} of parameter {key} has shape {found} in the state to load and must have "
                    f"{(*outer, *inner)}: another model, or another architecture of the optimizer"
                )

    def _loaded(self, name: str, value: Any, param: Tensor) -> Any:
        """A value of a state to load, as a parameter's own: copied, on its device and in its memory order."""
        row, shard = next((row for row in ROWS if row.name == name), None), real(distributed.local(param))
        if row is None and name != ATTENDED:
            return value.detach().to(param.device, copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
        if not isinstance(value, Tensor):
            value = torch.as_tensor(value, device=param.device)
        dtype = shard.dtype if row is None else row.dtype(self.state_format)
        value = value.detach().to(device=param.device, dtype=dtype, copy=True)
        if row is not None and row.per != "parameter":  # a tensor of its parameter's shape may have been sharded for it
            return distributed.whole(value)
        outer = 0 if row is None or row.size(self.config) is None else 1
        if distributed.is_dtensor(param):
            value = distributed.local(distributed.spread(param, value, outer))
            return distributed.like(param, like_parameter(value, shard), outer)
        return like_parameter(distributed.whole(value), shard)

    @torch.no_grad()
    def train(self, mode: bool = True) -> None:
        """Put the point at which gradients are wanted into the parameters. Does nothing without attention."""
        for group in self.param_groups:
            for param in group["params"] if group["train_mode"] != mode else ():
                numbers, state = real(param), self.state.get(param, {})
                if "true_param" in state and mode:
                    numbers.copy_(state.pop(ATTENDED))
                elif "true_param" in state:
                    state[ATTENDED] = numbers.clone()
                    numbers.copy_(state["true_param"])
            group["train_mode"] = mode

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
            RuntimeError: a gradient is sparse or of another size than its parameter, the requested backend cannot run
                here, the optimizer is in `eval` mode while using attention, or, with nonfinite="raise", a gradient is
                not finite. Nothing has moved then.
            ValueError: a tensor lr has several elements. Nothing has moved then.
            TypeError: a parameter with a gradient is not of a floating or complex dtype.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.meta.config.attention and not all(group["train_mode"] for group in self.param_groups):
            raise RuntimeError(
                "step() was called in eval mode: the parameters hold the point to evaluate, not the one "
                "at which gradients are wanted. Call optimizer.train() before the training step"
            )
        if not torch.compiler.is_compiling() and self._lowest_init_lr() != self._lowest:  # changed in a group, or gone
            self._check_options(self.param_groups)
            self._bound()
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)  # set by GradScaler
        tensors: list[Tensor] = []
        grads: list[Tensor] = []
        groups: list[Group] = []
        has_complex, shards = False, None
        sharded = self._sharded
        if sharded is None:
            sharded = distributed.any_sharded([param for group in self.param_groups for param in group["params"]])
            if not torch.compiler.is_compiling():  # which cannot set attributes of an optimizer before PyTorch 2.12
                self._sharded = sharded
        if sharded:
            shards = self._agree(found_inf, grad_scale)
            groups = self._init_shards(shards, tensors, grads)
            shards, found_inf = shards.nonempty(), shards.skip
        else:
            if self.nonfinite == "raise" and found_inf is None:
                self._raise_nonfinite()
            for group in self.param_groups:
                before = len(grads)
                has_complex |= self._init_group(group, tensors, grads)
                groups += [group] * (len(grads) - before)
        if not groups:
            return loss
        listed = self._list(tensors, None if shards is None else shards.params)
        rates = rates_of(groups, listed.fan_in, sum(param.requires_grad for param in listed.matrices))
        columns, (first, *others) = {**listed.columns, "grad": tuple(grads)}, listed.devices
        if has_complex:
            columns |= {name: tuple(map(real, columns[name])) for name in ("param", "grad")}
        if not others:
            sizes, orders = listed.sizes, listed.orders
            skip = self._step_device(first, columns, sizes, orders, groups, rates, found_inf, grad_scale, shards)
        else:
            # One device's overflow must hold back the others before any of them has moved.
            overflow = (~within_limit(columns["grad"], grad_scale, first)).float()
            overflow = overflow if found_inf is None else overflow + found_inf.to(first)
            for device, here in listed.devices.items():
                own = {name: tuple(column[index] for index in here) for name, column in columns.items()}
                own_shards = None if shards is None else shards.take(here)
                sizes, orders = [listed.sizes[index] for index in here], [listed.orders[index] for index in here]
                own_groups, own_rates = [groups[index] for index in here], [rates[index] for index in here]
                skip = self._step_device(
                    device, own, sizes, orders, own_groups, own_rates, overflow, grad_scale, own_shards
                )
        # On the CPU a look costs less than an addition.
        if not skip.is_cpu or torch.compiler.is_compiling() or skip:
            self._skipped[skip.device].add_(skip)
        return loss

    def _list(self, tensors: list[Tensor], whole: Sequence[Tensor] | None) -> _Listed:
        """What `_init_group` has listed, by kind; the same objects as in the last step if that had the same tensors.

        Args:
            tensors: the list. whole: the parameters, where those of the list are shards of them.
        """
        listed, compiling = self._listed, torch.compiler.is_compiling()
        counts = [len(group["params"]) for group in self.param_groups]
        if listed is None or compiling or counts != listed.counts or not are(tensors, listed.tensors):
            width, params = len(self._columns), tensors[:: len(self._columns)]
            devices: dict[torch.device, list[int]] = {}
            for index, param in enumerate(params):
                devices.setdefault(param.device, []).append(index)
            columns = {name: tuple(tensors[index::width]) for index, name in enumerate(self._columns)}
            listed = _Listed(
                tensors,
                columns,
                [real(param).numel() for param in params],
                [math.prod(param.shape[1:]) for param in whole or params],
                devices,
                [
                    (hidden.shape[1:], hidden.stride()[1:], distributed.layout(param))
                    for hidden, param in zip(columns["hidden"], whole or params, strict=True)
                ],
                counts,
                [param for group in self.param_groups for param in group["params"] if param.dim() > 1],
            )
            if not compiling:
                self._listed = listed
                self._share(columns.get("global_hidden", ()))
        return listed

    def _share(self, used: Sequence[Tensor]) -> None:
        """Have all parameters of a device share a step's global state, as those moved one by one do no longer."""
        of_device = {hidden.device: hidden for hidden in reversed(used)}
        for state in self.state.values():
            if isinstance(state, dict) and (hidden := state.get("global_hidden")) is not None:
                state["global_hidden"] = of_device.get(hidden.device, hidden)

    def _init_group(self, group: Group, tensors: list[Tensor], grads: list[Tensor]) -> bool:
        """List the tensors of a group that take part in a step, making their state at the first sight of them.

        Args:
            group: a parameter group.
            tensors: extended by `_columns` of each parameter with a gradient and at least one value, one behind the
                other: a flat list of tensors is what torch.compile hands on.
            grads: extended by the gradients.

        Returns:
            Whether a parameter is complex.
        """
        has_complex, states, read_state = False, self.state, self._read_state
        for param in group["params"]:
            grad = param.grad
            if grad is None:
                continue
            if grad.layout is not torch.strided:
                raise _sparse()
            state = states[param]
            if "hidden" not in state:
                self._init_state(real(param), state, group["init_lr"])
            numel, hidden = param.numel(), state["hidden"]
            if numel == 0:
                continue
            if grad.numel() != numel:
                raise _stale(param)
            if grad.is_neg() or grad.is_conj():  # kernels read memory, where the sign is another
                grad = grad.resolve_neg().resolve_conj()
            if hidden.stride() != (numel, *param.stride()) or hidden.device != param.device:
                has_complex |= param.is_complex()
                self._fit_state(real(param), state)
            tensors += (param, *read_state(state))
            grads.append(grad)
        return has_complex

    def _init_state(self, param: Tensor, state: dict[str, Tensor], init_lr: float) -> None:
        if not param.is_floating_point():
            raise TypeError(
                f"a parameter of shape {tuple(param.shape)} has dtype {param.dtype} and a gradient; HRNN "
                f"optimizes floating and complex tensors: leave it out"
            )
        self._check_readable(param)
        if _capturing(param.device):
            raise _unprepared()
        log_lr = min(max(math.log(init_lr), self.config.log_lr_min), self.config.log_lr_max)
        shared = (
            other["global_hidden"]
            for other in self.state.values()
            if isinstance(other, dict) and "global_hidden" in other and other["global_hidden"].device == param.device
        )
        state.update(init_state(param, self.meta, log_lr, state_format=self.state_format))
        if self.config.levels >= 3:
            first = next(shared, None)
            state["global_hidden"] = init_global(self.meta, param.device) if first is None else first

    def _check_readable(self, param: Tensor) -> None:
        """Raise if kernels, which read memory, would be given a tensor that has none of its own."""
        if self.backend == "reference" or self.defaults["fused"] is False:
            return
        if is_traceable_wrapper_subclass(param):
            raise TypeError(
                f"a parameter of shape {tuple(param.shape)} is a {type(param).__name__}, which is made of other "
                f"tensors, and kernels cannot read it: pass backend='reference'"
            )
        if param.is_neg():
            raise TypeError(
                f"a parameter of shape {tuple(param.shape)} is a view that negates what is in memory, which kernels "
                f"read: make it of its resolve_neg()"
            )

    def _fit_state(self, param: Tensor, state: dict[str, Tensor]) -> None:
        """Follow a parameter into another memory order; raise if it went to another device or shape."""
        hidden = state["hidden"]
        if hidden.device != param.device or hidden.shape[1:] != param.shape:
            raise RuntimeError(
                f"a parameter has shape {tuple(param.shape)} on {param.device}, its state was made for "
                f"{tuple(hidden.shape[1:])} on {hidden.device}. After moving a model call "
                f"optimizer.load_state_dict(optimizer.state_dict()); after changing shapes make another optimizer"
            )
        if hidden.stride() != strides(param, self.config.hidden_size):
            for row in rows(self.config, "parameter"):
                state[row.name] = like_parameter(state[row.name], param)

    def _agree(self, found_inf: Tensor | None, grad_scale: Tensor | None) -> Shards:
        """Find out, with all processes, what takes part in this step. They raise together at a non-finite gradient."""
        params = [param for group in self.param_groups for param in group["params"]]
        for param in params:
            if (grad := param.grad) is None:
                continue
            if grad.layout is not torch.strided:
                raise _sparse()
            if grad.numel() != param.numel():
                raise _stale(param)
        capturable = all(group["capturable"] for group in self.param_groups)
        shards = distributed.agree(params, found_inf, grad_scale, exchange=not capturable)
        if self.nonfinite == "raise" and found_inf is None and shards.skip:
            self._raise_nonfinite()
            raise RuntimeError(
                f"a gradient on another process is not finite or beyond {GRADIENT_LIMIT:g}; the message there names "
                f"it. Nothing was changed; nonfinite='skip' would pass over such steps"
            )
        return shards

    def _init_shards(self, shards: Shards, tensors: list[Tensor], grads: list[Tensor]) -> list[Group]:
        """List the local shards of the tensors of a step as `_init_group` does; returns the group of each."""
        group_of = {param: group for group in self.param_groups for param in group["params"]}
        kinds = {row.name: row for row in rows(self.config, "parameter")}
        sizes = {name: row.size(self.config) for name, row in kinds.items()}
        groups = []
        for param, grad, numel in zip(shards.params, shards.grads, shards.numel, strict=True):
            shard, state = real(distributed.local(param)), self.state[param]
            held = {name: distributed.local(value) for name, value in state.items()}
            before = dict(held)
            if "hidden" not in held:
                self._init_state(shard, held, group_of[param]["init_lr"])
            self._fit_state(shard, held)
            for name, value in held.items():
                if value is not before.get(name):
                    if distributed.is_dtensor(param) and name in sizes:
                        value = distributed.like(param, value, int(sizes[name] is not None))
                    state[name] = value
            if numel == 0:
                continue
            if shard.numel() == 0:  # the stages get one value that counts for nothing in place of none
                for name, size in sizes.items():
                    shape = (1,) if size is None else (size, 1)
                    held[name] = torch.zeros(shape, dtype=kinds[name].dtype(self.state_format), device=shard.device)
                shard, grad = shard.new_zeros(1), grad.new_zeros(1)
            tensors += (shard, *self._read_state(held))
            grads.append(grad)
            groups.append(group_of[param])
        return groups

    def _step_device(
        self,
        device: torch.device,
        columns: dict[str, tuple[Tensor, ...]],
        sizes: list[int],
        orders: list[tuple[Any, ...]],
        groups: list[Group],
        rates: list[float | Tensor],
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
        shards: Shards | None,
    ) -> Tensor:
        """The three stages, for all tensors of one device at once; returns [], 1 if nothing was changed, else 0."""
        numel = sizes if shards is None else shards.numel
        plan = self._plan(device, sizes, orders, shards)
        backend, meta, skip, step = plan.backend, plan.meta, plan.skip, columns["step"]
        if found_inf is None:
            skip.zero_()
        else:
            skip.copy_(found_inf.reshape(())).sign_()  # GradScaler's is a sum over devices
        if grad_scale is not None:
            grad_scale = grad_scale.to(device=device, dtype=torch.float32).reshape(())
        tensor_hidden, log_lr_mean, damping, distance = (
            columns.get(name, ()) for name in ("tensor_hidden", "log_lr_mean", "damping", "distance")
        )
        global_hidden = columns["global_hidden"][0] if "global_hidden" in columns else skip.new_empty(0)
        backend.advance(
            meta,
            columns["grad"],
            columns["hidden"],
            columns["accum"],
            columns["ms"],
            columns.get("log_lr", ()),
            step,
            tensor_hidden,
            global_hidden,
            log_lr_mean,
            damping,
            distance,
            numel=numel,
            maximize=[bool(group["maximize"]) for group in groups],
            grad_scale=grad_scale,
            skip=skip,
            update=plan.update,
            attention_update=plan.attention_update,
            sums=plan.sums,
        )
        sampled_update, places = plan.update, plan.places
        if shards is not None:
            sampled_update, places = shards.sum(plan.sums, plan.update, plan.places)
        backend.summarise(
            meta,
            plan.sums,
            tensor_hidden,
            global_hidden,
            log_lr_mean,
            damping,
            distance,
            step,
            numel=numel,
            update=sampled_update,
            places=places,
            lr=[group["lr"] for group in groups],
            skip=skip,
            scale=plan.scale,
        )
        backend.apply(
            meta,
            columns["param"],
            columns.get("true_param", ()),
            plan.update,
            plan.attention_update,
            plan.scale,
            log_lr_mean,
            lr=rates,
            weight_decay=[group["weight_decay"] for group in groups],
            skip=skip,
        )
        if not torch.compiler.is_compiling():  # kernels write behind autograd's back; the operators do it themselves
            torch.autograd.graph.increment_version(columns["param"])
        return skip

    def _plan(
        self, device: torch.device, sizes: list[int], orders: list[tuple[Any, ...]], shards: Shards | None
    ) -> _Plan:
        """The plan of a step over such tensors, one of the device's last `PLANS` or a new one.

        Captured graphs write into the memory of theirs, which is therefore kept.
        """
        plans = self._plans.setdefault(device, [])
        capturing = _capturing(device)
        if not (plans and plans[0].fits(sizes, orders)):
            kept = next((index for index, plan in enumerate(plans) if plan.fits(sizes, orders)), None)
            if kept is None and capturing:
                raise _unprepared()
            states, self._states = self._states, len(self.state)
            if (kept is None or len(self.state) < states) and not torch.compiler.is_compiling():
                for plan in plans:  # state may have gone that they alone hold
                    if id(plan) not in self._captured:
                        plan.backend.release(plan.update, plan.sums, plan.scale)
            plans.insert(0, self._make_plan(device, sizes, orders, shards) if kept is None else plans.pop(kept))
            del plans[PLANS:]
        if capturing:
            if plans[0].backend.__name__.endswith(".reference"):
                raise RuntimeError(
                    "the reference waits for the device, so it cannot be captured in a CUDA graph; fused kernels can: "
                    "see `lopt info`"
                )
            self._captured[id(plans[0])] = plans[0]
        return plans[0]

    def _make_plan(
        self, device: torch.device, sizes: list[int], orders: list[tuple[Any, ...]], shards: Shards | None
    ) -> _Plan:
        requested, fused = self.backend, self.defaults["fused"]
        if requested is None and fused is False:
            requested = "reference"
        backend = backends.choose(device, self.config, requested, self.state_format)
        if fused and backend.__name__.endswith(".reference"):
            raise RuntimeError(
                f"`fused=True` requires all the params to be floating point Tensors of supported devices, and on "
                f"{device.type} no fused kernel is usable for these meta-parameters: see `lopt info`; fused=None takes "
                f"the fastest backend there is"
            )
        like: dict[str, Any] = {"dtype": torch.float32, "device": device}
        if device not in self._metas:
            self._metas[device] = MetaParams.from_flat(self.config, self.meta.to(**like).flat())
        self._skipped.setdefault(device, torch.zeros((), **like))
        updates = [torch.empty(sum(sizes), **like) for _ in range(1 + self.config.attention)]
        return _Plan(
            backend=backend,
            meta=self._metas[device],
            sizes=sizes,
            orders=orders,
            places=_places(orders, sizes, shards).to(device) if self.config.log_lr_min_distance else None,
            skip=torch.zeros((), **like),
            update=updates[0],
            attention_update=updates[1] if self.config.attention else None,
            sums=torch.empty(len(sizes), sums_columns(self.config).count, **like),
            scale=torch.empty(len(sizes), len(updates), **like),
        )

    def _raise_nonfinite(self) -> None:
        cpu = torch.device("cpu")
        grads = {
            param: real(distributed.local(param.grad))
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None and param.grad.layout is torch.strided
        }
        if within_limit(grads.values(), None, cpu):  # one look for all, as a rule
            return
        for position, group in enumerate(self.param_groups):
            for index, param in enumerate(group["params"]):
                if param in grads and not within_limit([grads[param]], None, cpu):
                    name = group["param_names"][index] if "param_names" in group else f"{index} of group {position}"
                    raise RuntimeError(
                        f"the gradient of parameter {name}, shape {tuple(param.shape)}, is not finite or beyond "
                        f"{GRADIENT_LIMIT:g}. Nothing was changed; nonfinite='skip' would pass over such steps"
                    )


def _capturing(device: torch.device) -> bool:
    """Whether what is launched on a device goes into a CUDA graph."""
    return device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


def _unprepared() -> RuntimeError:
    return RuntimeError(
        "there was no step yet over the tensors that have a gradient now, and graph capture cannot prepare for them: "
        "run an ordinary optimizer step before each capture"
    )


def _sparse() -> RuntimeError:
    return RuntimeError(
        "HRNN does not support sparse gradients: use sparse=False in the embedding, or another optimizer for its "
        "parameters"
    )


def _stale(param: Tensor) -> RuntimeError:
    assert param.grad is not None
    return RuntimeError(
        f"a parameter of shape {tuple(param.shape)} has a gradient of shape {tuple(param.grad.shape)}: it was given "
        f"other values after backward. Set its grad to None then"
    )


def _places(orders: Sequence[tuple[Any, ...]], sizes: Sequence[int], shards: Shards | None) -> Tensor:
    """Where in the update each tensor's `sampled` parameters stand: [T, SAMPLES], -1 for those that are not here."""
    if shards is None:
        own = [_offsets(shape, order) for shape, order, _ in orders]
    else:
        own = [_flat(shards.sampled(index), order) for index, (_, order, _) in enumerate(orders)]
    offsets = np.array(own, dtype=np.int64).reshape(len(sizes), SAMPLES)
    begins = np.cumsum([0, *sizes], dtype=np.int64)[:-1, None]
    return torch.from_numpy(np.where(offsets < 0, -1, offsets + begins))


@functools.lru_cache(maxsize=4096)
def _offsets(shape: tuple[int, ...], order: tuple[int, ...]) -> np.ndarray:
    """`_flat` of a whole tensor's sampled parameters; when other tensors take part each step, most have been seen."""
    return _flat(sampled(shape), order)


def _flat(indices: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """Offsets, [SAMPLES], of indices, [SAMPLES, dimensions], in memory of such strides; -1 where one is below 0."""
    here, offsets = (indices >= 0).all(-1), np.full(len(indices), -1)
    if here.any():  # an empty shard may have other dimensions
        offsets[here] = indices[here] @ np.array(order, dtype=np.int64)
    return offsets


def _check_format(state_format: str) -> None:
    if state_format not in FORMATS:
        raise ValueError(f"state_format={state_format!r} must be one of {', '.join(FORMATS)}")
