"""What is built, what is installed, and what importing it does."""

import importlib.metadata
import json
import os
import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools

import lopt

ROOT = Path(__file__).resolve().parents[1]


def build(folder, *commands, **environment):
    """Run setup.py with everything it writes in `folder`. Returns the finished process."""
    places = ["egg_info", "-e", str(folder), "build", "--build-base", str(folder / "build")]
    environment = {**os.environ, "LOPT_CPP": "", "LOPT_CUDA": "", **environment}
    command = [sys.executable, "setup.py", "-q", *places, *commands]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel_without_compiler(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    done = build(folder, "bdist_wheel", "-d", str(folder), "--bdist-dir", str(folder / "bdist"), CXX="/nonexistent/c++")
    assert done.returncode == 0, done.stderr
    assert "lopt: cpp part left out: no C++17 compiler" in done.stderr
    return zipfile.ZipFile(next(folder.glob("*.whl")))


@pytest.fixture(scope="module")
def recipe():
    """The names in setup.py, and the arguments it gives to setup()."""
    given = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
        patch.chdir(ROOT)
        return {**runpy.run_path("setup.py"), "given": given}


def test_without_a_compiler_the_wheel_records_what_it_lacks(wheel_without_compiler):
    record = json.loads(wheel_without_compiler.read("lopt/_build.json"))
    assert record["version"] == lopt.__version__
    assert "/nonexistent/c++: No such file or directory" in record["skipped"]["cpp"]
    assert not [name for name in wheel_without_compiler.namelist() if "/_C." in name]


def test_wheel_has_every_module_and_data_file_and_nothing_else(wheel_without_compiler):
    names = set(wheel_without_compiler.namelist())
    folders = {"lopt": "lopt", "kernels": "lopt/kernels", "bench": "lopt/bench"}
    for folder, installed in folders.items():
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{installed}/{path.relative_to(ROOT / folder).as_posix()}" in names
    for path in [ROOT / "lopt" / "py.typed", *(ROOT / "lopt" / "weights").rglob("*.safetensors")]:
        assert path.relative_to(ROOT).as_posix() in names
    assert {name.partition("/")[0] for name in names} == {"lopt", f"lopt-{lopt.__version__}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_required_part_that_cannot_be_built_fails_the_build(tmp_path):
    done = build(tmp_path, "build_ext", CXX="/nonexistent/c++", LOPT_CPP="1")
    assert done.returncode != 0
    assert "LOPT_CPP=1, but it cannot be built: no C++17 compiler" in done.stderr


def test_unknown_wish_is_refused(tmp_path):
    done = build(tmp_path, "build_ext", LOPT_CPP="yes")
    assert done.returncode != 0
    assert "LOPT_CPP='yes': give 0" in done.stderr


def test_instruction_sets_grow_in_the_order_they_are_linked(recipe):
    for isas in recipe["ISAS"].values():
        sets = [{flag for flag in flags if flag.startswith("-mavx")} for flags in isas.values()]
        assert all(small <= large for small, large in zip(sets, sets[1:], strict=False))


def test_kernels_are_compiled_once_per_instruction_set_and_the_rest_once(recipe, tmp_path, monkeypatch):
    command = recipe["given"]["cmdclass"]["build_ext"](setuptools.Distribution({"version": lopt.__version__}))
    isas = recipe["ISAS"]["x86_64"]
    monkeypatch.setitem(command.ninja.__globals__, "run", lambda command: (True, "x86_64-linux-gnu"))
    text = command.ninja(["a c++"], ["-fopenmp"], [], tmp_path / "some $folder: x" / "_C.so")
    for source in recipe["PER_ISA"]:
        assert [f"build {source.name}.{isa}.o: compile" in text for isa in isas] == [True] * len(isas)
    for source in recipe["ONCE"]:
        assert text.count(f"build {source.name}.o: compile") == 1
    assert "build " + re.sub(r"([$ :])", r"$\1", str(tmp_path / "some $folder: x" / "_C.so")) + ": link" in text


@pytest.mark.parametrize(
    ("archs", "flags"),
    [
        ("all-major", ["-arch=all-major"]),
        ("native", ["-arch=native"]),
        (
            "80,90a",
            [
                "-gencode=arch=compute_80,code=sm_80",
                "-gencode=arch=compute_90a,code=sm_90a",
                "-gencode=arch=compute_80,code=compute_80",
            ],
        ),
        ("90a", ["-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_90,code=compute_90"]),
    ],
)
def test_cuda_architectures_translate_to_flags(recipe, archs, flags):
    assert recipe["cuda_archs"](archs) == flags


def test_cuda_is_compiled_for_the_architectures_that_nvcc_knows(recipe, monkeypatch):
    names = recipe["default_archs"].__globals__
    monkeypatch.setitem(names, "run", lambda command: (True, "sm_75 sm_80 sm_86 sm_90"))
    assert recipe["default_archs"](["nvcc"]) == "80,90"
    assert recipe["default_archs"]([]) == "all-major"


@pytest.mark.parametrize(
    ("told", "archs"), [("9.0\n9.0\n", "90"), ("12.0\n8.9\n", "89,120"), ("[N/A]\n", "native"), ("", "native")]
)
def test_native_architectures_are_those_of_the_gpus_here(recipe, monkeypatch, told, archs):
    monkeypatch.setitem(recipe["native_archs"].__globals__, "run", lambda command: (True, told))
    assert recipe["native_archs"]() == archs


def test_metadata_has_one_version_and_bounds_torch():
    assert importlib.metadata.version("lopt") == lopt.__version__
    metadata = importlib.metadata.metadata("lopt")
    assert metadata["Requires-Python"] == ">=3.10"
    requires = importlib.metadata.requires("lopt")
    core = {re.match(r"\w+", line)[0]: line for line in requires if "extra ==" not in line}
    assert set(core) == {"torch", "numpy", "safetensors"}
    assert "<" in core["torch"]
    assert ">=" in core["torch"]
    assert {"train", "test", "models", "triton"} <= set(metadata.get_all("Provides-Extra"))
    assert [script.value for script in importlib.metadata.entry_points(group="console_scripts", name="lopt")] == [
        "lopt.cli:main"
    ]


def test_import_is_silent_takes_no_cuda_and_compiles_nothing():
    code = """
import sys, torch
before = set(sys.modules)
def audit(event, args):
    if event in ("subprocess.Popen", "os.system", "os.posix_spawn", "os.fork"):
        raise AssertionError(f"import lopt runs {args}")
sys.addaudithook(audit)
import lopt
assert not torch.cuda.is_initialized()
loaded = set(sys.modules) - before
assert not {name for name in loaded if name.split(".")[0] in ("triton", "matplotlib", "tqdm", "sklearn")}, loaded
assert not {name for name in loaded if name.startswith(("lopt.train", "lopt.meta.", "lopt.kernels", "lopt.bench"))}
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("heading", ["Install and train", "Test"])
def test_readme_has_one_command_alone_in_its_block(heading):
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", (ROOT / "README.md").read_text(), re.M | re.S)
    blocks = re.findall(r"^```sh\n(.*?)^```", section[1], re.M | re.S)
    assert len(blocks) == 1
    assert len(blocks[0].splitlines()) == 1
