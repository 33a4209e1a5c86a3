"""Guards against non-finite losses and gradients: skips the step, counts it, stops the run after three in a row."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from rlchat.distributed.collectives import whole

_log = logging.getLogger("rlchat")

# Pinned memory cannot be swapped out, so larger copies go to ordinary memory.
_MOST_PINNED = 4 * 2**30


class NonFiniteGuard:
    """Finds non-finite losses and gradients, and counts the optimizer steps skipped because of them.

    For each optimizer step call :meth:`check_losses` (once per microbatch), then :meth:`check_gradients` where the
    gradients are unscaled, then :meth:`count`.
    """

    MOST_IN_A_ROW = 3
    """The run stops after this many consecutive skipped steps."""

    def __init__(self) -> None:
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.culprit: str | None = None
        """The name of the loss or gradient that is not finite in the current step; None if all are finite."""
        self.last_culprit: str | None = None
        """The culprit of the last skipped step."""

    @property
    def must_stop(self) -> bool:
        """Whether the run should stop."""
        return self.skipped_in_a_row >= self.MOST_IN_A_ROW

    def check_losses(self, losses: Mapping[str, float]) -> None:
        """Looks for a loss or metric that is not finite. ``losses`` are summed over all processes."""
        if self.culprit is None:
            self.culprit = next((name for name, value in losses.items() if not math.isfinite(value)), None)

    def check_gradients(self, gradients: Mapping[str, Tensor], norm: float) -> None:
        """Looks for a gradient that is not finite, if their total ``norm`` is not."""
        if self.culprit is None and not math.isfinite(norm):
            broken = (name for name, gradient in gradients.items() if not whole(gradient).isfinite().all())
            self.culprit = f"the gradient of {next(broken, 'all weights together')}"

    def drop_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Drops the gradients of a step that is not finite, so that the optimizer changes nothing."""
        if self.culprit is not None:
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
        self.last_culprit, self.culprit = self.culprit, None


class LastGoodWeights:
    """A copy on the CPU of the last trained weights that gave finite losses and gradients.

    An optimizer step can corrupt the weights although they stay finite, which only the next losses show. Therefore
    :meth:`remember` is called between a backward pass and the optimizer step, once per iteration. Under FSDP2 each
    process keeps its own shards.
    """

    def __init__(self) -> None:
        self.due = True
        """Whether the next weights that give finite losses and gradients are to be copied."""
        self._good: dict[str, Tensor] = {}

    def remember(self, network: nn.Module, guard: NonFiniteGuard) -> None:
        """Copies the trained weights of ``network``, in the place of those before, if that is due and they are good."""
        if not self.due or guard.culprit is not None:
            return
        weights = {name: local.detach() for name, local in _local_weights(network)}
        pin = sum(x.numel() * x.element_size() for x in weights.values()) <= _MOST_PINNED
        for name, x in weights.items():
            if name not in self._good:
                self._good[name] = torch.empty_like(x, device="cpu", pin_memory=pin and x.is_cuda)
            # A copy from a GPU to pinned memory does not make the program wait.
            self._good[name].copy_(x, non_blocking=pin and x.is_cuda)
        self.due = False

    def restore(self, network: nn.Module) -> None:
        """Copies the remembered weights back; without any, those of ``network`` are the initial ones and stay."""
        with torch.no_grad():
            for name, local in _local_weights(network):
                if name in self._good:
                    local.copy_(self._good[name])


def _local_weights(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, weight in network.named_parameters():
        if weight.requires_grad:
            yield name, getattr(weight, "to_local", lambda weight=weight: weight)()
