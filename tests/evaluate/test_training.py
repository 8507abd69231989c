"""Trainings in lock-step: they are torch.optim's and HRNN's own, and their results are kept."""

import dataclasses
import math

import pytest
import torch

from lopt import HRNN, HRNNConfig, MetaParams
from lopt.evaluate import suites, training
from lopt.evaluate.optimizers import OPTIMIZERS, SGD, Adam, RMSprop, ScheduleFree, Setting, factor
from lopt.evaluate.training import Cache, Result, Run, digest, lock_steps, train

META, ATTENTIVE = MetaParams.init(), MetaParams.init(HRNNConfig(attention=True))
FOLLOWING = MetaParams.init(HRNNConfig(log_lr_min_distance=0.5))  # a bound that binds within a few steps
WEIGHTS = {digest(meta): meta for meta in (META, ATTENTIVE, FOLLOWING)}
PLAIN = suites.hrnn(digest(META))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "rule, theirs, decay",
    [
        (Adam, torch.optim.Adam, 0.0),
        (Adam, torch.optim.AdamW, 0.01),
        (SGD, lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9), 0.0),
        (RMSprop, torch.optim.RMSprop, 0.0),
    ],
)
def test_batched_update_equals_torchs(rule, theirs, decay):
    assert_same_update(rule, theirs, decay)


def test_batched_schedule_free_equals_its_authors():
    schedulefree = pytest.importorskip("schedulefree")
    assert_same_update(ScheduleFree, schedulefree.AdamWScheduleFree, 0.0)


def assert_same_update(rule, theirs, decay):
    torch.manual_seed(0)
    rates, theta = torch.tensor([[1e-3], [3e-2]]), torch.randn(2, 4096)
    grads = [torch.randn(2, 4096) * 10.0 ** torch.randint(-4, 3, (4096,)) for _ in range(30)]
    expected = []
    for row, rate in zip(theta, rates, strict=True):
        param = torch.nn.Parameter(row.clone())
        optimizer = theirs([param], lr=rate.item())
        if hasattr(optimizer, "train"):
            optimizer.train()
        for grad in grads:
            param.grad = grad[int(rate > 1e-2)].clone()
            optimizer.step()
        if hasattr(optimizer, "eval"):
            optimizer.eval()
        expected.append(param.detach())
    ours = rule(theta, decay)
    for grad in grads:
        ours.step(grad, rates)
    ours.finish()
    # 30 steps of a few float32 roundings each, of numbers of about the size of the parameters.
    torch.testing.assert_close(theta, torch.stack(expected), rtol=3e-5, atol=3e-5)


def alone(task, setting, seed, steps):
    """Losses and final parameters of one training with a real optimizer in a plain loop."""
    params = [torch.nn.Parameter(part) for part in training._views(task, task.start(seed)[None])]
    params = [torch.nn.Parameter(param[0].detach().clone()) for param in params]
    if setting.optimizer == "hrnn":
        meta = WEIGHTS[setting.weights]
        optimizer = HRNN(
            params,
            setting.lr,
            meta=meta,
            init_lr=setting.init_lr,
            base_fan_in=setting.base_fan_in,
            base_depth=setting.base_depth,
            annealed=bool(setting.annealed),
            weight_decay=setting.weight_decay,
        )
    else:
        optimizer = torch.optim.AdamW(params, setting.lr, weight_decay=setting.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(setting, step / steps))
    losses = []
    for index in task.order(seed, steps):
        optimizer.zero_grad()
        loss = task.loss([param[None] for param in params], task.minibatch(index[None]))[0]
        (loss * setting.loss_scale).backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    if setting.optimizer == "hrnn":
        optimizer.eval()  # with attention, the parameters held where the gradient was taken
    return losses, task.evaluate([param.detach()[None] for param in params])


