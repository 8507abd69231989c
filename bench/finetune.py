"""Fine-tuning a pretrained transformer to classify texts: HRNN with nothing set beside AdamW at several rates.

The model is a folder that transformers can load, the texts a file of lines `label<tab>text`. AdamW has what it is used
with here: a linear warm-up over a tenth of the steps, then a linear decay to zero. HRNN trains without a schedule and
with a cooldown.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lopt import HRNN
from lopt.train.arguments import current_device, positive, whole
from lopt.train.schedules import cooldown

RATES = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3)
TEST = 1000  # texts held back
WARMUP = 0.1
LAST = 50  # steps whose mean loss is shown
UNTIMED = 10  # steps in which state is made and kernels are compiled


class Texts(NamedTuple):
    """Shuffled texts and the numbers of their classes."""

    texts: list[str]
    labels: list[int]
    classes: int


class Contender(NamedTuple):
    """An optimizer with a schedule: a step, counted from 0, and all steps -> factor of lr."""

    label: str
    make: Callable[[Any], torch.optim.Optimizer]
    factor: Callable[[int, int], float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `lopt bench finetune`."""
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="of a pretrained transformer")
    parser.add_argument("--texts", type=Path, required=True, metavar="FILE", help="lines of a label, a tab and a text")
    parser.add_argument("--classes", type=whole(2), default=20, metavar="N", help="most frequent ones (default: 20)")
    parser.add_argument("--steps", type=whole(1), default=250, metavar="N", help="default: 250")
    parser.add_argument("--batch-size", type=whole(1), default=16, metavar="N", help="default: 16")
    parser.add_argument("--length", type=whole(1), default=32, metavar="TOKENS", help="of a text (default: 32)")
    parser.add_argument("--rates", type=positive, nargs="+", default=RATES, metavar="LR", help="of AdamW")
    parser.add_argument("--meta", metavar="NAME|FILE", help="HRNN's meta-parameters (default: the shipped ones)")
    parser.add_argument("--seeds", type=whole(1), default=1, metavar="N", help="trainings of each (default: 1)")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--threads", type=whole(1), metavar="N", help="of a CPU (default: torch's own)")


def run(args: argparse.Namespace) -> int:
    """`lopt bench finetune`: train, print a line for each. Exit code 0; ImportError without transformers."""
    transformers = importlib.import_module("transformers")
    device = current_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    data = read(args.texts, args.classes, args.batch_size)
    transformers.logging.set_verbosity_error()
    if not (args.model / "config.json").is_file():
        raise ValueError(f"--model {args.model} is no folder of a transformer (it has no config.json)")
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)

    def batch(indices: Sequence[int]) -> dict[str, Tensor]:
        options = {"padding": True, "truncation": True, "max_length": args.length, "return_tensors": "pt"}
        encoded = tokenizer([data.texts[index] for index in indices], **options)
        encoded["labels"] = torch.tensor([data.labels[index] for index in indices])
        return {name: values.to(device) for name, values in encoded.items()}

    print(f"{len(data.texts):,} texts in {data.classes} classes, {args.steps} steps of {args.batch_size} on {device}")
    last = min(LAST, args.steps)
    print(f"{'':<16} {f'loss, last {last} steps':>20} {'test loss':>10} {'accuracy':>9} {'ms per step':>12}")

    hrnn = functools.partial(HRNN, meta=args.meta)
    contenders: list[Contender] = [
        Contender("HRNN", hrnn, lambda step, steps: 1.0),
        Contender("HRNN, cooldown", functools.partial(hrnn, annealed=True), lambda step, steps: cooldown(step / steps)),
        *(Contender(f"AdamW, {rate:g}", functools.partial(torch.optim.AdamW, lr=rate), linear) for rate in args.rates),
    ]
    for contender in contenders:
        results = []
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            model = transformers.AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=data.classes)
            results.append(train(model.to(device), contender, batch, len(data.texts), seed, args))
        loss, test, right, seconds = (statistics.fmean(values) for values in zip(*results, strict=True))
        print(f"{contender.label:<16} {loss:20.3f} {test:10.3f} {100 * right:7.1f} % {1e3 * seconds:12.0f}", flush=True)
    return 0


def linear(step: int, steps: int) -> float:
    """Of AdamW's rate: linear to 1 over the first steps, counted from 0, then linear to 0."""
    warmup = max(1, round(WARMUP * steps))
    return min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))


def read(path: Path, classes: int, batch_size: int) -> Texts:
    """The texts of the most frequent classes, in a fixed random order. Raises ValueError for a file of too few."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--texts {path} is not UTF-8 ({error}): convert it") from None
    lines = [line.split("\t", 1) for line in sorted(set(content.split("\n"))) if line]
    if wrong := [line for line in lines if len(line) < 2]:
        raise ValueError(f"--texts {path}: the line {wrong[0][0][:60]!r} has no tab between a label and a text")
    named = {label: index for index, (label, _) in enumerate(Counter(label for label, _ in lines).most_common(classes))}
    kept = [(text, named[label]) for label, text in lines if label in named]
    if len(kept) < TEST + batch_size or len(named) < 2:
        raise ValueError(
            f"--texts {path}: {len(kept):,} texts in {len(named)} classes are too few, {TEST + batch_size:,} are needed"
        )
    random.Random(0).shuffle(kept)
    texts, labels = zip(*kept, strict=True)
    return Texts(list(texts), list(labels), len(named))


def train(
    model: Any, contender: Contender, batch: Any, count: int, seed: int, args: argparse.Namespace
) -> tuple[float, float, float, float]:
    """One training on all texts but the first `TEST`.

    Args:
        model: pretrained, with a new classifier. contender: what trains it.
        batch: indices of texts -> what the model takes. count: of texts. seed: of their order.

    Returns:
        Mean training loss of the last steps, test loss, test accuracy, seconds per step after the first ones.
    """
    optimizer = contender.make(model.parameters())
    rate = optimizer.param_groups[0]["lr"]
    order = torch.randperm(count - TEST, generator=torch.Generator().manual_seed(seed)) + TEST
    losses: list[Tensor] = []
    untimed = min(UNTIMED, args.steps - 1)
    begin = time.perf_counter()
    model.train()
    for step in range(args.steps):
        if step == untimed > 0:
            losses[-1].item()  # waits for the device
            begin = time.perf_counter()
        at = step * args.batch_size % (len(order) - args.batch_size + 1)
        optimizer.param_groups[0]["lr"] = rate * contender.factor(step, args.steps)
        optimizer.zero_grad()
        loss = model(**batch(order[at : at + args.batch_size].tolist())).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    last = torch.stack(losses[-LAST:]).mean().item()
    seconds = (time.perf_counter() - begin) / (args.steps - untimed)
    model.eval()
    getattr(optimizer, "eval", lambda: None)()  # of HRNN with attention
    total, right = 0.0, 0
    with torch.no_grad():
        for first in range(0, TEST, 100):
            indices = range(first, min(first + 100, TEST))
            inputs = batch(indices)
            out = model(**inputs)
            total += len(indices) * out.loss.item()
            right += int((out.logits.argmax(-1) == inputs["labels"]).sum())
    return last, total / TEST, right / TEST, seconds
