"""Images in batches. The batch of a step is a pure function of (seed, step): which images, in which order, and how each
is augmented. Resuming at a step therefore needs no sampler state, and two optimizers see the same batches.

A batch arrives in parts of equal size, consecutive images of it: `accumulate` parts at each of `processes` processes.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import os
import signal
import stat
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lopt.train import TrainError

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CROPS = ("resized", "padded")
NO_LABEL = -100  # of an image that fills up the last batch of a process; what cross_entropy ignores

Batch = tuple[Tensor, Tensor]
Batches = Generator[Batch, None, None]


@dataclass(frozen=True)
class Feed:
    """How batches arrive: images [part, channels, image_size, image_size] float32 and labels [part] int64 on `device`.
    `batch_size` images are those of a step on all processes; it is a multiple of processes * accumulate. `seed` decides
    order and augmentation; `workers` processes decode files (0: this process)."""

    batch_size: int
    channels: int
    image_size: int
    device: torch.device
    seed: int = 0
    workers: int = 0
    channels_last: bool = False
    accumulate: int = 1
    process: int = 0  # which of the processes this is
    processes: int = 1

    @property
    def part(self) -> int:
        return self.batch_size // (self.processes * self.accumulate)

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


def open_data(name: str, crop: str | None = None) -> Data:
    """name: a key of NAMED, or the path of a folder with train/ and val/ folders of class folders; crop: one of CROPS,
    for a folder alone. Raises TrainError for a folder that is not such and a crop of other data, ImportError for a
    package that is not installed."""
    if name not in NAMED:
        return ImageFolder(Path(name), crop or CROPS[0])
    if crop is not None:
        raise TrainError(f"--crop {crop} is for a folder of images, not for {name}: leave it out")
    return NAMED[name]()


def train_parts(count: int, feed: Feed, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
    """(epoch, indices [part]) of the parts of this process, for the steps start..stop-1 over `count` images."""
    for epoch, places in batch_places(count, feed.batch_size, feed.seed, start, stop):
        first = feed.process * feed.accumulate
        for part in range(first, first + feed.accumulate):
            yield epoch, places[part * feed.part : (part + 1) * feed.part]


def test_parts(count: int, feed: Feed) -> Iterator[np.ndarray]:
    """Indices of the test images of this process, every processes-th, in batches of `part`, the last one maybe smaller.
    All processes get as many: an index of `count` or more stands for none."""
    places = np.arange(-(-count // feed.processes)) * feed.processes + feed.process
    for start in range(0, len(places), feed.part):
        yield places[start : start + feed.part]


def batch_places(count: int, batch_size: int, seed: int, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
    """(epoch, indices [batch_size] of the images) for the steps start..stop-1. Every epoch is a permutation drawn from
    (seed, epoch); the images left over when `count` is no multiple of `batch_size` sit that epoch out."""
    per_epoch = count // batch_size
    order, order_epoch = np.empty(0, np.int64), -1
    for step in range(start, stop):
        epoch, place = divmod(step, per_epoch)
        if epoch != order_epoch:
            order, order_epoch = np.random.default_rng([seed, epoch]).permutation(count), epoch
        yield epoch, order[place * batch_size : (place + 1) * batch_size]


class Digits:
    """scikit-learn's handwritten digits: 1,797 real 8x8 images, held in memory. 360 of them, the same ones for every
    seed and stratified by class, are the test set. A training image is shifted by up to one pixel each way."""

    name = "digits"
    digest = crop = class_names = None  # always the same
    classes = 10
    channels = 1
    image_size = 8
    left_out = 0

    def __init__(self) -> None:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
        from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]

        digits = load_digits()
        split = train_test_split(digits.images, digits.target, test_size=360, stratify=digits.target, random_state=0)
        images = [torch.from_numpy(part).float().unsqueeze(1) for part in split[:2]]
        self.train_labels, self.test_labels = (torch.from_numpy(part).long() for part in split[2:])
        mean, std = images[0].mean(), images[0].std()
        self.train_images, self.test_images = ((part - mean) / std for part in images)
        background = float((0 - mean) / std)
        padded = F.pad(self.train_images, (1, 1, 1, 1), value=background)
        self._windows = padded.unfold(2, 8, 1).unfold(3, 8, 1)  # [n, 1, 3, 3, 8, 8]: every image at its nine shifts

    @property
    def train_count(self) -> int:
        return len(self.train_labels)

    @property
    def test_count(self) -> int:
        return len(self.test_labels)

    def train_batches(self, feed: Feed, start: int, stop: int) -> Batches:
        """The parts of the steps start..stop-1."""
        shift_epoch, shifts = -1, np.empty((0, 2), np.int64)
        for epoch, places in train_parts(self.train_count, feed, start, stop):
            if epoch != shift_epoch:
                shifts = np.random.default_rng([feed.seed, epoch, 1]).integers(0, 3, (self.train_count, 2))
                shift_epoch = epoch
            down, right = torch.from_numpy(shifts[places].T)
            pick = torch.from_numpy(places)
            yield self._deliver(self._windows[pick, :, down, right], self.train_labels[pick], feed)

    def test_batches(self, feed: Feed) -> Batches:
        """Every test image once, in order; see `test_parts`."""
        for places in test_parts(self.test_count, feed):
            pick = torch.from_numpy(places)
            labels = torch.where(
                pick < self.test_count, self.test_labels[pick.clamp(max=self.test_count - 1)], NO_LABEL
            )
            yield self._deliver(self.test_images[pick.clamp(max=self.test_count - 1)], labels, feed)

    @staticmethod
    def _deliver(images: Tensor, labels: Tensor, feed: Feed) -> Batch:
        images = images.to(feed.device)
        if feed.image_size != images.shape[-1]:
            images = F.interpolate(images, size=(feed.image_size,) * 2, mode="bilinear", antialias=True)
        images = images.expand(-1, feed.channels, -1, -1).contiguous(memory_format=feed.memory_format)
        return images, labels.to(feed.device)


class Synthetic:
    """Normal noise with random labels in 1000 classes, to measure the speed of everything but data; it teaches nothing.
    Every step gets the same images, made once and kept on the device."""

    name = "synthetic"
    digest = crop = class_names = None  # always the same
    classes = 1000
    channels = 3
    image_size = None  # any
    left_out = 0
    train_count = 12_800
    test_count = 512

    def train_batches(self, feed: Feed, start: int, stop: int) -> Batches:
        """The parts of the steps start..stop-1, all steps alike."""
        first = feed.process * feed.accumulate
        parts = [
            self._part(np.arange(part * feed.part, (part + 1) * feed.part), feed)
            for part in range(first, first + feed.accumulate)
        ]
        for _ in range(start, stop):
            yield from parts

    def test_batches(self, feed: Feed) -> Batches:
        """Test images of this process; see `test_parts`."""
        for places in test_parts(self.test_count, feed):
            images, labels = self._part(places, feed)
            yield images, labels.where(torch.from_numpy(places).to(feed.device) < self.test_count, NO_LABEL)

    def _part(self, indices: np.ndarray, feed: Feed) -> Batch:
        shape = (feed.channels, feed.image_size, feed.image_size)
        generators = [np.random.default_rng([feed.seed, index]) for index in indices.tolist()]
        labels = torch.tensor([int(generator.integers(self.classes)) for generator in generators])
        pixels = [torch.from_numpy(generator.standard_normal(shape, np.float32)) for generator in generators]
        images = torch.stack(pixels).to(feed.device, memory_format=feed.memory_format)
        return images, labels.to(feed.device)


class ImageFolder:
    """A folder with train/<class>/<image> and val/<class>/<image> (images may lie deeper), read with PIL.

    Training images, flipped half of the time, and validation images, by `crop`:

        resized  a random crop of 8 to 100 % of the area and aspect 3/4 to 4/3 (Szegedy et al. 2015, section 6); the
                 centre 7/8 of the shorter side
        padded   the centre square, moved by up to an eighth each way, black where there is nothing (He et al. 2016,
                 section 4.2, for CIFAR-10); the centre square

    Both are resized and normalised with ImageNet's mean and deviation. What is random about an image is drawn from
    (seed, epoch, index), which transforms that draw from a process-wide generator could not be; the pixels are PIL's,
    which decodes a JPEG at a fraction of its size where that suffices.
    """

    channels = 3
    image_size = None  # any

    def __init__(self, path: Path, crop: str = CROPS[0]) -> None:
        importlib.import_module("PIL.Image")  # raises here, not in a worker
        self.name = path.resolve().name
        self.crop = crop
        if not path.is_dir():
            raise TrainError(
                f"data {str(path)!r} is neither {' nor '.join(map(repr, NAMED))} nor a folder: check --data"
            )
        for part in ("train", "val"):
            if not (path / part).is_dir():
                raise TrainError(f"data {str(path)!r} has no folder {part}/: expected train/ and val/ of class folders")
        names = _class_folders(path / "train")
        if len(names) < 2:
            raise TrainError(f"{str(path / 'train')!r} has {len(names)} class folders: a classifier needs two or more")
        unknown = sorted(set(_class_folders(path / "val")) - set(names))
        if unknown:
            raise TrainError(f"{str(path / 'val')!r} has class {unknown[0]!r}, which train/ lacks: add or remove it")
        self.class_names = names
        self.classes = len(names)
        self._train = _list_images(path / "train", names)
        if len(with_images := set(self._train.labels.tolist())) < self.classes:
            empty = next(name for label, name in enumerate(names) if label not in with_images)
            raise TrainError(
                f"{str(path / 'train' / empty)!r} holds no image ({' '.join(IMAGE_SUFFIXES)}): add some, or remove the "
                f"folder, for each one is a class"
            )
        self._test = _list_images(path / "val", names)

    @property
    def train_count(self) -> int:
        return len(self._train)

    @property
    def test_count(self) -> int:
        return len(self._test)

    @property
    def left_out(self) -> int:
        """Files beside the images, by their suffixes."""
        return self._train.left_out + self._test.left_out

    @property
    def digest(self) -> str:
        """Of the training images' names below the folder and their classes: what the order of a run depends on."""
        return self._train.digest

    def train_batches(self, feed: Feed, start: int, stop: int) -> Batches:
        """The parts of the steps start..stop-1. Raises TrainError naming a file that cannot be read."""
        keys = ((epoch, indices.tolist()) for epoch, indices in train_parts(self.train_count, feed, start, stop))
        yield from _load(_Pictures(self._train, feed.image_size, feed.seed, self.crop, augment=True), keys, feed)

    def test_batches(self, feed: Feed) -> Batches:
        """Every validation image once, in order; see `test_parts`. Raises as train_batches does."""
        keys = ((0, indices.tolist()) for indices in test_parts(self.test_count, feed))
        yield from _load(_Pictures(self._test, feed.image_size, feed.seed, self.crop, augment=False), keys, feed)


