"""A run that stops and goes on, however it stopped, equals one that did not."""

import csv
import itertools
import math
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lopt import MetaParams
from lopt.options import ANNEALED
from lopt.train import TrainError, checkpoint, loop, models, parallel
from lopt.train.config import Config
from lopt.train.data import Digits, open_data
from lopt.train.loop import Diverged, Training
from lopt.train.metrics import COLUMNS, Counts, read_metrics
from lopt.train.stop import StopRequest

pytestmark = pytest.mark.usefixtures("narrow_model")

CONFIG = Config(
    model="preresnet8", data="digits", optimizer="adamw", lr=1e-3, weight_decay=1e-2, schedule="cosine", steps=24,
    batch_size=16, image_size=8, seed=5, device="cpu", threads=1, workers=0, log_every=4, eval_every=10,
    train_images=1437, classes=10,
)  # fmt: skip


SameRun = Callable[[Path, Path], None]


class StopAfter(StopRequest):
    """As if SIGINT arrived while it is asked for the count-th time."""

    def __init__(self, count: int) -> None:
        self.asked, self.count = 0, count

    @property
    def received(self) -> int | None:  # type: ignore[override]
        self.asked += 1
        return 2 if self.asked > self.count else None


def train(config: Config, data: Digits, folder: Path, stop: StopRequest | None = None) -> bool:
    """One process' worth of a run, from the checkpoint when there is one."""
    folder.mkdir(exist_ok=True)
    training = Training(config, data)
    if (folder / "checkpoint.pt").exists():
        training.restore(folder / "checkpoint.pt")
    return training.run(folder, stop or StopRequest())


