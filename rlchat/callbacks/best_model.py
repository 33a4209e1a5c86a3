"""Keeps the best model of a run, and the last state that a run can go on from."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from rlchat.callbacks.stop_signals import StopSignals
from rlchat.callbacks.trainer_facts import is_rehearsal
from rlchat.errors import UserError
from rlchat.utils.files import set_aside

LAST = "last.ckpt"
BEST = "best.ckpt"


class BestModel(ModelCheckpoint):
    """Saves the best model on held-out conversations, as a bundle to use and as a checkpoint to go on from.

    Each time the module's ``monitor`` (PPO: ``val/reward``) is better than before, ``folder/<bundle_name>`` becomes the
    model of that moment, beside Lightning's ``best.ckpt`` in the run's own folder; a bundle that an earlier run left
    there is first set aside under its date. ``last.ckpt`` is written every ``save_last_every`` batches and before and
    after each validation, so that an interrupted run goes on with ``--ckpt_path last``. Ctrl-C and SIGTERM let the
    batch come to its end and write ``last.ckpt`` then, so that nothing is lost; a second Ctrl-C stops at once. Without
    validation, the bundle is the model at the end.

    Args:
        folder: where the bundles go.
        save_last_every: training batches between two writes of ``last.ckpt``; 0: around validations only.
    """

    def __init__(self, folder: str = "checkpoints", save_last_every: int = 25) -> None:
        super().__init__(filename="best", save_top_k=1, save_on_train_epoch_end=False, enable_version_counter=False)
        self.folder = folder
        self.save_last_every = save_last_every
        self.bundle_path: str | None = None
        """Where this run has written its bundle; None before the first."""
        self._signals = StopSignals()
        self._stop = 0  # the signal for which the run ends where the next batch would begin; 0: it goes on
        self._due = self._before_validation = False

    @property
    def state_key(self) -> str:
        """One key whatever the options, so that a resumed run with others finds its state."""
        return "rlchat.BestModel"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Takes over what the module wants to be judged by. Raises :class:`UserError` for a folder that takes none."""
        if stage == "fit" and not is_rehearsal(trainer):
            _require_writable(Path(self.folder))
        self.monitor, self.mode = pl_module.monitor  # type: ignore[misc]
        if self.best_model_score is None:
            self.kth_value = torch.tensor(-torch.inf if self.mode == "max" else torch.inf)
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes charge of Ctrl-C and SIGTERM."""
        super().on_train_start(trainer, pl_module)
        self._stop = 0
        self._signals.take_charge()
        validation = trainer.fit_loop.epoch_loop.val_loop
        if validation.restarted_mid_evaluation:  # what on_save_checkpoint noted is read by now, and was no batch
            batches: Any = validation.batch_progress.total
            batches.ready, batches.started = batches.ready - 1, batches.started - 1

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes ``last.ckpt`` every so often, and before the run is stopped."""
        # ModelCheckpoint's own every_n_train_steps counts optimizer steps, of which PPO takes several a batch.
        done = trainer.fit_loop.total_batch_idx + 1
        self._stop = self._signals.agreed(pl_module)
        self._due = bool(self._stop or (self.save_last_every and done % self.save_last_every == 0))
        # From here, Lightning would go on without the validation or the end of the epoch that follow: they save.
        if self._due and not trainer.is_last_batch and not _validation_follows(trainer):
            self._save_last(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves what is due since the last batch."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._due:
            self._save_last(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stops where the batch before is saved; by now its metrics are logged as well."""
        if self._stop:
            self._signals.stop(self._stop)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves what training has come to, so that a run that is broken off in validation begins with it anew."""
        super().on_validation_start(trainer, pl_module)
        if _is_part_of_training(trainer):
            self._before_validation = True
            self._save_last(trainer)
            self._before_validation = False
            if self._stop:
                self._signals.stop(self._stop)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stops: what came before the validation is saved."""
        if _is_part_of_training(trainer) and (number := self._signals.agreed(pl_module)):
            self._signals.stop(number)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notes that a validation has begun, by which Lightning knows that it has to be run before anything else."""
        if self._before_validation:
            batches = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["total"]
            batches["ready"] += 1
            batches["started"] += 1

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the best, where this is it, and the last."""
        if not _is_part_of_training(trainer) or is_rehearsal(trainer):
            return
        before = self.best_model_score
        if self.monitor in trainer.callback_metrics:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        better = self.best_model_score is not None and (before is None or bool(self.best_model_score != before))
        if better:
            self._save_bundle(trainer, pl_module)
        self._save_last(trainer)
        self._due = False
        if number := self._signals.agreed(pl_module):
            self._signals.stop(number)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gives the signals back."""
        super().on_train_end(trainer, pl_module)
        self._signals.release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Gives the signals back."""
        super().on_exception(trainer, pl_module, exception)
        self._signals.release()
        if self._signals.stopped:
            # The first draws and writes more than the others; where one ends much earlier, Lightning kills the rest.
            trainer.strategy.barrier()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run that was never validated leaves the model that it ended with."""
        if self.bundle_path is None and trainer.global_step and not is_rehearsal(trainer):
            self._save_bundle(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """ModelCheckpoint's, and where the bundle is."""
        return {**super().state_dict(), "bundle_path": self.bundle_path}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A resumed run has a folder of its own, but the best so far is still the one to beat."""
        self.bundle_path = state_dict["bundle_path"]
        self.current_score = state_dict["current_score"]
        super().load_state_dict({**state_dict, "dirpath": self.dirpath})

    def _save_last(self, trainer: L.Trainer) -> None:
        if not is_rehearsal(trainer):
            assert self.dirpath is not None
            self.last_model_path = str(Path(self.dirpath) / LAST)
            trainer.save_checkpoint(self.last_model_path)

    def _save_bundle(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        path = Path(self.folder) / pl_module.bundle_name  # type: ignore[operator]
        if trainer.is_global_zero and path.exists() and self.bundle_path != str(path):  # not this run's own
            set_aside(path)
        pl_module.save_bundle(path)  # type: ignore[operator]
        self.bundle_path = str(path)


def _require_writable(folder: Path) -> None:
    """Now, and not when hours of training are to be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"best_model.folder {folder}: cannot be written ({error.strerror}); give another") from error


def _is_part_of_training(trainer: L.Trainer) -> bool:
    """Whether a validation belongs to a fit that has begun."""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def _validation_follows(trainer: L.Trainer) -> bool:
    """Whether the training batch that ends now is one of those after which the run validates."""
    epoch = trainer.fit_loop.epoch_loop
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and not epoch.val_loop.skip and epoch._should_check_val_fx(fetcher)
