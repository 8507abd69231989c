"""The command: a report of its own, resumed by its cache, and errors of its users."""

import csv
import dataclasses
import multiprocessing
import os
import re
import signal
import threading
import time

import pytest
import torch

from lopt import HRNNConfig, MetaParams, cli
from lopt.evaluate import ablations, command, suites, timing
from lopt.evaluate.suites import Part, Suite
from lopt.meta.recipe import VARIANTS

TINY = Part(("wine-mlp", "cancer-mlp"), 10, ("adam", "sgd", "prodigy"), variants=tuple(suites.VARIANTS))
PAPER = Suite(
    "Tiny.",
    (
        Part(("bowl", "beale"), 10, ("adam",), "Problems", held_out=False),
        Part(("mlp-8", "mlp-16"), 10, ("adam",), "Networks", variants=("init_lr",), rates=(1e-5, 1e-3)),
    ),
    ablations=Part(("wine-mlp", "mlp-8"), 10, (), "Ablations"),
    timed=True,
)


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Run `lopt evaluate` on a tiny suite in tmp_path; returns the exit code."""
    monkeypatch.setitem(suites.SUITES, "digits", Suite("Tiny.", (TINY,)))
    monkeypatch.setitem(suites.SUITES, "paper", PAPER)
    monkeypatch.setattr(timing, "THOROUGH", ((1, 4), 1))
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
    part = dataclasses.replace(TINY, tasks=TINY.tasks[:1], optimizers=("adam",), variants=())
    monkeypatch.setitem(suites.SUITES, "digits", Suite("Tiny.", (part,)))
    assert evaluate("--quick") == 0
    assert evaluate("--quick", "--jobs", "2", "--cache", "other", "--out", "processes") == 0

    def losses(folder):
        with open(folder / "results.csv", newline="") as file:
            return [{**row, "seconds": ""} for row in csv.DictReader(file)]

    assert losses(tmp_path / "processes") == losses(tmp_path / "runs" / "evaluate-digits-quick")


def test_errors_name_the_cure(evaluate, tmp_path, monkeypatch, capsys):
    (tmp_path / "same.safetensors").write_bytes((tmp_path / "seed0.safetensors").read_bytes())
    assert evaluate("--weights", "seed0.safetensors", "same.safetensors") == 2
    assert "hold the same meta-parameters: leave one out" in capsys.readouterr().err
    assert evaluate("--weights", "none.safetensors") == 2
    assert "neither a file nor the name of shipped weights" in capsys.readouterr().err
    assert evaluate("--only", "rmsprop") == 2
    assert "--only rmsprop: the suite digits has adam, hrnn, " in capsys.readouterr().err
    absent = dataclasses.replace(command.OPTIMIZERS["prodigy"], package="no_such_package")
    monkeypatch.setitem(command.OPTIMIZERS, "prodigy", absent)
    assert evaluate("--only", "prodigy") == 2
    assert "--only prodigy: install no_such_package" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate("--seeds", "0")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGINT"])
def test_processes_that_are_killed_or_interrupted_end_at_once_and_say_so(
    evaluate, tmp_path, monkeypatch, capsys, signal_name
):
    """A worker as for want of memory, or the main process alone."""
    long = Suite("Long.", (dataclasses.replace(TINY, steps=200_000, optimizers=("adam",), variants=()),))
    monkeypatch.setitem(suites.SUITES, "digits", long)

    pids = []

    def strike() -> None:
        while len(workers := multiprocessing.active_children()) < 2:
            time.sleep(0.05)
        time.sleep(1)
        pids.extend(worker.pid for worker in workers)
        victim = pids[0] if signal_name == "SIGKILL" else os.getpid()
        os.kill(victim, getattr(signal, signal_name))

    def alive(pid: int) -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return True

    thread = threading.Thread(target=strike)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job would ignore
    try:
        thread.start()
        code = evaluate("--jobs", "2")
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    error = capsys.readouterr().err
    if signal_name == "SIGKILL":
        assert code == 2
        assert "a worker process was killed, as it is for want of memory: give fewer --jobs than 2" in error
    else:
        assert code == 130
    until = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    assert pids and not any(map(alive, pids))


@pytest.fixture
def architectures(tmp_path):
    """A folder with meta-parameters of every architecture that is compared."""
    (tmp_path / "architectures").mkdir()
    for name in ablations.NAMES:
        config = HRNNConfig(**VARIANTS.get(name, {}))
        MetaParams.init(config).save(tmp_path / "architectures" / f"{name}.safetensors")
    return tmp_path / "architectures"


def tables(text: str) -> list[list[list[str]]]:
    """Cells of every table of a Markdown text, without the line below the head."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.M)
    rows = ([line.strip("|").split("|") for line in block.splitlines()] for block in blocks)
    return [[[cell.strip() for cell in row] for row in (block[0], *block[2:])] for block in rows]


