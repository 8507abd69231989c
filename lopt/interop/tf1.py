"""Replay of recordings of the original code: the same gradients, the same numbers.

A recording is an .npz file with the original's meta-parameters, a start, the gradients fed in and every slot after
every step (`replay`), or a quadratic problem and the meta-gradients of consecutive unrolls
(`replay_meta_gradient`). Both functions return arrays under the recording's own keys, so that checking is a comparison
key by key.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lopt.backends import BACKENDS
from lopt.backends.reference import FlatState, Segments, init_flat_state, read_decays, step
from lopt.config import HRNNConfig
from lopt.hrnn import HRNN
from lopt.interop.tf1_names import config_of
from lopt.metaparams import MetaParams

TOLERANCE = 1e-4  # of the largest value of a slot: float32 through 12 steps of a recurrent network
OBJECTIVE_EPS = 1e-6
OF_UNROLL = re.compile(r"u\d+/")

Arrays = dict[str, np.ndarray]


class Recording(Arrays):
    """The arrays of a file; ValueError names one that is not there."""

    def __missing__(self, name: str) -> np.ndarray:
        raise ValueError(f"the recording has no array {name!r}")

    @property
    def unrolls(self) -> int:
        """How many consecutive unrolls have outcomes."""
        return len({key.split("/")[0] for key in self if OF_UNROLL.match(key)})


def load_recording(path: str | os.PathLike[str]) -> Recording:
    """Every array of a recording.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no recording of the hierarchical RNN.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no recording at {path}")
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = Recording(file)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = "not a NumPy archive" if "allow_pickle" in str(error) else error
        raise ValueError(f"{path} is not a readable .npz file: {reason}") from None
    if "config_json" not in arrays or not any(key.startswith("meta/update_weights") for key in arrays):
        raise ValueError(
            f"{path} is no recording of the hierarchical RNN: it has no config_json with its meta-parameters"
        )
    try:
        options = json.loads(str(arrays["config_json"]))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} has a config_json that is no JSON: {error}") from None
    if not isinstance(options, dict) or "level_sizes" not in options:
        raise ValueError(f"{path} is no recording of the hierarchical RNN: its configuration names no level_sizes")
    return arrays


def _subset(arrays: Mapping[str, np.ndarray], prefix: str) -> Recording:
    return Recording((key.removeprefix(prefix), value) for key, value in arrays.items() if key.startswith(prefix))


def _config(recording: Recording) -> HRNNConfig:
    return config_of(json.loads(str(recording["config_json"])))


