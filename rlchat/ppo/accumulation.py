"""Gradients of one minibatch, accumulated over its microbatches and averaged over all processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from rlchat.training.base import StageModule

LossAndMetrics = tuple[Tensor, dict[str, Tensor]]


def accumulate_gradients(module: StageModule, losses: Sequence[Callable[[], LossAndMetrics]]) -> dict[str, float]:
    """Adds the gradient of the sum of ``losses`` to the parameters; returns the sums of their metrics. A collective.

    Each function computes a loss and its metrics, already divided by the number of tokens per process (global
    tokens / processes). DDP and FSDP2 average gradients over processes, so the result is the gradient of the global
    mean.

    Processes exchange gradients once, with the last loss, which must depend on every parameter.
    """
    totals: dict[str, Tensor] = {}
    for compute in losses:
        loss, metrics = compute()
        with _gradient_exchange(module, compute is losses[-1]):
            module.manual_backward(loss)
        for name, value in metrics.items():
            totals[name] = totals.get(name, torch.zeros_like(value)) + value
    means = module.global_sum(torch.stack(list(totals.values()))) / module.trainer.world_size
    return dict(zip(totals, means.tolist(), strict=True))


def _gradient_exchange(module: StageModule, on: bool) -> AbstractContextManager[Any]:
    """A context in which backward passes exchange gradients with the other processes if ``on`` is True."""
    block = getattr(module.trainer.strategy, "block_backward_sync", nullcontext)
    return nullcontext() if on else block()