@pytest.mark.parametrize(
    "settings",
    [
        [PLAIN, dataclasses.replace(PLAIN, init_lr=1e-2), dataclasses.replace(PLAIN, loss_scale=1e3)],
        [dataclasses.replace(PLAIN, weight_decay=0.1), dataclasses.replace(PLAIN, schedule="cosine")],
        [dataclasses.replace(suites.hrnn(digest(FOLLOWING)), schedule="cooldown", annealed=True)],
        [suites.hrnn(digest(ATTENTIVE)), PLAIN],
        [Setting("adamw-cosine", lr, "cosine", 0.01) for lr in (1e-3, 1e-2)],
    ],
)
def test_training_in_lock_step_equals_training_alone(settings):
    task, steps = suites.task("cancer-mlp"), 25
    runs = [(setting, seed) for setting in settings for seed in (0, 1)]
    results = train(task, [run[0] for run in runs], [run[1] for run in runs], steps, WEIGHTS)
    for (setting, seed), result in zip(runs, results, strict=True):
        losses, (final, test, accuracy) = alone(task, setting, seed, steps)
        # Roundings of float32, amplified by 25 steps of training.
        assert result.curve == pytest.approx(losses, rel=1e-3)
        assert result.final == pytest.approx(final, rel=1e-3)
        assert result.test == pytest.approx(test, rel=1e-3)
        assert result.accuracy == pytest.approx(accuracy, abs=0.01)
        assert result.last_tenth == pytest.approx(sum(losses[-2:]) / 2, rel=1e-3)
        area = sum(math.log(loss / result.start) for loss in losses) / steps
        assert result.area == pytest.approx(area, abs=1e-3)


@pytest.mark.parametrize("name", [name for name, line in OPTIMIZERS.items() if line.rule is None and name != "hrnn"])
def test_optimizers_of_other_packages_train(name):
    if OPTIMIZERS[name].missing:
        pytest.skip(f"{OPTIMIZERS[name].package} is not installed")
    setting = Setting(name, OPTIMIZERS[name].default)
    (result,) = train(suites.task("wine-mlp"), [setting], [0], 60, {})
    assert result.final < 0.99 * result.start


def test_a_diverged_training_says_so():
    (result,) = train(suites.task("diabetes-mlp"), [Setting("sgd", 1e3)], [0], 40, {})
    assert result.diverged and result.final == math.inf
    assert result.log_ratio == pytest.approx(-math.log(training.FLOOR))
    (result,) = train(suites.task("diabetes-mlp"), [Setting("adam", 1e-2)], [0], 40, {})
    assert not result.diverged and -1 < result.log_ratio < 0


def test_progress_counts_every_step_of_every_copy():
    counts = []
    train(suites.task("wine-mlp"), [Setting("adam", 1e-3)] * 2, [0, 1], 47, {}, counts.append)
    assert sum(counts) == 94


def example() -> tuple[Run, Result]:
    run = Run("wine-mlp", 10, 0, Setting("adam", 1e-3))
    return run, Result(1.0, math.inf, 0.5, -1.0, None, None, (1.0, 0.5), 0.1)


def test_cache_returns_what_was_stored_and_nothing_else(tmp_path):
    run, result = example()
    cache = Cache(tmp_path, lambda name: "data")
    assert cache.get(run) is None
    cache.put(run, result)
    assert cache.get(run) == result
    for other in (
        run._replace(steps=11),
        run._replace(seed=1),
        run._replace(task="softmax"),
        run._replace(setting=Setting("adam", 1e-2)),
        run._replace(setting=PLAIN),
    ):
        assert cache.get(other) is None
    assert Cache(tmp_path, lambda name: "other data").get(run) is None


def test_another_version_of_the_suite_has_other_results(tmp_path, monkeypatch):
    run, result = example()
    cache = Cache(tmp_path, lambda name: "data")
    cache.put(run, result)
    monkeypatch.setattr(training, "VERSION", training.VERSION + 1)
    assert cache.get(run) is None


def test_a_damaged_file_is_no_result(tmp_path):
    run, result = example()
    cache = Cache(tmp_path, lambda name: "data")
    cache.put(run, result)
    (path,) = tmp_path.rglob("*.json")
    whole = path.read_text()
    for damaged in (whole[:50], "null", "[]", "{}", whole.replace('"curve"', '"curves"'), f'{whole[:-2]}, "a": 1}}}}'):
        path.write_text(damaged)
        assert cache.get(run) is None, damaged
    cache.put(run, result)
    assert cache.get(run) == result


def test_lock_steps_hold_every_run_once_and_never_mix_rules():
    runs = suites.runs(suites.SUITES["paper"], ["a", "b"], 3, ["c", "d"])
    groups = lock_steps(runs, lambda name: 300_000 if name == "conv" else 5_000)
    assert sorted(map(repr, runs)) == sorted(repr(run) for group in groups for run in group)
    for group in groups:
        assert len(group) <= (1 if group[0].task == "conv" else training.LOCKSTEP)
        assert len({(run.task, run.steps, run.setting.optimizer) for run in group}) == 1
