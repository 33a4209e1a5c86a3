"""Writes the responses of `rlchat predict`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.trainer.states import TrainerFn

from rlchat.distributed.collectives import gather_objects, take_turns
from rlchat.errors import UserError, at_least_one
from rlchat.ppo.module import PPOModule
from rlchat.rewards.best_of import best_of_kl, pass_at_k
from rlchat.utils.files import write_atomically


class Predictions(BasePredictionWriter):
    """Writes the responses of ``rlchat predict`` as JSONL, one line per prompt, in the order of the prompts.

    Args:
        path: the file to write; an existing file is an error unless ``overwrite`` is set.
        overwrite: replace an existing file.
        best_of: generate this many responses to each prompt, and write the one with the highest reward. The row also
            has ``mean_reward``, the mean reward of all of them. The stage needs a reward, so it must be PPO.

    With ``best_of``, ``rlchat validate`` and ``rlchat test`` also generate that many responses to each prompt. Their
    metrics are means over all of them, and pass@k is added for prompts with an answer.

    A row whose prompt has an answer or a check has ``correct``, and with ``best_of`` also ``correct_of_n``, the number
    of correct responses. The last line of the command states their means, and pass@n.
    """

    def __init__(self, path: str = "replies.jsonl", overwrite: bool = False, best_of: int = 1) -> None:
        super().__init__(write_interval="epoch")
        self.best_of = at_least_one("Predictions", "best_of", best_of)
        self.path = Path(path)
        self.overwrite = overwrite

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raises :class:`UserError` for an existing file, and for ``best_of`` without a reward."""
        if self.path.exists() and not self.overwrite:
            raise UserError(
                f"{self.path} already exists; set another --predictions.path, or --predictions.overwrite true"
            )
        self._set_best_of(pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raises :class:`UserError` for ``best_of`` without a reward or with several turns. Training ignores it."""
        if trainer.state.fn != TrainerFn.FITTING:
            self.on_test_start(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raises :class:`UserError` for ``best_of`` without a reward or with several turns."""
        self._set_best_of(pl_module)
        if self.best_of > 1 and isinstance(pl_module, PPOModule) and pl_module.options.turns > 1:
            raise UserError(
                f"--best_of {self.best_of} compares responses to the same prompt; set --model.turns 1, or leave it out"
            )

    def _set_best_of(self, pl_module: L.LightningModule) -> None:
        if self.best_of > 1:
            if not isinstance(pl_module, PPOModule):
                raise UserError(
                    f"--best_of {self.best_of} needs a reward, and {type(pl_module).__name__} has none; use the "
                    f"configuration or checkpoint of a PPO run"
                )
            pl_module.best_of = self.best_of

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
        print(f"wrote {len(rows)} responses to {self.path}{self._gain(rows)}{self._correct(rows)}")

    def _gain(self, rows: Sequence[dict[str, Any]]) -> str:
        """What the choice among ``best_of`` responses changed, as the end of a sentence."""
        if self.best_of == 1 or not rows:
            return ""
        chosen, mean = (sum(row[name] for row in rows) / len(rows) for name in ("reward", "mean_reward"))
        return (
            f": the best of {self.best_of} have a mean reward of {chosen:.3g}, all have {mean:.3g}; "
            f"KL to the model at most {best_of_kl(self.best_of):.2f} nats per response"
        )

    def _correct(self, rows: Sequence[dict[str, Any]]) -> str:
        """How many of the written responses are correct, and pass@k of all, as the end of a sentence."""
        checked = [row for row in rows if "correct" in row]
        if not checked:
            return ""
        text = f"; {sum(row['correct'] for row in checked)} of {len(checked)} that have an answer are correct"
        for k in (1, self.best_of) if self.best_of > 1 else ():
            mean = sum(pass_at_k(self.best_of, row["correct_of_n"], k) for row in checked) / len(checked)
            text += f", pass@{k} {mean:.3f}"
        return text
