"""Access to lopt._C, the compiled kernels, and words for its absence.

An installation without a C++ compiler has no lopt._C and works on the backends that need none. What the build left out
is in lopt/_build.json, which setup.py writes beside the module.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import lopt

FOLDER = Path(lopt.__file__).resolve().parent


def load() -> ModuleType:
    """The compiled module lopt._C.

    Raises:
        ImportError: it was not built, does not load or is of another version; the message says which, and the cure.
    """
    if reason := absent():
        raise ImportError(reason)
    return sys.modules["lopt._C"]


def runnable() -> list[str]:
    """Instruction sets that were compiled and that this processor runs, weakest first; none without lopt._C."""
    if absent():
        return []
    module, isas = load(), []
    chosen = module.isa()
    for isa in module.compiled()["isas"]:
        with contextlib.suppress(ValueError):
            module.use_isa(isa)
            isas.append(isa)
    module.use_isa(chosen)
    return isas


@functools.cache
def absent() -> str | None:
    """None if lopt._C can be used, or else why not, and the cure."""
    try:
        built_for = importlib.import_module("lopt._C").__version__
    except ModuleNotFoundError:
        reason = _why_not_built()
    except ImportError as error:
        reason = f"lopt._C does not load: {error}"
    else:
        if built_for == lopt.__version__:
            return None
        reason = f"lopt._C was built for lopt {built_for} and this is {lopt.__version__}"
    return f"{reason}. {_cure()}"


def left_out() -> dict[str, str]:
    """What the build left out -> why; among "cpp" (all of lopt._C), "openmp" and "cuda". Empty without a record."""
    try:
        return json.loads((FOLDER / "_build.json").read_text())["skipped"]
    except FileNotFoundError:
        return {}


def _why_not_built() -> str:
    if reason := left_out().get("cpp"):
        return f"lopt._C was left out at install: {reason}"
    python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    if other := sorted(path.name for path in FOLDER.glob("_C.*.so")):
        return f"{FOLDER} has {', '.join(other)} but no lopt._C for {python}"
    return f"lopt was imported from {FOLDER}, where lopt._C was never built"


def _cure() -> str:
    source = FOLDER.parent
    if (source / "setup.py").exists():
        return f"With a C++ compiler on PATH, run `pip install -e .` in {source}"
    return "Reinstall lopt with a C++ compiler on PATH"
