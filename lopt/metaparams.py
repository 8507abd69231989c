"""The learned numbers inside the optimizer: names, shapes, initialisation, files.

The table `MetaParams.shapes(config)` is the one place that lists them. Weights are `(in, out)` and meet row vectors,
`x @ w`.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lopt import hub
from lopt.config import HRNNConfig
from lopt.interop.tf1_names import VARIABLE_NAMES, tf_shape

FORMAT = "lopt.hrnn.1"
DEFAULT = "hrnn-13"  # of the shipped meta-parameters, for who names none

AFFINE_SCALE = 0.5  # standard deviation of an affine map's weights, times sqrt(fan in)
READOUT_SCALE = 0.5
GATE_BIAS = 2.2
SCALE_DECAY_BIAS = 3.2  # sigmoid: .961
GRAD_DECAY_BIAS = 2.2  # sigmoid: .900
LOG_LR_MOMENTUM = 3.2
LOG_STEP_OFFSET = -1.0


def _shapes(config: HRNNConfig) -> dict[str, tuple[int, ...]]:
    h0, h1, h2 = config.hidden_size, config.tensor_size, config.global_size
    d, s = config.num_features, config.timescales
    shapes: dict[str, tuple[int, ...]] = {}

    def affine(name: str, fan_in: int, fan_out: int) -> None:
        shapes[f"{name}.weight"] = (fan_in, fan_out)
        shapes[f"{name}.bias"] = (fan_out,)

    def gru(name: str, inputs: int, size: int) -> None:
        affine(f"{name}.gates", inputs + size, 2 * size)
        affine(f"{name}.candidate", inputs + size, size)

    for level, size in enumerate(config.level_sizes):
        shapes[f"level{level}.init"] = (size,)
    gru("level0", d, h0)
    if config.levels >= 2:
        affine("level0.from_level1", h1, 3 * h0)
    if config.levels >= 3:
        affine("level0.from_level2", h2, 3 * h0)
    if config.levels >= 2:
        gru("level1", config.tensor_input_size, h1)
    if config.levels >= 3:
        affine("level1.from_level2", h2, 3 * h1)
        gru("level2", h1, h2)
    shapes["direction.weight"] = (h0,)
    if config.gradient_shortcut:
        shapes["direction.shortcut"] = (s,)
    if config.attention:
        shapes["attention.weight"] = (h0,)
        if config.gradient_shortcut:
            shapes["attention.shortcut"] = (s,)
    if config.learnable_decay:
        shapes["scale_decay.weight"], shapes["scale_decay.bias"] = (h0,), ()
    if config.reads_grad_decay:
        shapes["grad_decay.weight"], shapes["grad_decay.bias"] = (h0,), ()
    if config.dynamic_output_scale:
        shapes["log_lr.weight"], shapes["log_lr.bias"] = (h0,), ()
        shapes["log_lr.momentum"] = ()
        shapes["log_step.offset"] = ()
    return shapes


class MetaParams(Mapping[str, Tensor]):
    """Named meta-parameters of one `HRNNConfig`, a read-only mapping from name to tensor.

    Args:
        config: the architecture they belong to.
        tensors: every name of `MetaParams.shapes(config)` with its shape; one floating dtype, one device.

    Raises:
        ValueError: a name is missing or unknown, or a shape, dtype or device is not what it must be.
    """

    def __init__(self, config: HRNNConfig, tensors: Mapping[str, Tensor]) -> None:
        expected = self.shapes(config)
        if missing := [name for name in expected if name not in tensors]:
            raise ValueError(f"meta-parameters {missing} are missing for this configuration")
        if unknown := [name for name in tensors if name not in expected]:
            raise ValueError(f"meta-parameters {unknown} do not belong to this configuration")
        for name, shape in expected.items():
            if tuple(tensors[name].shape) != shape:
                raise ValueError(f"meta-parameter {name!r} has shape {tuple(tensors[name].shape)}, it must be {shape}")
        kinds = {(tensor.dtype, tensor.device) for tensor in tensors.values()}
        if len(kinds) != 1 or not next(iter(tensors.values())).is_floating_point():
            raise ValueError(f"meta-parameters must share one floating dtype and device, got {sorted(map(str, kinds))}")
        self.config = config
        self.config_text = config.to_json()
        self._tensors = {name: tensors[name] for name in expected}
        self._flat: Tensor | None = None  # the vector that the tensors are views of, if they are

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"MetaParams({self.count:,} meta-parameters, {self.dtype}, {self.device}, {self.config})"

    def __deepcopy__(self, memo: dict[int, object]) -> MetaParams:
        return self  # read-only: copies of an optimizer share it

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of every tensor."""
        return next(iter(self._tensors.values())).dtype

    @property
    def device(self) -> torch.device:
        """Device of every tensor."""
        return next(iter(self._tensors.values())).device

    @property
    def count(self) -> int:
        """Number of scalar meta-parameters: 8,349 for the default configuration."""
        return sum(tensor.numel() for tensor in self._tensors.values())

    @property
    def digest(self) -> int:
        """48 bits that tell these numbers, in float32, from others; the configuration is not among them."""
        with _disable_current_modes():  # under FakeTensorMode, say, these are real numbers
            numbers = self.flat().detach().cpu().float().numpy().tobytes()
        return int.from_bytes(hashlib.sha256(numbers).digest()[:6], "big")

    @staticmethod
    def shapes(config: HRNNConfig) -> dict[str, tuple[int, ...]]:
        """Name and shape of every meta-parameter of a configuration, in the order of the flat view."""
        return _shapes(config)

    @staticmethod
    def layout(config: HRNNConfig) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Offset in the flat view and shape of every meta-parameter."""
        layout, offset = {}, 0
        for name, shape in _shapes(config).items():
            layout[name] = (offset, shape)
            offset += math.prod(shape)
        return layout

    @classmethod
    def init(cls, config: HRNNConfig | None = None, seed: int = 0, *, dtype: torch.dtype = torch.float32) -> MetaParams:
        """Draw untrained meta-parameters from the distributions of the original.

        They are a sensible optimizer already: RMS-normalised momentum with a constant learning rate and some noise.

        Args:
            config: the architecture; the paper's by default.
            seed: of a generator of its own; the global random state is left alone.
            dtype: torch.float32 or torch.float64.
        """
        config = config or HRNNConfig()
        generator = torch.Generator().manual_seed(seed)
        like: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}  # whatever the defaults of the caller are
        s = config.timescales

        def normal(shape: tuple[int, ...], std: float, mean: float = 0.0) -> Tensor:
            return torch.randn(shape, generator=generator, **like) * std + mean

        tensors: dict[str, Tensor] = {}
        for name, shape in _shapes(config).items():
            kind = name.rpartition(".")[2]
            if kind == "init":
                value = torch.rand(shape, generator=generator, **like) * 2 - 1
            elif kind == "shortcut":
                value = normal(shape, 0.1 / math.sqrt(s), 1 / s)
            elif kind == "weight" and len(shape) == 2:
                value = normal(shape, AFFINE_SCALE / math.sqrt(shape[0]))
            elif name == "attention.weight":
                value = tensors["direction.weight"].clone()
            elif name == "log_lr.weight" and config.zero_init_lr_weights:
                value = torch.zeros(shape, **like)
            elif kind == "weight":
                value = normal(shape, READOUT_SCALE / math.sqrt(shape[0]))
            else:
                constants = {
                    "scale_decay.bias": SCALE_DECAY_BIAS,
                    "grad_decay.bias": GRAD_DECAY_BIAS,
                    "log_lr.momentum": LOG_LR_MOMENTUM,
                    "log_step.offset": LOG_STEP_OFFSET,
                }
                value = torch.full(shape, GATE_BIAS if ".gates." in name else constants.get(name, 0.0), **like)
            tensors[name] = value
        return cls(config, {name: value.to(dtype) for name, value in tensors.items()})

    def map(self, function: Callable[[Tensor], Tensor]) -> MetaParams:
        """The same meta-parameters with `function` applied to each tensor."""
        return MetaParams(self.config, {name: function(tensor) for name, tensor in self.items()})

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> MetaParams:
        """The same meta-parameters in another dtype or on another device; itself when nothing changes."""
        dtype, device = dtype or self.dtype, torch.device(device or self.device)
        if dtype == self.dtype and device == self.device:
            return self
        return self.map(lambda tensor: tensor.to(dtype=dtype, device=device))

    def flat(self) -> Tensor:
        """All meta-parameters in one vector, [count], in the order of `shapes`; differentiable."""
        if self._flat is not None:
            return self._flat
        return torch.cat([tensor.reshape(-1) for tensor in self._tensors.values()])

    @classmethod
    def from_flat(cls, config: HRNNConfig, flat: Tensor) -> MetaParams:
        """The inverse of `flat`: views of one vector, [count]; differentiable.

        Raises:
            ValueError: the vector's length is not that of the configuration.
        """
        shapes = _shapes(config)
        count = sum(math.prod(shape) for shape in shapes.values())
        if flat.shape != (count,):
            raise ValueError(
                f"a flat vector of shape ({count},) is needed for this configuration, got {tuple(flat.shape)}"
            )
        parts = flat.split([math.prod(shape) for shape in shapes.values()])
        tensors = {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        meta = cls(config, tensors)
        meta._flat = flat
        return meta

    def save(self, path: str | os.PathLike[str], *, card: Mapping[str, str] | None = None) -> None:
        """Write a safetensors file with the configuration in its metadata, atomically.

        Args:
            path: the file, usually `*.safetensors`.
            card: further metadata, text to text: how these numbers were made.
        """
        path = Path(path)
        metadata = dict(card or {}) | {"format": FORMAT, "config": self.config.to_json()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.items()}
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with open(partial, "wb") as file:
                file.write(safetensors.torch.save(tensors, metadata))
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> MetaParams:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, is no safetensors file, or holds something else than meta-parameters.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no meta-parameter file at {path}")
        try:
            with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise ValueError(
                f"{path} is not a readable safetensors file ({error}): truncated, or written by something else"
            ) from None
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{path} holds no lopt meta-parameters: its metadata says format={metadata.get('format')!r}, "
                f"expected {FORMAT!r}; write it with MetaParams.save"
            )
        try:
            return cls(HRNNConfig.from_json(metadata.get("config", "")), tensors)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        file: str = hub.FILE,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> MetaParams:
        """Read meta-parameters from a folder or, through huggingface_hub, from a repository "user/name" of the hub.

        Args:
            name: a folder, a file, the name of a repository, or of shipped weights.
            file: name of the safetensors file in it.
            revision: branch, tag or commit of the repository; its main branch by default.
            token: of the hub, for private repositories; the one logged in with by default.

        Raises:
            FileNotFoundError: there is no such folder, repository or file.
            ValueError: the name is not that of a repository, or the file holds no meta-parameters.
            ConnectionError: the hub cannot be reached, and the file is not in the cache.
            ImportError: a repository is asked for and huggingface_hub is not installed.
        """
        if isinstance(name, str) and name in (shipped := cls.shipped()) and not Path(name).is_dir():
            return cls.load(shipped[name])
        return cls.load(hub.find(name, file=file, revision=revision, token=token))

    def push_to_hub(
        self,
        name: str,
        *,
        file: str = hub.FILE,
        private: bool = False,
        token: str | bool | None = None,
        message: str = "Upload meta-parameters",
        card: Mapping[str, str] | None = None,
    ) -> str:
        """Upload to the repository "user/name" of the hub, made if there is none, for `from_pretrained`.

        Args:
            name, file, token: as for `from_pretrained`.
            private: whether a repository that is made is private.
            message: of the commit.
            card: as for `save`.

        Returns:
            The address of the commit.

        Raises:
            ConnectionError: the hub cannot be reached, or refuses; nothing was uploaded.
            ImportError, ValueError: as for `from_pretrained`.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / hub.FILE
            self.save(path, card=card)
            return hub.push(path, name, file=file, private=private, token=token, message=message)

    @staticmethod
    def shipped() -> dict[str, Path]:
        """Name, hrnn-<number>, and file of the meta-parameters that come with the package, by their number."""
        folder = Path(str(importlib.resources.files("lopt"))) / "weights"
        files = sorted(folder.glob("hrnn-*.safetensors"), key=lambda file: int(file.stem.removeprefix("hrnn-")))
        return {file.stem: file for file in files}

    @classmethod
    def known_as(cls, digest: int) -> str:
        """Names of the shipped meta-parameters of a digest, for people: several have the same numbers."""
        names = [name for name, file in cls.shipped().items() if cls.load(file).digest == digest]
        return " or ".join(names) or "not shipped ones"

    @classmethod
    def resolve(cls, meta: MetaParams | str | os.PathLike[str] | None) -> MetaParams:
        """Meta-parameters from what a user passes as `meta`.

        Args:
            meta: `MetaParams`; a path to a file; the name of shipped weights; or None, the default shipped weights, or
                an untrained initialisation when none are shipped.

        Raises:
            FileNotFoundError: neither a file nor the name of shipped weights.
            ValueError: the file does not hold meta-parameters.
            TypeError: something else.
        """
        if isinstance(meta, MetaParams):
            return meta
        if not (meta is None or isinstance(meta, str | os.PathLike)):
            cure = "; MetaParams.init(config) makes untrained ones" if isinstance(meta, HRNNConfig) else ""
            raise TypeError(f"meta must be MetaParams, a path, a name or None, got {type(meta).__name__}{cure}")
        shipped = cls.shipped()
        if meta is None:
            return cls.load(shipped[DEFAULT]) if DEFAULT in shipped else cls.init()
        if isinstance(meta, str) and meta in shipped:
            return cls.load(shipped[meta])
        if not Path(meta).is_file():
            raise FileNotFoundError(
                f"meta={str(meta)!r} is neither a file nor the name of shipped weights; "
                f"shipped: {', '.join(shipped) or 'none'}. From a folder or the Hugging Face Hub: "
                f"MetaParams.from_pretrained"
            )
        return cls.load(meta)

    @classmethod
    def from_tf(cls, arrays: Mapping[str, np.ndarray], config: HRNNConfig) -> MetaParams:
        """Translate arrays under the original's TensorFlow variable names.

        Initial hidden states that are not learned have no variable in the original; here they are drawn with seed 0.

        Raises:
            ValueError: a variable is missing or unknown for the configuration, or has the wrong shape.
        """
        known = {name.removeprefix("LOL/").removesuffix(":0"): array for name, array in arrays.items()}
        shapes = cls.shapes(config)
        drawn = cls.init(config) if not config.learnable_init else {}
        tensors = {}
        for name, shape in shapes.items():
            variable = VARIABLE_NAMES[name]
            if variable in known:
                array = np.asarray(known[variable])
                if array.shape != tf_shape(name, shape):
                    raise ValueError(
                        f"variable {variable!r} has shape {array.shape}, it must be {tf_shape(name, shape)}"
                    )
                tensors[name] = torch.from_numpy(array.reshape(shape).copy())
            elif name.endswith(".init") and name in drawn:
                tensors[name] = drawn[name]
            else:
                raise ValueError(f"variable {variable!r} ({name}) is missing for this configuration")
        if unknown := sorted(set(known) - {VARIABLE_NAMES[name] for name in shapes}):
            raise ValueError(f"variables {unknown} do not belong to this configuration")
        return cls(config, tensors)

    def to_tf(self) -> dict[str, np.ndarray]:
        """The inverse of `from_tf`: arrays under the original's variable names, in the original's shapes."""
        return {
            VARIABLE_NAMES[name]: tensor.detach().cpu().numpy().reshape(tf_shape(name, tuple(tensor.shape)))
            for name, tensor in self.items()
            if self.config.learnable_init or not name.endswith(".init")
        }
