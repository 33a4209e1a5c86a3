"""Saves the best model of a run and the checkpoints from which the run can be resumed."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from rlchat.callbacks.averaging import averaged_weights, ends_with_an_unmeasured_average, keep_measured_buffers
from rlchat.callbacks.disk import announce_size
from rlchat.callbacks.run_state import batches_seen, is_fast_dev_run
from rlchat.callbacks.selection import Selection, selection_of
from rlchat.callbacks.stop_signals import StopSignals
from rlchat.distributed.collectives import greatest
from rlchat.errors import UserError, at_least_one
from rlchat.utils.files import set_aside

LAST = "last.ckpt"
BEST = "best.ckpt"


class BestModel(ModelCheckpoint):
    """Saves the model that is best on the validation split, as a model file and as a checkpoint.

    Whenever the module's ``monitor`` (PPO: ``val/reward``) improves, the model is written to ``folder/<bundle_name>``
    and Lightning's ``best.ckpt`` to the run's folder. A model file from an earlier run is renamed first, with its
    date. Without validation, the model file is written at the end of the run.

    ``last.ckpt`` is written every ``save_last_every`` batches, before and after each validation, and at the end, so
    that an interrupted run resumes with ``--ckpt_path last``. Ctrl-C and SIGTERM let the current batch finish and then
    write ``last.ckpt``; a second Ctrl-C stops immediately.

    A score that is not finite is never the best, and a model whose weights or their norm are not finite is never saved.

    With one of Lightning's callbacks for weight averaging, the averaged model is validated, and all files contain this
    model.

    Args:
        folder: the folder for the model files.
        save_last_every: write ``last.ckpt`` after this many training batches; 0: around validations and at the end
            only.
        select_by: the metric that selects the best model: a validation metric like ``val/answer_accuracy``, or
            ``reward-kl`` for ``val/reward`` − β · ``val/kl``. By default the module's ``monitor``.
        kl_weight: β of ``reward-kl``. By default ``--model.kl_coef``.
        keep_runs: the number of runs of this stage, including this one, whose checkpoints are kept; older ones are
            deleted at the end of this run. Model files and logs stay. By default all are kept.
    """

    def __init__(
        self,
        folder: str = "checkpoints",
        save_last_every: int = 25,
        select_by: str | None = None,
        kl_weight: float | None = None,
        keep_runs: int | None = None,
    ) -> None:
        super().__init__(filename="best", save_top_k=1, save_on_train_epoch_end=False, enable_version_counter=False)
        self.folder = folder
        self.save_last_every = save_last_every
        self.select_by = select_by
        self.kl_weight = kl_weight
        self.keep_runs = None if keep_runs is None else at_least_one("BestModel", "keep_runs", keep_runs)
        self._selection: Selection | None = None
        self.bundle_path: str | None = None
        """The model file that this run has written; None before the first."""
        self._signals = StopSignals()
        self._stop = 0  # the signal that ends the run before the next batch begins; 0: none
        self._due = self._before_validation = False
        self._batches_saved = -1  # training batches that last.ckpt was written after

    @property
    def state_key(self) -> str:
        """The same key for all options, so that a run that is resumed with different options finds its state."""
        return "rlchat.BestModel"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Determines the selection metric. Raises :class:`UserError` if ``folder`` cannot be written."""
        if stage == "fit" and not is_fast_dev_run(trainer):
            _require_writable(Path(self.folder))
        self._selection = selection_of(self.select_by, self.kl_weight, pl_module)
        if self._selection is not None:
            self.monitor, self.mode = self._selection.metric, self._selection.mode
        if self.best_model_score is None:
            self.kth_value = torch.tensor(-torch.inf if self.mode == "max" else torch.inf)
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Installs the handlers of Ctrl-C and SIGTERM."""
        super().on_train_start(trainer, pl_module)
        self._stop, self._batches_saved = 0, -1
        self._signals.take_charge()
        if not is_fast_dev_run(trainer) and trainer.is_global_zero:
            announce_size(pl_module, Path(self.folder))

    def stop_with(self, error: UserError) -> None:
        """Stops the run after the current batch: ``last.ckpt`` is written, then ``error`` is raised.

        All processes must call it in ``on_train_batch_end`` of the same batch.
        """
        self._signals.request(error)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes ``last.ckpt`` every ``save_last_every`` batches, and before a signal stops the run."""
        # ModelCheckpoint's every_n_train_steps counts optimizer steps, and PPO takes several per batch.
        done = batches_seen(trainer)
        self._stop = self._signals.agreed(pl_module)
        self._due = bool(self._stop or (self.save_last_every and done % self.save_last_every == 0))
        # A run resumed from a checkpoint written here would skip the validation or the end of the epoch that follows
        # this batch. In these cases the hooks below save.
        if self._due and not trainer.is_last_batch and not _validation_follows(trainer, batch_idx):
            self._save_last(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes ``last.ckpt`` if that is due."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._due:
            self._save_last(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stops the run if a signal came: at this point, the previous batch is saved and its metrics are logged."""
        if self._stop:
            self._signals.stop(self._stop)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves before the validation, so that a run interrupted during validation resumes with that validation."""
        super().on_validation_start(trainer, pl_module)
        if _is_part_of_training(trainer):
            self._before_validation = True
            self._save_last(trainer, pl_module)
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
        """Stops the run if a signal came; the state before the validation has been saved."""
        if _is_part_of_training(trainer) and (number := self._signals.agreed(pl_module)):
            self._signals.stop(number)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Marks a checkpoint written before a validation, so that a resumed run begins with this validation."""
        # Lightning has no hook at the point where its checkpoint means "in validation": it counts a batch as started
        # after on_validation_start and as processed before on_validation_batch_end. Therefore the counts are set here,
        # in the checkpoint. They are set in every checkpoint, because the counts of a run that was resumed from such a
        # checkpoint stay one too high in memory until the epoch ends.
        batches = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["total"]
        batches["processed"] = batches["completed"]
        batches["ready"] = batches["started"] = batches["completed"] + int(self._before_validation)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the model if it is the best so far, and ``last.ckpt``."""
        if not _is_part_of_training(trainer) or is_fast_dev_run(trainer):
            return
        keep_measured_buffers(trainer, pl_module)
        before = self.best_model_score
        score = None if self._selection is None else self._selection.score(trainer.callback_metrics)
        if score is not None and not bool(torch.isfinite(score)):
            # ModelCheckpoint would replace NaN by the worst finite value, so that a first NaN would become the best.
            rank_zero_warn(f"{self.monitor} is {float(score)}; this model is not saved as the best")
        elif score is not None and _is_finite(pl_module):
            candidates = {**self._monitor_candidates(trainer), str(self.monitor): score}
            self._save_topk_checkpoint(trainer, candidates)
        better = self.best_model_score is not None and (before is None or bool(self.best_model_score != before))
        if better:
            with averaged_weights(trainer, pl_module):
                self._save_bundle(trainer, pl_module)
        self._save_last(trainer, pl_module)
        self._due = False
        if number := self._signals.agreed(pl_module):
            self._signals.stop(number)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes ``last.ckpt`` if the run has trained since the last write, and restores the signal handlers."""
        super().on_train_end(trainer, pl_module)
        if self._batches_saved != batches_seen(trainer) or ends_with_an_unmeasured_average(trainer):
            self._save_last(trainer, pl_module)
        self._signals.release()
        if self._signals.has_error:  # found in the last batch of the run
            self._signals.stop(self._stop)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restores the signal handlers."""
        super().on_exception(trainer, pl_module, exception)
        self._signals.release()
        if self._signals.stopped:
            # The first process draws and writes more, and Lightning kills processes that end much later than others.
            trainer.strategy.barrier()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the model at the end of a run without a model file, and an average that was never measured.

        A run has no model file if it was never validated, or if it was resumed without its file.

        Raises :class:`UserError` if the weights are not finite; then no model file is written.
        """
        unmeasured = ends_with_an_unmeasured_average(trainer)
        if not trainer.global_step or is_fast_dev_run(trainer):
            return
        # Rank 0 decides for all: the file may be on a disk that other machines do not have.
        missing = trainer.strategy.broadcast(self.bundle_path is None or not Path(self.bundle_path).is_file())
        if not missing and not unmeasured:
            return
        if not _is_finite(pl_module):
            raise UserError(
                "the weights of the model are not finite, or too large for float32 arithmetic, so no model file was "
                "written; lower --model.learning_rate and train again"
            )
        if missing:
            self._save_bundle(trainer, pl_module)
        else:
            self._save_average(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """ModelCheckpoint's state, the path of the model file, and the selection metric."""
        return {**super().state_dict(), "bundle_path": self.bundle_path, "selected_by": self.monitor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the best score so far; the resumed run keeps its own folder."""
        self.bundle_path = state_dict["bundle_path"]
        selected_by = state_dict.get("selected_by", self.monitor)  # version 0.1 did not save it
        if selected_by != self.monitor:
            rank_zero_warn(f"the previous run selected its best model by {selected_by}; the selection starts again")
            return
        self.current_score = state_dict["current_score"]
        super().load_state_dict({**state_dict, "dirpath": self.dirpath})

    def _save_last(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not is_fast_dev_run(trainer) and _is_finite(pl_module):
            assert self.dirpath is not None
            self.last_model_path = str(Path(self.dirpath) / LAST)
            trainer.save_checkpoint(self.last_model_path)
            self._batches_saved = batches_seen(trainer)

    def _save_bundle(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not hasattr(pl_module, "save_bundle"):  # other modules than rlchat's have checkpoints only
            return
        path = Path(self.folder) / pl_module.bundle_name  # type: ignore[operator]
        if trainer.is_global_zero and path.exists() and self.bundle_path != str(path):  # left by an earlier run
            set_aside(path)
        pl_module.save_bundle(path)  # type: ignore[operator]
        self.bundle_path = str(path)

    def _save_average(self, pl_module: L.LightningModule) -> None:
        """Saves the final average of StochasticWeightAveraging next to the validated best model."""
        if not hasattr(pl_module, "save_bundle"):
            return
        best = Path(str(self.bundle_path))
        path = best.with_name(f"{best.stem}_averaged{best.suffix}")
        pl_module.save_bundle(path)  # type: ignore[operator]
        rank_zero_warn(f"{path} is the final average of StochasticWeightAveraging, which has not been validated")


def _require_writable(folder: Path) -> None:
    """Raises :class:`UserError` before the training instead of after hours of training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"best_model.folder {folder}: cannot be written ({error.strerror}); set another folder"
        ) from error


def _is_part_of_training(trainer: L.Trainer) -> bool:
    """Whether a validation is part of a fit, and not the sanity check before it."""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def _validation_follows(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether the run validates after the training batch ``batch_idx`` of its epoch, which is not the epoch's last.

    Lightning has no public method for this, so its rule is repeated with the trainer's public attributes. With
    ``val_check_interval`` as a time, this returns False; then ``last.ckpt`` is written twice in a row.
    """
    epochs = trainer.check_val_every_n_epoch
    if not trainer.enable_validation or not sum(trainer.num_val_batches):
        return False
    if epochs is not None and (trainer.current_epoch + 1) % epochs:
        return False
    if trainer.should_stop:  # EarlyStopping and Timer end the epoch here; what is due is saved at its end
        return True
    interval = trainer.val_check_batch
    if interval is None or interval == float("inf"):
        return False
    done = batches_seen(trainer) if epochs is None else batch_idx + 1
    return done % interval == 0


def _is_finite(module: L.LightningModule) -> bool:
    """Whether the norm of every weight of all processes is finite, in float32 or the weights' wider type; a collective.

    Weights above about 1e19 are finite numbers, but normalization layers square the numbers that they lead to.
    """
    local = (getattr(weight, "to_local", lambda weight=weight: weight)().detach() for weight in module.parameters())
    norms = (
        torch.linalg.vector_norm(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) for weight in local
    )
    return not greatest(module, int(not all(bool(norm.isfinite()) for norm in norms)))
