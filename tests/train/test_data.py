"""Batches are a pure function of (seed, step), and files are read as stated."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lopt.train import TrainError
from lopt.train.data import IMAGENET_MEAN, IMAGENET_STD, Digits, Feed, ImageFolder, open_data, random_crop

CPU = torch.device("cpu")
FEED = Feed(batch_size=64, channels=1, image_size=8, device=CPU, seed=3)


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


@pytest.fixture
def tree(tmp_path: Path, make_tree: Callable[..., Path]) -> Path:
    return make_tree(tmp_path / "stripes")


def folder_feed(**changes: object) -> Feed:
    return Feed(**{"batch_size": 4, "channels": 3, "image_size": 16, "device": CPU, "seed": 1, **changes})  # type: ignore


def same(left: list, right: list) -> bool:
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


def test_digits_are_split_stratified_and_the_same_every_time(digits: Digits) -> None:
    assert (digits.train_count, digits.test_count) == (1437, 360)
    assert torch.bincount(digits.test_labels).min() >= 34
    assert torch.equal(Digits().test_images, digits.test_images)
    assert abs(float(digits.train_images.mean())) < 1e-5
    assert abs(float(digits.train_images.std()) - 1) < 1e-5


def test_digits_batches_from_a_later_step_equal_those_of_a_run_from_the_start(digits: Digits) -> None:
    whole = list(digits.train_batches(FEED, 0, 50))
    assert same(whole[20:], list(digits.train_batches(FEED, 20, 50)))
    assert not torch.equal(whole[0][0], next(digits.train_batches(Feed(64, 1, 8, CPU, seed=4), 0, 1))[0])


def test_every_digit_appears_at_most_once_an_epoch_and_epochs_differ(digits: Digits) -> None:
    class Numbered(Digits):  # labels that tell the images apart
        def __init__(self) -> None:
            super().__init__()
            self.train_labels = torch.arange(self.train_count)

    batches = [labels for _, labels in Numbered().train_batches(FEED, 0, 44)]
    first, second = torch.cat(batches[:22]), torch.cat(batches[22:])
    assert len(first.unique()) == len(second.unique()) == 22 * 64
    assert not torch.equal(first, second)


def test_a_training_digit_is_its_original_shifted_by_at_most_one_pixel(digits: Digits) -> None:
    background = digits.train_images.min()
    padded = torch.nn.functional.pad(digits.train_images, (1, 1, 1, 1), value=float(background))
    shifted = [padded[:, 0, y : y + 8, x : x + 8].flatten(1) for y in range(3) for x in range(3)]
    images = torch.cat([images.flatten(1) for images, _ in digits.train_batches(FEED, 0, 4)])
    nearest = torch.cdist(images, torch.cat(shifted)).argmin(1)
    assert torch.equal(torch.cat(shifted)[nearest], images)
    assert len((nearest // digits.train_count).unique()) == 9


def test_digits_grow_to_the_size_and_channels_of_other_models(digits: Digits) -> None:
    images, _ = next(digits.train_batches(Feed(5, 3, 32, CPU), 0, 1))
    assert images.shape == (5, 3, 32, 32)
    assert torch.equal(images[:, 0], images[:, 2])
    assert sum(len(labels) for _, labels in digits.test_batches(Feed(64, 3, 32, CPU))) == 360


def test_folder_batches_do_not_depend_on_the_number_of_workers_or_the_first_step(tree: Path) -> None:
    data = ImageFolder(tree)
    whole = list(data.train_batches(folder_feed(), 0, 8))
    assert same(whole, list(data.train_batches(folder_feed(workers=2), 0, 8)))
    assert same(whole[5:], list(data.train_batches(folder_feed(), 5, 8)))
    assert not torch.equal(whole[0][0], whole[3][0])  # the next epoch crops and orders anew


def test_folder_labels_are_the_sorted_class_names(tree: Path) -> None:
    data = ImageFolder(tree)
    assert data.class_names == ["across", "down"]
    labels = torch.cat([labels for _, labels in data.test_batches(folder_feed())])
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_validation_images_are_the_centre_normalised_as_imagenet(tree: Path) -> None:
    image = Image.new("RGB", (64, 32), (255, 0, 0))
    image.paste((0, 128, 255), (16, 0, 48, 32))  # the centre square
    image.save(tree / "val" / "across" / "0.png")
    for path in (tree / "val" / "across").glob("*.jpg"):
        path.unlink()
    images, _ = next(ImageFolder(tree).test_batches(folder_feed(batch_size=1)))
    expected = (torch.tensor([0.0, 128.0, 255.0]) / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    assert (images[0].mean((1, 2)) - expected).abs().max() < 1e-5
    assert images[0].std((1, 2)).max() < 1e-5


def test_padded_crops_move_the_whole_image_and_flip_it(tree: Path) -> None:
    files = sorted(tree.glob("*/*/*.jpg"))
    pixels = np.random.default_rng(0).integers(1, 256, (len(files), 16, 16, 3), np.uint8)
    for path, image in zip(files, pixels, strict=True):
        Image.fromarray(image).save(path.with_suffix(".png"))
        path.unlink()
    data = ImageFolder(tree, "padded")
    mean, std = (255 * torch.tensor(numbers).view(3, 1, 1) for numbers in (IMAGENET_MEAN, IMAGENET_STD))
    train, test = torch.from_numpy(pixels).permute(0, 3, 1, 2).split([12, 6])
    images = torch.cat([images for images, _ in data.test_batches(folder_feed())])
    assert torch.equal((images * std + mean).round(), test)

    padded = torch.nn.functional.pad(train, (2, 2, 2, 2))
    moved = torch.stack([padded[..., y : y + 16, x : x + 16] for y in range(5) for x in range(5)])
    ways = torch.stack([moved, moved.flip(-1)]).flatten(3)  # [flipped, place, image, pixels]
    seen = torch.cat([images for images, _ in data.train_batches(folder_feed(batch_size=12), 0, 40)])
    seen = (seen * std + mean).round().to(torch.uint8).flatten(1)
    matches = (seen[:, None] == ways.flatten(0, 2)).all(2)
    assert (matches.sum(1) == 1).all()
    counts = matches.sum(0).view(2, 25, 12)
    assert (counts.sum((0, 1)) == 40).all()
    assert counts.sum((0, 2)).min() > 0
    assert abs(int(counts[0].sum()) - 240) < 5 * 480**0.5 / 2


@pytest.mark.parametrize("size", [(44, 32), (32, 44)])
def test_padded_crops_are_of_the_centre_square_of_an_oblong_image(tree: Path, size: tuple[int, int]) -> None:
    width, height = size
    ramp = np.broadcast_arrays(5 * np.arange(width), 5 * np.arange(height)[:, None], 99)
    for path in tree.glob("*/*/*.jpg"):
        Image.fromarray(np.stack(ramp, -1).astype(np.uint8)).save(path.with_suffix(".png"))
        path.unlink()
    data = ImageFolder(tree, "padded")
    mean, std = (255 * torch.tensor(numbers).view(3, 1, 1) for numbers in (IMAGENET_MEAN, IMAGENET_STD))
    images, _ = next(data.test_batches(folder_feed(batch_size=1)))
    square = (images[0] * std + mean).round()
    places = 5 * (2 * torch.arange(16) + 0.5)
    across, down = places + 5 * (width - 32) / 2, places + 5 * (height - 32) / 2
    assert (square[0] - across)[:, 1:-1].abs().max() < 1
    assert (square[1] - down[:, None])[1:-1].abs().max() < 1

    padded = torch.nn.functional.pad(square, (2, 2, 2, 2))
    moved = torch.stack([padded[..., y : y + 16, x : x + 16] for y in range(5) for x in range(5)])
    images, _ = next(data.train_batches(folder_feed(batch_size=12), 0, 1))
    for image in (images * std + mean).round():
        assert (torch.stack([moved, moved.flip(-1)]) == image).flatten(2).all(2).sum() == 1


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1"])
def test_every_mode_of_image_becomes_three_channels(tree: Path, mode: str) -> None:
    suffix = ".jpg" if mode == "CMYK" else ".png"
    Image.new("RGB", (20, 20), (10, 200, 30)).convert(mode).save(tree / "train" / "across" / f"odd{suffix}")
    batches = list(ImageFolder(tree).train_batches(folder_feed(batch_size=13), 0, 1))
    assert batches[0][0].shape == (13, 3, 16, 16)
    assert batches[0][0].isfinite().all()


def test_images_of_sixteen_bits_are_scaled_to_eight_and_others_refused(tree: Path) -> None:
    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    for path in (tree / "val").rglob("*.jpg"):
        path.unlink()
    for suffix in ("png", "tif", "pgm"):
        Image.fromarray(ramp.astype(np.uint16)).save(tree / "val" / "across" / f"ramp.{suffix}")
    Image.fromarray(np.round(ramp / 257).astype(np.uint8)).save(tree / "val" / "across" / "as8.png")
    images, _ = next(ImageFolder(tree).test_batches(folder_feed(batch_size=4)))
    assert len(images.flatten(1)[0].unique()) > 30
    for image in images[1:]:
        torch.testing.assert_close(image, images[0])
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tree / "val" / "across" / "a.tif")
    with pytest.raises(TrainError, match=r"a\.tif.*of mode F, are not whole numbers"):
        next(ImageFolder(tree).test_batches(folder_feed(batch_size=4)))


def test_links_are_followed_but_not_in_circles_and_what_is_hidden_is_left_out(tree: Path, tmp_path: Path) -> None:
    across = tree / "train" / "across"
    before = ImageFolder(tree)
    (tmp_path / "elsewhere" / "deeper").mkdir(parents=True)
    source = min(across.glob("*.jpg"))
    for name in ("elsewhere/one.jpg", "elsewhere/deeper/two.jpg"):
        (tmp_path / name).write_bytes(source.read_bytes())
    (across / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "deeper" / "circle").symlink_to(across)
    (across / "up").symlink_to("..")  # where the images of other classes are
    (across / "._hidden.jpg").write_bytes(b"no image")
    (across / ".checkpoints").mkdir()
    (across / ".checkpoints" / "x.jpg").write_bytes(source.read_bytes())
    data = ImageFolder(tree)
    assert data.train_count == before.train_count + 2
    assert data.digest != before.digest
    assert data._train.path(data.train_count - 1) == before._train.path(before.train_count - 1)
    paths = [data._train.path(index) for index in range(data.train_count)]
    assert str(across / "more" / "deeper" / "two.jpg") in paths and all(map(os.path.isfile, paths))


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_folder_that_cannot_be_read_is_named(tree: Path, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = tree / part / "down" / "locked"
    locked.mkdir()
    scandir = os.scandir

    def refuse(path: str) -> Any:  # as for any user but root
        if Path(path) == locked:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(
        TrainError, match=rf"{part}/down/locked' cannot be read \(Permission denied\): make it readable"
    ):
        ImageFolder(tree)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named(tree: Path, workers: int) -> None:
    broken = tree / "train" / "down" / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(TrainError, match=r"down/3\.jpg"):
        list(ImageFolder(tree).train_batches(folder_feed(workers=workers), 0, 3))


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_pipe_is_named_and_not_waited_for(tree: Path, part: str) -> None:
    pipe = tree / part / "down" / "pipe.jpg"
    os.mkfifo(pipe)
    writer = threading.Timer(5, lambda: os.close(os.open(pipe, os.O_WRONLY)))  # ends a reader's wait
    writer.start()
    data, feed = ImageFolder(tree), folder_feed(batch_size=1)
    with pytest.raises(TrainError, match=r"down/pipe\.jpg' \(it is no regular file\): replace"):
        list(data.train_batches(feed, 0, data.train_count) if part == "train" else data.test_batches(feed))
    writer.cancel()


def test_loading_files_leaves_the_global_generator_alone(tree: Path) -> None:
    before = torch.get_rng_state()
    list(ImageFolder(tree).train_batches(folder_feed(), 0, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_folder_that_is_no_image_folder_is_refused_with_what_is_missing(
    tmp_path: Path, make_tree: Callable[..., Path]
) -> None:
    with pytest.raises(TrainError, match="neither 'digits' nor 'synthetic' nor a folder"):
        open_data(str(tmp_path / "nowhere"))
    with pytest.raises(TrainError, match="no folder train/"):
        open_data(str(tmp_path))
    tree = make_tree(tmp_path / "tree", per_class=1)
    (tree / "val" / "third").mkdir()
    with pytest.raises(TrainError, match="class 'third'"):
        open_data(str(tree))
    (tree / "val" / "third").rmdir()
    (tree / "train" / ".ipynb_checkpoints").mkdir()
    assert open_data(str(tree)).classes == 2
    (tree / "train" / "third").mkdir()
    with pytest.raises(TrainError, match="train/third' holds no image .* or remove the folder"):
        open_data(str(tree))
    (tree / "train" / "third").rmdir()
    for path in (tree / "val").rglob("*.jpg"):
        path.rename(tree / "val" / f"{path.parent.name}-{path.name}")
    with pytest.raises(TrainError, match="they must lie in a folder for each class, such as val/"):
        open_data(str(tree))
    for path in (tree / "val").glob("*.jpg"):
        path.unlink()
    with pytest.raises(TrainError, match="holds no image .* add some"):
        open_data(str(tree))


def test_random_crops_lie_inside_and_have_the_stated_area_and_aspect() -> None:
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(500):
        left, top, width, height = random_crop(rng, 400, 300)
        assert left >= 0
        assert top >= 0
        assert left + width <= 400
        assert top + height <= 300
        assert 0.74 < width / height < 1.35
        shares.append(width * height / 120_000)
    assert 0.075 < min(shares) < 0.12
    assert max(shares) > 0.9
    assert random_crop(rng, 1, 400) == (0, 199, 1, 1)  # no crop of that aspect fits: the centre
