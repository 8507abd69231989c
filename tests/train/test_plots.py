"""curves.png shows what metrics.csv says."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lopt.train import plots
from lopt.train.metrics import COLUMNS


def write(path: Path, rows: int, rate: float) -> Path:
    lines = [",".join(COLUMNS)]
    for step in range(1, rows + 1):
        accuracy = 1 - np.exp(-rate * step)
        test = f"{accuracy * 0.5},{accuracy * 0.99}" if step % 10 == 0 else ","
        lines.append(f"{step},{step / 20},{np.exp(-rate * step)},{accuracy},{test},,,,,1000,0,0,{step}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("rows", [0, 1, 9, 300])
def test_a_run_of_any_length_is_drawn(tmp_path: Path, rows: int) -> None:
    plots.draw(tmp_path / "curves.png", "title", {"hrnn": write(tmp_path / "metrics.csv", rows, 0.03)})
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (1650, 690)
        assert image.convert("L").getextrema()[1] == 255


def test_every_run_has_its_own_colour(tmp_path: Path) -> None:
    runs = {name: write(tmp_path / f"{name}.csv", 300, rate) for name, rate in (("hrnn", 0.03), ("adamw", 0.02))}
    plots.draw(tmp_path / "both.png", "title", runs)
    plots.draw(tmp_path / "one.png", "title", {"hrnn": runs["hrnn"]})
    second = tuple(int(plots.COLOURS[1][place : place + 2], 16) for place in (1, 3, 5))

    def count(path: Path) -> int:
        with Image.open(path) as image:
            return int((np.abs(np.array(image.convert("RGB"), int) - second).max(-1) < 8).sum())

    assert count(tmp_path / "both.png") > 1000
    assert count(tmp_path / "one.png") == 0


def test_smoothing_keeps_a_constant_and_reduces_noise() -> None:
    rng = np.random.default_rng(0)
    assert np.allclose(plots.smoothed(np.full(50, 3.0)), 3.0)
    assert plots.smoothed(rng.standard_normal(1000)).std() < 0.25
    assert len(plots.smoothed(np.empty(0))) == 0
