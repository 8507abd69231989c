"""The `lopt` command: its table, its errors, and `lopt info`."""

import subprocess
import sys
import types

import pytest
import torch

import lopt
from lopt import backends, cli, info, native


def command(monkeypatch, run, module="lopt.made_up"):
    """Put a subcommand `made-up` into the table whose run(args) is executed as a line of `module`."""
    fake = types.ModuleType(module)
    exec(
        "def run(args):\n    return body(args)\ndef add_arguments(parser):\n    parser.add_argument('--n', type=int)",
        fake.__dict__,
    )
    source = "def body(args):\n" + "".join(f"    {line}\n" for line in run.splitlines())
    exec(source, fake.__dict__)
    monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setitem(cli.COMMANDS, "made-up", cli.Command(module, "a test"))
    return ["made-up"]


def test_exit_code_is_that_of_the_subcommand(monkeypatch):
    assert cli.main([*command(monkeypatch, "return args.n"), "--n", "7"]) == 7


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_subcommand_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
    assert f"usage: lopt {name}" in capsys.readouterr().out


def test_help_lists_the_subcommands_without_importing_them():
    code = "import sys; from lopt import cli\ntry: cli.main(['--help'])\nfinally: print(sorted(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    for name, line in cli.COMMANDS.items():
        assert name in output.split()
        assert f"'{line.module}'" not in output


@pytest.mark.parametrize("error", ["ValueError", "RuntimeError", "ImportError", "FileNotFoundError"])
def test_error_of_the_user_is_one_line_and_exit_code_2(monkeypatch, capsys, error):
    assert cli.main(command(monkeypatch, f"raise {error}('steps is -1;\\nit has to be positive')")) == 2
    assert capsys.readouterr().err == "lopt: error: steps is -1; it has to be positive\n"


def test_missing_file_is_an_error_of_the_user_wherever_it_is_opened(monkeypatch, capsys):
    assert cli.main(command(monkeypatch, "open('/nonexistent/file')", module="elsewhere")) == 2
    assert "/nonexistent/file" in capsys.readouterr().err


def test_error_from_outside_of_lopt_keeps_its_traceback(monkeypatch):
    with pytest.raises(ValueError, match="broken"):
        cli.main(command(monkeypatch, "raise ValueError('broken')", module="elsewhere"))


def test_debug_variable_keeps_every_traceback(monkeypatch):
    monkeypatch.setenv("LOPT_DEBUG", "1")
    with pytest.raises(ValueError, match="steps"):
        cli.main(command(monkeypatch, "raise ValueError('steps is -1')"))


def test_missing_extra_names_the_package_and_what_to_install(monkeypatch, capsys):
    run = "raise ModuleNotFoundError('', name='sklearn.datasets')"
    assert cli.main(command(monkeypatch, run)) == 2
    message = capsys.readouterr().err
    assert "scikit-learn is not installed" in message
    assert 'pip install "lopt[train]"' in message


def test_interrupted_command_ends_with_130(monkeypatch, capsys):
    assert cli.main(command(monkeypatch, "raise KeyboardInterrupt")) == 130
    assert capsys.readouterr().err == "lopt: interrupted\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_closed_pipe_ends_in_silence_but_not_as_if_the_work_were_done(unbuffered):
    done = subprocess.run(
        f"PYTHONUNBUFFERED={unbuffered} {sys.executable} -m lopt info | true; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (141, "")


def test_python_m_lopt_is_the_command():
    done = subprocess.run([sys.executable, "-m", "lopt", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"lopt {lopt.__version__}\n"


def test_info_shows_versions_every_backend_and_the_choice_per_device(capsys):
    assert cli.main(["info"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert lopt.__version__ in lines["lopt"]
    assert str(native.FOLDER) in lines["lopt"]
    assert torch.__version__ in lines["torch"]
    report = info.report()
    for name, reason in backends.available().items():
        assert f"\n  {name} " in report
        assert reason is None or reason in report
    assert info.chosen("cpu") in backends.BACKENDS
    assert lines["cpu"].split()[1] == info.chosen("cpu")


def test_info_says_why_there_is_no_compiled_module(monkeypatch):
    monkeypatch.setattr(native, "absent", lambda: "lopt._C was left out at install: no compiler. Cure")
    assert info.build() == [("built", "no: lopt._C was left out at install: no compiler. Cure")]


def test_info_says_which_parts_the_build_left_out(monkeypatch):
    compiled = {"compiler": "gcc", "isas": ["v2", "v3"], "openmp": False, "cuda": None}
    module = types.SimpleNamespace(compiled=lambda: compiled, isa=lambda: "v3")
    monkeypatch.setattr(native, "absent", lambda: None)
    monkeypatch.setattr(native, "load", lambda: module)
    monkeypatch.setattr(native, "left_out", lambda: {"openmp": "no omp.h", "cuda": "no nvcc on PATH"})
    rows = dict(info.build())
    assert rows["instruction sets"] == "v2 v3, this processor runs v3"
    assert rows["OpenMP"] == "no: no omp.h"
    assert rows["CUDA kernels"] == "no: no nvcc on PATH"


def test_info_of_a_model_shows_what_training_it_needs(capsys):
    assert cli.main(["info", "--model", "preresnet8", "--classes", "10"]) == 0
    said = capsys.readouterr().out
    assert "preresnet8 for 10 classes" in said
    assert "77,850 in 25 tensors" in said
    assert "5.92 MB, 76" in said
    assert cli.main(["info", "--model", "no_such_net"]) == 2
    assert "no_such_net" in capsys.readouterr().err


@pytest.mark.gpu
def test_info_names_the_gpu_and_its_backend():
    assert torch.cuda.get_device_name() in info.chosen("cuda")
