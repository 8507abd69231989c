"""`lopt train` as its user meets it: what it leaves, what it refuses, and how it is stopped and continued."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lopt.metaparams import DEFAULT, MetaParams
from lopt.train import TrainError, checkpoint, command, plots, runs, textures
from lopt.train.config import Config
from lopt.train.data import Feed, open_data
from lopt.train.metrics import COLUMNS, read_metrics

SameRun = Callable[[Path, Path], None]
MakeTree = Callable[..., Path]
QUICK = ["--optimizer", "adamw", "--steps", "12", "--batch-size", "16", "--eval-every", "6"]


@pytest.fixture
def drawn() -> None:
    """For tests that look at curves.png; the others leave out the second that drawing takes."""


@pytest.fixture(autouse=True)
def _undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(plots, "draw", lambda path, title, runs: None)


def parsed(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lopt train")
    command.add_arguments(parser)
    return parser.parse_args(options)


def run(*options: object) -> int:
    return command.run(parsed(*map(str, options)))


def start(*options: object) -> subprocess.Popen:
    """`lopt train` in a process group of its own, as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "lopt", "train", *map(str, options)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_step(folder: Path, step: int, alive: Callable[[], bool]) -> None:
    """Until metrics.csv has a row of that step, or what writes it is no longer alive."""
    while alive():
        rows = read_metrics(folder / "metrics.csv") if (folder / "metrics.csv").exists() else []
        if rows and int(rows[-1][0]) >= step:
            return
        time.sleep(0.01)


def run_and_signal(folder: Path, step: int, number: int, *options: object) -> int:
    """Exit code of a run in this process that gets a signal when `folder` has reached a step."""
    running = True

    def send() -> None:
        wait_for_step(folder, step, lambda: running)
        os.kill(os.getpid(), number)

    before = signal.signal(number, signal.SIG_IGN)  # the run that does not listen goes on to its end
    thread = threading.Thread(target=send)
    thread.start()
    try:
        return run(*options)
    finally:
        running = False
        thread.join()
        signal.signal(number, before)


@pytest.mark.usefixtures("drawn")
def test_a_run_leaves_config_metrics_curves_and_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*QUICK) == 0
    folder = tmp_path / "runs" / "preresnet8-digits-adamw-1"
    names = {"config.json", "metrics.csv", "curves.png", "checkpoint.pt", "tensorboard"}
    assert {path.name for path in folder.iterdir()} == names
    config = json.loads((folder / "config.json").read_text())
    assert (config["model"], config["optimizer"], config["steps"]) == ("preresnet8", "adamw", 12)
    assert config["versions"]["torch"] == torch.__version__
    with Image.open(folder / "curves.png") as image:
        assert image.width > 1000
    said = capsys.readouterr().out
    assert "77,562 parameters in 25 tensors" in said
    assert re.search(r"test accuracy \d+\.\d\d %", said)
    assert "runs/preresnet8-digits-adamw-1" in said
    assert run(*QUICK, "--steps", 1) == 0
    assert (tmp_path / "runs" / "preresnet8-digits-adamw-2" / "curves.png").exists()


