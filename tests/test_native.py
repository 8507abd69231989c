"""lopt._C, or the words for its absence."""

import importlib
import json
import types

import pytest

import lopt
from lopt import native


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """lopt lives in an empty folder, and importing lopt._C fails as it does there."""

    def fails(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(native, "FOLDER", tmp_path / "lopt")
    monkeypatch.setattr(importlib, "import_module", fails)
    native.absent.cache_clear()
    (tmp_path / "lopt").mkdir()
    yield tmp_path / "lopt"
    native.absent.cache_clear()


def test_compiled_module_belongs_to_this_version_and_processor():
    if reason := native.absent():
        pytest.skip(reason)
    module = native.load()
    assert module.__version__ == lopt.__version__
    assert module.isa() in module.compiled()["isas"]


def test_module_left_out_at_install_says_why_and_the_cure(elsewhere):
    (elsewhere / "_build.json").write_text(json.dumps({"version": "1", "skipped": {"cpp": "no C++17 compiler"}}))
    with pytest.raises(ImportError, match="left out at install: no C\\+\\+17 compiler. Reinstall lopt with a C\\+\\+"):
        native.load()


def test_source_tree_that_was_never_built_says_so_and_what_to_run(elsewhere):
    (elsewhere.parent / "setup.py").touch()
    message = native.absent()
    assert f"imported from {elsewhere}, where lopt._C was never built" in message
    assert f"run `pip install -e .` in {elsewhere.parent}" in message


def test_module_for_another_python_is_named(elsewhere):
    (elsewhere / "_C.cpython-27-x86_64-linux-gnu.so").touch()
    assert "_C.cpython-27-x86_64-linux-gnu.so but no lopt._C for Python 3" in native.absent()


def test_module_of_another_version_is_refused(elsewhere, monkeypatch):
    monkeypatch.setattr(importlib, "import_module", lambda name: types.SimpleNamespace(__version__="0.0.1"))
    assert f"built for lopt 0.0.1 and this is {lopt.__version__}" in native.absent()


def test_module_that_does_not_load_passes_on_the_loaders_words(elsewhere, monkeypatch):
    def fails(name):
        raise ImportError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", fails)
    assert "lopt._C does not load: libgomp.so.1" in native.absent()
