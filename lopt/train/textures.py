"""`lopt make-images`: a folder of JPEG files as `lopt train --data` takes it, where a class is a texture.

It is for trying things out where there is no ImageNet: reading, decoding and augmenting files, models at their own
image size, the stability of training. It is learnable, by convolutional networks and not by mean colour alone, and an
accuracy on it says nothing about ImageNet.

A class is three bands of spatial frequency, each with an orientation, a width and a colour; an image of it is noise of
these bands, lit unevenly, at a random contrast, with grain. A band lies in both mirror images of its orientation, so
that a flipped image stays in its class. Every image is a function of (seed, part, class, number).
"""

from __future__ import annotations

import argparse
import importlib
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lopt.train import TrainError

BANDS = 3
QUALITY = 90  # of JPEG
PARTS = {"train": 0, "val": 1}
README = """Images made by `lopt make-images`: {classes} classes, each a texture, seed {seed}.
To try training on. An accuracy on them says nothing about photographs.
"""


class Texture(NamedTuple):
    """A class. Of each band: the logarithm to base 2 of its frequency in cycles per image, its orientation in radians,
    its width in octaves and in radians, [BANDS] each; and its colour, [BANDS, 3]."""

    octave: np.ndarray
    orientation: np.ndarray
    octave_width: np.ndarray
    orientation_width: np.ndarray
    colour: np.ndarray


def texture(seed: int, label: int) -> Texture:
    """The class of that number."""
    rng = np.random.default_rng([seed, label])
    colour = rng.standard_normal((BANDS, 3))
    return Texture(
        rng.uniform(2.5, 5.5, BANDS),
        rng.uniform(0, np.pi / 2, BANDS),
        rng.uniform(0.15, 0.4, BANDS),
        rng.uniform(0.08, 0.25, BANDS),
        colour / np.linalg.norm(colour, axis=1, keepdims=True),
    )


def picture(kind: Texture, rng: np.random.Generator, size: int) -> np.ndarray:
    """An image of a class: [size, size, 3] uint8."""
    down, right = np.fft.fftfreq(size)[:, None] * size, np.fft.rfftfreq(size)[None] * size
    octave = np.log2(np.maximum(np.hypot(down, right), 0.5))
    orientation = np.arctan2(np.abs(down), np.abs(right))
    pixels = np.zeros((size, size, 3))
    for band in range(BANDS):
        distance = ((octave - kind.octave[band]) / kind.octave_width[band]) ** 2
        distance += ((orientation - kind.orientation[band]) / kind.orientation_width[band]) ** 2
        amplitude = np.exp(-distance / 2)
        wave = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((size, size))) * amplitude, (size, size))
        pixels += wave[..., None] / (wave.std() + 1e-12) * kind.colour[band]
    ramp = np.linspace(-1, 1, size)
    light = rng.normal(0, 0.4, 3) + np.add.outer(rng.normal(0, 0.4) * ramp, rng.normal(0, 0.4) * ramp)[..., None]
    pixels = rng.uniform(0.15, 0.3) * pixels + 0.2 * light + rng.normal(0, 0.08, pixels.shape)
    return (255 / (1 + np.exp(-4 * pixels))).astype(np.uint8)


def make(folder: Path, classes: int, train: int, val: int, size: int, seed: int = 0, jobs: int = 1) -> None:
    """Write folder/train/<class>/<number>.jpg and folder/val/... all or nothing.

    Args:
        folder: not yet there, or empty.
        classes: their number. train, val: images in all, shared equally by the classes.
        size: pixels on a side. jobs: processes.

    Raises:
        TrainError: the folder holds files, or cannot be written.
    """
    importlib.import_module("PIL.Image")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TrainError(f"{str(folder)!r} is not an empty folder: choose another")
    folder = folder.resolve()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            unfinished = Path(scratch, folder.name)
            tasks = [
                (unfinished / part, seed, label, range(label, count, classes), size)
                for part, count in (("train", train), ("val", val))
                for label in range(classes)
            ]
            if jobs == 1:
                for task in tasks:
                    _make_class(*task)
            else:
                with ProcessPoolExecutor(jobs) as pool:
                    list(pool.map(_make_class, *zip(*tasks, strict=True)))
            (unfinished / "README.txt").write_text(README.format(classes=classes, seed=seed))
            if folder.exists():  # empty, and perhaps someone's working directory
                for entry in unfinished.iterdir():
                    os.replace(entry, folder / entry.name)
            else:
                os.replace(unfinished, folder)
    except OSError as error:
        raise TrainError(f"{str(folder)!r} cannot be written ({error}): free space, or choose another") from error


def _make_class(part: Path, seed: int, label: int, numbers: range, size: int) -> None:
    from PIL import Image

    kind, folder = texture(seed, label), part / f"texture-{label:04d}"
    folder.mkdir(parents=True)
    for number in numbers:
        rng = np.random.default_rng([seed, label, PARTS[part.name], number])
        Image.fromarray(picture(kind, rng, size)).save(folder / f"{number:07d}.jpg", quality=QUALITY)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lopt make-images`."""
    parser.add_argument("folder", type=Path, help="to be made")
    parser.add_argument("--classes", type=int, default=10, metavar="N", help="default: 10")
    parser.add_argument("--train", type=int, default=1000, metavar="N", help="training images in all (default: 1000)")
    parser.add_argument("--val", type=int, default=200, metavar="N", help="validation images in all (default: 200)")
    parser.add_argument("--size", type=int, default=256, metavar="PIXELS", help="default: 256")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: one per core)"
    )


def run(args: argparse.Namespace) -> int:
    """`lopt make-images`. Raises TrainError, before anything is written, for numbers that make no such folder."""
    least = {"classes": 2, "train": args.classes, "val": args.classes, "size": 8, "seed": 0, "jobs": 1}
    for name, bound in least.items():
        if getattr(args, name) < bound:
            reason = ": an image for every class" if name in ("train", "val") else ""
            raise TrainError(f"--{name} {getattr(args, name)} is too small: give {bound} or more{reason}")
    make(args.folder, args.classes, args.train, args.val, args.size, args.seed, args.jobs)
    count = f"{args.train:,} training and {args.val:,} validation images of {args.size}x{args.size}"
    print(f"{args.folder}: {count}, {args.classes} textures; lopt train --data {args.folder}")
    return 0
