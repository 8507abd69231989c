"""Files that are either the old one or the whole new one, whenever the process or the machine dies."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lopt.train import TrainError

FORMAT = 1
_locks: set[int] = set()  # descriptors of the folders in which this process is `alone`


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replaces `path` by what `write` puts into a file; on any failure `path` is untouched and OSError or the failure
    itself is raised. One process at a time may write to it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:  # of a full disk, say
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    if os.name == "posix":  # the rename itself reaches the disk with the folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Raises TrainError if another process trains in the folder, where the system tells. The lock is this process's
    own: processes that it forks, which may outlive it, do not hold it."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    _locks.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            text = f"another process is training in {str(folder)!r}: wait for it, or choose another --out"
            raise TrainError(text) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        if descriptor in _locks:  # a process that was forked has closed it
            _locks.discard(descriptor)
            os.close(descriptor)


def _let_go() -> None:
    """Close a forked process's duplicates; the lock goes with the last of them, so its parent keeps it."""
    while _locks:
        os.close(_locks.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` (tensors, numbers, strings, and containers of them). Raises TrainError, the old file intact."""
    try:
        write_atomic(path, lambda file: torch.save({"format": FORMAT, **state}, file))
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        kept = f"{str(path)!r} still holds the checkpoint before" if path.exists() else "there is none before it"
        reason = _first_os_error(error) or error
        raise TrainError(
            f"checkpoint of step {state.get('step')} cannot be written ({reason}); {kept}. "
            "Free space or make the folder writable, then resume"
        ) from error


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote, on the CPU. Raises TrainError when the file is damaged or of another format."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # checksums; torch.load does not look at them
        if damaged is not None:
            raise ValueError(f"wrong checksum in {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(f"format is not {FORMAT}")
    except Exception as error:  # zipfile, pickle and torch raise a dozen kinds for damaged files
        raise TrainError(
            f"checkpoint {str(path)!r} cannot be read ({type(error).__name__}: {error}): restore it from a copy, "
            "or delete it to begin this run again"
        ) from error
    return state


def step_of(path: Path) -> int:
    """The step of a checkpoint, of which little is read; 0 if it is damaged, which `load` will tell."""
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"])
    except Exception:  # as above
        return 0


def _first_os_error(error: BaseException | None) -> OSError | None:
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__context__
    return None
