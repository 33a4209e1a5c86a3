"""Rejects trainer options that the stages do not support; the errors name alternatives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlchat.errors import UserError
from rlchat.ppo.config import refuse_max_steps

_CALLBACKS = "lightning.pytorch.callbacks"

# Callbacks that change Lightning's optimization, which PPO does not use, and their alternatives.
_NOT_FOR_PPO = {
    "GradientAccumulationScheduler": "set --model.micro_batch_size instead",
    "StochasticWeightAveraging": f"use {_CALLBACKS}.EMAWeightAveraging or WeightAveraging instead",
    "LearningRateFinder": "set --model.learning_rate, and compare short runs",
    "SpikeDetection": "steps that are not finite are skipped in any case, and the alarms watch the rest",
    "BatchSizeFinder": "set --data.batch_size, and --model.micro_batch_size to bound memory",
}


def check_trainer(options: Mapping[str, Any]) -> None:
    """Raises :class:`UserError` for trainer options that no stage supports."""
    if options.get("enable_checkpointing") is False:
        raise UserError(
            "trainer.enable_checkpointing false is not supported, because each run saves its best model; set "
            "--best_model.folder to write it elsewhere, or --trainer.fast_dev_run 1 for a run that writes nothing"
        )
    if options.get("barebones"):
        raise UserError(
            "trainer.barebones is not supported, because each run saves its best model and logs its metrics; for a "
            "run without logs set --trainer.logger false and --trainer.enable_progress_bar false"
        )
    for name, init_args in _callbacks(options):
        if name == "Timer" and init_args.get("duration") is None:
            raise UserError(
                "trainer.callbacks: Timer has no duration; set one with --trainer.callbacks.duration 00:12:00:00 "
                "(days:hours:minutes:seconds), or set --trainer.max_time"
            )
        if name == "BackboneFinetuning":
            raise UserError(
                "trainer.callbacks: BackboneFinetuning is not supported, because the head of a chat model is part of "
                "its backbone; set --model.warmup and a lower --model.learning_rate instead"
            )


def check_trainer_for_ppo(options: Mapping[str, Any]) -> None:
    """Raises :class:`UserError` for trainer options that Lightning does not support with manual optimization."""
    if options.get("gradient_clip_val"):
        raise UserError("trainer.gradient_clip_val is not supported by PPO; set --model.max_grad_norm instead")
    refuse_max_steps(options.get("max_steps") or -1)
    if (options.get("accumulate_grad_batches") or 1) > 1:
        raise UserError("trainer.accumulate_grad_batches is not supported by PPO; set --model.micro_batch_size instead")
    for name, _ in _callbacks(options):
        if name in _NOT_FOR_PPO:
            raise UserError(f"trainer.callbacks: {name} is not supported by PPO; {_NOT_FOR_PPO[name]}")


def check_checkpoint_keyword(wanted: str) -> None:
    """Raises :class:`UserError` for Lightning's keywords for ``--ckpt_path`` other than ``best`` and ``last``."""
    if wanted == "hpc":
        raise UserError(
            "ckpt_path hpc is not supported: rlchat writes last.ckpt when SLURM sends SIGTERM; set --ckpt_path last"
        )
    if wanted.partition(":")[0] == "registry":
        raise UserError("ckpt_path registry is not supported; set --ckpt_path to best, last or a file")


def _callbacks(options: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The class name and the arguments of each callback in ``trainer.callbacks``."""
    value = options.get("callbacks") or []
    found = []
    for callback in value if isinstance(value, list) else [value]:
        class_path = callback.get("class_path") if hasattr(callback, "get") else None
        if class_path is not None:
            found.append((str(class_path).rpartition(".")[2], callback.get("init_args") or {}))
    return found
