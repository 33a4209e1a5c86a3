"""Support for Lightning's weight averaging callbacks: the weights that were validated are saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import lightning as L
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging


@contextmanager
def averaged_weights(trainer: L.Trainer, module: L.LightningModule) -> Iterator[None]:
    """A context in which the module has the weights that are validated: the average if a ``WeightAveraging`` is used.

    The hooks at the beginning and the end of a validation swap the weights; there are no other public hooks.
    """
    with ExitStack() as stack:
        for callback in _averaging(trainer):
            callback.on_validation_epoch_start(trainer, module)
            stack.callback(callback.on_validation_epoch_end, trainer, module)
        yield


def keep_measured_buffers(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Copies buffers that a validation has computed (for example the mean of all scores) to the averaged model.

    Lightning swaps the weights back before the module computes them, so they are in the trained model. Call it
    after each validation.
    """
    if not _averaging(trainer):
        return
    measured = [buffer.clone() for buffer in module.buffers()]
    with averaged_weights(trainer, module), torch.no_grad():
        for buffer, value in zip(module.buffers(), measured, strict=True):
            buffer.copy_(value)


def ends_with_an_unmeasured_average(trainer: L.Trainer) -> bool:
    """Whether the weights at the end of the run are an average that has not been validated."""
    return any(isinstance(callback, StochasticWeightAveraging) for callback in _all_callbacks(trainer))


def _averaging(trainer: L.Trainer) -> list[WeightAveraging]:
    return [callback for callback in _all_callbacks(trainer) if isinstance(callback, WeightAveraging)]


def _all_callbacks(trainer: L.Trainer) -> list[L.Callback]:
    return list(getattr(trainer, "callbacks", []))
