"""A checkpoint is the old one or the whole new one, and a damaged one is noticed."""

import errno
import multiprocessing
import resource
from pathlib import Path

import pytest
import torch

from lopt.train import TrainError, checkpoint

STATE = {"step": 7, "model": {"weight": torch.arange(50_000.0), "flags": [1, None, "x", 2.5]}}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, STATE)
    return path


def test_what_is_loaded_equals_what_was_saved(saved: Path) -> None:
    state = checkpoint.load(saved)
    assert state["step"] == 7
    assert torch.equal(state["model"]["weight"], STATE["model"]["weight"])
    assert state["model"]["flags"] == [1, None, "x", 2.5]
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("damage", ["one bit", "cut off", "empty", "text", "other format"])
def test_a_damaged_checkpoint_is_refused_by_name(saved: Path, damage: str) -> None:
    content = bytearray(saved.read_bytes())
    if damage == "one bit":
        content[len(content) // 2] ^= 1
    elif damage == "cut off":
        del content[len(content) * 2 // 3 :]
    elif damage == "empty":
        content.clear()
    elif damage == "text":
        content[:] = b"step 7"
    saved.write_bytes(content)
    if damage == "other format":
        torch.save({"format": 99}, saved)
    with pytest.raises(TrainError, match=r"checkpoint\.pt' cannot be read"):
        checkpoint.load(saved)


def test_a_full_disk_keeps_the_checkpoint_before_and_says_so(saved: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # a write beyond it fails, as on a full disk
    try:
        with pytest.raises(TrainError, match=r"step 8 cannot be written .*still holds the checkpoint before"):
            checkpoint.save(saved, {**STATE, "step": 8})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoint.load(saved)["step"] == 7
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint.pt"]


def test_a_failure_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file: object) -> None:
        file.write(b"half of the n")  # type: ignore[attr-defined]
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoint.write_atomic(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_gone_is_reported(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="there is none before it"):
        checkpoint.save(tmp_path / "gone" / "checkpoint.pt", STATE)


def test_a_process_that_was_forked_does_not_hold_the_folder_and_its_parent_does(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    context = multiprocessing.get_context("fork")
    begun, ended = context.Event(), context.Event()
    child = context.Process(target=lambda: (begun.set(), ended.wait()))
    try:
        with checkpoint.alone(tmp_path):
            child.start()
            assert begun.wait(60)
            with pytest.raises(TrainError, match="another process is training in"), checkpoint.alone(tmp_path):
                pass
        with checkpoint.alone(tmp_path):
            assert child.is_alive()
    finally:
        ended.set()
        child.join()
