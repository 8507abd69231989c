"""The loop and the command: learning, exact resume after kill -9, user tasks, errors."""

import dataclasses
import importlib
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lopt import HRNN, HRNNConfig, MetaParams, cli
from lopt.meta import meta_train, validate
from lopt.meta import recipe as recipes
from lopt.meta.estimators import chosen
from lopt.meta.meta_train import COLUMNS, MetaTraining, TFRMSProp
from lopt.meta.recipe import Recipe, Stage
from lopt.meta.tasks import Task, networks, paper
from lopt.meta.unroll import Augment, Draw, Objective
from lopt.train import TrainError, checkpoint
from lopt.train.stop import StopRequest

CONFIG = HRNNConfig(level_sizes=(3, 3, 3), timescales=2, ms_eps=1e-24, rms_eps=1e-30)


def mixes() -> list[list[Task]]:
    return [[paper.Quadratic(4), networks.Linear(4, 3, samples=24, batch=8)], [paper.Bowl(5.0)]]


def tiny(**options: object) -> Recipe:
    common = {"mixes": mixes, "rows": 4, "unroll": Draw(4, 7), "episode": Draw(8, 20), "lr": 1e-3}
    return Recipe(
        CONFIG,
        (
            Stage("first", 6, estimator="bptt", warmup=2, **common),
            Stage(
                "second", 6, estimator="pes", reuse=2, final_lr=0.1, average=0.5, objective=Objective(cap=2.0), **common
            ),
            Stage("third", 3, estimator="bptt", optimizer="rmsprop", second_order=True, sampled=1, **common),
        ),
        minutes=1,
        validate_every=1000,
        **options,
    )


VALIDATE = MetaTraining._validate


