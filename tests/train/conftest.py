"""Shared by the tests of training: one thread, a tree of images, and the comparison of two runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lopt.train import checkpoint, models
from lopt.train.data import Digits
from lopt.train.metrics import COLUMNS, read_metrics


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Of every test here."""


@pytest.fixture(scope="module", name="data")
def _data() -> Digits:
    """Fewer images than there are, so that an evaluation is quick."""
    digits = Digits()
    digits.test_images, digits.test_labels = digits.test_images[:64], digits.test_labels[:64]
    return digits


@pytest.fixture
def narrow_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default model with fewer channels."""
    monkeypatch.setitem(models.OWN, "preresnet8", (4, 8, 16))


@pytest.fixture(name="make_tree")
def _make_tree() -> Callable[..., Path]:
    return make_tree


@pytest.fixture(name="differences")
def _differences() -> Callable[[Any, Any], list[str]]:
    return differences


@pytest.fixture(name="assert_same_run")
def _assert_same_run() -> Callable[[Path, Path], None]:
    return assert_same_run


def make_tree(root: Path, per_class: int = 6, size: tuple[int, int] = (48, 40)) -> Path:
    """An ImageFolder tree of real JPEG files; the class is the direction of the stripes."""
    rng = np.random.default_rng(0)
    for part, count in (("train", per_class), ("val", 3)):
        for name in ("across", "down"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                place = np.arange(size[0] if name == "across" else size[1])
                wave = 127 + 100 * np.sin(place * rng.uniform(0.5, 0.9))
                pixels = np.broadcast_to(wave[None, :] if name == "across" else wave[:, None], size[::-1])
                Image.fromarray(pixels.astype(np.uint8)).convert("RGB").save(folder / f"{index}.jpg")
    return root


def differences(left: Any, right: Any, path: str = "") -> list[str]:
    """Where two checkpoints are not bitwise equal, wall-clock times apart."""
    if isinstance(left, dict):
        if left.keys() != right.keys():
            return [f"{path}: keys"]
        return [
            line for key in left if key != "seconds" for line in differences(left[key], right[key], f"{path}/{key}")
        ]
    if isinstance(left, list | tuple):
        if len(left) != len(right):
            return [f"{path}: length"]
        pairs = enumerate(zip(left, right, strict=True))
        return [line for place, (a, b) in pairs for line in differences(a, b, f"{path}/{place}")]
    equal = torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
    return [] if equal else [path]


def timeless(path: Path) -> list[list[str]]:
    """The rows of metrics.csv without speeds and times."""
    return [row[: COLUMNS.index("images_per_second")] for row in read_metrics(path)]


def assert_same_run(left: Path, right: Path) -> None:
    assert differences(checkpoint.load(left / "checkpoint.pt"), checkpoint.load(right / "checkpoint.pt")) == []
    assert timeless(left / "metrics.csv") == timeless(right / "metrics.csv")
