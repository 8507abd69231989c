"""Build lopt._C, the compiled kernels, from csrc/ with ninja. Everything else about the package is in pyproject.toml.

    python setup.py build_ext --inplace     after a change in csrc/: recompiles what changed, into lopt/

Environment, none of it needed:
    CXX, CXXFLAGS            the C++ compiler (default: c++, g++ or clang++, the first that works) and more flags for it
    CUDACXX, CUDA_HOME       where nvcc is (default: on PATH, else in /usr/local/cuda/bin)
    LOPT_CUDA_ARCHS          what nvcc compiles for (default: CUDA_ARCHS below); "native", "all", "all-major" work too
    LOPT_CPP, LOPT_CUDA      0: leave this part out; 1: fail where it cannot be built; unset: leave it out there

What is left out, and why, goes to lopt/_build.json, where `lopt info` finds it. Neither torch nor a GPU is needed here.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77 or not all(map(importlib.util.find_spec, ("ninja", "pybind11"))):
    raise SystemExit('building lopt without build isolation needs: pip install "setuptools>=77" ninja pybind11')

import pybind11

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# How -> which files. PER_ISA files are compiled once for each entry of ISAS, in the namespace that LOPT_ISA names.
CUDA = sorted(CSRC.glob("*.cu"))
PER_ISA = sorted(CSRC.glob("hrnn_*.cpp"))
ONCE = sorted(set(CSRC.glob("*.cpp")) - set(PER_ISA))

# Processor of the compiler's target -> instruction sets, weakest first. That order is also the link order: where inline
# functions of the C++ library were emitted for several instruction sets, the linker keeps the first, which all can run.
X86_V3 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"]
ISAS = {
    "x86_64": {
        "v2": ["-msse4.2", "-mpopcnt"],
        "v3": X86_V3,
        "v4": [*X86_V3, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"],
    },
}
ISAS_ELSEWHERE: dict[str, list[str]] = {"generic": []}

CUDA_ARCHS = ("80", "90", "100", "120")  # Ampere, Hopper, Blackwell of both kinds; all others take the first one's PTX

COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
COMMON += shlex.split(os.environ.get("CXXFLAGS", ""))
KERNEL = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]  # the last is GCC's default
SHARED = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
PYTHON = f"-I{sysconfig.get_path('include')}"


def run(command: list[str]) -> tuple[bool, str]:
    """Run a command. Returns whether it succeeded, and its output or the first error line in it."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        return False, f"{command[0]}: {error.strerror}"
    output = (done.stdout + done.stderr).strip()
    if done.returncode == 0:
        return True, output
    errors = [line for line in output.splitlines() if "error" in line.lower()] or output.splitlines()
    return False, re.sub(r"^\S+: ", "", errors[0].strip()) if errors else f"{command[0]} exits {done.returncode}"


def links(compiler: list[str], code: str, suffix: str = ".cpp") -> tuple[bool, str]:
    """Try a compiler on a few lines of code, linked to a shared library. Returns success, and the first error line."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe" + suffix)
        source.write_text(code)
        return run([*compiler, str(source), "-o", str(source.with_suffix(".so"))])


def find_cxx() -> tuple[list[str], str]:
    """Returns the command of a C++17 compiler that can build a Python module, or ([], why there is none)."""
    reasons = []
    for name in [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]:
        cxx = shlex.split(name)
        works, reason = links([*cxx, *COMMON, *SHARED, PYTHON], "#include <Python.h>\n#include <string_view>\n")
        if works:
            return cxx, ""
        reasons.append(reason)
    return [], "no C++17 compiler that finds Python.h: " + "; ".join(dict.fromkeys(reasons))


def find_nvcc(cxx: list[str]) -> tuple[list[str], str]:
    """Returns the command of an nvcc that takes `cxx` as its host compiler, or ([], why there is none)."""
    if not CUDA:
        return [], "this version has no CUDA source"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home, "bin")))
    if not nvcc:
        return [], f"no nvcc on PATH, in CUDACXX or in {home}/bin"
    command = [nvcc, "-std=c++17", "-ccbin", cxx[-1], "-cudart", "static"]
    works, reason = links([*command, "-shared", "-Xcompiler=-fPIC"], "#include <cuda_runtime.h>\n", ".cu")
    return (command, "") if works else ([], f"nvcc does not work with {cxx[-1]}: {reason}")


def default_archs(nvcc: list[str]) -> str:
    """Those of CUDA_ARCHS that nvcc knows, as for LOPT_CUDA_ARCHS; without any, what it calls all-major."""
    known = run([*nvcc, "--list-gpu-code"])[1].split() if nvcc else []
    return ",".join(arch for arch in CUDA_ARCHS if f"sm_{arch}" in known) or "all-major"


def native_archs() -> str:
    """Those of this machine's GPUs, as for LOPT_CUDA_ARCHS; "native" where nvidia-smi does not tell."""
    works, told = run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    found = sorted({line.strip().replace(".", "") for line in told.splitlines()}, key=len)
    return ",".join(found) if works and found and all(map(str.isdigit, found)) else "native"


def cuda_archs(archs: str) -> list[str]:
    """Translate LOPT_CUDA_ARCHS to nvcc's flags: machine code for each number, and PTX of the lowest for other GPUs."""
    numbers = [arch.strip() for arch in re.split("[,;]", archs)]
    if not numbers[0].rstrip("af").isdigit():
        return [f"-arch={archs}"]
    lowest = min(int(number.rstrip("af")) for number in numbers)
    flags = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
    return [*flags, f"-gencode=arch=compute_{lowest},code=compute_{lowest}"]


