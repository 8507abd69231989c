"""The `lopt` command: a table of subcommands, and errors in one line."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import lopt


class Command(NamedTuple):
    """One line of the table. The module has `add_arguments(parser)` and `run(args) -> int`, the exit code."""

    module: str
    help: str


COMMANDS = {
    "train": Command("lopt.train.command", "train a network with HRNN or, to compare, with AdamW or SGD"),
    "make-images": Command("lopt.train.textures", "make a folder of images of textures, to try `lopt train` on"),
    "meta-train": Command("lopt.meta.command", "meta-train an optimizer on many small tasks"),
    "evaluate": Command("lopt.evaluate.command", "compare meta-parameters with tuned optimizers on held-out tasks"),
    "replay": Command("lopt.interop.tf1", "replay a recorded trajectory and print the worst error of each slot"),
    "bench": Command("lopt.bench.command", "time steps, trainings and meta-training beside others, and test stability"),
    "info": Command("lopt.info", "print versions, how lopt was built, and which backends can be used"),
}

EXTRAS = {  # module -> (what pip calls it, extra of lopt that brings it)
    "PIL": ("pillow", "train"),
    "huggingface_hub": ("huggingface_hub", "huggingface"),
    "matplotlib": ("matplotlib", "train"),
    "pytorchcv": ("pytorchcv", "train"),
    "sklearn": ("scikit-learn", "train"),
    "tensorboard": ("tensorboard", "train"),
    "timm": ("timm", "models"),
    "torchvision": ("torchvision", "models"),
    "tqdm": ("tqdm", "train"),
    "transformers": ("transformers", "frameworks"),
    "triton": ("triton", "triton"),
}

INTERRUPTED = 130  # exit code of a program ended by Ctrl-C
UNREAD = 141  # of one ended by SIGPIPE, as nobody reads what it prints; its work may not be done
USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: the arguments after the program's name; those of the process if None.

    Returns:
        The exit code: the subcommand's own, 2 after an error that its user can cure, 130 after Ctrl-C, or 141 where
        standard output is closed.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser, subparsers = _parsers()
    try:
        if argv and argv[0] in COMMANDS:
            _module(argv[0]).add_arguments(subparsers[argv[0]])
        args = parser.parse_args(argv)
        code = int(_module(args.command).run(args))
        print(end="", flush=True)  # a closed pipe is noticed here, not when Python ends
        return code
    except KeyboardInterrupt:
        print("lopt: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        message = _message(error)
        if message is None or os.environ.get("LOPT_DEBUG", "0") not in ("", "0"):
            raise
        print(f"lopt: error: {message}", file=sys.stderr)
        return USER_ERROR


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of `lopt`, and those of its subcommands without their arguments: their modules are not imported."""
    parser = argparse.ArgumentParser(
        prog="lopt", description=lopt.__doc__, epilog="LOPT_DEBUG=1 shows the traceback of an error."
    )
    parser.add_argument("--version", action="version", version=f"lopt {lopt.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    return parser, {
        name: commands.add_parser(name, help=line.help, description=line.help) for name, line in COMMANDS.items()
    }


def _module(command: str) -> ModuleType:
    return importlib.import_module(COMMANDS[command].module)


def _message(error: Exception) -> str | None:
    """What the user can act on in one line, or None for an error that wants a traceback."""
    if isinstance(error, ModuleNotFoundError) and error.name and (name := error.name.partition(".")[0]) in EXTRAS:
        package, extra = EXTRAS[name]
        return f'{package} is not installed; it comes with an extra of lopt: pip install "lopt[{extra}]"'
    if isinstance(error, OSError) or _raised_by(error).partition(".")[0] == "lopt":
        return " ".join(str(error).split())
    return None


def _raised_by(error: Exception) -> str:
    """Name of the module whose line raised an error."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "")