def _columns(array: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    """The original's (n, features) as [features, *shape]."""
    return torch.from_numpy(np.ascontiguousarray(array.T)).reshape(-1, *shape)


def _rows(state: Tensor) -> np.ndarray:
    """[features, *shape] as the original's (n, features)."""
    return state.detach().reshape(state.shape[0], -1).T.numpy().copy()


def _slots(
    config: HRNNConfig,
    hidden: Tensor,
    accum: Tensor,
    ms: Tensor,
    log_lr: Tensor | None,
    tensor_hidden: Tensor | None,
    decays: tuple[Tensor, Tensor],
    param: Tensor,
) -> Arrays:
    """One tensor's state under the original's slot names; `hidden`, `accum` and `ms` are [features, n]."""
    slots = {
        "parameter": _rows(hidden),
        "inp_decay": _rows(decays[0][None]),
        "scl_decay": _rows(decays[1][None]),
        "true_param": param.detach().numpy().copy(),
    }
    for scale in range(config.timescales):
        slots[f"grad_accum{scale + 1}"] = _rows(accum[scale, None])
        slots[f"ms{scale + 1}"] = _rows(ms[scale, None])
    if log_lr is not None:
        slots["log_learning_rate"] = _rows(log_lr[None])
    if tensor_hidden is not None:
        slots["layer"] = tensor_hidden.detach().reshape(1, -1).numpy().copy()
    return slots


def replay(path: str | os.PathLike[str], backend: str = "reference") -> Arrays:
    """Feed a recorded trajectory's gradients to `lopt.HRNN`, started from the recorded state.

    Args:
        path: a recorded trajectory (`traj_*.npz`).
        backend: the backend to run.

    Returns:
        `param/<i>`, `attend/<i>`: [T, *shape]; `state/<i>/<slot>`: [T, n, .]; `global`: [T, 1, H2] with three levels.

    Raises:
        ValueError: the file is no recorded trajectory, or it starts amid a run whose decays are not those of its state.
        RuntimeError: the backend cannot run here or not with this configuration.
    """
    recording = load_recording(path)
    if "n_tensors" not in recording:
        raise ValueError(f"{path} is no recorded trajectory: it has no n_tensors")
    config = _config(recording)
    meta = MetaParams.from_tf(_subset(recording, "meta/"), config)
    count, steps = int(recording["n_tensors"]), int(recording["T"])
    params = [torch.nn.Parameter(torch.from_numpy(recording[f"param0/{i}"].copy())) for i in range(count)]
    optimizer = HRNN(params, meta=meta, base_fan_in=None, base_depth=None, backend=backend)
    _set_start(optimizer, params, recording)
    out: dict[str, list[np.ndarray]] = {}
    for t in range(steps):
        for i, param in enumerate(params):
            param.grad = torch.from_numpy(np.array(recording[f"grads/{i}"][t]))
        optimizer.step()
        for i, param in enumerate(params):
            state = optimizer.state[param]
            true_param = state.get("true_param", param)
            decays = read_decays(meta, config, state["hidden"].reshape(config.hidden_size, -1))
            slots = _slots(
                config,
                state["hidden"],
                state["accum"],
                state["ms"],
                state.get("log_lr"),
                state.get("tensor_hidden"),
                decays,
                true_param,
            )
            arrays = {f"param/{i}": slots["true_param"], f"attend/{i}": param.detach().numpy().copy()}
            for key, value in (arrays | {f"state/{i}/{slot}": value for slot, value in slots.items()}).items():
                out.setdefault(key, []).append(value)
        if config.levels >= 3:
            out.setdefault("global", []).append(
                optimizer.state[params[0]]["global_hidden"].reshape(1, -1).numpy().copy()
            )
    return {key: np.stack(values) for key, values in out.items()}


def _set_start(optimizer: HRNN, params: list[torch.nn.Parameter], recording: Recording) -> None:
    """Make the optimizer's state that of the recording's start."""
    config = optimizer.config
    state_dict = optimizer.state_dict()
    for i, param in enumerate(params):
        start, shape = _subset(recording, f"state0/{i}/"), tuple(param.shape)
        state = {
            "hidden": _columns(start["parameter"], shape),
            "accum": torch.cat([_columns(start[f"grad_accum{s + 1}"], shape) for s in range(config.timescales)]),
            "ms": torch.cat([_columns(start[f"ms{s + 1}"], shape) for s in range(config.timescales)]),
        }
        if config.dynamic_output_scale:
            state["log_lr"] = _columns(start["log_learning_rate"], shape)[0]
            state["log_lr_mean"] = state["log_lr"].mean()
        if config.attention:
            state["true_param"] = torch.from_numpy(start["true_param"].copy())
        if config.levels >= 2:
            state["tensor_hidden"] = torch.from_numpy(start["layer"][0].copy())
        if config.levels >= 3:
            state["global_hidden"] = torch.from_numpy(recording["global0"][0].copy())
        decays = np.stack([start["inp_decay"][:, 0], start["scl_decay"][:, 0]])
        state["step"] = torch.tensor(float(decays.any()))
        if decays.any():
            read = read_decays(optimizer.meta, config, state["hidden"].reshape(config.hidden_size, -1))
            if not np.allclose(decays, torch.stack(read).numpy(), rtol=1e-5, atol=1e-7):
                raise ValueError(
                    f"tensor {i} starts with decays that its hidden state does not give: this start cannot be "
                    f"represented, decays are not stored"
                )
        state_dict["state"][i] = state
    optimizer.load_state_dict(state_dict)


class RMSProp:
    """TensorFlow 1's RMSProp, which differs from PyTorch's: the mean square starts at 1, epsilon is inside the root.

    Args:
        lr: step size. decay: of the mean square. eps: under the root. clip: bound of each gradient's absolute value;
            non-finite gradients count as 0.
    """

    def __init__(self, lr: float = 1e-6, decay: float = 0.9, eps: float = 1e-20, clip: float = 1e4) -> None:
        self.lr, self.decay, self.eps, self.clip = lr, decay, eps, clip
        self.ms: dict[str, Tensor] = {}

    def step(self, meta: MetaParams, grads: Mapping[str, Tensor]) -> MetaParams:
        """Meta-parameters after one step along the meta-gradients."""
        after = {}
        for name, value in meta.items():
            grad = torch.where(torch.isfinite(grads[name]), grads[name], 0.0).clamp(-self.clip, self.clip)
            ms = self.ms.get(name, torch.ones_like(grad))
            self.ms[name] = self.decay * ms + (1 - self.decay) * grad.square()
            after[name] = (value - self.lr * grad / torch.sqrt(self.ms[name] + self.eps)).detach()
        return MetaParams(meta.config, after)


def meta_objective(objectives: Tensor, initial: Tensor, *, log: bool = True, numerator_eps: bool = False) -> Tensor:
    """The original's meta-objective of one unroll.

    Args:
        objectives: [K+1], f_0, f_0, f_1 .. f_{K-1}: the start counts twice and the final point does not.
        initial: [] objective at the start of the first unroll.
        log: mean log ratio to `initial`; otherwise the mean ratio over f_0 .. f_{K-1}.
        numerator_eps: add epsilon to the objective rather than to the ratio.
    """
    denominator = initial + OBJECTIVE_EPS
    if not log:
        return (objectives[1:] / denominator).mean()
    if numerator_eps:
        return torch.log((objectives + OBJECTIVE_EPS) / denominator).mean()
    return torch.log(objectives / denominator + OBJECTIVE_EPS).mean()


def replay_meta_gradient(path: str | os.PathLike[str]) -> Arrays:
    """Repeat a recording's unrolls on its quadratic problem, each followed by a meta-step.

    Args:
        path: a recorded meta-gradient (`metagrad_*.npz`).

    Returns:
        For unroll k: `u<k>/objectives`, `u<k>/initial_obj`, `u<k>/metaobj`, `u<k>/dmeta/<name>`,
        `u<k>/meta_after/<name>`, `u<k>/final_param/<i>`, `u<k>/final_attend/<i>`, `u<k>/final_state/<i>/<slot>` and,
        with three levels, `u<k>/final_global`; names are the original's.

    Raises:
        ValueError: the file is no recorded meta-gradient.
    """
    recording = load_recording(path)
    if "problem/W" not in recording:
        raise ValueError(f"{path} is no recorded meta-gradient: it has no problem/W")
    config, options = _config(recording), json.loads(str(recording["config_json"]))
    meta = MetaParams.from_tf(_subset(recording, "meta/"), config)
    second_order = bool(recording["second"])
    matrix, target = (torch.from_numpy(recording[f"problem/{name}"].copy()) for name in ("W", "y"))
    start = [torch.from_numpy(recording[f"param0/{i}"].copy()) for i in range(len(_subset(recording, "param0/")))]
    segments = Segments([param.numel() for param in start])

    def objective(theta: Tensor) -> Tensor:
        return 0.5 * (matrix @ theta[:, None] - target).square().sum()

    optimizer = RMSProp(lr=1e-3)
    theta = attended = torch.cat([param.reshape(-1) for param in start])
    log_lr = torch.cat([torch.from_numpy(recording[f"loglr0/{i}"].copy()).reshape(-1) for i in range(len(start))])
    state: FlatState | None = None
    initial = objective(theta)
    out: Arrays = {}
    for unroll in range(recording.unrolls):
        leaves = meta.map(lambda tensor: tensor.detach().requires_grad_())
        state = init_flat_state(leaves, config, segments, log_lr) if state is None else state.detach()
        theta, attended = theta.detach(), attended.detach()
        objectives = [objective(theta)]
        for _ in range(int(recording["K"])):
            objectives.append(objective(theta))
            point = attended if attended.requires_grad else attended.clone().requires_grad_()
            with torch.enable_grad():
                (grad,) = torch.autograd.grad(objective(point), point, create_graph=second_order)
            theta, attended, state = step(leaves, config, segments, theta, grad, state)
        values = torch.stack(objectives)
        loss = meta_objective(
            values,
            initial,
            log=options.get("use_log_objective", True),
            numerator_eps=options.get("use_numerator_epsilon", False),
        )
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        meta_grads = {
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
        }
        meta = optimizer.step(leaves, meta_grads)
        arrays: dict[str, Any] = {
            "objectives": values.detach().numpy(),
            "initial_obj": initial.numpy(),
            "metaobj": loss.item(),
        }
        arrays |= {f"dmeta/{name}": array for name, array in MetaParams(config, meta_grads).to_tf().items()}
        arrays |= {f"meta_after/{name}": array for name, array in meta.to_tf().items()}
        arrays |= _final(config, segments, start, theta, attended, state)
        out |= {f"u{unroll}/{name}": np.asarray(array) for name, array in arrays.items()}
    return out


def _final(
    config: HRNNConfig,
    segments: Segments,
    start: list[Tensor],
    theta: Tensor,
    attended: Tensor,
    state: FlatState,
) -> Arrays:
    arrays: Arrays = {}
    for i, (begin, end) in enumerate(segments.bounds):
        part = slice(begin, end)
        param = theta[part].reshape(start[i].shape)
        slots = _slots(
            config,
            state.hidden[:, part],
            state.accum[:, part],
            state.ms[:, part],
            None if state.log_lr is None else state.log_lr[part],
            None if state.tensor_hidden is None else state.tensor_hidden[i],
            (state.grad_decay[part], state.scale_decay[part]),
            param,
        )
        arrays |= {f"final_state/{i}/{slot}": value for slot, value in slots.items()}
        arrays[f"final_param/{i}"] = slots["true_param"]
        arrays[f"final_attend/{i}"] = attended[part].detach().reshape(start[i].shape).numpy()
    if state.global_hidden is not None:
        arrays["final_global"] = state.global_hidden.detach().reshape(1, -1).numpy()
    return arrays


def compare(recording: Arrays, replayed: Arrays) -> dict[str, float]:
    """Worst error of each slot, as a part of the slot's largest recorded value.

    Args:
        recording: what `load_recording` returned. replayed: what `replay` or `replay_meta_gradient` returned.

    Raises:
        ValueError: an array is missing on one side, or has another shape there.
    """
    outcomes = {
        key
        for key in recording
        if key.startswith(("param/", "attend/", "state/")) or key == "global" or OF_UNROLL.match(key)
    }
    if missing := sorted(outcomes - set(replayed)):
        raise ValueError(f"{missing} were recorded and not replayed")
    worst: dict[str, float] = {}
    for key, array in replayed.items():
        if key not in recording or recording[key].size != array.size:
            raise ValueError(f"{key!r}, shape {array.shape}, has no counterpart in the recording")
        recorded = recording[key].astype(np.float64)
        largest = np.abs(recorded).max(initial=0.0) or 1.0
        error = np.abs(array.astype(np.float64).reshape(recorded.shape) - recorded).max(initial=0.0) / largest
        # Tensors share a slot: state/<i>/<slot> -> state/<slot>.
        slot = "/".join(part for part in key.split("/") if not part.isdigit())
        worst[slot] = max(worst.get(slot, 0.0), float(error) if np.isfinite(error) else np.inf)
    return worst


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `lopt replay`."""
    parser.description = (
        "Replay recordings of the original code and print the worst error of every slot, relative to its maximum."
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="recorded trajectory or meta-gradient (.npz)")
    parser.add_argument("--backend", default="reference", choices=list(BACKENDS), help="backend for trajectories")


def run(args: argparse.Namespace) -> int:
    """`lopt replay`: 0 if every slot of every file is within the tolerance, otherwise 1."""
    failures = 0
    for path in args.files:
        recording = load_recording(path)
        if "n_tensors" in recording:
            errors = compare(recording, replay(path, args.backend))
        else:
            errors = compare(recording, replay_meta_gradient(path))
        worst = max(errors, key=lambda slot: errors[slot])
        failed = errors[worst] > TOLERANCE
        failures += failed
        for slot, error in errors.items():
            print(f"  {slot:<48} {error:9.2e}{'  above ' + format(TOLERANCE, '.0e') if error > TOLERANCE else ''}")
        print(f"{'FAILED' if failed else 'ok':<7} {path}: worst {errors[worst]:.2e} in {worst}")
    return 1 if failures else 0
