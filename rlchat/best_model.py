"""Keeps the best model of a run, and the last state that a run can go on from."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from rlchat.errors import UserError
from rlchat.files import set_aside

LAST = "last.ckpt"
BEST = "best.ckpt"
_STOPPED = "stopped, and nothing is lost; go on with `rlchat fit --ckpt_path last`"


class BestModel(ModelCheckpoint):
    """Saves the best model on held-out conversations, as a bundle to use and as a checkpoint to go on from.

    Each time the module's ``monitor`` (PPO: ``val/reward``) is better than before, ``folder/<bundle_name>`` becomes the
    model of that moment, beside Lightning's ``best.ckpt`` in the run's own folder; a bundle that an earlier run left
    there is first set aside under its date. ``last.ckpt`` is written every ``save_last_every`` batches and after each
    validation, so that an interrupted run goes on with ``--ckpt_path last``. Ctrl-C lets the batch come to its end and
    writes ``last.ckpt`` then, so that nothing is lost; a second one stops at once. Without validation, the bundle is
    the model at the end.

    Args:
        folder: where the bundles go.
        save_last_every: training batches between two writes of ``last.ckpt``; 0: after validations only.
    """

    def __init__(self, folder: str = "checkpoints", save_last_every: int = 25) -> None:
        super().__init__(filename="best", save_top_k=1, save_on_train_epoch_end=False, enable_version_counter=False)
        self.folder = folder
        self.save_last_every = save_last_every
        self.bundle_path: str | None = None
        """Where this run has written its bundle; None before the first."""
        self._stopping = self._may_stop = False  # Ctrl-C came; and what the run has come to since then is saved
        self._handler_before: Any = None

    @property
    def state_key(self) -> str:
        """One key whatever the options, so that a resumed run with others finds its state."""
        return "rlchat.BestModel"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Takes over what the module wants to be judged by. Raises :class:`UserError` for a folder that takes none."""
        if stage == "fit" and not _is_rehearsal(trainer):
            _require_writable(Path(self.folder))
        self.monitor, self.mode = pl_module.monitor  # type: ignore[misc]
        if self.best_model_score is None:
            self.kth_value = torch.tensor(-torch.inf if self.mode == "max" else torch.inf)
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes charge of Ctrl-C."""
        super().on_train_start(trainer, pl_module)
        self._stopping = self._may_stop = False
        # Several processes get it in different batches, and would wait for each other: they stop as Lightning does.
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._handler_before = signal.signal(signal.SIGINT, self._stop_soon)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes ``last.ckpt`` every so often, and before the run is stopped."""
        # ModelCheckpoint's own every_n_train_steps counts optimizer steps, of which PPO takes several a batch.
        done = trainer.fit_loop.total_batch_idx + 1
        stopping = self._stopping
        if stopping or trainer.received_sigterm or (self.save_last_every and done % self.save_last_every == 0):
            self._save_last(trainer)
        self._may_stop = stopping

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stops where the batch before is saved; by now its metrics are logged as well."""
        if self._may_stop:
            raise KeyboardInterrupt(_STOPPED)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the best, where this is it, and the last."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or _is_rehearsal(trainer):
            return
        before = self.best_model_score
        if self.monitor in trainer.callback_metrics:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        better = self.best_model_score is not None and (before is None or bool(self.best_model_score != before))
        if better:
            self._save_bundle(trainer, pl_module)
        self._save_last(trainer)
        if self._stopping:
            raise KeyboardInterrupt(_STOPPED)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gives Ctrl-C back."""
        super().on_train_end(trainer, pl_module)
        self._release_interrupts()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Gives Ctrl-C back."""
        super().on_exception(trainer, pl_module, exception)
        self._release_interrupts()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run that was never validated leaves the model that it ended with."""
        if self.bundle_path is None and trainer.global_step and not _is_rehearsal(trainer):
            self._save_bundle(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """ModelCheckpoint's, and where the bundle is."""
        return {**super().state_dict(), "bundle_path": self.bundle_path}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A resumed run has a folder of its own, but the best so far is still the one to beat."""
        self.bundle_path = state_dict["bundle_path"]
        super().load_state_dict({**state_dict, "dirpath": self.dirpath})

    def _stop_soon(self, signum: int, frame: Any) -> None:
        self._release_interrupts()
        self._stopping = True
        print("\nstopping after this batch; Ctrl-C again stops at once", file=sys.stderr)

    def _release_interrupts(self) -> None:
        if self._handler_before is not None:
            signal.signal(signal.SIGINT, self._handler_before)
            self._handler_before = None

    def _save_last(self, trainer: L.Trainer) -> None:
        if not _is_rehearsal(trainer):
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


def _is_rehearsal(trainer: L.Trainer) -> bool:
    """Whether this is ``fast_dev_run``, which leaves nothing behind."""
    return bool(getattr(trainer, "fast_dev_run", False))  # Lightning sets it where type checkers cannot see