def _class_folders(root: Path) -> list[str]:
    """Names of the folders below root, sorted; hidden ones are nobody's class."""
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


class _Files:
    """Paths below a folder and their classes, in arrays: a list of a million texts would be copied into every worker,
    object by object, as their reference counts change.

    Args:
        found: (class index, path below root), in their order.
        left_out: how many files beside them are no images, by their suffixes.

    Attributes:
        labels: [n].
    """

    def __init__(self, root: Path, found: list[tuple[int, str]], left_out: int) -> None:
        texts = [os.fsencode(path) for _, path in found]
        self._root, self._text = str(root), np.frombuffer(b"".join(texts), np.uint8)
        self._ends = np.cumsum([0, *map(len, texts)])
        self.labels = np.array([label for label, _ in found])
        self.left_out = left_out

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        begin, end = self._ends[index : index + 2]
        return os.path.join(self._root, os.fsdecode(self._text[begin:end].tobytes()))

    @property
    def digest(self) -> str:
        """Of everything but the folder."""
        content = hashlib.sha256(self._text.tobytes())
        for array in (self._ends, self.labels):
            content.update(array.astype("<i8").tobytes())
        return content.hexdigest()[:16]


def _walk(root: Path) -> Iterator[str]:
    """Files below root, links followed but never in a circle or upwards; what is hidden is none's image. Raises
    TrainError naming a folder that cannot be read."""

    def refuse(error: OSError) -> None:
        text = f"folder {error.filename!r} cannot be read ({error.strerror}): make it readable, or remove it"
        raise TrainError(text) from error

    seen = {(status.st_dev, status.st_ino) for status in (above.stat() for above in root.resolve().parents)}
    for folder, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        status = os.stat(folder)
        if (place := (status.st_dev, status.st_ino)) in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(folder, name) for name in files if not name.startswith("."))