OPTIMIZERS = {
    "adamw": {},
    "sgd": {"optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4},
    "hrnn": {"optimizer": "hrnn", "lr": 1.0, "weight_decay": 0.01, "init_lr": 2e-3},  # the fastest backend here
    "hrnn-reference": {"optimizer": "hrnn", "lr": 1.0, "weight_decay": 0.0, "backend": "reference"},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumed_run_equals_uninterrupted_run(
    optimizer: str, data: Digits, tmp_path: Path, assert_same_run: SameRun, differences: Callable[..., list[str]]
) -> None:
    config = replace(CONFIG, **OPTIMIZERS[optimizer])
    assert train(config, data, tmp_path / "whole")
    assert not train(config, data, tmp_path / "parts", StopAfter(7))  # between two rows
    assert not train(config, data, tmp_path / "parts", StopAfter(5))
    assert train(config, data, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert differences({"a": torch.zeros(2)}, {"a": torch.tensor([0.0, 1e-9])}) == ["/a"]  # the comparison can fail


def test_a_model_with_dropout_resumes_bit_for_bit(
    data: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assert_same_run: SameRun
) -> None:
    def build(*_: object) -> tuple[nn.Module, None, int]:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.5), nn.ReLU(), nn.Linear(32, 10)), None, 1

    monkeypatch.setattr(models, "build", build)
    train(CONFIG, data, tmp_path / "whole")
    train(CONFIG, data, tmp_path / "parts", StopAfter(9))
    torch.manual_seed(99)
    train(CONFIG, data, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_an_evaluation_that_was_stopped_is_made_up_for(data: Digits, tmp_path: Path, assert_same_run: SameRun) -> None:
    config = replace(CONFIG, steps=12)
    train(config, data, tmp_path / "whole")
    stop = StopAfter(11)  # asked once a step, and at step 10 once for each of the four test batches
    assert not train(config, data, tmp_path / "parts", stop)
    state = checkpoint.load(tmp_path / "parts" / "checkpoint.pt")
    assert (state["step"], state["row_step"]) == (10, 8)
    train(config, data, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_rows_after_the_checkpoint_are_dropped_and_a_torn_row_too(
    data: Digits, tmp_path: Path, assert_same_run: SameRun
) -> None:
    train(CONFIG, data, tmp_path / "whole")
    train(CONFIG, data, tmp_path / "parts", StopAfter(9))
    with open(tmp_path / "parts" / "metrics.csv", "a") as file:
        file.write("12,0.27,9.9,0.5,,,,,,9,0,0,1.0\n16,0.36,9.9,0.5,,,,,,9,0,0,1.0\n20,0.4")
    train(CONFIG, data, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_row_with_bytes_that_are_no_text_is_dropped(data: Digits, tmp_path: Path) -> None:
    train(CONFIG, data, tmp_path)
    path = tmp_path / "metrics.csv"
    whole = read_metrics(path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b".", b"\xff", 1)
    path.write_bytes(b"".join(lines))
    assert read_metrics(path) == [whole[0], *whole[2:]]


def test_a_checkpoint_whose_sums_count_no_images_goes_on(
    data: Digits, tmp_path: Path, assert_same_run: SameRun
) -> None:
    train(CONFIG, data, tmp_path / "whole")
    train(CONFIG, data, tmp_path / "parts", StopAfter(9))
    state = checkpoint.load(tmp_path / "parts" / "checkpoint.pt")
    del state["format"]
    state["meter"] = state["meter"][[0, 2]]
    checkpoint.save(tmp_path / "parts" / "checkpoint.pt", state)
    train(CONFIG, data, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_metrics_have_a_row_every_log_and_evaluation_step_of_means_since_the_last(data: Digits, tmp_path: Path) -> None:
    train(replace(CONFIG, log_every=1, eval_every=24), data, tmp_path / "fine")
    train(CONFIG, data, tmp_path / "coarse")
    with open(tmp_path / "coarse" / "metrics.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == COLUMNS
    assert [int(row[0]) for row in rows] == [4, 8, 10, 12, 16, 20, 24]
    assert [row[0] for row in rows if row[5]] == ["10", "20", "24"]
    fine = np.array([row[:4] for row in read_metrics(tmp_path / "fine" / "metrics.csv")], float)
    for row, since in zip(rows, [0, 4, 8, 10, 12, 16, 20], strict=True):
        mean = fine[since : int(row[0])].mean(0)
        assert float(row[2]) == pytest.approx(mean[2], rel=1e-6)
        assert float(row[3]) == pytest.approx(mean[3], rel=1e-6)
        assert float(row[COLUMNS.index("images_per_second")]) > 0


def test_training_learns_digits(data: Digits, tmp_path: Path) -> None:
    train(replace(CONFIG, steps=120, eval_every=120, batch_size=64, lr=1e-2), data, tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert float(rows[0][2]) == pytest.approx(math.log(10), rel=0.15)
    assert float(rows[-1][5]) > 0.7  # chance is 0.1


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(data: Digits, tmp_path: Path) -> None:
    config = replace(CONFIG, optimizer="sgd", lr=1e30, checkpoint_every=1, log_every=1)
    with pytest.raises(
        TrainError, match=r"loss of sgd \(lr 1e\+30\) was not finite for \d+ steps? up to \d+; .*smaller --lr"
    ):
        train(config, data, tmp_path / "run")
    state = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    assert state["meter"].isfinite().all()
    assert all(math.isfinite(float(row[2])) for row in read_metrics(tmp_path / "run" / "metrics.csv"))


@pytest.mark.parametrize("optimizer", ["hrnn", "adamw"])
def test_one_loss_that_is_not_finite_ends_only_what_it_has_broken(
    optimizer: str, data: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = Training._loss

    def sometimes(self: Training, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return loss(self, logits, labels) * (math.nan if self.step in (6, 11, 23) else 1.0)

    monkeypatch.setattr(Training, "_loss", sometimes)
    saved: list[int] = []
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda path, state: [saved.append(state["step"]), save(path, state)])
    config = replace(
        CONFIG, optimizer=optimizer, lr=1.0 if optimizer == "hrnn" else 1e-3, checkpoint_every=1, log_every=1
    )
    if optimizer == "adamw":  # its parameters are not finite any more
        with pytest.raises(Diverged, match="not finite for 1 step up to 7"):
            train(config, data, tmp_path / "run")
        assert saved == [1, 2, 3, 4, 5, 6]
        return
    train(config, data, tmp_path / "run")  # which passes over such steps
    assert saved == list(range(1, 25))
    losses = [float(row[2]) for row in read_metrics(tmp_path / "run" / "metrics.csv")]
    assert [step + 1 for step, value in enumerate(losses) if math.isnan(value)] == [7, 12, 24]
    monkeypatch.setattr(Training, "_loss", lambda self, *given: loss(self, *given) * math.nan)
    with pytest.raises(Diverged, match="not finite for 20 steps up to 20"):
        train(config, data, tmp_path / "all")
    monkeypatch.setattr(Training, "_loss", sometimes)
    train(replace(config, log_every=4), data, tmp_path / "coarse")
    rows = [(int(row[0]), float(row[2])) for row in read_metrics(tmp_path / "coarse" / "metrics.csv")]
    for (begin, _), (end, mean) in zip(rows, rows[1:], strict=False):
        assert mean == pytest.approx(np.nanmean(losses[begin:end]), rel=1e-6)


@pytest.mark.parametrize("place", ["a step", "an evaluation"])
def test_a_killed_worker_ends_the_run_in_one_line_with_the_cure_and_the_run_goes_on(
    place: str,
    tmp_path: Path,
    make_tree: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    assert_same_run: SameRun,
) -> None:
    data = open_data(str(make_tree(tmp_path / "stripes")))
    config = replace(CONFIG, batch_size=4, classes=2, steps=6, eval_every=3, checkpoint_every=2, workers=1)
    assert train(config, data, tmp_path / "whole")

    def kill(*_: object) -> torch.Tensor:
        multiprocessing.active_children()[0].kill()
        time.sleep(60)  # until the signal of its death
        raise AssertionError("it was not noticed")

    with monkeypatch.context() as patch:
        owner, method = (Training, "_loss") if place == "a step" else (Counts, "add")
        usual = getattr(owner, method)
        calls = itertools.count()
        patch.setattr(owner, method, lambda *given: (usual if next(calls) < 2 else kill)(*given))
        with pytest.raises(TrainError, match=r"DataLoader worker .* killed .*: resume with fewer --workers than 1"):
            train(config, data, tmp_path / "run")
    assert train(config, data, tmp_path / "run")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_checkpoints_are_written_every_so_many_steps(
    data: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    monkeypatch.setattr(checkpoint, "save", lambda path, state: saved.append(state["step"]))
    train(replace(CONFIG, checkpoint_every=7), data, tmp_path / "run")
    assert saved == [7, 14, 21, 24]
    saved.clear()
    train(CONFIG, data, tmp_path / "timed")
    assert saved == [24]


def test_evaluation_is_in_evaluation_mode_and_training_is_not(data: Digits, tmp_path: Path) -> None:
    training = Training(CONFIG, data)
    seen: list[tuple[bool, str]] = []
    mode = ["train"]
    training.optimizer.eval = lambda: mode.__setitem__(0, "eval")  # type: ignore[attr-defined]
    training.optimizer.train = lambda: mode.__setitem__(0, "train")  # type: ignore[attr-defined]
    training.model.register_forward_pre_hook(lambda model, inputs: seen.append((model.training, mode[0])))
    training.run(tmp_path, StopRequest())
    assert seen[:10] == [(True, "train")] * 10
    assert seen[10:14] == [(False, "eval")] * 4
    assert seen[14:24] == [(True, "train")] * 10


def test_the_loss_of_an_auxiliary_classifier_counts_four_tenths(
    data: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.side = nn.Linear(64, 10), nn.Linear(64, 10)
            nn.init.zeros_(self.main.bias)
            self.side.load_state_dict(self.main.state_dict())

        def forward(self, x: torch.Tensor) -> Any:
            x = x.flatten(1)
            return (self.main(x), self.side(x)) if self.training else self.main(x)

    monkeypatch.setattr(models, "build", lambda *_: (TwoHeads(), None, 1))
    training = Training(replace(CONFIG, steps=1, optimizer="sgd", weight_decay=0.0), data)
    training.run(tmp_path, StopRequest())
    main, side = training.model.main.weight.grad, training.model.side.weight.grad
    assert torch.allclose(side, loop.AUXILIARY_WEIGHT * main, atol=1e-7)
    assert loop.AUXILIARY_WEIGHT == 0.4


def test_hrnn_is_told_of_schedules_that_end_at_zero(data: Digits) -> None:
    def share(**changes: Any) -> float:
        return Training(replace(CONFIG, optimizer="hrnn", lr=1.0, **changes), data).optimizer.config.log_lr_min_distance

    constant = share(schedule="constant")
    assert constant == MetaParams.resolve(None).config.log_lr_min_distance > 0
    assert share(schedule="cooldown") == share(schedule="cosine") == ANNEALED * constant
    assert share(schedule="cooldown", min_lr=1e-3) == 0


def test_schedules_end_at_zero_but_for_the_constant_one(data: Digits, tmp_path: Path) -> None:
    for schedule, middle, late, end in (
        ("cosine", 0.5, 0.5 - 0.5 * 0.75**0.5, 0.0),
        ("cooldown", 1.0, (1 / 6) / 0.2, 0.0),
        ("constant", 1.0, 1.0, 1.0),
    ):
        training = Training(replace(CONFIG, schedule=schedule), data)
        rates = []
        training.optimizer.register_step_post_hook(
            lambda optimizer, *_, rates=rates: rates.append(optimizer.param_groups[0]["lr"])
        )
        (tmp_path / schedule).mkdir()
        training.run(tmp_path / schedule, StopRequest())
        assert rates[0] == 1e-3
        assert rates[12] == pytest.approx(middle * 1e-3)
        assert rates[20] == pytest.approx(late * 1e-3)
        assert training.optimizer.param_groups[0]["lr"] == pytest.approx(end * 1e-3, abs=1e-12)


@pytest.mark.parametrize("saved", ["fused", "foreach"])
def test_an_optimizer_keeps_the_kernels_of_its_own_choice(saved: str) -> None:
    param = torch.nn.Parameter(torch.ones(5))
    param.grad = torch.arange(5.0)
    first = torch.optim.SGD([param], lr=0.1, momentum=0.9, **{saved: True})
    first.step()
    own = "foreach" if saved == "fused" else "fused"
    second = torch.optim.SGD([param], lr=0.2, **{own: True})
    parallel.load_optimizer(second, first.state_dict())
    (group,) = second.param_groups
    assert group[own] and not group[saved]
    assert (group["lr"], group["momentum"]) == (0.1, 0.9)
    assert torch.equal(second.state[param]["momentum_buffer"], param.grad)


def test_a_checkpoint_of_another_model_is_refused(data: Digits, tmp_path: Path) -> None:
    train(replace(CONFIG, steps=1), data, tmp_path / "run")
    other = replace(CONFIG, optimizer="sgd", lr=0.1, image_size=16, model="preresnet8", classes=3)
    three = Digits()
    three.classes = 3
    with pytest.raises(TrainError, match="does not fit model 'preresnet8'"):
        Training(other, three).restore(tmp_path / "run" / "checkpoint.pt")


def test_a_config_is_loaded_as_it_was_saved_and_a_changed_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    config = replace(CONFIG, compare=("sgd:0.03", "hrnn"), init_lr=0.1 + 0.2)
    config.save(path)
    assert Config.load(path) == config
    path.write_text(path.read_text().replace('"seed"', '"sead"'))
    with pytest.raises(TrainError, match="sead"):
        Config.load(path)
    path.write_text("{")
    with pytest.raises(TrainError, match="not the configuration of a run"):
        Config.load(path)
