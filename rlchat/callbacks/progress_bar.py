"""A progress bar that stays on one line of 80 columns."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text


class OneLineProgressBar(RichProgressBar):
    """Lightning's rich progress bar on one line: a short bar that leaves room for the metrics.

    The metrics are those that the module logs with ``prog_bar=True``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._numbers = _Numbers()

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Keeps the metrics for rlchat's column and returns none for Lightning's column, which wraps."""
        metrics = super().get_metrics(trainer, pl_module)
        self._numbers.shown = {name: value for name, value in metrics.items() if isinstance(value, float)}
        return {}

    def configure_columns(self, trainer: L.Trainer) -> list[ProgressColumn]:
        """The description, the bar, the batch count, the remaining time and the metrics."""
        return [
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=24),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True, table_column=Column(no_wrap=True)),
            self._numbers,
        ]

    def _get_train_description(self, current_epoch: int) -> str:
        epochs = self.trainer.max_epochs or -1
        description = f"Epoch {current_epoch + 1}" + (f"/{epochs}" if epochs > 0 else "")
        return description.ljust(len(self.validation_description))


class _Numbers(ProgressColumn):
    """Metrics under short names: ``loss`` for ``train/loss``. Empty in the bars of validation."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=True, overflow="ellipsis"))
        self.shown: dict[str, float] = {}

    def render(self, task: Task) -> Text:
        """The metrics as one line of text."""
        if not task.description.startswith("Epoch"):
            return Text()
        parts = (f"{name.removeprefix('train/').replace('/', ' ')} {value:.3g}" for name, value in self.shown.items())
        return Text("  ".join(parts), style="italic")
