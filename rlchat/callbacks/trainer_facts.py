"""What a Trainer knows about its run, by names that say what it is."""

from __future__ import annotations

from lightning.pytorch import Trainer


def batches_seen(trainer: Trainer) -> int:
    """Training batches that the run has begun, over all epochs and resumes.

    ``trainer.global_step`` would count optimizer steps, several a batch where a module optimizes by hand.
    """
    return trainer.fit_loop.total_batch_idx + 1


def is_rehearsal(trainer: Trainer) -> bool:
    """Whether this is ``--trainer.fast_dev_run``, which must leave no trace in the files of real runs."""
    return bool(getattr(trainer, "fast_dev_run", False))  # Lightning sets it where type checkers cannot see
