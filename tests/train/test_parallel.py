"""Two processes train as one does: by DDP and FSDP2, from each other's checkpoints, until a signal reaches one of them.

Run as a program, `python test_parallel.py FOLDER`, this file is one of the two processes that the tests start once: it
goes through all CHECKS and leaves what became of each in FOLDER. The model has no BatchNorm, which sees how a batch is
divided.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lopt.state import SAMPLES
from lopt.train import checkpoint, models, parallel, plots
from lopt.train.config import Config
from lopt.train.data import Digits
from lopt.train.group import ALONE, Group
from lopt.train.loop import Training
from lopt.train.metrics import COLUMNS, read_metrics
from lopt.train.runs import train_all
from lopt.train.stop import StopRequest

WORLD = 2
TIMEOUT = 240  # seconds, of the whole program
CONFIG = Config(
    model="preresnet8", data="digits", optimizer="hrnn", lr=1.0, weight_decay=0.0, schedule="cosine", steps=8,
    batch_size=16, image_size=8, seed=5, device="cpu", threads=1, workers=0, log_every=4, eval_every=4,
    train_images=1437, classes=10, ema=0.9,
)  # fmt: skip
# Gradients are means of means, summed in another order: some float32 roundings of 2^-24, which every step multiplies.
CLOSE = {"rtol": 2**-12, "atol": 2**-14}

UNABLE = parallel.unable_to_shard(torch.device("cpu"))
MODES = [mode for mode in parallel.MODES if mode != "fsdp" or not UNABLE]
RATES = {"hrnn": 1.0, "sgd": 0.03}  # SGD, unlike HRNN, sees a gradient of the wrong scale

CHECKS: dict[str, Callable[[Path], None]] = {}


def on_two_processes(check: Callable[[Path], None]) -> Callable[[Path], None]:
    """Make a function one of the CHECKS. It is given a folder that both processes share."""
    CHECKS[check.__name__] = check
    return check


class Plain(nn.Module):
    """Convolutions without normalisation, as many biases as a tensor has numbers in one kind of state, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 7, 3), nn.Tanh(), nn.Flatten(), nn.Linear(7 * 36, 1 + SAMPLES), nn.Tanh()
        )
        self.head = nn.Linear(1 + SAMPLES, 10)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


@contextlib.contextmanager
def plain_model(build: Callable[[], nn.Module] = Plain) -> Iterator[None]:
    """Every model is that one; a unit of FSDP is small enough for it to have several; no curves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "build", lambda *_: (build(), None, 1))
        patch.setattr(parallel, "UNIT", 200)
        patch.setattr(plots, "draw", lambda *_: None)
        yield


def digits() -> Digits:
    """A test set that two processes cannot share equally."""
    data = Digits()
    data.test_images, data.test_labels = data.test_images[:63], data.test_labels[:63]
    return data


def train(config: Config, folder: Path, group: Group, stop: StopRequest | None = None) -> Training:
    """One process' worth of a run, from the checkpoint when there is one."""
    folder.mkdir(exist_ok=True, parents=True)
    group.max([0.0])
    training = Training(config, digits(), group)
    if (folder / "checkpoint.pt").exists():
        training.restore(folder / "checkpoint.pt")
    training.run(folder, stop or StopRequest())
    return training


def tensors(tree: Any, path: str = "") -> dict[str, torch.Tensor]:
    """Floating tensors of a checkpoint by their path."""
    if isinstance(tree, dict):
        return {key: value for name, part in tree.items() for key, value in tensors(part, f"{path}/{name}").items()}
    return {path: tree} if isinstance(tree, torch.Tensor) and tree.is_floating_point() else {}


def assert_close_runs(left: Path, right: Path) -> None:
    """Checkpoints equal to rounding, rows too."""
    if dist.is_initialized():
        dist.barrier()  # process 0 has written
    one, two = (tensors(checkpoint.load(folder / "checkpoint.pt")) for folder in (left, right))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
    rows, others = (read_metrics(folder / "metrics.csv") for folder in (left, right))
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        for place in range(9):
            assert (row[place] == "") == (other[place] == "")
            if row[place]:
                assert float(other[place]) == pytest.approx(float(row[place]), rel=1e-3)


