"""The state of a run, read from its Trainer."""

from __future__ import annotations

from lightning.pytorch import Trainer


def batches_seen(trainer: Trainer) -> int:
    """The number of training batches that the run has begun, over all epochs and resumes.

    ``trainer.global_step`` counts optimizer steps instead; with manual optimization, there are several per batch.
    """
    return trainer.fit_loop.total_batch_idx + 1


def is_fast_dev_run(trainer: Trainer) -> bool:
    """Whether the run is ``--trainer.fast_dev_run``, which must not change the files of real runs."""
    return bool(getattr(trainer, "fast_dev_run", False))  # set by Lightning in a way that type checkers do not see
