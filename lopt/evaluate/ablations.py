"""Meta-parameters of the other architectures of meta-training, all trained alike: what each feature is worth.

They lie in weights/ablations, one file for each name of `NAMES`; the card there says how they were made.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
from pathlib import Path

from lopt.meta.recipe import VARIANTS
from lopt.metaparams import MetaParams

FULL = "full"  # the architecture that the others are compared with
NAMES = (FULL, *VARIANTS)


def shipped() -> Path:
    """Folder of those that come with the package."""
    return Path(str(importlib.resources.files("lopt"))) / "weights" / "ablations"


def load(folder: Path) -> dict[str, MetaParams]:
    """Name -> meta-parameters, in the order of `NAMES`; empty for a folder without files of theirs.

    Raises:
        ValueError: a file is not named after an architecture, does not hold meta-parameters, or differs from "full" in
            more or less than its name says; or there is no "full".
    """
    files = {file.stem: file for file in sorted(folder.glob("*.safetensors"))}
    if unknown := [str(file) for name, file in files.items() if name not in NAMES]:
        raise ValueError(f"{unknown[0]} is not named after an architecture; there are {', '.join(NAMES)}")
    loaded = {name: MetaParams.load(files[name]) for name in NAMES if name in files}
    if loaded and FULL not in loaded:
        raise ValueError(f"{folder} has no {FULL}.safetensors, which the others are compared with")
    for name, meta in loaded.items():
        expected = dataclasses.replace(loaded[FULL].config, **VARIANTS.get(name, {}))
        if meta.config != expected:
            raise ValueError(
                f"{files[name]} holds the architecture {meta.config}, after its name it must be {expected}: train it "
                f"with the same recipe as {FULL} and with --variant {name}"
            )
    return loaded
