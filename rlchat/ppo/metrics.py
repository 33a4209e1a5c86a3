"""The metrics that PPO logs after each iteration, over all processes."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlchat.distributed.collectives import gather_objects
from rlchat.ppo.advantages import Reduce
from rlchat.training.base import StageModule

if TYPE_CHECKING:
    from rlchat.ppo.module import Iteration, PPOModule


class Stopwatch:
    """Measures the time of each part of an iteration, in seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Ends the part ``name``; the next one starts."""
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


def mean_of_steps(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the optimizer steps that were not skipped; residuals are those of the first of them.

    A step with a value that is not finite was skipped.
    """
    taken = [step for step in steps if all(map(math.isfinite, step.values()))]
    means = {name: sum(step[name] for step in taken) / len(taken) for name in steps[0] if taken}
    # A skipped step changes no weights, so what holds in the first step holds in the first that was taken.
    first = (taken or steps)[0]
    residuals = {name: value for name, value in first.items() if name.endswith("_residual")}
    return {**means, **residuals, "optimizer_steps": float(len(taken))}


def global_mean(module: StageModule, values: Tensor) -> float:
    """Mean of ``values`` [N] over the rows of all processes, whose N may differ."""
    total = torch.stack(
        [values.float().sum().to(module.device), torch.tensor(float(len(values)), device=module.device)]
    )
    total = module.global_sum(total)
    return float(total[0] / total[1])


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, reduce: Reduce) -> float:
    """``1 - Var(returns - values) / Var(returns)`` over the mask [B, R]; 0 if the returns do not vary."""
    count = reduce(mask.sum()).clamp(min=1)

    def variance(x: Tensor) -> float:
        mean = reduce((x * mask).sum()) / count
        return float(reduce(((x - mean) ** 2 * mask).sum()) / count)

    total, unexplained = variance(returns), variance(returns - values)
    return 1 - unexplained / total if total > 1e-8 else 0.0


def iteration_metrics(module: PPOModule, iteration: Iteration, update: dict[str, float]) -> dict[str, float]:
    """All metrics under ``train/``: those of ``update``, and those of the rollout. A collective."""
    rollout, mask = iteration.rollout, iteration.rollout.response_mask
    tokens = module.global_sum(mask.sum()).clamp(min=1)
    texts = [text for part in gather_objects([reply.text for reply in rollout.replies]) for text in part]
    sampling_residual = ((rollout.sampling_logprobs - rollout.old_logprobs).exp() - 1).abs()[mask].sum()
    metrics = {
        **update,
        "reward": global_mean(module, iteration.scores),
        "kl": global_mean(module, rollout.kl),
        "sampling_residual": float(module.global_sum(sampling_residual) / tokens),
        "response_length": global_mean(module, torch.tensor([reply.tokens for reply in rollout.replies])),
        "truncated_fraction": global_mean(module, torch.tensor([not reply.ended for reply in rollout.replies])),
        "distinct_replies": len(set(texts)) / len(texts),
        "skipped_steps": float(module.guard.skipped_steps),
        "kl_coef": module.kl_coef,
        "learning_rate": module.current_learning_rate(),
        "episodes": float(module.episodes),
    }
    if module.critic_kind != "none":
        metrics["explained_variance"] = explained_variance(
            rollout.values, iteration.returns, mask, reduce=module.global_sum
        )
    return metrics