def test_hrnn_is_the_default_and_its_options_reach_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--steps", 2, "--batch-size", 8, "--init-lr", 0.005, "--weight-decay", 0.1, "--backend", "reference"]
    options += ["--state-format", "compact", "--min-lr", 0.001]
    assert run(*options, "--out", tmp_path / "run") == 0
    group = checkpoint.load(tmp_path / "run" / "checkpoint.pt")["optimizer"]["param_groups"][0]
    assert (group["init_lr"], group["weight_decay"], group["initial_lr"]) == (0.005, 0.1, 1.0)
    expected = "HRNN: lr 1 (cooldown), weight decay 0.1, init_lr 0.005, min_lr 0.001, compact state, backend reference"
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "no_such_net"], "no_such_net"),
        (["--data", "no/such/folder"], "no/such/folder"),
        (["--optimizer", "sgd", "--init-lr", "0.1"], "--init-lr is for --optimizer hrnn"),
        (["--optimizer", "adamw", "--backend", "cpu"], "--backend is for --optimizer hrnn"),
        (["--backend", "abacus"], "abacus"),
        (["--meta", "no_such_weights"], "no_such_weights"),
        (["--device", "abacus"], "device 'abacus'"),
        (["--batch-size", "1438"], "1438 exceeds the 1437"),
        (["--crop", "padded"], "--crop padded is for a folder of images, not for digits"),
        (["--compare", "hrnn"], "--compare hrnn"),
        (["--resume", "nowhere"], "holds no run"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_written(
    options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((TrainError, ImportError), match=re.escape(said) + "|pytorchcv"):
        run(*options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--lr", "-1"], "'-1' is not a positive number"),
        (["--lr", "nan"], "'nan' is not a positive number"),
        (["--weight-decay", "-0.1"], "positive or zero"),
        (["--steps", "0"], "whole number of 1 or more"),
        (["--seed", "1.5"], "whole number of 0 or more"),
        (["--steps", "5", "--epochs", "5"], "not allowed with"),
        (["--compare", "adam"], "'adam' is no optimizer"),
        (["--compare", "sgd:0"], "'0' is not a positive number"),
        (["--resume", "a", "--out", "b"], "not allowed with"),
    ],
)
def test_values_out_of_range_are_refused(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(*options)
    assert said in capsys.readouterr().err


def test_an_image_size_the_model_does_not_take_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pytorchcv", reason="pytorchcv is not installed: pip install 'lopt[train]'")
    with pytest.raises(TrainError, match="does not take images of 8x8"):
        run("--model", "nin_cifar10", "--image-size", 8, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_in_use_or_cannot_be_made_is_refused(tmp_path: Path) -> None:
    assert run(*QUICK, "--steps", 1, "--out", tmp_path / "run") == 0
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    with pytest.raises(TrainError, match="--resume"):
        run(*QUICK, "--out", tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "metrics.csv").write_text("precious")
    with pytest.raises(TrainError, match="other files"):
        run(*QUICK, "--out", tmp_path / "mine")
    with pytest.raises(TrainError, match="cannot be made"):
        run(*QUICK, "--out", tmp_path / "mine" / "metrics.csv" / "run")
    assert (tmp_path / "mine" / "metrics.csv").read_text() == "precious"


def test_resuming_allows_more_steps_and_refuses_another_experiment(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = [
        "--optimizer",
        "adamw",
        "--schedule",
        "constant",
        "--log-every",
        2,
        "--eval-every",
        6,
        "--batch-size",
        16,
    ]
    assert run(*options, "--steps", 8, "--out", folder) == 0
    for option, value in (("--lr", 0.5), ("--seed", 1), ("--model", "preresnet50"), ("--batch-size", 8)):
        with pytest.raises(TrainError, match=f"{option} {value} differs"):
            run("--resume", folder, option, value)
    assert run("--resume", folder, "--steps", 12, "--lr", 0.001) == 0
    assert run(*options, "--steps", 12, "--out", tmp_path / "whole") == 0
    rows, whole = (read_metrics(path / "metrics.csv") for path in (folder, tmp_path / "whole"))
    del rows[3], whole[3]  # step 8 was the end of the first part, and as such an evaluation
    assert [row[:6] for row in rows] == [row[:6] for row in whole]


def test_fewer_steps_than_were_taken_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run(*QUICK, "--steps", 8, "--compare", "sgd", "--out", folder) == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for options, said in (
        (["--steps", 5], "--steps 5 is less than the 8 steps already taken: give more"),
        (["--compare-steps", 3], "--compare-steps 3 is less than the 8 steps already taken by sgd: give more"),
    ):
        with pytest.raises(TrainError, match=said):
            run("--resume", folder, *options)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    folder = tmp_path / "run"
    assert run(*QUICK, "--out", folder) == 0
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(TrainError, match="another process is training in .* or choose another --out"):
        run("--resume", folder, "--steps", 14)
    os.close(held)
    assert run("--resume", folder, "--steps", 14) == 0


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    assert run(*QUICK, "--out", tmp_path / "run") == 0
    before = [(tmp_path / "run" / name).read_bytes() for name in ("checkpoint.pt", "metrics.csv")]
    assert run("--resume", tmp_path / "run") == 0
    assert [(tmp_path / "run" / name).read_bytes() for name in ("checkpoint.pt", "metrics.csv")] == before


@pytest.mark.usefixtures("drawn")
def test_a_finished_run_without_its_metrics_names_them_and_not_the_curves(tmp_path: Path) -> None:
    assert run(*QUICK, "--steps", 2, "--out", tmp_path / "run") == 0
    (tmp_path / "run" / "metrics.csv").unlink()
    with pytest.raises(TrainError, match=r"^'.*metrics\.csv' cannot be read \(.*: restore it from a copy"):
        run("--resume", tmp_path / "run")
    (tmp_path / "run" / "metrics.csv").touch()
    with pytest.raises(TrainError, match=r"metrics\.csv' has no row with a test accuracy: restore it from a copy"):
        run("--resume", tmp_path / "run")


@pytest.mark.usefixtures("drawn")
def test_compared_runs_see_the_same_model_and_batches_and_are_drawn_together(
    tmp_path: Path, assert_same_run: SameRun
) -> None:
    assert run(*QUICK, "--out", tmp_path / "run", "--compare", "adamw:0.001", "sgd") == 0
    twin, other = tmp_path / "run" / "adamw-0.001", tmp_path / "run" / "sgd"
    assert_same_run(tmp_path / "run", twin)
    assert Config.load(other / "config.json").lr == 0.1
    first = [read_metrics(folder / "metrics.csv")[0] for folder in (twin, other)]
    assert first[0][2] == first[1][2]  # the loss before the first step
    with Image.open(tmp_path / "run" / "curves.png") as image:
        assert image.width > 1000


@pytest.mark.usefixtures("drawn")
def test_a_rival_of_the_same_optimizer_has_its_options_and_any_its_own_weight_decay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", "preresnet8", "--steps", 2, "--batch-size", 16, "--meta", "hrnn-4", "--init-lr", 0.01]
    rivals = ["hrnn:0.5", "adamw:0.001:0.3", "adamw"]
    assert run(*options, "--weight-decay", 0.2, "--compare", *rivals, "--out", tmp_path / "run") == 0
    half, decayed, plain = (
        Config.load(tmp_path / "run" / name / "config.json") for name in ("hrnn-0.5", "adamw-0.001-0.3", "adamw")
    )
    assert (half.lr, half.meta, half.init_lr, half.weight_decay) == (0.5, "hrnn-4", 0.01, 0.2)
    assert (decayed.lr, decayed.meta, decayed.init_lr, decayed.weight_decay) == (0.001, None, None, 0.3)
    assert plain.weight_decay == 0.01
    assert (half.schedule, plain.schedule) == ("cooldown", "cosine")
    for_all = replace(half, schedule="constant", schedule_for_all=True)
    assert runs.rival_config(for_all, "sgd").schedule == "constant"
    said = capsys.readouterr().out
    assert "compare    AdamW, lr 0.001 (cosine), weight decay 0.3" in said
    assert "compare    HRNN, lr 0.5 (cooldown), weight decay 0.2" in said
    assert "result     AdamW, lr 0.001 (adamw): " in said


def test_a_run_goes_on_where_its_images_have_moved_to_and_not_with_others(tmp_path: Path) -> None:
    textures.make(tmp_path / "images", classes=2, train=8, val=4, size=16, jobs=1)
    options = ["--model", "preresnet8", "--batch-size", 4, "--image-size", 16, "--workers", 0, "--steps", 2]
    assert run(*options, "--data", tmp_path / "images", "--out", tmp_path / "run") == 0
    (tmp_path / "images").rename(tmp_path / "moved")
    with pytest.raises(TrainError, match="nor a folder: check --data"):
        run("--resume", tmp_path / "run", "--steps", 4)
    assert run("--resume", tmp_path / "run", "--steps", 4, "--data", tmp_path / "moved") == 0
    for part in ("train", "val"):
        first = min((tmp_path / "moved" / part).iterdir())
        first.rename(first.with_name("zzz"))
    with pytest.raises(TrainError, match="have other names or classes than those"):
        run("--resume", tmp_path / "run", "--steps", 6)


def test_a_run_goes_on_where_its_meta_parameters_have_moved_to_and_not_with_others(tmp_path: Path) -> None:
    options = ["--model", "preresnet8", "--batch-size", 16]
    assert run(*options, "--steps", 2, "--out", tmp_path / "shipped") == 0
    assert Config.load(tmp_path / "shipped" / "config.json").meta == DEFAULT  # that of a later version may be another
    MetaParams.resolve("hrnn-9").save(tmp_path / "own.safetensors")
    assert run(*options, "--steps", 2, "--meta", tmp_path / "own.safetensors", "--out", tmp_path / "run") == 0
    (tmp_path / "own.safetensors").rename(tmp_path / "moved.safetensors")
    with pytest.raises(TrainError, match="own.safetensors' is neither a file nor the name of shipped weights"):
        run("--resume", tmp_path / "run", "--steps", 4)
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(TrainError, match=r"other meta-parameters, .* or hrnn-9 .* or is --meta another one\?"):
        run("--resume", tmp_path / "run", "--steps", 4, "--meta", "hrnn-10")
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    assert run("--resume", tmp_path / "run", "--steps", 4, "--meta", tmp_path / "moved.safetensors") == 0


def test_a_run_says_which_meta_parameters_its_rival_has_and_one_that_does_not_say_needs_them(tmp_path: Path) -> None:
    options = ["--model", "preresnet8", "--batch-size", 16, "--optimizer", "adamw", "--steps", 2]
    assert run(*options, "--compare", "hrnn", "sgd", "--out", tmp_path / "run") == 0
    configs = {name: Config.load(tmp_path / "run" / name / "config.json") for name in (".", "hrnn", "sgd")}
    assert {name: config.meta for name, config in configs.items()} == {".": DEFAULT, "hrnn": DEFAULT, "sgd": None}
    replace(configs["."], meta=None).save(tmp_path / "run" / "config.json")
    with pytest.raises(TrainError, match="does not say with which meta-parameters it began, .*: give --meta"):
        run("--resume", tmp_path / "run", "--steps", 4)
    with pytest.raises(TrainError, match="--init-lr is for --optimizer hrnn, not adamw"):
        run("--resume", tmp_path / "run", "--steps", 4, "--init-lr", 0.1)
    assert run("--resume", tmp_path / "run", "--steps", 4, "--meta", DEFAULT) == 0


def test_a_run_killed_at_any_step_and_resumed_equals_one_that_was_not(tmp_path: Path, assert_same_run: SameRun) -> None:
    options = ["--steps", 40, "--batch-size", 16, "--log-every", 1, "--eval-every", 15, "--checkpoint-every", 6]
    options += ["--optimizer", "adamw", "--compare", "sgd", "--threads", 1]
    assert run(*options, "--out", tmp_path / "whole") == 0
    folder = tmp_path / "killed"
    process = start(*options, "--out", folder)
    wait_for_step(folder, 20, lambda: process.poll() is None)
    process.kill()  # SIGKILL
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    reached = int(read_metrics(folder / "metrics.csv")[-1][0])
    kept = checkpoint.load(folder / "checkpoint.pt")["step"]
    assert reached - 6 <= kept <= reached
    assert run_and_signal(folder / "sgd", 10, signal.SIGINT, "--resume", folder) == 130  # in the compared run
    assert 10 <= checkpoint.load(folder / "sgd" / "checkpoint.pt")["step"] < 40
    assert run("--resume", folder) == 0
    assert_same_run(tmp_path / "whole", folder)
    assert_same_run(tmp_path / "whole" / "sgd", folder / "sgd")


def test_ctrl_c_saves_a_checkpoint_and_says_how_to_go_on(tmp_path: Path, make_tree: MakeTree) -> None:
    tree, folder = make_tree(tmp_path / "stripes", per_class=20), tmp_path / "run"
    options = ["--data", tree, "--model", "preresnet8", "--optimizer", "adamw", "--batch-size", 8, "--steps", 100_000]
    process = start(*options, "--workers", 2, "--log-every", 1, "--threads", 1, "--out", folder)
    wait_for_step(folder, 5, lambda: process.poll() is None)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the workers too
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert f"lopt train --resume {folder}" in said
    assert "Traceback" not in said
    step = checkpoint.load(folder / "checkpoint.pt")["step"]
    assert step >= 5
    assert int(read_metrics(folder / "metrics.csv")[-1][0]) == step
    assert (folder / "curves.png").exists()


def test_a_request_to_terminate_saves_a_checkpoint_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--optimizer", "adamw", "--batch-size", 8, "--steps", 2000, "--eval-every", 2000, "--log-every", 1]
    assert run_and_signal(tmp_path / "run", 5, signal.SIGTERM, *options, "--out", tmp_path / "run") == 143
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["step"] >= 5
    said = capfd.readouterr()
    assert f"lopt train --resume {tmp_path / 'run'}" in said.out
    assert "stopping after this step" in said.err


def test_a_folder_of_images_is_trained_with_workers_and_resumes_bit_for_bit(
    tmp_path: Path, make_tree: MakeTree
) -> None:
    tree = make_tree(tmp_path / "stripes", per_class=24)
    options = ["--data", tree, "--model", "preresnet8", "--optimizer", "adamw", "--lr", 0.01, "--batch-size", 8]
    options += ["--image-size", 16, "--eval-every", 6, "--threads", 1]
    assert run(*options, "--workers", 2, "--schedule", "constant", "--steps", 24, "--out", tmp_path / "whole") == 0
    assert run(*options, "--workers", 0, "--schedule", "constant", "--steps", 12, "--out", tmp_path / "parts") == 0
    assert run("--resume", tmp_path / "parts", "--steps", 24, "--workers", 1) == 0
    left, right = (read_metrics(tmp_path / name / "metrics.csv")[-1] for name in ("whole", "parts"))
    assert left[:6] == right[:6]
    assert float(left[5]) >= 5 / 6


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ([], ""),
        (["train/down/.hidden.gif", "val/down/a.gif"], ", 1 other file left out"),
        (["train/down/a.gif", "train/across/b.txt", "val/down/deeper/c.npy"], ", 3 other files left out"),
    ],
)
def test_files_that_are_no_images_are_counted_where_there_are_any(
    others: list[str], said: str, tmp_path: Path, make_tree: MakeTree, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = make_tree(tmp_path / "stripes")
    for other in others:
        (tree / other).parent.mkdir(exist_ok=True)
        (tree / other).touch()
    options = ["--data", tree, "--model", "preresnet8", "--optimizer", "adamw", "--batch-size", 4, "--workers", 0]
    assert run(*options, "--steps", 1, "--out", tmp_path / "run") == 0
    expected = f"data       stripes: 12 training and 6 test images of 32x32 in 2 classes{said}\n"
    assert expected in capsys.readouterr().out


def test_a_run_keeps_its_crop(tmp_path: Path, make_tree: MakeTree) -> None:
    tree = make_tree(tmp_path / "stripes")
    options = ["--data", tree, "--model", "preresnet8", "--optimizer", "adamw", "--batch-size", 4, "--image-size", 16]
    options += ["--workers", 0, "--crop", "padded"]
    assert run(*options, "--steps", 4, "--schedule", "constant", "--out", tmp_path / "whole") == 0
    assert run(*options, "--steps", 2, "--schedule", "constant", "--out", tmp_path / "parts") == 0
    with pytest.raises(TrainError, match="--crop resized differs from the padded"):
        run("--resume", tmp_path / "parts", "--crop", "resized")
    with pytest.raises(TrainError, match=r"data 'digits' has 1[\d]{3} training images in 10 classes, but the run"):
        run("--resume", tmp_path / "parts", "--data", "digits")
    assert run("--resume", tmp_path / "parts", "--steps", 4) == 0
    left, right = (checkpoint.load(tmp_path / name / "checkpoint.pt")["model"] for name in ("whole", "parts"))
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_the_lines_of_the_readme_give_the_trained_model_and_the_names_of_its_classes(
    tmp_path: Path, make_tree: MakeTree, ema: float | None
) -> None:
    tree, folder = make_tree(tmp_path / "stripes", per_class=24), tmp_path / "run"
    options = ["--data", tree, "--model", "preresnet8", "--optimizer", "adamw", "--lr", 0.01, "--batch-size", 8]
    options += ["--image-size", 16, "--workers", 0, "--steps", 24, *(["--ema", ema] if ema else [])]
    assert run(*options, "--out", folder) == 0
    data = open_data(str(tree))
    feed = Feed(data.test_count, 3, 16, torch.device("cpu"))
    ((images, labels),) = data.test_batches(feed)
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (lines,) = re.findall(r"^```python\n(from lopt\.train .*?)^```", readme, re.M | re.S)
    names: dict[str, Any] = {"FOLDER": folder, "images": images}
    exec(lines, names)
    logits = names["model"](images)
    assert names["likeliest"] == [("across", "down")[label] for label in logits.argmax(1)]
    row = read_metrics(folder / "metrics.csv")[-1]
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert loss == pytest.approx(float(row[COLUMNS.index("ema_test_loss" if ema else "test_loss")]), rel=1e-5)


def test_a_run_that_does_not_say_the_names_of_its_classes_goes_on_and_says_them(
    tmp_path: Path, make_tree: MakeTree
) -> None:
    tree, path = make_tree(tmp_path / "stripes"), tmp_path / "run" / "config.json"
    options = ["--model", "preresnet8", "--optimizer", "adamw", "--batch-size", 4, "--workers", 0, "--steps", 1]
    assert run(*options, "--data", tree, "--out", tmp_path / "run") == 0
    content = json.loads(path.read_text())
    assert content.pop("class_names") == ["across", "down"]
    path.write_text(json.dumps(content))
    assert run("--resume", tmp_path / "run", "--steps", 2) == 0
    assert Config.load(path).class_names == ["across", "down"]
    assert run(*options, "--out", tmp_path / "digits") == 0
    assert Config.load(tmp_path / "digits" / "config.json").class_names is None


@pytest.mark.usefixtures("narrow_model")
def test_options_that_say_what_a_run_has_by_default_are_those_of_the_run(tmp_path: Path, make_tree: MakeTree) -> None:
    tree = make_tree(tmp_path / "stripes")
    options = ["--data", tree, "--model", "preresnet8", "--batch-size", 4, "--image-size", 16, "--workers", 0]
    assert run(*options, "--steps", 2, "--out", tmp_path / "run") == 0
    path = tmp_path / "run" / "config.json"
    content = json.loads(path.read_text())
    assert (content["schedule"], content["schedule_for_all"], content["crop"]) == ("cooldown", False, "resized")
    del content["crop"], content["schedule_for_all"]  # as versions wrote it that had one crop, and one schedule for all
    path.write_text(json.dumps(content))
    assert Config.load(path).schedule_for_all
    assert run("--resume", tmp_path / "run", "--steps", 3, "--schedule", "cooldown", "--crop", "resized") == 0
    assert Config.load(path).crop == "resized"
    content["schedule"] = None  # as a version wrote it that left it to the optimizer
    path.write_text(json.dumps(content))
    assert run("--resume", tmp_path / "run", "--steps", 4, "--schedule", "cooldown") == 0
    assert (Config.load(path).schedule, Config.load(path).schedule_for_all) == ("cooldown", False)
    with pytest.raises(TrainError, match="--schedule cosine differs from the cooldown of the run"):
        run("--resume", tmp_path / "run", "--schedule", "cosine")


def test_data_that_changed_is_noticed_on_resume(tmp_path: Path, make_tree: MakeTree) -> None:
    tree = make_tree(tmp_path / "stripes")
    assert run("--data", tree, "--model", "preresnet8", *QUICK, "--batch-size", 4, "--out", tmp_path / "run") == 0
    (tree / "train" / "down" / "0.jpg").unlink()
    with pytest.raises(TrainError, match="11 training images"):
        run("--resume", tmp_path / "run", "--steps", 20)


def test_a_damaged_checkpoint_is_named_on_resume(tmp_path: Path) -> None:
    assert run(*QUICK, "--out", tmp_path / "run") == 0
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(TrainError, match=r"run/checkpoint\.pt' cannot be read"):
        run("--resume", tmp_path / "run", "--steps", 20)
