"""Lets lopt's GPU backends run on CPU tensors: their kernels, as compiled for a GPU, by the machine of this folder.

CUDA: csrc/hrnn_cuda.cu, compiled by nvcc, with its own launches; only the CUDA runtime beneath is runtime.cpp instead.
Triton: its front end and compiler as they are, for a GPU that is not there; only the launch is replaced.
"""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lopt import HRNNConfig, backends, native
from lopt.backends import coverage, cuda, triton, triton_flat

from .machine import run
from .source import Kernel, parse

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
FIELD_TYPES = {"int": ctypes.c_int, "bool": ctypes.c_bool, "float": ctypes.c_float}
LAUNCHES: list[str] = []  # names of the kernels that have run


def tensors_of(*values: Any) -> list[tuple[int, int]]:
    """Begin and end of the memory of tensors: of values, in containers and in objects of lopt."""
    found, seen, todo = {}, set(), list(values)
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list | tuple):
            todo += value
        elif type(value).__module__.startswith("lopt.") and hasattr(value, "__dict__"):
            todo += vars(value).values()
    return sorted((begin, begin + size) for begin, size in found.items() if size)


def within_reach(*arguments: Any) -> list[tuple[int, int]]:
    """The same of a launch's arguments and of what lopt's functions hold that have led to it."""
    values, frame = list(arguments), sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("lopt."):
            values += frame.f_locals.values()
        frame = frame.f_back
    return tensors_of(*values)


def launch(kernel: Kernel, blocks: int, params: bytes, allowed: list[tuple[int, int]], shared: int) -> None:
    """Run a kernel; threads get at atomic operations in another order each time."""
    LAUNCHES.append(kernel.name)
    run(kernel, blocks, params, allowed, shared, seed=len(LAUNCHES))


class Dim(ctypes.Structure):
    _fields_ = [("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint)]


LAUNCHED = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, Dim, Dim, ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t)


@functools.cache
def structure(name: str) -> type[ctypes.Structure]:
    """An argument of csrc/hrnn_cuda.h, as its text declares it."""
    text = re.sub(r"//[^\n]*", "", (CSRC / "hrnn_cuda.h").read_text())
    body = re.search(rf"struct {name} \{{(.*?)\n\}};", text, re.DOTALL)[1]
    fields: list[tuple[str, Any]] = []
    for declaration in filter(None, map(str.strip, body.split(";"))):
        first, *others = declaration.split(",")
        type_, first = re.fullmatch(r"(?:const )?(\w+)(\W.*)", first.strip()).groups()
        for each in (first, *others):
            fields.append((each.strip(" *"), ctypes.c_void_p if "*" in each else FIELD_TYPES[type_]))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


class Cuda:
    """The stages of csrc/hrnn_cuda.cu as lopt._C has them, and everything else that it has."""

    def __init__(self, folder: Path) -> None:
        library = folder / "lopt_cuda.so"
        command = (
            "nvcc -std=c++17 -O3 -arch=compute_80 -cudart none -shared -Xcompiler -fPIC -Xlinker -Bsymbolic".split()
        )
        command += [f"-I{CSRC}", "-keep", "-keep-dir", str(folder), "-o", str(library)]
        sources = [str(CSRC / "hrnn_cuda.cu"), str(HERE / "runtime.cpp")]
        done = subprocess.run([*command, *sources], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        self.kernels = parse((folder / "hrnn_cuda.ptx").read_text())
        self._library = ctypes.CDLL(str(library))
        self._follow, self._fault = LAUNCHED(self._launch), None
        self._library.lopt_follow(self._follow)

    def __getattr__(self, name: str) -> Any:
        return getattr(native.load(), name)

    def gpu_advance(self, emulated: bool, stream: int, values: dict[str, Any]) -> None:
        self._stage("Advance", values)

    def gpu_summarise(self, emulated: bool, stream: int, values: dict[str, Any]) -> None:
        self._stage("Summarise", values)

    def gpu_apply(self, emulated: bool, stream: int, values: dict[str, Any]) -> None:
        self._stage("Apply", values)

    def _stage(self, name: str, values: dict[str, Any]) -> None:
        stage = getattr(self._library, f"lopt_{name.lower()}")
        stage.restype, self._fault = ctypes.c_char_p, None
        error = stage(ctypes.byref(structure(name)(**values)))
        if self._fault is not None:
            raise self._fault
        assert error is None, error

    def _launch(self, name: bytes, blocks: Dim, threads: Dim, args: Any, shared: int) -> int:
        try:
            kernel = self.kernels[name.decode()]
            assert (threads.x, threads.y, threads.z, blocks.y, blocks.z) == (kernel.threads, 1, 1, 1, 1)
            launch(kernel, blocks.x, ctypes.string_at(args[0], kernel.params_size), within_reach(), shared)
        except BaseException as error:  # a callback of C has nobody to raise to
            self._fault = error
            return 1
        return 0


def install_cuda(monkeypatch: pytest.MonkeyPatch, compiled: Cuda) -> None:
    """Let lopt's CUDA backend, where CPU tensors can ask for it, launch `compiled`."""
    monkeypatch.setattr(cuda, "native", types.SimpleNamespace(load=lambda: compiled, absent=native.absent))


class Driver:
    """What Triton asks of a GPU's driver before it launches."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """No number of a real one: kernels are kept by it, and with them how to launch them."""
        return 1000 + self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


PACKED = {"i32": np.int32, "i64": np.int64, "fp32": np.float32, "fp64": np.float64}


def launch_triton(compiled: Any, blocks: int, *values: Any) -> None:
    """Run a kernel that Triton compiled, with the arguments of its launch."""
    kernel = next(iter(_parse(compiled.asm["ptx"]).values()))
    params = b""
    for value, type_ in zip(values, compiled.src.signature.values(), strict=True):
        if type_ == "constexpr":
            continue
        packed = np.int64(value.data_ptr()) if type_.startswith("*") else PACKED[type_](value)
        params = params.ljust(-(-len(params) // packed.nbytes) * packed.nbytes, b"\0") + packed.tobytes()
    params = params.ljust(kernel.params_size, b"\0")
    launch(kernel, blocks, params, within_reach(*values), compiled.metadata.shared)


_parse = functools.lru_cache(maxsize=64)(parse)


def install_triton(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    """Let Triton compile for a GPU that is not there and launch by `launch_triton`, and lopt use it on CPU tensors."""
    from triton.compiler import CompiledKernel
    from triton.runtime import driver

    def covers(kernels: triton_flat.Kernels, config: HRNNConfig, like: torch.Tensor) -> bool:
        return like.dtype == torch.float32 and coverage.unsupported(config) is None

    def start(compiled: Any) -> None:
        def launcher(x, y, z, stream, function, metadata, launch_metadata, enter, exit_, *values):
            assert (y, z) == (1, 1)
            launch_triton(compiled, x, *values)

        compiled._run = launcher

    monkeypatch.setattr(CompiledKernel, "_init_handles", start)
    monkeypatch.setattr(type(driver), "active", Driver(capability))
    monkeypatch.setattr(triton, "unusable", lambda: None)
    monkeypatch.setattr(triton_flat.Kernels, "covers", covers)
    monkeypatch.setitem(backends.BACKENDS, "triton", backends.Backend(triton.__name__, "cpu"))
