"""What the options of `lopt train` make of a step: parts, precision, averages, smoothing, speed."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.exc
import torch.nn.functional as F
from torch import nn

from lopt.train import TrainError, arguments, checkpoint, command, models, plots
from lopt.train.config import Config
from lopt.train.data import NO_LABEL, Digits, Feed, Synthetic
from lopt.train.ema import Average
from lopt.train.loop import Training
from lopt.train.metrics import COLUMNS, TAGS, Counts, read_metrics
from lopt.train.stop import StopRequest

pytestmark = pytest.mark.usefixtures("narrow_model")

CONFIG = Config(
    model="preresnet8", data="digits", optimizer="hrnn", lr=1.0, weight_decay=0.0, schedule="cosine", steps=8,
    batch_size=16, image_size=8, seed=5, device="cpu", threads=1, workers=0, log_every=2, eval_every=4,
    train_images=1437, classes=10,
)  # fmt: skip
SGD: dict[str, Any] = {"optimizer": "sgd", "lr": 0.05}


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "draw", lambda *_: None)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without BatchNorm."""

    def build(*_: object) -> tuple[nn.Module, None, int]:
        return nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(216, 10)), None, 1

    monkeypatch.setattr(models, "build", build)


def train(config: Config, data: Any, folder: Path, steps: int | None = None) -> Training:
    """A run, from the checkpoint when there is one; `steps` stop it as a signal would."""
    folder.mkdir(exist_ok=True)
    training = Training(config, data)
    if (folder / "checkpoint.pt").exists():
        training.restore(folder / "checkpoint.pt")
    stop, take_step = StopRequest(), training.take_step

    def step(batches: Any) -> None:
        take_step(batches)
        stop.received = 15 if training.step == steps else None

    training.take_step = step  # type: ignore[method-assign]
    training.run(folder, stop)
    return training


def run(*options: object) -> int:
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(option) for option in options]))


def column(folder: Path, name: str) -> list[str]:
    return [row[COLUMNS.index(name)] for row in read_metrics(folder / "metrics.csv")]


@pytest.mark.usefixtures("plain")
def test_a_batch_taken_in_parts_gives_the_step_of_the_whole(data: Digits, tmp_path: Path) -> None:
    whole = train(replace(CONFIG, **SGD), data, tmp_path / "whole")
    parts = train(replace(CONFIG, **SGD, accumulate=4), data, tmp_path / "parts")
    for one, other in zip(whole.parameters, parts.parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=2**-16, atol=2**-18)  # roundings of 2^-24, times steps and sums
    for left, right in zip(
        column(tmp_path / "whole", "train_loss"), column(tmp_path / "parts", "train_loss"), strict=True
    ):
        assert float(left) == pytest.approx(float(right), rel=1e-4)


def test_averaged_weights_are_the_average_and_are_tested_beside_the_model(
    data: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    update = Average.update

    def watch(self: Average, model: nn.Module) -> None:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        update(self, model)

    monkeypatch.setattr(Average, "update", watch)
    training = train(replace(CONFIG, ema=0.75), data, tmp_path)
    assert training.average is not None
    expected = {name: value.double() for name, value in seen[0].items()}
    for state in seen[1:]:
        expected = {name: 0.75 * value + 0.25 * state[name] for name, value in expected.items()}
    for name, value in training.average.model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[name], rtol=2**-20, atol=2**-22)
        else:
            assert value == len(seen)
    logits = training.average.model(data.test_images)
    accuracy = (logits.argmax(1) == data.test_labels).float().mean().item()
    assert float(column(tmp_path, "ema_test_accuracy")[-1]) == pytest.approx(accuracy)
    assert float(column(tmp_path, "ema_test_loss")[-1]) == pytest.approx(
        F.cross_entropy(logits, data.test_labels).item(), rel=1e-5
    )
    assert column(tmp_path, "ema_test_loss")[-1] != column(tmp_path, "test_loss")[-1]


