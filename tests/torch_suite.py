"""Run PyTorch's own tests of its optimizers against lopt.HRNN.

    python tests/torch_suite.py PYTORCH/test/test_optim.py [options of unittest, such as -v or -k NAME]

The file is not part of the wheel of PyTorch: take it from the sources of the installed version. Its TestOptimRenewed
runs once for each of `entries`: the fastest backend on each device, and by name every other one that can run here.
SKIPPED names what does not hold for a learned optimizer, and why; the contracts of the other tests are checked by
tests/hrnn and tests/test_contracts.py as well, without that file.

The exit code is 0 if no test failed.
"""

import importlib.util
import sys
import types
import unittest
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.testing._internal import common_optimizers
from torch.testing._internal.common_methods_invocations import DecorateInfo
from torch.testing._internal.common_optimizers import OptimizerInfo, OptimizerInput

from lopt import HRNN, HRNNConfig, backends

SUITE = "TestOptimRenewed"
SIBLINGS = ("optim", "optim.test_lrscheduler", "optim.test_optim", "optim.test_swa_utils")  # imported, not needed here

SKIPPED = {
    "test_complex_2d": "a tensor of complex numbers is one tensor, its real and imaginary parts are two: their means "
    "differ, and with them what the tensor and global GRUs see",
    "test_fused_large_tensor": "2^32 float16 parameters need 76 bytes of state each, 304 GiB",
    "test_state_dict_with_cuda_params": "`step` is always on its parameter's device, where it is counted without a "
    "host synchronisation",
}

INPUTS: tuple[dict[str, Any], ...] = (
    {},
    {"init_lr": 1e-2},
    {"init_lr": 1e-2, "weight_decay": 0.1},
    {"init_lr": 1e-2, "weight_decay": 0.1, "maximize": True},
    {"lr": 0.5, "init_lr": 1e-2},
    {"nonfinite": "raise"},
)


def on_backend(name: str) -> type[HRNN]:
    """HRNN on one backend, whatever others there are."""

    class OnBackend(HRNN):
        def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(params, *args, **{"backend": name} | kwargs)

    OnBackend.__name__ = f"HRNN{name.capitalize()}"
    return OnBackend


def inputs(device: Any = None, dtype: Any = None) -> list[OptimizerInput]:
    """What the suite makes optimizers with. `lr` multiplies a learned step: the suite's own, 1e-3, freezes it."""
    return [OptimizerInput(params=None, kwargs=dict(options), desc=str(options)) for options in INPUTS]


def fastest() -> dict[str, str]:
    """Type of device -> name of the backend that HRNN takes on it here."""
    names = {backend.module: name for name, backend in backends.BACKENDS.items()}
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    return {device: names[backends.choose(torch.device(device), HRNNConfig()).__name__] for device in devices}


def entries() -> list[OptimizerInfo]:
    """HRNN with the fastest backend, and with each other usable one by its name."""
    skips = [DecorateInfo(unittest.skip(reason), SUITE, name) for name, reason in SKIPPED.items()]
    common: dict[str, Any] = {
        "optim_inputs_func": inputs,
        "optim_error_inputs_func": common_optimizers.get_error_inputs_for_all_optims,
        "not_og_supported_flags": (
            "maximize",
            "capturable",
            "fused",
            "init_lr",
            "base_fan_in",
            "base_depth",
            "train_mode",
            "meta_digest",
            "ms_steps",
        ),
        "has_capturable_arg": True,
    }
    chosen = fastest()
    fused = tuple(device for device, name in chosen.items() if name != "reference")
    infos = [OptimizerInfo(HRNN, supported_impls=("fused",), supports_fused_on=fused, skips=skips, **common)]
    for name, reason in backends.available().items():
        home = backends.BACKENDS[name].device
        if reason is None and chosen.get(home) != name:
            elsewhere = [
                DecorateInfo(unittest.skip(f"the {name} backend runs on {home} tensors"), SUITE, device_type=device)
                for device in chosen
                if home not in ("*", device)
            ]
            infos.append(OptimizerInfo(on_backend(name), supported_impls=(), skips=skips + elsewhere, **common))
    return infos if fused else infos[1:]


def load(path: Path) -> types.ModuleType:
    """The suite's module, with HRNN in the place of torch's optimizers."""
    common_optimizers.optim_db[:] = entries()
    for name in SIBLINGS:
        stub = types.ModuleType(name)
        stub.__getattr__ = lambda attribute: type(attribute, (), {})  # type: ignore[method-assign]
        sys.modules[name] = stub
    spec = importlib.util.spec_from_file_location("test_optim", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SystemExit(f"{path} is no Python file: give the path of PyTorch's test/test_optim.py")
    module = sys.modules["test_optim"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0].startswith("-"):
        raise SystemExit(__doc__)
    warnings.simplefilter("ignore")
    module = load(Path(arguments[0]))
    found = [name for name in vars(module) if name.startswith(SUITE) and name != SUITE]  # one for each device type
    if not found:
        raise SystemExit(f"{arguments[0]} has no {SUITE}: is it PyTorch's test/test_optim.py?")
    options, selected = arguments[1:], any(argument.startswith("Test") for argument in arguments[1:])
    unittest.main(module=module, argv=["torch_suite.py", *options, *([] if selected else found)])


if __name__ == "__main__":
    main(sys.argv[1:])