def test_report_of_the_paper_has_every_part(evaluate, trained, architectures, tmp_path):
    (architectures / "no-global-rnn.safetensors").unlink()
    options = ("--suite", "paper", "--weights", "seed0.safetensors", "--ablations", "architectures", "--out", "paper")
    assert evaluate(*options) == 0
    text = (tmp_path / "paper" / "report.md").read_text()
    shown = set(re.findall(r"\]\((.*?\.png)\)", text))
    assert shown == {path.name for path in (tmp_path / "paper").glob("*.png")}
    assert {"families-networks.png", "robustness-networks.png", "ablations.png", "times.png"} < shown
    heads = {tuple(table[0]): table[1:] for table in tables(text)}
    rates = heads["learning rate", "HRNN", "Adam"]
    assert [row[0] for row in rates] == ["1e-05", "0.001"] and "-" not in sum(rates, [])
    compared = next(table for head, table in heads.items() if head[1] == "differs by")
    there = [name for name in ablations.NAMES if name != "no-global-rnn"]
    assert [row[0] for row in compared] == there and "Not there: no-global-rnn." in text
    assert compared[there.index("no-shortcut")][1] == "`gradient_shortcut=False`"
    assert len({run.setting.weights for run in trained() if run.task == "wine-mlp"}) == len(there)
    times = heads["batch size", "HRNN", "Adam", "SGD + momentum", "RMSprop"]
    assert [row[0] for row in times] == ["1", "4"]


def test_without_other_architectures_the_report_says_how_to_train_them(evaluate, trained, tmp_path, monkeypatch):
    monkeypatch.setitem(suites.SUITES, "paper", dataclasses.replace(PAPER, parts=(), timed=False))
    (tmp_path / "empty").mkdir()
    assert evaluate("--suite", "paper", "--ablations", "empty", "--out", "none") == 0
    assert "lopt meta-train --variant NAME" in (tmp_path / "none" / "report.md").read_text()
    assert trained() == []


def test_architectures_are_what_their_names_say(evaluate, architectures, capsys):
    assert evaluate("--ablations", "architectures") == 2
    assert "the suite digits compares none" in capsys.readouterr().err
    assert evaluate("--suite", "paper", "--ablations", "nowhere") == 2
    assert "nowhere is not a folder" in capsys.readouterr().err
    (architectures / "attention.safetensors").rename(architectures / "no-shortcut.safetensors")
    assert evaluate("--suite", "paper", "--ablations", "architectures") == 2
    assert "no-shortcut.safetensors holds the architecture" in capsys.readouterr().err
    (architectures / "no-shortcut.safetensors").rename(architectures / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors is not named after an architecture"):
        ablations.load(architectures)
    (architectures / "other.safetensors").unlink()
    (architectures / "full.safetensors").unlink()
    with pytest.raises(ValueError, match="has no full.safetensors"):
        ablations.load(architectures)


def test_shipped_architectures_are_what_their_names_say_and_no_default():
    assert ablations.load(ablations.shipped()).keys() <= set(ablations.NAMES)
    assert not set(ablations.NAMES) & set(MetaParams.shipped())


def test_a_timing_for_every_optimizer_and_batch_size():
    timings = timing.measure(MetaParams.init(), (1, 3), 2)
    assert {(one.optimizer, one.batch) for one in timings} == {
        (label, batch) for label in ("HRNN", *timing.OPTIMIZERS) for batch in (1, 3)
    }
    assert all(0 < one.update < one.step for one in timings)


@pytest.mark.parametrize("name", suites.SUITES)
def test_suites_are_consistent(name):
    suite, short = suites.SUITES[name], suites.quick(suites.SUITES[name])
    for part in suite.parts:
        assert "adam" in part.optimizers
    for part in (*suite.parts, *filter(None, [suite.ablations])):
        assert all(suites.task(task).count > 0 for task in part.tasks)
    for part in (*short.parts, *filter(None, [short.ablations])):
        assert 0 < len(part.tasks) <= 4 and part.steps <= suites.QUICK_STEPS