def test_label_smoothing_shares_out_a_part_of_the_label_in_training_alone(data: Digits, tmp_path: Path) -> None:
    config = replace(CONFIG, steps=1, label_smoothing=0.2, **SGD)
    training = Training(config, data)
    images, labels = next(data.train_batches(training.feed, 0, 1))
    log = training.model(images).log_softmax(1)
    expected = -(0.8 * log[range(16), labels] + 0.2 * log.mean(1)).mean().item()
    after = train(config, data, tmp_path)
    assert float(column(tmp_path, "train_loss")[0]) == pytest.approx(expected, rel=1e-5)
    after.model.eval()
    loss = F.cross_entropy(after.model(data.test_images), data.test_labels).item()
    assert float(column(tmp_path, "test_loss")[0]) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_differs_by_roundings_and_resumes_bit_for_bit(
    amp: str, data: Digits, tmp_path: Path, assert_same_run: Callable[[Path, Path], None]
) -> None:
    config = replace(CONFIG, amp=amp, ema=0.9, steps=16)
    whole = train(config, data, tmp_path / "whole")
    train(config, data, tmp_path / "parts", steps=7)
    train(config, data, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert {param.dtype for param in whole.parameters} == {torch.float32}
    train(replace(config, amp=None, steps=2), data, tmp_path / "float32")
    loss, exact = (float(column(tmp_path / name, "train_loss")[0]) for name in ("whole", "float32"))
    assert loss != exact
    assert loss == pytest.approx(exact, rel=2**-7)  # bfloat16 rounds to 2^-9
    scaler = checkpoint.load(tmp_path / "whole" / "checkpoint.pt")["scaler"]
    assert bool(scaler) == (amp == "fp16")
    assert not scaler or scaler["_growth_tracker"] == 16  # no step overflowed


def test_a_model_sees_the_precision_that_was_asked_for(data: Digits) -> None:
    for amp, dtype in ((None, torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        training = Training(replace(CONFIG, amp=amp), data)
        seen: list[torch.dtype] = []
        training.model.stem.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output.dtype))
        training.take_step(data.train_batches(training.feed, 0, 1))
        assert seen == [dtype]


def test_an_overflow_in_fp16_leaves_the_step_out_and_lowers_the_scale(data: Digits) -> None:
    for optimizer in ("hrnn", "sgd"):
        training = Training(replace(CONFIG, amp="fp16", optimizer=optimizer), data)
        batches = data.train_batches(training.feed, 0, 2)
        training.take_step(batches)
        before = [param.detach().clone() for param in training.parameters]
        hook = training.parameters[0].register_hook(lambda grad: grad * math.inf)
        scale = training.precision.scaler.get_scale()
        training.take_step(batches)
        hook.remove()
        assert all(map(torch.equal, before, training.parameters))
        assert training.precision.scaler.get_scale() == scale / 2


def test_momentum_begins_with_the_first_gradient_that_is_finite(data: Digits) -> None:
    training = Training(replace(CONFIG, amp="fp16", optimizer="sgd"), data)
    batches = data.train_batches(training.feed, 0, 2)
    hook = training.parameters[0].register_hook(lambda grad: grad * math.inf)
    training.take_step(batches)
    hook.remove()
    training.take_step(batches)
    for param in training.parameters:
        assert torch.equal(training.optimizer.state[param]["momentum_buffer"], param.grad)


def test_channels_last_is_the_memory_order_of_images_and_weights_and_changes_only_roundings(
    data: Digits, tmp_path: Path
) -> None:
    config = replace(CONFIG, steps=2, channels_last=True, **SGD)
    training = train(config, data, tmp_path / "last")
    images, _ = next(data.train_batches(replace(training.feed, channels=3), 0, 1))
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert training.model.blocks[1].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    other = train(replace(config, channels_last=False), data, tmp_path / "first")
    for one, two in zip(training.parameters, other.parameters, strict=True):
        torch.testing.assert_close(one, two, rtol=2**-12, atol=2**-16)


def test_a_compiled_model_trains_and_evaluates_as_the_model_does(
    data: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[nn.Module] = []
    plain_compile = nn.Module.compile

    def compile(self: nn.Module) -> None:
        compiled.append(self)
        plain_compile(self, backend="eager")  # traces as any backend does, and spares the minute of a C++ compiler

    monkeypatch.setattr(nn.Module, "compile", compile)
    config = replace(CONFIG, steps=4, compile=True)
    training = train(config, data, tmp_path / "compiled")
    assert compiled == [training.model]
    train(replace(config, compile=False), data, tmp_path / "plain")
    left, right = (checkpoint.load(tmp_path / name / "checkpoint.pt")["model"] for name in ("compiled", "plain"))
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name])


