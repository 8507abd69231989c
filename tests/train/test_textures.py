"""The images of `lopt make-images` are what is said of them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lopt import cli
from lopt.train import TrainError, command, plots, textures
from lopt.train.data import ImageFolder
from lopt.train.metrics import COLUMNS, read_metrics

OPTIONS = ["--classes", "4", "--train", "130", "--val", "41", "--size", "32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("textures") / "images"
    assert cli.main(["make-images", str(folder), *OPTIONS]) == 0
    return folder


def test_the_images_are_a_folder_of_jpeg_files_shared_equally_by_the_classes(folder: Path) -> None:
    data = ImageFolder(folder)
    assert (data.classes, data.train_count, data.test_count) == (4, 130, 41)
    counts = [len(list((folder / "train" / name).iterdir())) for name in data.class_names]
    assert sorted(counts) == [32, 32, 33, 33]
    for path in folder.glob("*/*/*"):
        with Image.open(path) as image:
            assert (image.format, image.size, image.mode) == ("JPEG", (32, 32), "RGB")
            pixels = np.asarray(image)
        assert pixels.std() > 10
    assert "nothing about photographs" in " ".join((folder / "README.txt").read_text().split())


def test_images_are_the_same_every_time_and_in_any_number_of_processes(folder: Path, tmp_path: Path) -> None:
    textures.make(tmp_path / "again", classes=4, train=130, val=41, size=32, jobs=2)
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*.jpg"))
    assert paths == sorted(path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*.jpg"))
    contents = [(folder / path).read_bytes() for path in paths]
    assert contents == [(tmp_path / "again" / path).read_bytes() for path in paths]
    assert len(set(contents)) == len(contents)


def test_a_network_learns_the_classes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse

    monkeypatch.setattr(plots, "draw", lambda *_: None)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    options = f"--data {folder} --model preresnet8 --steps 60 --batch-size 26 --image-size 16 --workers 0 --threads 1"
    options += f" --optimizer adamw --lr 0.01 --eval-every 60 --out {tmp_path / 'run'}"
    assert command.run(parser.parse_args(options.split())) == 0
    accuracy = float(read_metrics(tmp_path / "run" / "metrics.csv")[-1][COLUMNS.index("test_accuracy")])
    assert accuracy > 0.75  # chance is 0.25


def test_a_folder_with_files_and_numbers_that_make_no_folder_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TrainError, match="is not an empty folder"):
        textures.make(folder, 4, 8, 8, 32)
    for option, value in (("--classes", 1), ("--train", 3), ("--size", 7)):
        assert cli.main(["make-images", str(tmp_path / "no"), *OPTIONS, option, str(value)]) == 2
        assert f"{option} {value} is too small" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_lies_beside_the_folder_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.tmp").mkdir()
    (tmp_path / "mine.tmp" / "notes").write_text("kept")
    textures.make(tmp_path / "mine", 2, 2, 2, 32)
    assert (tmp_path / "mine.tmp" / "notes").read_text() == "kept"
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    textures.make(Path("."), 2, 2, 2, 32)
    assert sorted(path.name for path in here.iterdir()) == ["README.txt", "train", "val"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "mine", "mine.tmp"]


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textures, "picture", lambda kind, rng, size: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        textures.make(tmp_path / "images", 2, 4, 4, 32)
    assert list(tmp_path.iterdir()) == []