def _list_images(root: Path, classes: list[str]) -> _Files:
    """Every image below root, sorted by class and path. Raises TrainError when there is none."""
    files = [
        (label, file.removeprefix(f"{root}{os.sep}"))
        for label, name in enumerate(classes)
        for file in _walk(root / name)
    ]
    found = [entry for entry in files if entry[1].lower().endswith(IMAGE_SUFFIXES)]
    if not found:
        beside = any(file.lower().endswith(IMAGE_SUFFIXES) for file in os.listdir(root))
        cure = f"they must lie in a folder for each class, such as {root.name}/{classes[0]}/" if beside else "add some"
        raise TrainError(f"{str(root)!r} holds no image ({' '.join(IMAGE_SUFFIXES)}) in a class folder: {cure}")
    return _Files(root, sorted(found), left_out=len(files) - len(found))


class _Pictures(torch.utils.data.Dataset):
    """Whole parts by key (epoch, indices): (images [n, 3, size, size] uint8, labels [n]), or the text of an error. An
    index beyond the files gives some image without a label."""

    def __init__(self, files: _Files, size: int, seed: int, crop: str, augment: bool) -> None:
        self.files, self.size, self.seed, self.crop, self.augment = files, size, seed, crop, augment

    def __getitem__(self, key: tuple[int, list[int]]) -> Batch | str:
        from PIL.Image import DecompressionBombError

        epoch, indices = key
        images = torch.empty(len(indices), 3, self.size, self.size, dtype=torch.uint8)
        for row, index in enumerate(indices):
            path = self.files.path(min(index, len(self.files) - 1))
            try:
                picture = self._read(path, epoch, index)
            except (OSError, SyntaxError, ValueError, DecompressionBombError) as error:  # what PIL raises
                # A training image takes part in the order of all: without it another run would go on.
                cure = "replace it by an image that can be read" if self.augment else "replace or remove it"
                return f"cannot read image {path!r} ({error}): {cure}, then resume"
            images[row] = torch.from_numpy(picture).permute(2, 0, 1)
        labels = [int(self.files.labels[index]) if index < len(self.files) else NO_LABEL for index in indices]
        return images, torch.tensor(labels)

    def _read(self, path: str, epoch: int, index: int) -> np.ndarray:
        """One image [size, size, 3] uint8."""
        from PIL import Image

        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe waits for its writer
            raise ValueError("it is no regular file")
        with Image.open(path) as image:
            width, height = image.size
            resized = self.crop == "resized"
            rng = np.random.default_rng([self.seed, epoch, index])
            if self.augment and resized:
                left, top, box_width, box_height = random_crop(rng, width, height)
            else:
                box_width = box_height = min(width, height) * (0.875 if resized else 1.0)
                left, top = (width - box_width) / 2, (height - box_height) / 2
            shrink = max(1, int(min(box_width, box_height) // self.size))
            image.draft("RGB", (width // shrink, height // shrink))  # JPEG decodes at 1/2, 1/4, 1/8 when that suffices
            x, y = image.width / width, image.height / height
            box = (left * x, top * y, (left + box_width) * x, (top + box_height) * y)
            whole = _eight_bits(image).convert("RGB")
            pixels = np.array(whole.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box))
        if self.augment and not resized:
            pixels = moved(rng, pixels)
        return pixels[:, ::-1].copy() if self.augment and rng.integers(2) else pixels


def _eight_bits(image: Image.Image) -> Image.Image:
    """A picture with 8 bits a channel: PIL cuts those of more off instead. Raises ValueError where none can be made."""
    from PIL import Image

    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its pixels, of mode {image.mode}, are not whole numbers from 0 to 65,535")
    return Image.fromarray(np.round(values / 257).astype(np.uint8))


def moved(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """An image [size, size, channels] moved by up to size / 8 pixels each way, 0 where there is nothing."""
    size, reach = len(pixels), len(pixels) // 8
    top, left = rng.integers(2 * reach + 1, size=2)
    return np.pad(pixels, ((reach, reach), (reach, reach), (0, 0)))[top : top + size, left : left + size]


def random_crop(rng: np.random.Generator, width: int, height: int) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a crop of 8 to 100 % of the area, aspect 3/4 to 4/3; the centre square when ten
    draws do not fit."""
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = rng.integers(width - crop_width + 1), rng.integers(height - crop_height + 1)
            return int(left), int(top), crop_width, crop_height
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side


def _load(pictures: _Pictures, keys: Iterator[tuple[int, list[int]]], feed: Feed) -> Batches:
    loader: torch.utils.data.DataLoader = torch.utils.data.DataLoader(
        pictures,
        batch_size=None,  # a key is a whole part
        sampler=keys,  # type: ignore[arg-type]
        num_workers=feed.workers,
        pin_memory=feed.device.type == "cuda",
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # its own: the global generator belongs to the model
    )
    mean = torch.tensor(IMAGENET_MEAN, device=feed.device).view(1, 3, 1, 1) * 255
    std = torch.tensor(IMAGENET_STD, device=feed.device).view(1, 3, 1, 1) * 255
    for batch in loader:
        if isinstance(batch, str):
            raise TrainError(batch)
        images, labels = (part.to(feed.device, non_blocking=True) for part in batch)
        yield images.to(torch.float32, memory_format=feed.memory_format).sub_(mean).div_(std), labels


Data = Digits | Synthetic | ImageFolder
NAMED: dict[str, type[Digits] | type[Synthetic]] = {"digits": Digits, "synthetic": Synthetic}


def _ignore_signals(worker: int) -> None:
    """Ctrl-C reaches the whole process group; the main process finishes its step and then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
