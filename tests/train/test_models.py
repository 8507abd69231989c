"""Models by name have the stated size and are refused by name."""

import importlib.util
import sys
import types

import pytest
import torch
from torch import nn

from lopt.train import TrainError
from lopt.train.models import PreActivationBlock, build

needs_pytorchcv = pytest.mark.skipif(
    importlib.util.find_spec("pytorchcv") is None, reason="pytorchcv is not installed: pip install 'lopt[train]'"
)


def size(model: nn.Module) -> tuple[int, int]:
    tensors = list(model.parameters())
    return sum(tensor.numel() for tensor in tensors), len(tensors)


def test_preresnet8_takes_images_of_any_size_and_channels() -> None:
    model, native, channels = build("preresnet8", classes=10, channels=1, image_size=None)
    assert (native, channels, size(model)) == (None, 1, (77_562, 25))
    for side in (8, 13, 32):
        assert model(torch.zeros(2, 1, side, side)).shape == (2, 10)
    assert build("preresnet8", classes=4, channels=3, image_size=32)[0](torch.zeros(2, 3, 32, 32)).shape == (2, 4)


def test_the_shortcut_of_a_block_is_the_identity() -> None:
    block = PreActivationBlock(4, 4, stride=1)
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(block(x), x)


@needs_pytorchcv
@pytest.mark.parametrize(
    ("name", "parameters", "tensors", "native"),
    [("preresnet50", 25_549_480, 155, 224), ("resnet50", 25_557_032, 161, 224), ("inceptionv3", 27_161_264, 292, 299)],
)
def test_imagenet_models_have_their_published_size(name: str, parameters: int, tensors: int, native: int) -> None:
    with torch.device("meta"):
        model, image_size, channels = build(name, classes=1000, channels=1, image_size=None)
    assert (size(model), image_size, channels) == ((parameters, tensors), native, 3)


@pytest.mark.parametrize(
    ("name", "parameters", "native"),
    [
        ("timm:resnet18", 11_689_512, 224),
        ("timm:vit_tiny_patch16_224", 5_717_416, 224),
        ("torchvision:resnet18", 11_689_512, 224),
        ("torchvision:inception_v3", 27_161_264, 299),
    ],
)
def test_models_of_other_packages_have_their_published_size(name: str, parameters: int, native: int) -> None:
    package = name.split(":")[0]
    pytest.importorskip(
        package, reason=f"{package} that fits torch is not installed", exc_type=(ImportError, RuntimeError)
    )
    with torch.device("meta"):
        model, image_size, channels = build(name, classes=1000, channels=1, image_size=None)
    assert (size(model)[0], image_size, channels) == (parameters, native, 3)
    with pytest.raises(TrainError, match=f"'{package}:no_such_model'"):
        build(f"{package}:no_such_model", classes=10, channels=3, image_size=None)


@needs_pytorchcv
def test_another_image_size_leaves_the_native_result_unchanged() -> None:
    torch.manual_seed(0)
    model, native, _ = build("resnet20_cifar10", classes=10, channels=3, image_size=None)
    torch.manual_seed(0)
    other, _, _ = build("resnet20_cifar10", classes=10, channels=3, image_size=48)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model, other = model.double().eval(), other.double().eval()
    assert native == 32
    torch.testing.assert_close(other(images), model(images), rtol=1e-12, atol=1e-12)
    assert other(torch.zeros(1, 3, 48, 48, dtype=torch.float64)).shape == (1, 10)


@needs_pytorchcv
def test_a_model_made_for_ten_classes_takes_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = build("resnet20_cifar10", classes=7, channels=3, image_size=None)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)

    def fails(num_classes: int = 10) -> torch.nn.Module:
        assert num_classes in (10, 100)
        return torch.nn.Identity()

    monkeypatch.setattr("pytorchcv.models.resnet_cifar.resnet20_cifar10", fails)
    with pytest.raises(TrainError, match="for 7 classes"):
        build("resnet20_cifar10", classes=7, channels=3, image_size=None)


@pytest.mark.parametrize("name", ["no_such_model", "keras:resnet50", "timm:", "", "get_resnet", "resnet18;"])
def test_an_unknown_name_is_refused_with_what_can_be_given(name: str) -> None:
    if importlib.util.find_spec("pytorchcv") is None and ":" not in name:
        pytest.skip("pytorchcv is not installed, which is what is said")
    with pytest.raises(TrainError, match="preresnet8"):
        build(name, classes=10, channels=1, image_size=None)


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18", "preresnet50"])
def test_a_package_that_is_not_installed_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("timm", "torchvision", "pytorchcv"):
        for module in [module for module in sys.modules if module.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError) as raised:
        build(name, classes=10, channels=3, image_size=None)
    assert raised.value.name.split(".")[0] == (name.split(":")[0] if ":" in name else "pytorchcv")


def test_other_packages_are_asked_for_fresh_weights_and_the_number_of_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_model(name: str, *, pretrained: bool, num_classes: int) -> nn.Module:
        if pretrained or name != "tiny":
            raise RuntimeError(f"Unknown model ({name})")
        model = nn.Linear(3, num_classes)
        model.default_cfg = {"input_size": (3, 96, 96)}  # type: ignore[assignment]
        return model

    timm = types.ModuleType("timm")
    timm.create_model = create_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)
    model, native, channels = build("timm:tiny", classes=6, channels=1, image_size=None)
    assert (model.out_features, native, channels) == (6, 96, 3)
    with pytest.raises(TrainError, match="'timm:huge'"):
        build("timm:huge", classes=6, channels=1, image_size=None)


def test_a_package_that_is_broken_is_named_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("lopt.train.models.importlib.import_module", fail)
    with pytest.raises(TrainError, match=r"torchvision.*nms does not exist"):
        build("torchvision:resnet18", classes=10, channels=3, image_size=None)
