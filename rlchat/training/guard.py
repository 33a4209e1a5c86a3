"""The guard against losses and gradients that are not finite: skip the step, count it, stop after three in a row."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from rlchat.distributed.collectives import whole

_log = logging.getLogger("rlchat")


class NonFiniteGuard:
    """Finds non-finite losses and gradients, and counts the optimizer steps skipped because of them.

    For each optimizer step call :meth:`check_losses`, then :meth:`check_gradients` where the gradients are unscaled,
    then :meth:`count`.
    """

    MOST_IN_A_ROW = 3
    """The run stops after this number of skipped steps in a row."""

    def __init__(self) -> None:
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.culprit: str | None = None
        """The name of the loss or gradient that is not finite in the present step; None if all are finite."""

    @property
    def must_stop(self) -> bool:
        """Whether the run should stop."""
        return self.skipped_in_a_row >= self.MOST_IN_A_ROW

    def check_losses(self, losses: Mapping[str, float]) -> None:
        """Starts a new step, whose ``losses`` and metrics are summed over all processes."""
        self.culprit = next((name for name, value in losses.items() if not math.isfinite(value)), None)

    def check_gradients(self, gradients: Mapping[str, Tensor], norm: float) -> None:
        """Looks for a gradient that is not finite, if their total ``norm`` is not."""
        if self.culprit is None and not math.isfinite(norm):
            broken = (name for name, gradient in gradients.items() if not whole(gradient).isfinite().all())
            self.culprit = f"the gradient of {next(broken, 'all weights together')}"

    def clip_or_drop(self, parameters: Iterable[Tensor], max_norm: float, norm: Tensor) -> None:
        """Clips the gradients to ``max_norm``; in a step that is not finite, drops them, so that it changes nothing."""
        parameters = list(parameters)
        if self.culprit is None:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
            return
        for parameter in parameters:
            parameter.grad = None

    def count(self, place: str, log: bool) -> None:
        """Ends the step: counts it if it was skipped, and logs a warning that names ``place``."""
        if self.culprit is None:
            self.skipped_in_a_row = 0
            return
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        if log:
            _log.warning("%s: %s is not finite, so this step was skipped", place, self.culprit)