def escaped(text: str | Path) -> str:
    """Escape for build.ninja: $ everywhere, and in a path what separates paths."""
    return re.sub(r"[$ :]" if isinstance(text, Path) else r"[$]", r"$\g<0>", str(text))


def wanted(name: str, found: list[str], reason: str) -> tuple[list[str], str]:
    """Apply LOPT_CPP / LOPT_CUDA (0, 1 or unset) to a compiler that was or was not found."""
    choice = os.environ.get(name, "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"{name}={choice!r}: give 0 (leave it out) or 1 (fail without it), or unset it")
    if choice == "1" and not found:
        raise SystemExit(f"{name}=1, but it cannot be built: {reason}")
    return ([], f"{name}=0 was set") if choice == "0" else (found, reason)


class Ninja(build_ext):
    """Write build.ninja, run ninja, and record what was left out. Handles the one extension lopt._C."""

    def build_extension(self, ext):
        folder = Path(self.build_temp).resolve()
        module, record = (Path(self.build_lib, name).resolve() for name in self.outputs())
        for path in (folder, module.parent):
            path.mkdir(parents=True, exist_ok=True)
        skipped = {}
        cxx, skipped["cpp"] = wanted("LOPT_CPP", *find_cxx())
        nvcc, skipped["cuda"] = wanted("LOPT_CUDA", *(find_nvcc(cxx) if cxx else ([], "the C++ part is left out")))
        if cxx:
            openmp = ["-fopenmp"]
            works, reason = links([*cxx, *COMMON, *SHARED, *openmp], "#include <omp.h>\nint n = omp_get_num_procs();\n")
            if not works:
                openmp, skipped["openmp"] = [], f"{cxx[-1]} -fopenmp: {reason}"
            (folder / "build.ninja").write_text(self.ninja(cxx, openmp, nvcc, module))
            if subprocess.call([sys.executable, "-m", "ninja", "-C", str(folder)]):
                raise SystemExit("lopt._C does not compile, see above. LOPT_CPP=0 installs lopt without it.")
        else:
            module.unlink(missing_ok=True)
        skipped = {part: reason for part, reason in skipped.items() if reason}
        record.write_text(json.dumps({"version": self.distribution.get_version(), "skipped": skipped}, indent=1) + "\n")
        for part, reason in skipped.items():
            print(f"lopt: {part} part left out: {reason}", file=sys.stderr)

    def ninja(self, cxx, openmp, nvcc, module):
        """Returns the text of build.ninja: an object per ONCE and CUDA file, and per PER_ISA file and ISA."""
        isas = ISAS.get(run([*cxx, "-dumpmachine"])[1].split("-")[0], ISAS_ELSEWHERE)
        archs = os.environ.get("LOPT_CUDA_ARCHS") or default_archs(nvcc)
        archs = native_archs() if archs == "native" else archs
        defines = [
            f'-DLOPT_VERSION="{self.distribution.get_version()}"',
            f"-DLOPT_FOR_EACH_ISA(X)={' '.join(f'X({isa})' for isa in isas)}",
            *([f'-DLOPT_CUDA_ARCHS="{archs}"'] if nvcc else []),
        ]
        bindings = [*cxx, *COMMON, "-O2", *openmp, *defines, PYTHON, f"-I{pybind11.get_include()}", "-MMD"]
        device = [*nvcc, "-O3", *cuda_archs(archs), "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden", "-MD"]
        objects = [(source, "", bindings) for source in ONCE]
        for isa, flags in isas.items():
            kernel = [*cxx, *COMMON, *KERNEL, *flags, *openmp, f"-DLOPT_ISA={isa}", "-MMD"]
            objects += [(source, f".{isa}", kernel) for source in PER_ISA]
        objects += [(source, "", device) for source in CUDA if nvcc]
        link = [*nvcc, "-shared", *(f"-Xcompiler={flag}" for flag in openmp)] if nvcc else [*cxx, *SHARED, *openmp]
        text = ["rule compile\n command = $flags -MF $out.d -c $in -o $out\n depfile = $out.d\n deps = gcc"]
        text += [f"rule link\n command = {escaped(shlex.join(link))} $in -o $out"]
        names = []
        for source, suffix, flags in objects:
            names.append(f"{source.name}{suffix}.o")
            text += [f"build {names[-1]}: compile {escaped(source)}\n flags = {escaped(shlex.join(flags))}"]
        return "\n".join([*text, f"build {escaped(module)}: link {' '.join(names)}", ""])

    def outputs(self):
        return [self.get_ext_filename("lopt._C"), "lopt/_build.json"]

    def get_outputs(self):
        return [str(path) for name in self.outputs() if (path := Path(self.build_lib, name)).exists()]

    def get_output_mapping(self):
        return {path: str(Path(path).relative_to(self.build_lib)) for path in self.get_outputs() if self.inplace}

    def copy_extensions_to_source(self):
        for name in self.outputs():
            Path(name).unlink(missing_ok=True)  # a running process keeps the file it has mapped
            if Path(self.build_lib, name).exists():
                shutil.copy2(Path(self.build_lib, name), name)


setup(
    packages=[*find_packages(include=["lopt", "lopt.*"]), "lopt.kernels", "lopt.bench"],
    package_dir={"lopt.kernels": "kernels", "lopt.bench": "bench"},
    ext_modules=[Extension("lopt._C", sources=[str(path.relative_to(ROOT)) for path in [*ONCE, *PER_ISA, *CUDA]])],
    cmdclass={"build_ext": Ninja},
)
