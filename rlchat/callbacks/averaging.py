"""Lightning's weight averaging callbacks: what was measured is what is saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import lightning as L
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging


@contextmanager
def averaged_weights(trainer: L.Trainer, module: L.LightningModule) -> Iterator[None]:
    """The module with the weights that a validation measures: the average where a ``WeightAveraging`` is used.

    The hooks of a validation's beginning and end swap the weights, and there are no other public ones.
    """
    with ExitStack() as stack:
        for callback in _averaging(trainer):
            callback.on_validation_epoch_start(trainer, module)
            stack.callback(callback.on_validation_epoch_end, trainer, module)
        yield


def keep_measured_buffers(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Gives the averaged model the buffers that its validation has computed, such as the mean of all scores.

    Lightning swaps the weights back before the module computes them, so they are in the model that is trained. Call it
    after each validation.
    """
    if not _averaging(trainer):
        return
    measured = [buffer.clone() for buffer in module.buffers()]
    with averaged_weights(trainer, module), torch.no_grad():
        for buffer, value in zip(module.buffers(), measured, strict=True):
            buffer.copy_(value)


def ends_with_an_unmeasured_average(trainer: L.Trainer) -> bool:
    """Whether the weights at the end of the run are an average that no validation has measured."""
    return any(isinstance(callback, StochasticWeightAveraging) for callback in _all_callbacks(trainer))


def _averaging(trainer: L.Trainer) -> list[WeightAveraging]:
    return [callback for callback in _all_callbacks(trainer) if isinstance(callback, WeightAveraging)]


def _all_callbacks(trainer: L.Trainer) -> list[L.Callback]:
    return list(getattr(trainer, "callbacks", []))
