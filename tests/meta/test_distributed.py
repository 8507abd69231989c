"""Several processes compute what one process with all rows does, and go on from a checkpoint."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lopt.meta.meta_train import MetaTraining
from lopt.meta.tasks import Random
from lopt.train import TrainError, checkpoint
from lopt.train.group import Group

from .test_meta_train import tiny

RUNNER = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from tests.meta.test_meta_train import tiny
from lopt.meta import meta_train
from lopt.train.group import Group
from lopt.train import checkpoint
meta_train.draw = lambda *args: None
meta_train.MetaTraining._validate = lambda self: (self.flat.sum().item(), 0.0)
folder, stop_at = Path(sys.argv[1]), int(sys.argv[2])
group = Group.from_environment()
training = meta_train.MetaTraining(tiny(), 0, group=group)
if (folder / "checkpoint.pt").exists():
    training.load_state_dict(checkpoint.load(folder / "checkpoint.pt"))


class Stop:
    @property
    def received(self):  # one process alone is asked to stop
        return 15 if training.done >= stop_at and group.rank == group.size - 1 else None


training.run(folder, Stop())
group.leave()
"""


def run(folder: Path, processes: int, stop_at: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = RUNNER.format(tests=str(Path(__file__).parents[2]))
    started = []
    for rank in range(processes):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", script, str(folder), str(stop_at)], env=environment, stderr=subprocess.PIPE
            )
        )
    for process in started:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors.decode()


def test_two_processes_equal_one_with_all_rows_also_when_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(MetaTraining, "_validate", lambda self: (self.flat.sum().item(), 0.0))
    one = MetaTraining(tiny(), 0)
    while one.done < 12:  # the stages with bptt and pes
        one.meta_step()
    run(tmp_path, 2, 8)
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    assert state["done"] == 8 and len(state["worlds_of_others"]) == 1
    run(tmp_path, 2, 12)
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    assert state["done"] == 12
    moved = (one.flat - MetaTraining(tiny(), 0).flat).abs().max()
    assert moved > 5e-3
    # Sums of other lengths round otherwise; Adam makes of that up to lr per step where a gradient is about zero.
    difference = (one.flat - state["flat"]).abs()
    assert difference.median() < 1e-6 and difference.max() < 0.02 * moved
    start, *rows = state["rows"]
    assert start[:2] == [0, "start"]
    for ours, theirs in zip(one.rows, rows, strict=True):
        assert ours[2] == pytest.approx(theirs[2], rel=1e-3)
    with pytest.raises(TrainError, match="nproc-per-node 2"):
        MetaTraining(tiny(), 0).load_state_dict(state)


def test_rows_that_cannot_be_shared_out_are_refused():
    with pytest.raises(TrainError, match="4 rows of stage 'first'"):
        MetaTraining(tiny(), 0, group=Group(0, 3))


@pytest.mark.parametrize("repeat", [1, 2])
def test_parts_draw_what_one_process_draws(repeat):
    whole = Random(torch.Generator().manual_seed(0), repeat)
    parts = [Random(torch.Generator().manual_seed(0), repeat, part, 3) for part in range(3)]
    for draw in (
        lambda random, count: random.normal(count, 2),
        lambda random, count: random.integers(count, 3, high=9),
        lambda random, count: random.permutation(count, 5),
    ):
        drawn = [draw(part, 4 // 2 * repeat).chunk(repeat) for part in parts]
        expected = draw(whole, 3 * (4 // 2) * repeat)
        assert torch.equal(torch.cat([torch.cat(half) for half in zip(*drawn, strict=True)]), expected)
        assert whole.scalar() == parts[0].scalar() == parts[1].scalar() == parts[2].scalar()
