"""Writes the responses of `rlchat predict`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter

from rlchat.distributed.collectives import gather_objects, take_turns
from rlchat.errors import UserError
from rlchat.utils.files import write_atomically


class Predictions(BasePredictionWriter):
    """Writes the responses of ``rlchat predict`` as JSONL, one line per prompt, in the order of the prompts.

    Args:
        path: the file to write; an existing file is an error unless ``overwrite`` is set.
        overwrite: replace an existing file.
    """

    def __init__(self, path: str = "replies.jsonl", overwrite: bool = False) -> None:
        super().__init__(write_interval="epoch")
        self.path = Path(path)
        self.overwrite = overwrite

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raises :class:`UserError` for an existing file, before anything is computed."""
        if self.path.exists() and not self.overwrite:
            raise UserError(
                f"{self.path} already exists; set another --predictions.path, or --predictions.overwrite true"
            )

    def write_on_epoch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Gathers the rows of all processes and writes them on the first."""
        mine = [row for batch in predictions for row in batch]
        parts = gather_objects(mine)
        if not trainer.is_global_zero:
            return
        rows = take_turns(parts)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(self.path, lambda file: file.write(text.encode()))
        print(f"wrote {len(rows)} responses to {self.path}")
