"""A run of `lopt train` that is killed again and again, or has no room to write, ends as if nothing had been.

LOPT_KILLS sets how often the run is killed, 6 by default.
"""

import argparse
import contextlib
import errno
import importlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lopt.train import TrainError, checkpoint, command, models, plots
from lopt.train.metrics import read_metrics

KILLS = int(os.environ.get("LOPT_KILLS", "6"))
STEPS = 40
OPTIONS = ["--steps", STEPS, "--batch-size", 8, "--log-every", 5, "--eval-every", 20, "--checkpoint-every", 2]
OPTIONS += ["--threads", 1, "--weight-decay", 0.01, "--device", "cpu"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch.setattr, monkeypatch.setitem)


def make_quick(setattr: Callable[..., None], setitem: Callable[..., None]) -> None:
    """No curves, and a model so small that starting takes most of the time."""
    setattr(plots, "draw", lambda path, title, runs: None)
    setitem(models.OWN, "preresnet8", (4, 8, 16))


def parsed(*options: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lopt train")
    command.add_arguments(parser)
    return parser.parse_args([str(option) for option in options])


def run(*options: object) -> int:
    return command.run(parsed(*options))


class Forks:
    """Runs in processes of their own, forked by one that has imported everything and run nothing: torch's threads do
    not survive a fork."""

    def __init__(self, folder: Path) -> None:
        self.said = folder / "said.txt"
        with self.said.open("w") as said:
            self.server = subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                bufsize=0,  # so that what is left in the pipe is what is left to read
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )

    def run_for(self, seconds: float | None, *options: object) -> int | None:
        """Exit code of a run; None if it was killed after `seconds`. What a run that fails has said is printed."""
        assert self.server.stdin and self.server.stdout
        self.server.stdin.write(json.dumps([str(option) for option in options]).encode() + b"\n")
        process = int(self.server.stdout.readline())
        ended = bool(select.select([self.server.stdout], [], [], seconds)[0])
        if not ended:
            os.kill(process, signal.SIGKILL)
        code = int(self.server.stdout.readline())
        if ended and code:
            print(self.said.read_text()[-5000:])
        return code if ended else None


@pytest.fixture
def forks(tmp_path: Path) -> Iterator[Forks]:
    forks = Forks(tmp_path)
    yield forks
    with forks.server as server:
        assert server.stdin
        server.stdin.close()


def serve() -> None:
    """For each line of options on standard input: fork a run, say its process, and when it has ended its exit code."""
    for module in ("sklearn.datasets", "sklearn.metrics", "torch._dynamo", "torch.utils.tensorboard", "tqdm"):
        importlib.import_module(module)  # which each run would have to do
    make_quick(setattr, dict.__setitem__)
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            code = 1
            try:
                os.dup2(2, 1)
                code = run(*json.loads(line))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)  # without the cleaning up of the process that forks
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of its own at `folder`; skips the test where that is not allowed."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount a small tmpfs: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_run_killed_at_random_moments_ends_with_the_parameters_of_one_that_was_not(
    tmp_path: Path, forks: Forks, assert_same_run: Callable[[Path, Path], None]
) -> None:
    assert run(*OPTIONS, "--out", tmp_path / "whole") == 0
    assert forks.run_for(None, *OPTIONS, "--steps", 1, "--out", tmp_path / "first") == 0  # the server has begun
    begin = time.monotonic()
    assert forks.run_for(None, *OPTIONS, "--out", tmp_path / "twin") == 0
    duration = time.monotonic() - begin
    assert_same_run(tmp_path / "whole", tmp_path / "twin")
    moments, killed, reached = random.Random(KILLS), 0, []
    folder = tmp_path / "killed"

    def enough() -> bool:  # on a busy machine many moments are before training
        return killed >= (KILLS if any(0 < step < STEPS for step in reached) else 10 * KILLS)

    while not enough() or folder.exists():
        begun = (folder / "config.json").exists()
        if not begun and folder.exists():
            shutil.rmtree(folder)  # nothing of a run is there yet, but maybe a part of its configuration
        seconds = None if enough() else moments.uniform(0, duration)
        code = forks.run_for(seconds, *(["--resume", folder] if begun else [*OPTIONS, "--out", folder]))
        if code is None:
            killed += 1
            if (folder / "checkpoint.pt").exists():
                reached.append(checkpoint.load(folder / "checkpoint.pt")["step"])
        else:
            assert code == 0
            assert_same_run(tmp_path / "whole", folder)
            shutil.rmtree(folder)
    assert any(0 < step < STEPS for step in reached)  # some moments were those of training


def test_a_full_disk_ends_the_run_with_its_last_checkpoint_and_more_room_lets_it_go_on(tmp_path: Path) -> None:
    assert run(*OPTIONS, "--steps", 1, "--out", tmp_path / "whole") == 0
    size = (tmp_path / "whole" / "checkpoint.pt").stat().st_size
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk, f"{(size * 5 // 2) // 1024}k"):
        folder = disk / "run"
        assert run(*OPTIONS, "--steps", 4, "--schedule", "constant", "--out", folder) == 0
        filler = disk / "filler"
        filler.write_bytes(bytes(size))  # what is left is too little for another checkpoint beside the first
        before = (folder / "checkpoint.pt").read_bytes()
        with pytest.raises(
            TrainError, match=r"checkpoint of step 6 cannot be written .*No space left.*still holds the"
        ):
            run("--resume", folder, "--steps", STEPS)
        assert (folder / "checkpoint.pt").read_bytes() == before
        assert not list(folder.glob("*.tmp"))
        filler.unlink()
        assert run("--resume", folder, "--steps", STEPS) == 0
        assert checkpoint.load(folder / "checkpoint.pt")["step"] == STEPS


def test_a_folder_that_became_read_only_ends_the_run_with_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    assert run(*OPTIONS, "--steps", 4, "--schedule", "constant", "--out", folder) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    real = open

    def read_only(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if str(path).startswith(str(folder)) and set(mode) & set("wax+"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", read_only)
    with pytest.raises(TrainError, match=r"cannot be written \(.*Read-only file system.*make .* writable"):
        run("--resume", folder, "--steps", 8)
    monkeypatch.setattr("builtins.open", real)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert run("--resume", folder, "--steps", 8) == 0
    assert int(read_metrics(folder / "metrics.csv")[-1][0]) == 8


if __name__ == "__main__":
    serve()
