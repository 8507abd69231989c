"""accelerate with HRNN."""

from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from lopt import HRNN

accelerate = pytest.importorskip("accelerate", reason="pip install accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")


def prepared(model: Any, data: Any) -> tuple[Any, Any, Any, Any]:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    return accelerator, *accelerator.prepare(model, HRNN(model.parameters()), DataLoader(data, batch_size=2))


def train(accelerator: Any, model: Any, optimizer: Any, loader: Any, steps: range) -> None:
    for index, batch in enumerate(loader):
        if index // 2 in steps:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch)["loss"])
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()


def test_a_resumed_run_equals_an_uninterrupted_one(
    regression: Any, data: Any, tmp_path: Path, assert_trained_alike: Any
) -> None:
    whole = prepared(regression(), data)
    train(*whole, range(3))
    whole[0].save_state(str(tmp_path))
    train(*whole, range(3, 6))
    again = prepared(regression(), data)
    again[0].load_state(str(tmp_path))
    train(*again, range(3, 6))
    assert_trained_alike(whole[0].unwrap_model(whole[1]), again[0].unwrap_model(again[1]))
    assert {state["step"].item() for state in again[2].optimizer.state.values()} == {6}
