"""With weight averaging, all files contain the model that was validated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.callback_runs import Data, trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch import Tensor

from rlchat.callbacks.best_model import BestModel


class Climber(L.LightningModule):
    """Its weight grows by 1 per batch. Validation logs the current weight and stores it in a buffer."""

    bundle_name = "climber.pt"
    monitor = ("val/weight", "max")

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.register_buffer("mean", torch.zeros(()))
        self.measured: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return -self.weight.sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.measured.append(float(self.weight))

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.mean.fill_(self.measured[-1])
            self.log("val/weight", self.measured[-1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def save_bundle(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        torch.save({name: value.clone() for name, value in self.state_dict().items()}, path)


def fitted(folder: Path, averaging: L.Callback, **options: Any) -> Climber:
    module = Climber()
    best = BestModel(str(folder / "models"))
    trainer(best, averaging, default_root_dir=folder, num_sanity_val_steps=0, **options).fit(module, Data())
    return module


@pytest.mark.parametrize("averaging", [WeightAveraging, lambda: EMAWeightAveraging(decay=0.5)])
def test_what_was_measured_is_what_is_saved(averaging: Any, tmp_path: Path) -> None:
    module = fitted(tmp_path, averaging())
    (best,) = tmp_path.rglob("best.ckpt")
    checkpoint = torch.load(best, weights_only=True)["state_dict"]
    bundle = torch.load(tmp_path / "models" / "climber.pt", weights_only=True)
    assert module.measured[-1] < 8  # an average, and not the weight after eight batches
    for state in (checkpoint, bundle):
        assert float(state["weight"]) == pytest.approx(module.measured[-1])
        assert float(state["mean"]) == pytest.approx(module.measured[-1])


def test_the_weights_that_are_trained_are_not_touched(tmp_path: Path) -> None:
    """Eight batches of +1 with validations between them: the last one starts from 7."""
    seen: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(float(pl_module.weight.detach()))

    module = Climber()
    callbacks = BestModel(str(tmp_path / "models")), WeightAveraging(), Watch()
    trainer(*callbacks, default_root_dir=tmp_path, num_sanity_val_steps=0).fit(module, Data())
    assert seen == [float(batch) for batch in range(8)]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_average_of_swa_is_in_a_file_of_its_own(tmp_path: Path) -> None:
    module = fitted(tmp_path, StochasticWeightAveraging(swa_lrs=1.0, swa_epoch_start=1), epochs=3)
    average = float(module.weight.detach())
    assert average < 12  # the weight after the last of 12 batches
    saved = torch.load(tmp_path / "models" / "climber_averaged.pt", weights_only=True)
    (last,) = tmp_path.rglob("last.ckpt")
    assert float(saved["weight"]) == pytest.approx(average)
    assert float(torch.load(last, weights_only=True)["state_dict"]["weight"]) == pytest.approx(average)
