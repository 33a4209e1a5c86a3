"""Modules of one weight that log known numbers and give known responses, and a trainer for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rlchat.callbacks import StatsPlot
from rlchat.callbacks.best_model import BestModel
from rlchat.conversation import Conversation, Message
from rlchat.rewards import Reply


class Automatic(L.LightningModule):
    """Logs ``train/loss`` n in its n-th training batch, and ``train/odd`` n if n is odd."""

    bundle_name = "tiny_model.pt"

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches = 0
        self.validations = 0
        self.fail_at = fail_at

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.count_and_log()
        return self.weight.sum()

    def count_and_log(self) -> None:
        self.batches += 1
        if self.batches == self.fail_at:
            raise ZeroDivisionError
        self.log("train/loss", float(self.batches), on_step=True, on_epoch=True)
        self.log("train/once_an_epoch", float(self.batches), on_step=False, on_epoch=True)
        if self.batches % 2:
            self.log("train/odd", float(self.batches))

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        self.validations += not self.trainer.sanity_checking
        self.log("val/accuracy", self.validations / 10)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["counts"] = (self.batches, self.validations)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.batches, self.validations = checkpoint["counts"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Manual(Automatic):
    """Takes three optimizer steps per batch, as PPO does."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__(fail_at)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        self.count_and_log()
        for _ in range(3):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.weight.sum())
            optimizer.step()


NASTY = "[bold]a|b[/bold] <b>x</b> *y*\n\x1b[31m$1_2_3 :smile: ![i](http://e.x/i.png)"


class FixedReward:
    def breakdown(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> dict[str, Tensor]:
        return {
            "polite": torch.full((len(replies),), 0.5),
            "too_long": torch.tensor([-0.125 * r.tokens for r in replies]),
        }


class Chatty(Automatic):
    """Responds to every prompt with ``NASTY``, and checks that no gradient is recorded."""

    def __init__(self, rewarded: bool = True) -> None:
        super().__init__()
        self.asked: list[list[Conversation]] = []
        if rewarded:
            self.reward = FixedReward()

    def respond(self, prompts: list[Conversation]) -> list[Reply]:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.asked.append(prompts)
        return [Reply(NASTY, tokens=row + 1, ended=row > 0) for row in range(len(prompts))]


class Data(L.LightningDataModule):
    prompts = tuple(Conversation((Message("user", f"question {n}"),)) for n in range(9))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.zeros(4, 1))  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.zeros(1, 1))  # type: ignore[arg-type]

    def sample_prompts(self, n: int) -> list[Conversation]:
        return list(self.prompts[:n])


def trainer(*callbacks: L.Callback, epochs: int = 2, **options: Any) -> L.Trainer:
    """Four batches per epoch, with a validation after every second one."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": epochs,
        "val_check_interval": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, BestModel) for callback in callbacks),
    }
    return L.Trainer(callbacks=list(callbacks), **defaults | options)


def logged(plot: StatsPlot) -> dict[str, dict[str, Any]]:
    return plot.state_dict()["history"]
