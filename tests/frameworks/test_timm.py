"""timm's optimizer factory and schedule with HRNN."""

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lopt import HRNN

NAME = "hrnn"
REASON = "timm, with the torchvision that fits torch, is not installed: pip install 'lopt[models]'"
timm_optim = pytest.importorskip("timm.optim", reason=REASON, exc_type=ImportError)
timm_scheduler = pytest.importorskip("timm.scheduler", reason=REASON, exc_type=ImportError)
factory = pytest.importorskip("timm.optim._optim_factory", reason=REASON, exc_type=ImportError)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    assert NAME not in factory.default_registry.list_optimizers()
    info = timm_optim.OptimInfo(name=NAME, opt_class=HRNN, description="learned", has_eps=False)
    factory.default_registry.register(info)
    yield
    del factory.default_registry._optimizers[NAME]


def made(model: Any) -> tuple[HRNN, Any]:
    optimizer = timm_optim.create_optimizer_v2(model, opt=NAME, lr=1.0, weight_decay=0.1)
    schedule = timm_scheduler.CosineLRScheduler(optimizer, t_initial=6, t_in_epochs=False)
    return optimizer, schedule


def train(model: Any, optimizer: HRNN, schedule: Any, data: Any, steps: range) -> None:
    for step in steps:
        batch = torch.utils.data.default_collate(data[4 * step : 4 * step + 4])
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
        schedule.step_update(step + 1)


def test_the_factory_makes_hrnn_by_name_with_its_groups(regression: Any) -> None:
    assert NAME in timm_optim.list_optimizers()
    optimizer, _ = made(regression())
    assert isinstance(optimizer, HRNN)
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.1]
    given = {"eps": 1e-8, "betas": (0.9, 0.99)}  # which timm's training script passes to every optimizer
    assert isinstance(timm_optim.create_optimizer_v2(regression(), opt=NAME, lr=1.0, **given), HRNN)


def test_a_resumed_run_equals_an_uninterrupted_one(regression: Any, data: Any, assert_trained_alike: Any) -> None:
    whole = regression()
    run = made(whole)
    train(whole, *run, data, range(3))
    file = io.BytesIO()
    torch.save({"model": whole.state_dict(), "optimizer": run[0].state_dict()}, file)
    train(whole, *run, data, range(3, 6))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = regression()
    resumed.load_state_dict(saved["model"])
    again = made(resumed)
    again[0].load_state_dict(saved["optimizer"])
    again[1].step_update(3)
    train(resumed, *again, data, range(3, 6))
    assert_trained_alike(whole, resumed)
    for optimizer in (run[0], again[0]):
        assert {state["step"].item() for state in optimizer.state.values()} == {6}
        assert optimizer.param_groups[0]["lr"] == 0  # the end of the schedule