@pytest.fixture(autouse=True)
def quick_validation(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(MetaTraining, "_validate", lambda self: (self.flat.sum().item(), 0.0))


def test_resumed_run_equals_uninterrupted_run(tmp_path):
    whole = MetaTraining(tiny(), 0)
    while not whole.finished:
        whole.meta_step()
    resumed = MetaTraining(tiny(), 0)
    while not resumed.finished:
        for _ in range(2):
            if not resumed.finished:
                resumed.meta_step()
        resumed.save(tmp_path)
        following = MetaTraining(tiny(), 1)
        following.load_state_dict(recipes_checkpoint(tmp_path))
        resumed = following
    assert torch.equal(whole.flat, resumed.flat)
    # All but the time taken.
    assert [row[:5] + row[7:] for row in whole.rows] == [row[:5] + row[7:] for row in resumed.rows]
    assert not torch.equal(whole.flat, MetaTraining(tiny(), 1).flat)


def test_a_run_is_not_resumed_by_another_recipe(tmp_path):
    begun = MetaTraining(tiny(), 0)
    begun.meta_step()
    begun.save(tmp_path)
    changed = (
        dataclasses.replace(tiny(), config=dataclasses.replace(CONFIG, damping=0.5)),
        dataclasses.replace(tiny(), stages=(dataclasses.replace(tiny().stages[0], lr=2e-3), *tiny().stages[1:])),
    )
    for recipe in changed:
        other = MetaTraining(recipe, 0)
        before = other.flat.clone()
        with pytest.raises(TrainError, match="another version of this recipe: .* --start"):
            other.load_state_dict(recipes_checkpoint(tmp_path))
        assert torch.equal(other.flat, before)


def test_a_stage_ends_with_the_average_over_its_second_half():
    recipe = dataclasses.replace(tiny(), stages=tiny().stages[1:2])
    plain = dataclasses.replace(recipe, stages=(dataclasses.replace(recipe.stages[0], average=0.0),))
    averaged, trained, visited = MetaTraining(recipe, 0), MetaTraining(plain, 0), []
    for step in range(6):
        averaged.meta_step()
        trained.meta_step()
        visited.append(trained.flat)
        if step < 5:
            assert torch.equal(averaged.flat, trained.flat)  # the average takes no part in training
    torch.testing.assert_close(averaged.result.flat(), 0.25 * visited[3] + 0.25 * visited[4] + 0.5 * visited[5])
    assert torch.equal(averaged.result.flat(), averaged.flat)


def recipes_checkpoint(folder: Path) -> dict:
    from lopt.train import checkpoint

    return checkpoint.load(folder / "checkpoint.pt")


RUNNER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_meta_train as t
from lopt.meta import meta_train
meta_train.CHECKPOINT_SECONDS = 0
meta_train.draw = lambda *args: None
meta_train.MetaTraining._validate = lambda self: (self.flat.sum().item(), 0.0)
training = t.MetaTraining(t.longer(), 0)
folder = Path(sys.argv[1])
if (folder / "checkpoint.pt").exists():
    training.load_state_dict(t.recipes_checkpoint(folder))
with t.StopRequest() as stop:
    training.run(folder, stop)
"""


def longer() -> Recipe:
    return tiny().scaled(3)


def test_run_survives_kill_9(tmp_path):
    script = RUNNER.format(tests=str(Path(__file__).parent))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    folder.mkdir()
    whole.mkdir()

    def begin(where: Path) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", script, str(where)], env=environment, stderr=subprocess.PIPE)

    process = begin(folder)
    for _ in range(600):
        if (folder / "checkpoint.pt").exists():
            break
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = recipes_checkpoint(folder)["done"]
    assert 0 < done < longer_total()
    for where in (folder, whole):
        process = begin(where)
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors.decode()
    first, second = (recipes_checkpoint(where) for where in (folder, whole))
    assert first["done"] == second["done"] == longer_total()
    assert torch.equal(first["flat"], second["flat"])


def longer_total() -> int:
    return MetaTraining(longer(), 0).total


def test_meta_training_learns(tmp_path):
    """On one task, from too small learning rates: the meta-loss falls."""
    stage = Stage(
        "only",
        60,
        lambda: [[paper.Quadratic(3)]],
        "bptt",
        rows=16,
        unroll=Draw(10),
        episode=Draw(10),
        lr=1e-2,
        augment=Augment((1e-3, 1e-3), 0.0, 0.0),
    )
    training = MetaTraining(Recipe(CONFIG, (stage,), 1), 0)
    losses = [training.meta_step().loss for _ in range(60)]
    assert sum(losses[-10:]) / 10 < sum(losses[:10]) / 10 - 0.2


VALLEY = """
from lopt.meta.tasks import Task


class Valley(Task):
    shapes = ((2,),)

    def instance(self, count, random):
        return {"steepness": random.uniform(count, low=1, high=100)}

    def loss(self, params, data):
        x, y = params[0].unbind(-1)
        return data["steepness"] * (y - x**2) ** 2 + (1 - x) ** 2
"""


def test_command_trains_on_a_users_task_and_its_result_is_an_optimizer(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(recipes.RECIPES, "default", tiny())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_valley.py").write_text(VALLEY)
    out = tmp_path / "run"
    assert cli.main(["meta-train", "--tasks", "my_valley:Valley", "--out", str(out), "--seed", "3"]) == 0
    header, *rows = (out / "metrics.csv").read_text().splitlines()
    assert header == ",".join(COLUMNS)
    assert [row.split(",")[1] for row in rows] == ["start", "first", "second", "second", "third"]
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "metrics.csv",
        "curves.png",
        "checkpoint.pt",
        "meta.safetensors",
        "best.safetensors",
        "tensorboard",
    }
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = HRNN([weight], meta=str(out / "meta.safetensors"))
    weight.square().sum().backward()
    optimizer.step()
    assert not torch.equal(weight, torch.ones(3))
    assert cli.main(["meta-train", "--resume", str(out)]) == 0
    with checkpoint.alone(out):
        assert cli.main(["meta-train", "--resume", str(out)]) == 2
    assert "another process is training in" in capsys.readouterr().err
    assert cli.main(["meta-train", "--resume", str(out), "--seed", "4"]) == 2
    assert "--seed cannot change" in capsys.readouterr().err
    assert cli.main(["meta-train", "--out", str(out)]) == 2
    assert cli.main(["meta-train", "--tasks", "my_valley:Hill"]) == 2
    assert cli.main(["meta-train", "--stages", "fourth"]) == 2
    assert "has first, second, third" in capsys.readouterr().err
    assert cli.main(["meta-train", "--tasks", "torch:Tensor"]) == 2
    assert "not a lopt.meta.tasks.Task" in capsys.readouterr().err
    assert cli.main(["meta-train", "--resume", str(tmp_path / "none")]) == 2
    unknown = (out / "config.json").read_text().replace('"default"', '"none"')
    for content, message in (
        ("[]", "holds no meta-training run"),
        (unknown, "does not go on here: --recipe none: choose"),
    ):
        (out / "config.json").write_text(content)
        assert cli.main(["meta-train", "--resume", str(out)]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


BROKEN = """
import torch
from lopt.meta.tasks import Task
class Base(Task):
    shapes = ((3,), (2, 2))
    def loss(self, params, data):
        return params[0].square().sum(-1) + params[1].square().sum((1, 2))
class NoLoss(Task):
    shapes = ((3,),)
class Empty(Base):
    shapes = ((3,), (0, 2))
class Flat(Base):
    shapes = (3,)
class Mean(Base):
    def loss(self, params, data):
        return super().loss(params, data).mean().expand(len(params[0]))
class Double(Base):
    def loss(self, params, data):
        return super().loss(params, data).double()
class OwnNumbers(Base):
    def instance(self, count, random):
        return {"scale": 1 + torch.rand(count)}
    def loss(self, params, data):
        return data["scale"] * super().loss(params, data)
class Total(Base):
    def loss(self, params, data):
        return super().loss(params, data).sum()
class Unused(Base):
    def loss(self, params, data):
        return params[0].square().sum(-1)
class Start(Base):
    def start(self, count, random, data):
        return super().start(count, random, data)[:1]
class Data(Base):
    def instance(self, count, random):
        return {"teacher": lambda x: x}
class Fails(Base):
    def minibatch(self, data, count, random):
        return data["x"]
class Structure(Base):
    def instance(self, count, random):
        return {"x": random.normal(count)}
    def minibatch(self, data, count, random):
        return (data["x"],)
    def loss(self, params, data):
        (x,) = data
        return super().loss(params, data) + x.square()
class Later(Base):
    def minibatch(self, data, count, random):
        data["order"] = range(3)
        return data
class Doubles(Base):
    def start(self, count, random, data):
        return [value.double() for value in super().start(count, random, data)]
class FanIn(Base):
    fan_in = 8
class Short(Base):
    fan_in = (8,)
class Weightless(Base):
    weight = 0.0
class Root(Base):
    def start(self, count, random, data):
        return [0 * value for value in super().start(count, random, data)]
    def loss(self, params, data):
        return super().loss(params, data).sqrt() + 1
class NaN(Base):
    def loss(self, params, data):
        return super().loss(params, data) * float("nan")
class Corrupts(Base):
    def corrupt(self, grads, random):
        return [grad.sum(0) for grad in grads]
class Below(Base):
    def loss(self, params, data):
        return super().loss(params, data) - 100
class Needs(Base):
    def __init__(self, size):
        pass
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NoLoss", "NoLoss has no method loss"),
        ("Empty", "at least one value"),
        ("Flat", "a tuple of shapes such as ((8, 4), (4,)), got (3,)"),
        ("Total", r"tensor of shape (4,), got shape ()"),
        ("Mean", "take no mean or sum over copies"),
        ("Double", "dtype torch.float32, got torch.float64"),
        ("OwnNumbers", "loss differs between copies that are given the same random numbers"),
        ("Unused", "does not depend on parameter tensor 1"),
        ("Start", "must return tensors of shapes [(4, 3), (4, 2, 2)], got [(4, 3)]"),
        ("Data", "got function: keep other things in the task itself"),
        ("Fails", "KeyError: 'x'"),
        ("Structure", "return both in the same structure"),
        ("Later", "and minibatch leave them so, got range: keep other things in the task itself"),
        ("Doubles", "start must return float32, as meta-training computes in, got torch.float64"),
        ("FanIn", "fan_in must have a number for each of the 2 tensors, got 8"),
        ("Short", "fan_in must have a number for each of the 2 tensors, got (8,)"),
        ("Weightless", "weight must be positive, as meta-losses are means with these weights, got 0.0"),
        ("Root", "the gradient of parameter tensor 0 is not finite at the start"),
        ("NaN", "loss must be finite; at the start it is [nan, nan, nan, nan]"),
        ("Corrupts", "corrupt must return gradients of shapes [(4, 3), (4, 2, 2)], got [(3,), (2, 2)]"),
        ("Below", "loss must be positive"),
        ("Needs", "missing 1 required positional argument"),
    ],
)
def test_a_broken_task_is_refused_by_what_is_wrong_before_anything_is_written(
    name, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    assert cli.main(["meta-train", "--tasks", f"broken:{name}", "--out", "run"]) == 2
    assert f"--tasks broken:{name}: " in (error := capsys.readouterr().err) and message in error
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_resumed_with_a_task_of_other_shapes(tmp_path):
    def training(*shapes):
        return MetaTraining(tiny(), 0, extra=[networks.Linear(*shape) for shape in shapes])

    saved = training((4, 3)).state_dict()
    training((4, 3)).load_state_dict(saved)
    with pytest.raises(TrainError, match=r"began with the tasks .*\(4, 3\).*, and their modules have .*\(5, 3\)"):
        training((5, 3)).load_state_dict(saved)


RECIPE = """
import dataclasses
from lopt.meta.recipe import DEFAULT, Draw, Recipe, Stage
from lopt.meta.tasks import Noisy
from my_valley import Valley
SHORT = Stage("short", 2, lambda: [[Valley(), Valley()]], "pes", rows=4, unroll=Draw(3), episode=Draw(6), lr=1e-3,
              objective=lambda losses, start: (losses / start).mean(0))
MINE = Recipe(DEFAULT.config, (SHORT,), minutes=1, validate_every=2)
class Wrong:
    pass
BAD_TASK = dataclasses.replace(MINE, stages=(dataclasses.replace(SHORT, mixes=lambda: [[Wrong()]]),))
class Negative(Valley):
    def loss(self, params, data):
        return super().loss(params, data) - 1e6
WRAPPED = dataclasses.replace(MINE, stages=(dataclasses.replace(SHORT, mixes=lambda: [[Noisy(Negative(), 0.1)]]),))
EMPTY = dataclasses.replace(MINE, stages=(dataclasses.replace(SHORT, mixes=lambda: [[]]),))
ODD = dataclasses.replace(MINE, stages=(dataclasses.replace(SHORT, rows=3),))
STAGE = SHORT
"""


def test_command_trains_by_a_users_recipe_and_resumes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_valley.py").write_text(VALLEY)
    (tmp_path / "my_recipes.py").write_text(RECIPE)
    for name in ("my_valley", "my_recipes"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert cli.main(["meta-train", "--recipe", "my_recipes:MINE", "--out", "run"]) == 0
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1:]
    assert [row.split(",")[1] for row in rows] == ["start", "short"]
    saved = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    assert "Objective" not in saved["recipe"] and " at 0x" not in saved["recipe"]
    for name in ("my_valley", "my_recipes"):
        monkeypatch.delitem(sys.modules, name)
    assert cli.main(["meta-train", "--resume", "run"]) == 0
    assert cli.main(["meta-train", "--recipe", "my_recipes:MINE", "--stages", "long", "--out", "other"]) == 2
    assert "'my_recipes:MINE' has short" in capsys.readouterr().err
    for name, message in {
        "defualt": "choose default, refine, lengthen, paper, or write MODULE:RECIPE",
        "my_recipes:": "write MODULE:NAME",
        "my_recipes:YOURS": "has no attribute 'YOURS'",
        "my_recipes:STAGE": "not a lopt.meta.recipe.Recipe",
        "my_recipes:BAD_TASK": "Wrong is not a lopt.meta.tasks.Task",
        "my_recipes:WRAPPED": "loss must be positive",
        "my_recipes:EMPTY": "mixes must return lists of at least one task each",
    }.items():
        assert cli.main(["meta-train", "--recipe", name, "--out", "other"]) == 2
        assert f"--recipe {name}: " in (error := capsys.readouterr().err) and message in error
    assert cli.main(["meta-train", "--recipe", "my_recipes:ODD", "--out", "other"]) == 2
    assert "3 rows of stage 'short' (pes) cannot" in (error := capsys.readouterr().err) and "multiple of 2" in error
    assert not (tmp_path / "other").exists()
    (tmp_path / "my_recipes.py").write_text(RECIPE.replace("lr=1e-3", "lr=2e-3"))
    monkeypatch.delitem(sys.modules, "my_recipes")
    importlib.invalidate_caches()
    assert cli.main(["meta-train", "--resume", "run"]) == 2
    assert "another version of this recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimator": "reinforce"}, "estimator='reinforce' of stage 'refine' must be one of bptt, pes, es"),
        ({"optimizer": "sgd"}, "optimizer='sgd' of stage 'refine' must be one of adam, rmsprop"),
        ({"meta_steps": 0}, "meta_steps=0 of stage 'refine' must be a whole number of at least 1"),
        ({"rows": 1.5}, "rows=1.5 "),
        ({"unroll": 30}, "unroll=30 of stage 'refine' must be a Draw"),
        ({"mixes": [[]]}, "must be a function"),
    ],
)
def test_a_stage_says_what_is_wrong_with_it(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(recipes.REFINE_STAGE, **change)


@pytest.mark.parametrize("change", [{"stages": ()}, {"minutes": 0}, {"validate_every": 0}])
def test_a_recipe_says_what_is_wrong_with_it(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}=.* must be"):
        dataclasses.replace(recipes.DEFAULT, **change)


@pytest.mark.parametrize("name", [":Valley", "my_valley", "my_valley:", ".relative:Valley"])
def test_a_task_is_named_by_module_and_class(name, capsys):
    assert cli.main(["meta-train", "--tasks", name]) == 2
    assert f"--tasks {name}: " in capsys.readouterr().err


def test_meta_training_starts_from_the_same_architecture_alone(tmp_path, capsys):
    same_count = HRNNConfig(relative_log_lr=None, lr_shortcut=True)
    MetaParams.init(same_count).save(tmp_path / "other.safetensors")
    command = ["meta-train", "--start", str(tmp_path / "other.safetensors"), "--out", str(tmp_path / "run")]
    assert cli.main(command) == 2
    assert "relative_log_lr=None, lr_shortcut=True, the recipe has" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    bounds = dataclasses.replace(recipes.DEFAULT.config, damping=0.0, log_lr_min=-9.0, init_lr_range=(1e-5, 1e-3))
    MetaTraining(recipes.DEFAULT, 0, start=MetaParams.init(bounds, seed=1))


def test_stop_request_leaves_a_checkpoint(tmp_path):
    training = MetaTraining(tiny(), 0)
    with StopRequest() as stop:
        stop.received = signal.SIGTERM
        assert not training.run(tmp_path, stop)
    assert recipes_checkpoint(tmp_path)["done"] == 0


def events(folder: Path) -> dict[str, list[int]]:
    """Steps of every tag that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder / "tensorboard"))
    shown.Reload()
    return {tag: [event.step for event in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


def test_tensorboard_shows_every_row_once_after_a_run_was_killed_and_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(meta_train, "ROW_EVERY", 2)
    training = MetaTraining(tiny(), 0)
    stop = StopRequest()
    for _ in range(4):
        training.meta_step()
    training.save(tmp_path)
    with monkeypatch.context() as patch:  # as if killed: the events are written, the checkpoint is the old one
        patch.setattr(MetaTraining, "save", lambda self, folder: None)
        training.run(tmp_path, stop)
    assert events(tmp_path)["meta-training/meta_loss"] == [6, 8, 10, 12, 14, 15]
    resumed = MetaTraining(tiny(), 0)
    resumed.load_state_dict(recipes_checkpoint(tmp_path))
    resumed.run(tmp_path, stop)
    found = events(tmp_path)
    assert found["meta-training/meta_loss"] == [row[0] for row in resumed.rows if row[0] > 4]
    assert found["validation/final"] == [6, 12, 15]
    assert set(found) == {tag for tag in meta_train.SCALARS if "own" not in tag}  # there are no tasks of the user


def test_run_goes_on_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    training = MetaTraining(tiny(), 0)
    assert training.run(tmp_path, StopRequest())
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("name", recipes.VARIANTS)
def test_a_variant_changes_the_architecture_alone_and_trains(name):
    recipe = recipes.varied(dataclasses.replace(tiny(), config=recipes.SHIPPED_CONFIG), [name])
    assert recipe.stages == tiny().stages
    assert dataclasses.asdict(recipe.config) != dataclasses.asdict(recipes.SHIPPED_CONFIG)
    training = MetaTraining(recipe, 0)
    whole = MetaParams.init(recipes.SHIPPED_CONFIG).count
    assert training.flat.numel() > whole if name == "attention" else training.flat.numel() < whole
    before = training.flat
    for _ in range(8):
        assert training.meta_step().loss < 5
    assert training.flat.isfinite().all() and not torch.equal(before, training.flat)


@pytest.mark.parametrize("name", recipes.VARIANTS)
def test_what_a_stage_is_restricted_to_is_there_in_every_architecture(name):
    for recipe in recipes.RECIPES.values():
        config = recipes.varied(recipe, [name]).config
        for stage in recipe.stages:
            assert chosen(config, stage.only or ["*"]).any()  # raises for a name without a match


def test_a_restriction_that_nothing_meets_is_told_before_the_first_stage():
    recipe = tiny()
    stages = (recipe.stages[0], dataclasses.replace(recipe.stages[1], only=("level9.*",)))
    with pytest.raises(TrainError, match=r"stage '\w+': only='level9\.\*': no meta-parameter has this name"):
        MetaTraining(dataclasses.replace(recipe, stages=stages), 0)


def test_variants_combine():
    both = recipes.varied(recipes.DEFAULT, ["no-global-rnn", "no-tensor-rnn", "no-shortcut"])
    assert both.config.level_sizes == (10,) and not both.config.gradient_shortcut
    assert both == recipes.varied(recipes.DEFAULT, ["no-shortcut", "no-tensor-rnn", "no-global-rnn"])


def test_recipes_scale_to_other_durations():
    for recipe in recipes.RECIPES.values():
        half = recipe.scaled(recipe.minutes / 2)
        for ours, full in zip(half.stages, recipe.stages, strict=True):
            assert ours.meta_steps == pytest.approx(full.meta_steps / 2, abs=1)
            highest, whole = (max(map(one.lr_at, range(one.meta_steps))) for one in (ours, full))
            assert highest == pytest.approx(whole, rel=0.02)
            assert ours.lr_at(ours.meta_steps) == pytest.approx(full.lr_at(full.meta_steps))
    assert recipes.DEFAULT.scaled(None) is recipes.DEFAULT
    first = recipes.DEFAULT.stages[0]
    assert first.lr_at(0) < 0.1 * first.lr
    assert first.lr_at(first.meta_steps) == pytest.approx(first.final_lr * first.lr)


def test_every_stage_of_every_recipe_takes_a_step():
    for recipe in recipes.RECIPES.values():
        for stage in recipe.stages:
            short = dataclasses.replace(stage, rows=2, unroll=Draw(2), meta_steps=100)
            training = MetaTraining(dataclasses.replace(recipe, stages=(short,)), 0)
            for _ in range(min(6, len(training.mixes))):
                estimate = training.meta_step()
                assert estimate.losses.isfinite().all()
            assert training.flat.isfinite().all()


def test_rmsprop_is_the_originals():
    config = HRNNConfig(level_sizes=(2,), timescales=2)
    flat = MetaParams.init(config).flat()
    after = TFRMSProp(config, clip=1e4).step(flat, torch.full_like(flat, 2e4), 1e-6)
    torch.testing.assert_close(after, flat - 1e-6 * 1e4 / (0.9 + 0.1 * 1e8) ** 0.5)


def test_the_users_tasks_are_validated_beside_the_others_and_count_as_much(tmp_path, monkeypatch):
    monkeypatch.setattr(meta_train, "VALID_STEPS", 20)
    monkeypatch.setattr(MetaTraining, "_validate", VALIDATE)
    monkeypatch.setattr(validate, "validation_tasks", lambda: {"linear": networks.Linear(4, 3, samples=64)})
    own = [paper.Quadratic(4), paper.Bowl(5.0)]
    alone, beside = MetaTraining(tiny(), 0), MetaTraining(tiny(), 0, extra=own)
    score = validate.scores(validate.learned(alone.meta, own, 20))
    for training in (alone, beside):
        training._start_row()
        training._keep_best(tmp_path)
    assert alone.rows[0][-2:] == ["", ""]
    assert beside.rows[0][-4:] == [*alone.rows[0][-4:-2], *(pytest.approx(s.mean().item(), abs=1e-5) for s in score)]
    assert beside.best == (beside.rows[0][-4] + beside.rows[0][-2]) / 2
    assert "own tasks" in beside.summary and "own tasks" not in alone.summary
    for training in (alone, beside):  # a run that was begun without these columns goes on with them
        saved = training.state_dict()
        saved["rows"] = [row[:-2] for row in saved["rows"]]
        training.load_state_dict(saved)
        assert training.rows[0][-2:] == ["", ""] and "own tasks" not in training.summary
        training._start_row()
        assert ("own tasks" in training.summary) is (training is beside)
    assert beside.best == math.inf and alone.best == alone.rows[0][-4]


def test_a_loss_that_falls_below_zero_counts_as_zero_in_validation():
    losses = torch.tensor([2.0, 1.0, *[-0.5] * 18]).reshape(20, 1, 1)
    final, area = validate.scores(losses)
    assert final.item() == pytest.approx(math.log(1e-8))
    assert area.item() == pytest.approx((math.log(0.5) + 18 * math.log(1e-8)) / 20, rel=1e-5)


def test_what_of_a_users_losses_does_not_count_as_it_is_is_said():
    losses = torch.ones(10, 2, 3)
    losses[5:, 0, 0], losses[9, :, 2] = -1.0, torch.tensor([math.nan, -math.inf])
    tasks = [paper.Quadratic(4), networks.Linear(4, 3), paper.Bowl(5.0)]
    below, not_finite = validate.remarks(tasks, losses)
    assert below.startswith("Quadratic: 5 of 20 validation losses are below zero, and count as zero")
    assert not_finite == "Bowl: 2 of 20 validation losses are not finite, and count as diverged"
    final = validate.scores(losses).final
    assert final[0, 0] == pytest.approx(math.log(1e-8)) and (final[2] > 10).all()
    assert validate.remarks(tasks, torch.ones(10, 2, 3)) == []


def test_validation_is_the_same_for_all_rates_of_adam_and_finds_the_best_one():
    tasks = [paper.Quadratic(4), networks.Linear(6, 3, samples=64)]
    losses = validate.adam(tasks, 60, rates=(1e-4, 1e-2, 1e-1))
    assert losses.shape == (3, 60, 2, 2)
    torch.testing.assert_close(losses[0, 0], losses[2, 0])
    final = torch.stack([validate.scores(values).final for values in losses])
    assert (final[2] < final[0]).all()
    ours = validate.learned(MetaParams.init(CONFIG), tasks, 60)
    torch.testing.assert_close(ours[0], validate.learned(MetaParams.init(CONFIG, 5), tasks, 60)[0])