def test_the_five_likeliest_classes_are_counted_and_images_without_label_are_not() -> None:
    logits = torch.arange(8.0).repeat(4, 1)  # class 7 is the likeliest, 3 the fifth
    labels = torch.tensor([7, 3, 2, NO_LABEL])
    counts = Counts(torch.device("cpu"))
    counts.add(torch.tensor(6.0), logits, labels)
    assert counts.scores(counts.sums, classes=8) == (2.0, pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert counts.scores(counts.sums, classes=5).top5 is None


def test_rows_tell_where_the_time_of_a_step_goes_on_the_console_and_in_tensorboard(
    data: Digits, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(replace(CONFIG, ema=0.5), data, tmp_path)
    for row in read_metrics(tmp_path / "metrics.csv"):
        named = dict(zip(COLUMNS, row, strict=True))
        speed, waited, optimizer = (
            float(named[name]) for name in ("images_per_second", "data_seconds", "optimizer_seconds")
        )
        assert waited > 0 and optimizer > 0
        assert waited + optimizer < CONFIG.batch_size / speed
    assert "data" in (said := capfd.readouterr().err) and "optimizer" in said
    shown = EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    assert set(shown.Tags()["scalars"]) == set(TAGS)
    assert [event.step for event in shown.Scalars("train/loss")] == [2, 4, 6, 8]
    assert [event.step for event in shown.Scalars("test/top5")] == [4, 8]


def test_synthetic_images_are_the_same_in_any_parts_and_train(tmp_path: Path) -> None:
    data = Synthetic()
    feed = Feed(8, 3, 32, torch.device("cpu"), seed=3)
    ((images, labels),) = data.train_batches(feed, 4, 5)
    parts = [
        part
        for process in (0, 1)
        for part in data.train_batches(replace(feed, processes=2, process=process, accumulate=2), 0, 1)
    ]
    assert [len(part) for part, _ in parts] == [2] * 4
    assert torch.equal(torch.cat([part for part, _ in parts]), images)
    assert torch.equal(torch.cat([part for _, part in parts]), labels)
    assert images.std() == pytest.approx(1, abs=0.05)
    tests = [labels for _, labels in data.test_batches(replace(feed, batch_size=30, processes=3, process=2))]
    assert [len(labels) for labels in tests] == [10] * 17 + [1]
    assert (torch.cat(tests) == NO_LABEL).sum() == 1  # 512 images, 171 places in each of three processes
    options = ["--data", "synthetic", "--model", "preresnet8", "--steps", 2, "--batch-size", 8, "--image-size", 8]
    assert run(*options, "--out", tmp_path / "run") == 0
    assert Config.load(tmp_path / "run" / "config.json").classes == 1000
    assert run("--resume", tmp_path / "run", "--steps", 3) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--batch-size", 10, "--accumulate", 4], "--batch-size 10 cannot be shared equally .* multiple of 4"),
        (["--parallel", "fsdp"], "--parallel fsdp is for several processes: start them with torchrun"),
        (["--sync-bn"], "--sync-bn works on GPUs, not on device 'cpu'"),
    ],
)
def test_options_that_need_something_else_say_what(options: list[object], said: str, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=said):
        run(*options, "--device", "cpu", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_processes_that_cannot_share_a_batch_or_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(TrainError, match="--batch-size 16 cannot be shared equally by 3 processes .* multiple of 6"):
        command._check_parts(replace(CONFIG, accumulate=2))
    with pytest.raises(TrainError, match="--device cuda:1 is one GPU for 3 processes: give --device cuda"):
        command._check_parts(replace(CONFIG, batch_size=6, device="cuda:1"))
    command._check_parts(replace(CONFIG, batch_size=6, device="cuda"))


def test_sharding_on_cpus_is_refused_where_torch_gets_it_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, parallel="fsdp")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.8.0+cpu"))
    with pytest.raises(TrainError, match="--parallel fsdp: on CPUs .* PyTorch 2.9 on, this is 2.8.0"):
        command._check_parts(config)
    command._check_parts(replace(config, device="cuda"))
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.10.0"))
    command._check_parts(config)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--ema", "1"), ("--ema", "0"), ("--label-smoothing", "1"), ("--amp", "fp8"), ("--accumulate", "0")],
)
def test_values_out_of_range_are_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(option, value)
    assert value in capsys.readouterr().err


