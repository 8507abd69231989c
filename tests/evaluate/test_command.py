"""The command: a report of its own, resumed by its cache, and errors of its users."""

import csv
import dataclasses

import pytest
import torch

from lopt import MetaParams, cli
from lopt.evaluate import command, suites

TINY = suites.Suite("Tiny.", ("wine-mlp", "cancer-mlp"), (10,), ("adam", "sgd", "prodigy"), variants=True)


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Run `lopt evaluate` on a tiny suite in tmp_path; returns the exit code."""
    monkeypatch.setitem(suites.SUITES, "digits", TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for seed in (0, 1):
        MetaParams.init(seed=seed).save(tmp_path / f"seed{seed}.safetensors")
    return lambda *options: cli.main(["evaluate", "--seeds", "2", "--jobs", "1", *options])


@pytest.fixture
def trained(monkeypatch):
    """The runs that were trained since the last look."""
    seen, train = [], command._train

    def noted(group, *rest):
        seen.extend(group)
        return train(group, *rest)

    monkeypatch.setattr(command, "_train", noted)

    def look():
        taken = list(seen)
        seen.clear()
        return taken

    return look


def test_report_compares_weights_and_reruns_train_only_what_changed(evaluate, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(
        command.OPTIMIZERS, "prodigy", dataclasses.replace(command.OPTIMIZERS["prodigy"], package="not_there")
    )
    threads = torch.get_num_threads()
    assert evaluate("--weights", "seed0.safetensors") == 0
    assert torch.get_num_threads() == threads
    first = trained()
    settings = len(suites.settings(TINY, ["x"]))
    assert len(first) == settings * len(TINY.tasks) * 2 and len(set(first)) == len(first)
    folder = tmp_path / "runs" / "evaluate-digits"
    names = {path.name for path in folder.iterdir()}
    assert names == {"report.md", "results.csv", "scores-10.png", "curves-10.png", "robustness-10.png"}
    text = (folder / "report.md").read_text()
    assert "Prodigy is left out: `not_there` is not installed" in text
    assert "HRNN ends with at most the training loss of Adam at its best of 7 rates on" in capsys.readouterr().out
    assert all(name in text for name in ("wine-mlp", "init_lr 1e-05", "loss_scale 1e+06", "cosine schedule"))
    assert evaluate("--weights", "seed0.safetensors") == 0
    assert trained() == []
    assert (folder / "report.md").read_text() == text
    assert evaluate("--weights", "seed0.safetensors", "seed1.safetensors", "--out", "both") == 0
    second = trained()
    assert {run.setting.optimizer for run in second} == {"hrnn"}
    assert len({run.setting.weights for run in second}) == 1
    text = (tmp_path / "both" / "report.md").read_text()
    assert "HRNN seed0 ends" in text and "HRNN seed1 ends" in text
    with open(tmp_path / "both" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(first) + len(second)
    assert all(float(row["final"]) > 0 for row in rows)


def test_stopped_evaluation_goes_on_where_it_was(evaluate, trained, monkeypatch):
    put, stored = command.Cache.put, []

    def stopping(cache, run, result):
        if len(stored) == 30:
            raise KeyboardInterrupt
        stored.append(run)
        put(cache, run, result)

    with monkeypatch.context() as patch:
        patch.setattr(command.Cache, "put", stopping)
        assert evaluate() == 130
    trained()
    assert evaluate() == 0
    rest = trained()
    assert not set(rest) & set(stored)
    assert len(rest) + len(stored) == len(suites.settings(TINY, ["x"])) * len(TINY.tasks) * 2


def test_one_optimizer_alone_makes_a_report_without_the_others(evaluate, trained, tmp_path):
    assert evaluate("--only", "hrnn", "--quick", "--out", "alone") == 0
    assert {run.setting.optimizer for run in trained()} == {"hrnn"}
    assert "nothing to compare with" in (tmp_path / "alone" / "report.md").read_text()


def test_processes_give_the_same_results(evaluate, tmp_path, monkeypatch):
    monkeypatch.setitem(suites.SUITES, "digits", dataclasses.replace(TINY, tasks=TINY.tasks[:1], optimizers=("adam",)))
    assert evaluate("--quick") == 0
    assert evaluate("--quick", "--jobs", "2", "--cache", "other", "--out", "processes") == 0

    def losses(folder):
        with open(folder / "results.csv", newline="") as file:
            return [{**row, "seconds": ""} for row in csv.DictReader(file)]

    assert losses(tmp_path / "processes") == losses(tmp_path / "runs" / "evaluate-digits-quick")


def test_errors_name_the_cure(evaluate, tmp_path, capsys):
    (tmp_path / "same.safetensors").write_bytes((tmp_path / "seed0.safetensors").read_bytes())
    assert evaluate("--weights", "seed0.safetensors", "same.safetensors") == 2
    assert "hold the same meta-parameters: leave one out" in capsys.readouterr().err
    assert evaluate("--weights", "none.safetensors") == 2
    assert "neither a file nor the name of shipped weights" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate("--seeds", "0")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", suites.SUITES)
def test_suites_are_consistent(name):
    suite = suites.SUITES[name]
    assert "adam" in suite.optimizers
    assert all(suites.task(task).count > 0 for task in suite.tasks)
    short = suites.quick(suite)
    assert 0 < len(short.tasks) <= 4 and max(short.steps) <= 200
