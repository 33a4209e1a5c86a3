"""Logs rollouts as text and as histograms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rlchat.callbacks.run_state import batches_seen, is_fast_dev_run
from rlchat.distributed.collectives import gather_objects, take_turns
from rlchat.errors import at_least_one
from rlchat.ppo.module import PPOModule
from rlchat.utils.files import append_lines

_LARGEST = 1e19  # still within the bins of TensorBoard's histograms


class RolloutLog(Callback):
    """Logs the responses that PPO trains on, and the distribution of their rewards, KL, values and advantages.

    ``rollouts.jsonl`` in the run's log folder has one line per response: the prompt, the response, why it ended, its
    reward by factor, its KL to the reference model in nats, and the critic's value. TensorBoard shows histograms of
    the same numbers, and of the advantages, under ``rollout/``.

    Args:
        every_n_iterations: log the first rollout, then one every this many PPO iterations.
        max_replies: maximum number of responses written per logged rollout.
    """

    def __init__(self, every_n_iterations: int = 10, max_replies: int = 64) -> None:
        self.every_n_iterations = at_least_one("RolloutLog", "every_n_iterations", every_n_iterations)
        self.max_replies = at_least_one("RolloutLog", "max_replies", max_replies)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        iteration = batches_seen(trainer)
        if not isinstance(pl_module, PPOModule) or (iteration - 1) % self.every_n_iterations:
            return
        seen = pl_module.last_iteration
        assert seen is not None
        advantages = seen.advantages[seen.rollout.response_mask].tolist()
        parts = gather_objects((seen.rollout.rows(seen.factors), advantages))
        log_dir = trainer.log_dir  # a collective, so every process has to call it
        if not trainer.is_global_zero or is_fast_dev_run(trainer):
            return
        rows = take_turns([part for part, _ in parts], pl_module.options.group_size)
        if log_dir is not None:
            path = Path(log_dir, "rollouts.jsonl")
            append_lines(path, ({"iteration": iteration, **row} for row in rows[: self.max_replies]))
        numbers: dict[str, list[float]] = {
            name: [row[name] for row in rows] for name in ("reward", "kl", "value", "tokens")
        }
        numbers |= {f"factor_{name}": [row["factors"][name] for row in rows] for name in seen.factors}
        numbers["advantage"] = [number for _, part in parts for number in part]
        for logger in trainer.loggers:
            add_histogram = getattr(getattr(logger, "experiment", None), "add_histogram", None)
            if add_histogram is not None:
                for name, values in numbers.items():
                    if (drawable := _drawable(values)) is not None:
                        add_histogram(f"rollout/{name}", drawable, iteration)


def _drawable(values: Sequence[float]) -> torch.Tensor | None:
    """The finite ``values``, clipped to the range that TensorBoard can draw; None if there is no finite value.

    TensorBoard's bins end at ±1e20, and it raises an error if no value falls into them.
    """
    numbers = torch.tensor(values, dtype=torch.float64)
    finite = numbers[numbers.isfinite()]
    return finite.clamp(-_LARGEST, _LARGEST) if len(finite) else None