def test_the_memory_options_may_change_when_a_run_is_resumed_and_the_others_not(tmp_path: Path) -> None:
    options = ["--steps", 2, "--batch-size", 16, "--ema", 0.9, "--amp", "bf16"]
    assert run(*options, "--out", tmp_path / "run") == 0
    for option in (["--ema", 0.8], ["--amp", "fp16"], ["--label-smoothing", 0.1]):
        with pytest.raises(TrainError, match=f"{option[0]} .* differs"):
            run("--resume", tmp_path / "run", *option)
    assert run("--resume", tmp_path / "run", "--steps", 4, "--accumulate", 2, "--channels-last") == 0
    config = Config.load(tmp_path / "run" / "config.json")
    assert (config.accumulate, config.channels_last, config.ema, config.amp) == (2, True, 0.9, "bf16")


def test_a_rival_whose_loss_is_not_finite_is_noted_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--optimizer", "adamw", "--steps", 6, "--batch-size", 16, "--log-every", 1, "--compare-steps", 4]
    assert run(*options, "--compare", "sgd:1e30", "sgd:0.01", "--out", tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "SGD, lr 1e+30: ended: the training loss of sgd" in said
    assert "SGD, lr 0.01: test accuracy" in said
    assert checkpoint.load(tmp_path / "run" / "sgd-0.01" / "checkpoint.pt")["step"] == 4
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["step"] == 6


def test_a_run_from_before_an_option_existed_goes_on_with_its_default(data: Digits, tmp_path: Path) -> None:
    CONFIG.save(tmp_path / "config.json")
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('  "sync_bn": false,\n', "").replace('  "ema": null,\n', ""))
    assert Config.load(tmp_path / "config.json") == CONFIG
    (tmp_path / "metrics.csv").write_text("step,test_accuracy,seconds\n4,0.5,1.0\n8,0.6,2.0\n12,0.7")
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in read_metrics(tmp_path / "metrics.csv")]
    assert [(row["step"], row["test_accuracy"], row["test_top5"]) for row in rows] == [
        ("4", "0.5", ""),
        ("8", "0.6", ""),
    ]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "16 images in 1 part.* larger --accumulate"),
        (
            torch._dynamo.exc.InternalTorchDynamoError("no compiler"),
            "--compile .*no compiler.* resume with --no-compile",
        ),
        (RuntimeError("a bug"), "^a bug$"),
    ],
)
def test_an_error_that_another_option_avoids_names_it(
    error: Exception, said: str, data: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Module, "compile", lambda self: None)
    training = Training(replace(CONFIG, compile=True), data)

    def fail(batches: object) -> None:
        raise error

    monkeypatch.setattr(training, "take_step", fail)
    with pytest.raises(RuntimeError, match=said):
        training.run(tmp_path, StopRequest())


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"amp": "bf16", "ema": 0.9}, {"amp": "fp16"}, {"amp": "bf16", **SGD}])
def test_a_step_never_waits_for_the_device(options: dict[str, Any]) -> None:
    data = Synthetic()
    config = replace(CONFIG, device="cuda", image_size=32, classes=1000, channels_last=True, accumulate=2, **options)
    training = Training(config, data)
    batches = data.train_batches(training.feed, 0, 8)
    for _ in range(3):
        training.take_step(batches)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            training.take_step(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    seconds, _, optimizer = training.times.per_step()
    assert 0 < optimizer < seconds


@pytest.mark.parametrize(
    ("name", "rank", "index"), [("cuda", None, 3), ("cuda", "1", 1), ("cuda:2", None, 2), ("cuda:2", "1", 2)]
)
def test_a_gpu_is_chosen_by_its_number(monkeypatch, name, rank, index):
    """torch.cuda.set_device takes no device without one."""
    chosen = []
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(arguments, "checked_device", lambda name: name)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert arguments.current_device(name) == torch.device("cuda", index)
    assert chosen == [torch.device("cuda", index)]