class StopAfter(StopRequest):
    """As if SIGTERM arrived while it is asked for the count-th time."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.asked, self.count, self.told = 0, count, None

    @property
    def received(self) -> int | None:  # type: ignore[override]
        self.asked += 1
        return self.told or (int(signal.SIGTERM) if self.asked > self.count else None)

    @received.setter
    def received(self, number: int | None) -> None:
        self.told = number


# The two processes


@on_two_processes
def each_process_gets_its_part_of_the_batches_of_one(folder: Path) -> None:
    group, data = Group(dist.get_rank(), WORLD), digits()
    with plain_model():
        own, whole = (Training(replace(CONFIG, ema=None), data, each).feed for each in (group, ALONE))
    part = slice(8 * group.rank, 8 * group.rank + 8)
    for mine, all_ in zip(data.train_batches(own, 0, 3), data.train_batches(whole, 0, 3), strict=True):
        assert torch.equal(mine[0], all_[0][part])
        assert torch.equal(mine[1], all_[1][part])
    labels = torch.cat([labels for _, labels in data.test_batches(own)])
    assert len(labels) == 32
    assert (labels >= 0).sum() == 32 - group.rank  # 63 images


@on_two_processes
def ddp_trains_as_one_process_does(folder: Path) -> None:
    for optimizer, lr in RATES.items():
        config = replace(CONFIG, parallel="ddp", optimizer=optimizer, lr=lr)
        with plain_model():
            train(config, folder / f"ddp-{optimizer}", Group(dist.get_rank(), WORLD))
        assert_close_runs(folder / f"one-{optimizer}", folder / f"ddp-{optimizer}")


@on_two_processes
def fsdp_trains_as_one_process_does(folder: Path) -> None:
    if UNABLE:
        pytest.skip(UNABLE)
    from torch.distributed.tensor import DTensor

    for optimizer, lr in RATES.items():
        config = replace(CONFIG, parallel="fsdp", optimizer=optimizer, lr=lr)
        with plain_model():
            training = train(config, folder / f"fsdp-{optimizer}", Group(dist.get_rank(), WORLD))
        assert all(isinstance(param, DTensor) for param in training.model.parameters())
        assert isinstance(training.model.body[3].weight, DTensor)
        assert_close_runs(folder / f"one-{optimizer}", folder / f"fsdp-{optimizer}")


@on_two_processes
def parts_of_a_batch_are_accumulated_before_gradients_are_exchanged(folder: Path) -> None:
    for mode in MODES:
        with plain_model():
            home = folder / f"{mode}-parts"
            config = replace(CONFIG, parallel=mode, accumulate=4, optimizer="sgd", lr=RATES["sgd"])
            train(config, home, Group(dist.get_rank(), WORLD))
        assert_close_runs(folder / "one-sgd", home)


@on_two_processes
def a_checkpoint_of_one_process_goes_on_with_two(folder: Path) -> None:
    for mode in MODES:
        home = folder / f"one-then-{mode}"
        if dist.get_rank() == 0:
            home.mkdir(exist_ok=True)
            for name in ("checkpoint.pt", "metrics.csv"):
                (home / name).write_bytes((folder / "half" / name).read_bytes())
        with plain_model():
            train(replace(CONFIG, parallel=mode), home, Group(dist.get_rank(), WORLD))
        assert_close_runs(folder / "one-hrnn", home)


@on_two_processes
def a_stopped_run_of_two_goes_on_bit_for_bit(folder: Path) -> None:
    group = Group(dist.get_rank(), WORLD)

    def dropout() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.5), nn.Tanh(), nn.Linear(32, 10))

    for mode in MODES:
        config = replace(CONFIG, parallel=mode, amp="bf16", ema=None)
        with plain_model(dropout):
            train(config, folder / f"{mode}-whole", group)
            train(config, folder / f"{mode}-stopped", group, StopAfter(3 if group.rank else 99))
            group.max([0.0])
            state = checkpoint.load(folder / f"{mode}-stopped" / "checkpoint.pt")
            assert state["step"] == 3
            assert not torch.equal(state["rng"], state["rng_others"][0][0])  # processes drop out each on its own
            torch.manual_seed(99)
            train(config, folder / f"{mode}-stopped", group)
        group.max([0.0])  # process 0 has written
        left, right = (
            tensors(checkpoint.load(folder / f"{mode}-{name}" / "checkpoint.pt")) for name in ("whole", "stopped")
        )
        del left["/meter"], right["/meter"]  # sums over processes, added up at another step
        assert [name for name in left if not torch.equal(left[name], right[name])] == []


@on_two_processes
def batch_norm_evaluates_with_the_statistics_that_are_saved(folder: Path) -> None:
    for mode in MODES:
        with plain_model(
            lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))
        ):
            config = replace(CONFIG, parallel=mode, steps=4)
            training = train(config, folder / f"{mode}-norm", Group(dist.get_rank(), WORLD))
            again = Training(config, digits())
            training.group.max([0.0])
            again.restore(folder / f"{mode}-norm" / "checkpoint.pt")
            scores = again._evaluate(StopRequest())
        row = dict(zip(COLUMNS, read_metrics(folder / f"{mode}-norm" / "metrics.csv")[-1], strict=True))
        assert len(scores) == 6
        for name, value in scores.items():
            assert float(row[name]) == pytest.approx(value, rel=1e-4)
        mean = training.model[1].running_mean
        assert training.group.max(mean.tolist()) == mean.tolist()


@on_two_processes
def a_checkpoint_amid_a_row_does_not_change_its_means(folder: Path) -> None:
    rows = []
    for name, every in (("none", 100), ("each", 1)):
        config = replace(CONFIG, steps=6, log_every=6, eval_every=6, checkpoint_every=every)
        with plain_model():
            train(config, folder / f"row-{name}", Group(dist.get_rank(), WORLD))
        rows.append(read_metrics(folder / f"row-{name}" / "metrics.csv")[-1][:9])
    assert rows[0] == rows[1]


@on_two_processes
def the_process_that_writes_alone_says_when_a_checkpoint_is_due(folder: Path) -> None:
    group, saved = Group.from_environment("gloo"), []
    with plain_model(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_save_due", lambda self, since, cost: self.group.rank == 1 or self.step == 3)
        patch.setattr(Training, "_save", lambda self, path: saved.append(self.step))
        train(CONFIG, folder / "run", group)
    assert saved == [3, 8]  # process 1, which writes nothing, would have it cheap


@on_two_processes
def a_signal_that_torchrun_passes_on_is_not_a_second_one(folder: Path) -> None:
    os.environ["WORLD_SIZE"], before = str(WORLD), os.environ.get("WORLD_SIZE")
    acted: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: acted.append(number))
    with StopRequest() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM and not acted
        stop._since -= 60
        os.kill(os.getpid(), signal.SIGTERM)
        assert acted == [signal.SIGTERM]
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.pop("WORLD_SIZE") if before is None else os.environ.update(WORLD_SIZE=before)


@on_two_processes
def a_signal_to_one_process_ends_both_after_the_same_step(folder: Path) -> None:
    group, home = Group(dist.get_rank(), WORLD), folder / "signalled"
    with plain_model():
        training = Training(replace(CONFIG, steps=100_000, log_every=1, eval_every=100_000), digits(), group)
        take_step, alarm = training.take_step, 5

        def step(batches: Any) -> None:
            take_step(batches)
            if training.step == alarm and group.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        training.take_step = step  # type: ignore[method-assign]
        code = train_all(training, home)
    assert code == 128 + signal.SIGTERM
    assert group.max([training.step, -training.step]) == [alarm, -alarm]
    assert checkpoint.load(home / "checkpoint.pt")["step"] == alarm


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    group = parallel.join(torch.device("cpu"))
    outcomes: dict[str, str | None] = {}
    for name, check in CHECKS.items():
        try:
            check(folder)
            outcomes[name] = None
        except pytest.skip.Exception as skip:
            outcomes[name] = f"skipped: {skip}"
        except BaseException:
            outcomes[name] = traceback.format_exc()
            break
    (folder / f"outcomes-{group.rank}.json").write_text(json.dumps(outcomes))
    if all(outcome is None or outcome.startswith("skipped: ") for outcome in outcomes.values()):
        group.leave()


# The tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, run_processes: Callable[..., None]) -> Path:
    """What the two processes leave, beside the same runs of this one process."""
    folder = tmp_path_factory.mktemp("parallel")
    with plain_model():
        for optimizer, lr in RATES.items():
            train(replace(CONFIG, optimizer=optimizer, lr=lr), folder / f"one-{optimizer}", ALONE)
        train(CONFIG, folder / "half", ALONE, StopAfter(5))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environments = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(WORLD)]
    run_processes(__file__, [[str(folder)]] * WORLD, environments, folder, TIMEOUT)
    return folder


@pytest.mark.parametrize("check", CHECKS)
def test_on_two_processes(check: str, folder: Path, failures_of: Callable[[str, Path, int], list[str]]) -> None:
    failures = failures_of(check, folder, WORLD)
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("mode", parallel.MODES)
def test_a_checkpoint_of_two_processes_goes_on_with_one(mode: str, folder: Path) -> None:
    if mode == "fsdp" and UNABLE:
        pytest.skip(UNABLE)
    rest = replace(CONFIG, steps=12, schedule="constant")
    with plain_model():
        for name in (f"{mode}-hrnn", "one-hrnn"):
            train(rest, folder / name, ALONE)
    assert_close_runs(folder / "one-hrnn", folder / f"{mode}-hrnn")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
