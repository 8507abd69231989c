"""Models by name, with fresh weights: `preresnet8` (here), a pytorchcv name, `timm:NAME` or `torchvision:NAME`."""

from __future__ import annotations

import importlib
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lopt.train import TrainError


class PreActivationBlock(nn.Module):
    """x + conv(relu(bn(conv(relu(bn(x)))))). He et al. 2016, "Identity Mappings in Deep Residual Networks"."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = torch.relu(self.norm1(x))
        residual = self.conv2(torch.relu(self.norm2(self.conv1(active))))
        return residual + (x if self.shortcut is None else self.shortcut(active))


class PreResNet(nn.Module):
    """Pre-activation ResNet for small images: a 3x3 stem, one block per width with stride 2 between widths, global
    average pool. Images [n, channels, h, w] of any size -> logits [n, classes]."""

    def __init__(self, widths: tuple[int, ...], channels: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        pairs = zip((widths[0], *widths), widths, strict=False)
        self.blocks = nn.Sequential(
            *(PreActivationBlock(a, b, stride=1 if place == 0 else 2) for place, (a, b) in enumerate(pairs))
        )
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.blocks(self.stem(x))))
        return self.head(x.mean((2, 3)))


class InceptionV3(nn.Module):
    """pytorchcv's InceptionV3 with the auxiliary classifier that it leaves out, on the last grid of 17x17 cells:
    Szegedy et al. 2015, "Rethinking the Inception Architecture", section 4, with the layers of torchvision's.

    Images [n, 3, h, w] -> logits [n, classes]; in training mode (logits, auxiliary logits).
    """

    def __init__(self, model: Any, classes: int, native: bool) -> None:
        super().__init__()
        grid = [name for name, _ in model.features.named_children()].index("stage2") + 1
        self.lower, self.upper, self.output = model.features[:grid], model.features[grid:], model.output
        self.auxiliary = nn.Sequential(
            nn.AvgPool2d(5, stride=3) if native else nn.AdaptiveAvgPool2d(5),  # to 5x5 cells
            *_convolution(768, 128, 1),
            *_convolution(128, 768, 5),
            nn.Flatten(),
            nn.Linear(768, classes),
        )

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        grid = self.lower(x)
        logits = self.output(self.upper(grid).flatten(1))
        return (logits, self.auxiliary(grid)) if self.training else logits


def _convolution(inputs: int, outputs: int, size: int) -> tuple[nn.Module, ...]:
    layer = nn.Conv2d(inputs, outputs, size, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer, nn.BatchNorm2d(outputs, eps=1e-3), nn.ReLU(inplace=True)


OWN = {"preresnet8": (16, 32, 64)}


def build(name: str, classes: int, channels: int, image_size: int | None) -> tuple[nn.Module, int | None, int]:
    """(model, image size it is made for or None for any, channels it takes).

    `channels` and `image_size` are what the data has and the user wants; models from other packages take 3 channels.
    Raises TrainError naming an unknown model or a package that fails to import, ImportError for one not installed.
    """
    if name in OWN:
        return PreResNet(OWN[name], channels, classes), None, channels
    source, _, rest = name.rpartition(":")
    builders = {"": _pytorchcv, "timm": _timm, "torchvision": _torchvision}
    if source not in builders or not re.fullmatch(r"[\w.\-/]+", rest):
        raise TrainError(
            f"model {name!r} is not known: give {', '.join(OWN)}, a pytorchcv name such as preresnet50, "
            "timm:NAME or torchvision:NAME"
        )
    model, native = builders[source](rest, classes, image_size)
    return model, native, 3


def _import(module: str, model: str) -> object:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # a package built for another torch fails with RuntimeError or OSError
        raise TrainError(
            f"model {model!r} needs {module.split('.')[0]}, which is installed but fails to import ({error}): "
            f"install the version that fits torch {torch.__version__}"
        ) from error


def _pytorchcv(name: str, classes: int, image_size: int | None) -> tuple[nn.Module, int]:
    package = _import("pytorchcv.models", name)
    files = sorted(Path(package.__path__[0]).glob("*.py"))  # type: ignore[attr-defined]
    # Its table of all models imports every one of them and what they depend on; the file that defines one does not.
    homes = [file.stem for file in files if f"\ndef {name}(" in file.read_text(encoding="utf-8")]
    if not homes or name.startswith("get_"):
        raise TrainError(
            f"model {name!r} is neither one of {', '.join(OWN)} nor in pytorchcv: check the name, or give timm:NAME or "
            "torchvision:NAME"
        )
    make = getattr(_import(f"pytorchcv.models.{homes[0]}", name), name)
    try:
        try:
            model = make(num_classes=classes)
        except AssertionError:  # those for CIFAR are made for its 10 or 100 classes alone
            model = make()
            if not isinstance(getattr(model, "output", None), nn.Linear):
                raise
            model.output = nn.Linear(model.output.in_features, classes)
    except (TypeError, ValueError, AssertionError) as error:
        reason = f"{type(error).__name__} {error}".strip()
        raise TrainError(
            f"model {name!r} of pytorchcv cannot be made for {classes} classes ({reason}): choose another --model"
        ) from error
    native = getattr(model, "in_size", (224, 224))[0]
    pool = getattr(getattr(model, "features", None), "final_pool", None)
    if image_size not in (None, native) and isinstance(pool, nn.AvgPool2d):
        model.features.final_pool = nn.AdaptiveAvgPool2d(1)  # the same numbers at the native size
    if name == "inceptionv3":
        model = InceptionV3(model, classes, native=image_size in (None, native))
    return model, native


def _timm(name: str, classes: int, image_size: int | None) -> tuple[nn.Module, int]:
    timm = _import("timm", f"timm:{name}")
    try:
        model = timm.create_model(name, pretrained=False, num_classes=classes)  # type: ignore[attr-defined]
    except RuntimeError as error:
        raise TrainError(f"model 'timm:{name}' cannot be made ({error}): check the name") from error
    return model, model.default_cfg.get("input_size", (3, 224, 224))[-1]


def _torchvision(name: str, classes: int, image_size: int | None) -> tuple[nn.Module, int]:
    models = _import("torchvision.models", f"torchvision:{name}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about defaults of its weight initialisation
        try:
            model = models.get_model(name, weights=None, num_classes=classes)  # type: ignore[attr-defined]
        except ValueError as error:
            raise TrainError(f"model 'torchvision:{name}' cannot be made ({error}): check the name") from error
    return model, 299 if "inception" in name else 224
