"""transformers.Trainer with HRNN, by both of its routes."""

from pathlib import Path
from typing import Any

import pytest

from lopt import HRNN

transformers = pytest.importorskip("transformers", reason="pip install transformers accelerate")
pytest.importorskip("accelerate", reason="transformers.Trainer needs it: pip install accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")


def trained(route: str, model: Any, data: Any, folder: Path, resume: str | None = None) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        save_steps=3,
        per_device_train_batch_size=4,
        weight_decay=0.01,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": 2, "decay_type": "linear"},
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    given: dict[str, Any] = {"optimizer_cls_and_kwargs": (HRNN, {"init_lr": 1e-2, "annealed": True})}
    if route == "optimizers":
        given = {"optimizers": (HRNN(model.parameters(), init_lr=1e-2, annealed=True, weight_decay=0.01), None)}
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, **given)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def rates(trainer: Any) -> list[float]:
    """lr before each step, by the scheduler that the trainer made."""
    return [trainer.lr_scheduler.lr_lambdas[0](step) for step in range(6)]


@pytest.mark.parametrize("route", ["optimizers", "optimizer_cls_and_kwargs"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    route: str, regression: Any, data: Any, tmp_path: Path, assert_trained_alike: Any
) -> None:
    whole = trained(route, regression(), data, tmp_path / "whole")
    again = trained(route, regression(), data, tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-3"))
    assert_trained_alike(whole.model, again.model)
    optimizer = getattr(whole.optimizer, "optimizer", whole.optimizer)
    assert isinstance(optimizer, HRNN)
    assert {state["step"].item() for state in optimizer.state.values()} == {6}
    assert rates(whole) == [1, 1, 1, 1, 1, 0.5]
    assert optimizer.param_groups[0]["lr"] == 0
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    assert decays == ({0.01} if route == "optimizers" else {0.01, 0.0})
