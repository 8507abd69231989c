"""`lopt bench`: a table of benchmarks."""

from __future__ import annotations

import argparse

from lopt.bench import finetune, meta, stability, step, train

BENCHMARKS = {"step": step, "train": train, "stability": stability, "finetune": finetune, "meta": meta}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand per benchmark."""
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="benchmark", required=True)
    for name, module in BENCHMARKS.items():
        summary = (module.__doc__ or "").partition("\n")[0]
        module.add_arguments(benchmarks.add_parser(name, help=summary, description=summary))


def run(args: argparse.Namespace) -> int:
    """Run the chosen benchmark."""
    return BENCHMARKS[args.benchmark].run(args)
