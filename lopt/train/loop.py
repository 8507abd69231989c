"""The training loop: a Config and data in, a run folder out.

    config.json    the Config and the versions it ran under
    metrics.csv    one row per `log_every` steps and per evaluation
    tensorboard/   the same rows, where `tensorboard` is installed
    checkpoint.pt  everything needed to go on, bit for bit on a CPU

A batch is a pure function of (seed, step) and the generators' states are in the checkpoint, so a resumed run equals an
uninterrupted one. Nothing in a step waits for the device: the loss is read for rows, checkpoints and the bar.

Processes of a group take the same decisions at the same step: to write a row, to save, to stop. Process 0 writes.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lopt.distributed import local
from lopt.train import TrainError, checkpoint, models, parallel
from lopt.train.config import Config
from lopt.train.data import NO_LABEL, Batches, Data, Feed
from lopt.train.ema import Average
from lopt.train.group import ALONE, Group
from lopt.train.metrics import COLUMNS, TAGS, Counts, Metrics, Scores
from lopt.train.optimizers import OPTIMIZERS
from lopt.train.precision import Precision
from lopt.train.scalars import Scalars
from lopt.train.schedules import SCHEDULES
from lopt.train.stop import StopRequest
from lopt.train.timing import StepTimes

PATIENCE = 20  # steps without a finite loss; an optimizer that passes over such steps may find out of them
AUXILIARY_WEIGHT = 0.4  # of an auxiliary classifier's loss; Szegedy et al. 2015


class Diverged(TrainError):
    """The training loss is not finite, and nothing suggests that it will be again."""


class Training:
    """One model in training, by the processes of a group. Building it writes nothing; TrainError when model, data and
    optimizer do not fit."""

    def __init__(self, config: Config, data: Data, group: Group = ALONE) -> None:
        self.config, self.data, self.group = config, data, group
        self.device = parallel.own_device(config.device)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # all batches have one shape
        torch.manual_seed(config.seed)
        self.model, _, channels = models.build(config.model, data.classes, data.channels, config.image_size)
        self.feed = Feed(
            config.batch_size,
            channels,
            config.image_size,
            self.device,
            config.seed,
            config.workers,
            config.channels_last,
            config.accumulate,
            group.rank,
            group.size,
        )
        if config.sync_bn:
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.model.to(self.device)
        if config.channels_last and not (group.size > 1 and config.parallel == "fsdp"):  # shards are contiguous
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        _check_shape(self.model, self.feed, config, data.classes)
        self.average = None if config.ema is None else Average(self.model, config.ema)
        parallel.prepare(self.model, config, group)
        if self.average is not None:
            parallel.prepare(self.average.model, config, group)
        try:
            self.optimizer = OPTIMIZERS[config.optimizer].make(self.model, config)
        except (ValueError, RuntimeError, ImportError, OSError) as error:
            raise TrainError(f"optimizer {config.optimizer!r}: {error}") from error
        self.forward = parallel.wrap(self.model, config, group)
        if config.compile:
            self.forward.compile()
        self.precision = Precision(config.amp, self.device)
        self.factor = SCHEDULES[config.schedule]
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: self.factor(step / config.steps))
        self.step = 0  # steps taken
        self.row_step = 0  # step of the last row in metrics.csv
        self.seconds = 0.0  # of training before this process
        # Over the images since the last row: losses that are finite, how many those are, correct answers.
        self.sums = torch.zeros(3, device=self.device)
        self.streak = torch.zeros((), device=self.device)  # steps up to now whose loss was not finite
        self.times = StepTimes(self.device)
        self._batches_per_epoch = data.train_count // config.batch_size
        self.model.train()
        if group.rank:
            self._seed_anew()

    @property
    def parameters(self) -> list[Tensor]:
        return [tensor for tensor in self.model.parameters() if tensor.requires_grad]

    def restore(self, path: Path) -> None:
        """Continue from the checkpoint at `path`. Raises TrainError when it is damaged or of another model."""
        state = checkpoint.load(path)
        try:
            parallel.load_model(self.model, state["model"])
            parallel.load_optimizer(self.optimizer, state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            for group, initial in zip(self.optimizer.param_groups, self.schedule.base_lrs, strict=True):
                group["lr"] = initial * self.factor(state["step"] / self.config.steps)
            self.precision.scaler.load_state_dict(state.get("scaler", {}))
            if self.average is not None:
                parallel.load_model(self.average.model, state["average"])
                self.average.updates = state["average_updates"]
            if self.group.rank == 0:
                meter = state["meter"]
                if len(meter) == 2:  # of a version that ended a run at a loss that was not finite
                    images = (state["step"] - state["row_step"]) * self.config.batch_size
                    meter = torch.tensor([meter[0], images, meter[1]])
                self.sums.copy_(meter)
            self.step, self.row_step, self.seconds = state["step"], state["row_step"], state["seconds"]
            generators = [(state["rng"], state["rng_cuda"]), *state.get("rng_others", [])]
            if self.group.rank < len(generators):
                self._set_generators(*generators[self.group.rank])
            else:
                self._seed_anew()
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise TrainError(
                f"checkpoint {str(path)!r} does not fit model {self.config.model!r} and optimizer "
                f"{self.config.optimizer!r} ({error}): was config.json changed, or is --meta another one?"
            ) from error

    def run(self, folder: Path, stop: StopRequest) -> bool:
        """Train to config.steps, or until `stop` has received a signal in any process; a checkpoint is left in either
        case.

        folder: the run folder, existing. Returns whether all steps are done. Raises TrainError when an image cannot be
        read or a file cannot be written, Diverged when the loss stays non-finite or the parameters are. Then no
        checkpoint is written: that before has some to go on from.
        """
        config, path = self.config, folder / "checkpoint.pt"
        if self.step == self.row_step == config.steps and path.exists():
            return True
        started = time.perf_counter() - self.seconds
        batches = self.data.train_batches(self.feed, self.step, config.steps)
        with _cures_named(config), self._record(folder) as record, self._bar() as bar, contextlib.closing(batches):
            self.times.clear()
            shown = saved = time.perf_counter()
            save_cost = 0.0
            saved_steps = (self.step, self.row_step) if path.exists() else None
            while True:
                if self._row_due():
                    row = self._train_part_of_row(folder)
                    evaluation = self._evaluate(stop) if self._evaluation_due() else {}
                    if evaluation is not None:
                        seconds = round(time.perf_counter() - started, 2)
                        record(dict.fromkeys(COLUMNS, "") | row | evaluation | {"seconds": seconds})
                        self.row_step = self.step
                        self.sums.zero_()
                        if "test_accuracy" in evaluation:
                            bar.test_text = f", test {100 * evaluation['test_accuracy']:.1f} %"
                    self.times.clear()
                # Process 0 writes, so it alone knows what a checkpoint costs.
                due = self.group.rank == 0 and self._save_due(time.perf_counter() - saved, save_cost)
                signal_number, save_due = self._agree(stop, due)
                ending = self.step >= config.steps or signal_number > 0
                new = saved_steps != (self.step, self.row_step)
                if (ending or save_due) and new and (not self._bad_steps() or self._sound()):
                    before = time.perf_counter()
                    self.seconds = before - started
                    self._save(path)
                    saved, saved_steps = time.perf_counter(), (self.step, self.row_step)
                    save_cost = saved - before
                    self.times.leave_out(save_cost)
                if ending:
                    return self.row_step == config.steps
                self.take_step(batches)
                if self.group.rank == 0 and (time.perf_counter() - shown > 0.5 or self.step == config.steps):
                    bar.set_postfix_str(self._bar_text() + bar.test_text, refresh=False)
                    shown = time.perf_counter()
                bar.update(config.batch_size)

    def take_step(self, batches: Batches) -> None:
        """One step on the next batch."""
        parts = self.config.accumulate
        self.optimizer.zero_grad()
        sound = torch.ones((), dtype=torch.bool, device=self.device)
        for part in range(parts):
            with self.times.data.measure():
                images, labels = next(batches)
            with parallel.gradients(self.forward, exchanged=part == parts - 1):
                with self.precision.autocast():
                    output = self.forward(images)
                logits, *auxiliary = output if isinstance(output, tuple) else (output,)
                loss = self._loss(logits, labels)
                total = loss + AUXILIARY_WEIGHT * sum(self._loss(other, labels) for other in auxiliary)
                self.precision.backward(total / parts)
            correct = (logits.detach().argmax(1) == labels).sum()
            finite = loss.isfinite()
            self.sums += torch.stack((loss.detach().where(finite, 0.0) * len(labels), finite * len(labels), correct))
            sound = sound & finite
        with self.times.optimizer.measure():
            self.precision.step(self.optimizer)
        self.streak = torch.where(sound, 0.0, self.streak + 1)
        self.schedule.step()
        if self.average is not None:
            self.average.update(self.model)
        self.step += 1
        self.times.steps += 1

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)

    @torch.no_grad()
    def _evaluate(self, stop: StopRequest) -> dict[str, float] | None:
        """Fields of a row, over all test images; None when a signal came meanwhile."""
        contenders = {"": self.forward} if self.average is None else {"": self.forward, "ema_": self.average.model}
        counts = {name: Counts(self.device) for name in contenders}
        for module in contenders.values():
            parallel.share_buffers(module, self.group)
        self._set_mode("eval")
        try:
            with contextlib.closing(self.data.test_batches(self.feed)) as batches:
                for images, labels in batches:
                    if self._agree(stop)[0]:
                        return None
                    for name, module in contenders.items():
                        with self.precision.autocast():
                            logits = module(images)
                        losses = F.cross_entropy(logits.float(), labels, ignore_index=NO_LABEL, reduction="sum")
                        counts[name].add(losses, logits, labels)
        finally:
            self._set_mode("train")
            for module in contenders.values():
                parallel.reshard(module)
        fields: dict[str, float] = {}
        for name, count in counts.items():
            scores: Scores = count.scores(self.group.sum(count.sums), self.config.classes)
            fields |= {f"{name}test_loss": scores.loss, f"{name}test_accuracy": scores.accuracy}
            if scores.top5 is not None:
                fields[f"{name}test_top5"] = scores.top5
        return fields

    def _set_mode(self, mode: str) -> None:
        getattr(self.model, mode)()
        getattr(self.optimizer, mode, lambda: None)()  # optimizers that keep two points have modes, torch's have not

    def _evaluation_due(self) -> bool:
        return self.step % self.config.eval_every == 0 or self.step == self.config.steps

    def _row_due(self) -> bool:
        return self.step > self.row_step and (self.step % self.config.log_every == 0 or self._evaluation_due())

    def _save_due(self, since: float, cost: float) -> bool:
        """since: seconds since the last checkpoint; cost: seconds it took. By default every 30 seconds, and rarer when
        writing would take more than a twentieth of the time."""
        if self.config.checkpoint_every is not None:
            return self.step > 0 and self.step % self.config.checkpoint_every == 0
        return since > max(30.0, 20 * cost)

    def _agree(self, stop: StopRequest, save_due: bool = False) -> tuple[int, bool]:
        """(signal that any process has received or 0, whether any wants to save): the same for all processes."""
        own = stop.received or 0
        number, due = map(int, self.group.max([own, save_due]))
        if number and not own:
            stop.received = number
        return number, bool(due)

    def _save(self, path: Path) -> None:
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        generators = self.group.to_first((torch.get_rng_state(), cuda))
        state = {
            "step": self.step,
            "row_step": self.row_step,
            "seconds": self.seconds,
            "model": parallel.gathered(self.model.state_dict()),
            "optimizer": parallel.gathered(self.optimizer.state_dict()),
            "schedule": self.schedule.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "meter": self.group.sum(self.sums),
        }
        if self.average is not None:
            state["average"] = parallel.gathered(self.average.model.state_dict())
            state["average_updates"] = self.average.updates
        if self.group.rank == 0:
            (state["rng"], state["rng_cuda"]), *state["rng_others"] = generators
            checkpoint.save(path, state)

    def _set_generators(self, cpu: Tensor, cuda: Tensor | None) -> None:
        torch.set_rng_state(cpu)
        if self.device.type == "cuda" and cuda is not None:
            torch.cuda.set_rng_state(cuda, self.device)

    def _seed_anew(self) -> None:
        """Dropout of its own for a process that no checkpoint tells how to go on."""
        entropy = [self.config.seed, self.group.rank, self.step]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1))

    def _means(self, sums: Tensor, processes: int) -> tuple[float, float]:
        """(loss, accuracy) of sums of so many processes over the images since the last row; the loss is that of images
        where it is finite, NaN if nowhere. Waits for the device."""
        images = max(1, (self.step - self.row_step) * self.config.batch_size * processes // self.group.size)
        loss, finite, correct = sums.tolist()
        return loss / finite if finite else math.nan, correct / images

    def _bad_steps(self) -> int:
        """Steps up to now whose loss was not finite in some process; waits for the device."""
        (steps,) = self.group.max([self.streak.item()])
        return int(steps)

    def _sound(self) -> bool:
        """Whether the parameters and BatchNorm's statistics are finite, in every process."""
        own = [local(tensor) for tensor in self.model.state_dict().values() if tensor.is_floating_point()]
        (broken,) = self.group.any([not all(tensor.isfinite().all() for tensor in own)])
        return not broken

    def _train_part_of_row(self, folder: Path) -> dict[str, Any]:
        if (bad := self._bad_steps()) and (bad >= PATIENCE or not self._sound()):
            path = folder / "checkpoint.pt"
            kept = f"the checkpoint before it is {str(path)!r}" if path.exists() else "there is no checkpoint before it"
            smaller = "--init-lr" if self.config.optimizer == "hrnn" else "--lr"
            raise Diverged(
                f"the training loss of {self.config.optimizer} (lr {self.config.lr:g}) was not finite for {bad} "
                f"step{'s' if bad > 1 else ''} up to {self.step}; {kept}, but from there the same would follow. Start "
                f"again with a smaller {smaller}"
            )
        loss, accuracy = self._means(self.group.sum(self.sums), self.group.size)
        row = {
            "step": self.step,
            "epoch": round(self.step / self._batches_per_epoch, 4),
            "train_loss": loss,
            "train_accuracy": accuracy,
        }
        if self.times.steps:  # none where a resumed run makes up for an evaluation
            seconds, data, optimizer = self.times.per_step()
            row["images_per_second"] = round(self.config.batch_size / seconds, 1)
            row |= {"data_seconds": float(f"{data:.4g}"), "optimizer_seconds": float(f"{optimizer:.4g}")}
        return row

    @contextlib.contextmanager
    def _record(self, folder: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
        """Inside, a function that writes a row; it does nothing in processes other than 0."""
        if self.group.rank:
            yield lambda row: None
            return
        scalars = Scalars(folder / "tensorboard", TAGS, self.row_step)
        with Metrics(folder / "metrics.csv", self.row_step) as metrics, contextlib.closing(scalars):

            def record(row: dict[str, Any]) -> None:
                metrics.add(row)
                scalars.add(self.step, row)

            yield record

    def _bar(self) -> Any:
        from tqdm import tqdm  # type: ignore[import-untyped]

        config = self.config
        bar = tqdm(
            disable=self.group.rank > 0,
            total=config.steps * config.batch_size,
            initial=self.step * config.batch_size,
            unit="img",
            unit_scale=True,
            smoothing=0.05,
            mininterval=0.2 if sys.stderr.isatty() else 10,
            dynamic_ncols=True,
            desc=config.optimizer,
            bar_format="{desc} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        )
        bar.test_text = ""
        return bar

    def _bar_text(self) -> str:
        """Means since the last row, of this process; waits for the device."""
        loss, accuracy = self._means(self.sums, 1)
        seconds, data, optimizer = self.times.per_step()
        return (
            f"data {100 * data / seconds:.0f} %, optimizer {100 * optimizer / seconds:.0f} %, loss {loss:.3g}, "
            f"accuracy {100 * accuracy:.1f} %"
        )


@contextlib.contextmanager
def _cures_named(config: Config) -> Iterator[None]:
    """Raises TrainError for what a run may meet that other options avoid. The death of a process that decodes images
    is raised by a signal, wherever the run is."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainError(
            f"a step of {config.batch_size} images in {config.accumulate} part(s) exceeds the memory of "
            f"{config.device!r}: resume with a larger --accumulate, or start with --amp bf16"
        ) from error
    except ValueError as error:
        if "more than 1 value per channel" in str(error):
            raise TrainError(
                f"batch normalisation has one value of each channel in a part of {config.batch_size} images in "
                f"{config.accumulate} part(s): give a larger --batch-size or --image-size, or a smaller --accumulate"
            ) from error
        raise
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker"):
            reason = " ".join(str(error).split()).rstrip(".")
            raise TrainError(
                f"{reason}: resume with fewer --workers than {config.workers}, more memory or a larger /dev/shm"
            ) from error
        if config.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = str(error).strip().splitlines()[0]
            raise TrainError(f"--compile does not work here ({reason}): resume with --no-compile") from error
        raise


def _check_shape(model: nn.Module, feed: Feed, config: Config, classes: int) -> None:
    """One image through the model, so that a model that does not fit the data is refused before anything is written."""
    shape = (1, feed.channels, feed.image_size, feed.image_size)
    model.eval()
    try:
        with torch.no_grad():
            output = model(torch.zeros(shape, device=feed.device))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise TrainError(
            f"model {config.model!r} does not take images of {feed.image_size}x{feed.image_size} ({error}): "
            "choose another --image-size"
        ) from error
    if not isinstance(output, Tensor) or output.shape != (1, classes):
        got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise TrainError(f"model {config.model!r} is no image classifier: it returns {got}, not logits [1, {classes}]")
