"""timm's optimizer factory with HRNN."""

from typing import Any

import pytest
import torch

from lopt import HRNN

factory = pytest.importorskip(
    "timm.optim",
    reason="timm, with the torchvision that fits torch, is not installed: pip install 'lopt[hub]'",
    exc_type=ImportError,
)


def test_the_factory_makes_hrnn_by_name_with_its_groups(regression: Any) -> None:
    name = "hrnn_of_lopt"
    info = factory.OptimInfo(name=name, opt_class=HRNN, description="learned", has_momentum=False, has_betas=False)
    factory.default_registry.register(info)
    model = regression()
    optimizer = factory.create_optimizer_v2(model, opt=name, lr=1.0, weight_decay=0.1)
    assert isinstance(optimizer, HRNN)
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.1]
    before = [param.detach().clone() for param in model.parameters()]
    model(torch.ones(2, 3), torch.ones(2))["loss"].backward()
    optimizer.step()
    assert not any(torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))
