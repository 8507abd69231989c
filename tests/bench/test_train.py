"""The benchmarks of training: their rows and runs. No timing is asserted."""

import dataclasses
from pathlib import Path

import pytest

from lopt import cli
from lopt.bench import gpu, stability, train
from lopt.bench.results import load
from lopt.train import TrainError, checkpoint, models, plots
from lopt.train.optimizers import OPTIMIZERS

OPTIONS = ["--device", "cpu", "--batch-size", "4", "--rounds", "2", "--threads", "1"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.OWN, "preresnet8", (4, 8, 16))
    monkeypatch.setattr(train, "IMAGE_SIZES", {"preresnet8": 8})
    monkeypatch.setattr(train, "TURN", 0.01)
    monkeypatch.setattr(plots, "draw", lambda *_: None)


def test_every_contender_appends_its_speed_its_share_and_its_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.csv"
    assert (
        cli.main(["bench", "train", *OPTIONS, "--reference", "--out", str(out), "--plot", str(tmp_path / "plot.png")])
        == 0
    )
    rows = load(out)
    names = {row.backend for row in rows}
    assert {"hrnn reference", "adamw fused", "sgd foreach"} <= names
    for name in names:
        found = {row.unit: row for row in rows if row.backend == name}
        assert set(found) == {train.SPEED, train.SHARE, train.MEMORY}
        assert found[train.SPEED].p20 > 0
        assert 0 < found[train.SHARE].p50 < 1
    assert {(row.op, row.case, row.threads) for row in rows} == {("train", "preresnet8 x4", 1)}
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert all(name in said and name in gpu.summary(out) for name in names)


def test_a_contender_that_fails_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no such momentum")

    monkeypatch.setitem(OPTIMIZERS, "sgd", dataclasses.replace(OPTIMIZERS["sgd"], make=fail))
    options = [*OPTIONS, "--amp", "bf16", "--image-size", "6", "--out", str(tmp_path / "rows.csv")]
    assert cli.main(["bench", "train", *options]) == 1
    assert "FAILED sgd foreach on preresnet8: TrainError: optimizer 'sgd': no such momentum" in capsys.readouterr().err
    assert {row.case for row in load(tmp_path / "rows.csv")} == {"preresnet8 x4 6px bf16"}
    assert cli.main(["bench", "train", "lenet"]) == 2


def test_stability_trains_hrnn_on_all_models_before_the_others_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = stability.Case("preresnet8", 8, 4, 6, 3)
    scale = stability.Scale(stability.Images(2, 12, 4, 16), (case,), ("--workers", "0"))
    monkeypatch.setitem(stability.SCALES, "cpu", scale)
    order: list[str] = []
    save = checkpoint.save
    monkeypatch.setattr(
        checkpoint, "save", lambda path, state: (order.append(f"{path.parent.name} {state['step']}"), save(path, state))
    )
    options = ["bench", "stability", "--device", "cpu", "--threads", "1", "--jobs", "1", "--out", str(tmp_path / "out")]
    assert cli.main(options) == 0
    assert order == ["preresnet8 6", *(f"{rival.replace(':', '-')} 3" for rival in stability.RIVALS)]
    said = capsys.readouterr().out
    assert "all is done" in said
    assert all(f"preresnet8 {name}" in said for name in ("hrnn", *stability.RIVALS))
    order.clear()
    assert cli.main(options) == 0
    assert order == []
    assert cli.main([*options, "--meta", "hrnn-4"]) == 1
    assert "was config.json changed, or is --meta another one?" in capsys.readouterr().out


def test_stability_tells_of_a_divergence_and_goes_on_with_the_other_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = tuple(stability.Case(name, 8, 4, 2, 1) for name in ("preresnet8", "preresnet18"))
    monkeypatch.setitem(stability.SCALES, "cpu", stability.Scale(stability.Images(2, 12, 4, 16), cases, ()))
    trained = []

    def train(case: stability.Case, *_: object) -> int:
        trained.append((case.model, _[-1]))
        if case.model == "preresnet8":
            raise TrainError("diverged")
        return 0

    monkeypatch.setattr(stability, "train", train)
    assert cli.main(["bench", "stability", "--device", "cpu", "--jobs", "1", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    assert "preresnet8: diverged" in said and "all is done" not in said
    assert trained == [("preresnet8", False), ("preresnet18", False), ("preresnet18", True)]
