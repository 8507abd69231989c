"""Lightning with HRNN."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lopt import HRNN

NAMES = ("lightning.pytorch", "pytorch_lightning")
pytestmark = pytest.mark.filterwarnings("ignore")


def lightning() -> Any:
    for name in NAMES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    pytest.skip("Lightning is not installed: pip install lightning")


def test_a_resumed_run_equals_an_uninterrupted_one(
    regression: Any, data: Any, tmp_path: Path, assert_trained_alike: Any
) -> None:
    pl = lightning()

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = regression()

        def training_step(self, batch: Any, index: int) -> Any:
            return self.model(**batch)["loss"]

        def configure_optimizers(self) -> Any:
            optimizer = HRNN(self.parameters())
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def fit(epochs: int, checkpoint: Path | None = None) -> tuple[Any, Any]:
        module = Module()
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            gradient_clip_val=1.0,
        )
        trainer.fit(module, DataLoader(data[:12], batch_size=4), ckpt_path=checkpoint)
        return trainer, module

    _, whole = fit(2)
    first, _ = fit(1)
    first.save_checkpoint(tmp_path / "first.ckpt")
    trainer, resumed = fit(2, tmp_path / "first.ckpt")
    assert_trained_alike(whole, resumed)
    (optimizer,) = trainer.optimizers
    assert {state["step"].item() for state in optimizer.state.values()} == {6}
