"""Means over a validation or test, on all processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from rlchat.distributed.collectives import gather_objects


class Tally:
    """Means over all values of an evaluation, on all processes. Each value has the same weight, whatever its batch.

    A mean that includes a NaN is NaN, so that the NaN is visible and the model is never selected as the best.
    """

    def __init__(self) -> None:
        self._means: dict[str, MeanMetric] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Counts every number in ``values`` (any shape). Without numbers, there is no mean."""
        if not values.numel():
            return
        if name not in self._means:
            self._means[name] = _mean().to(values.device)
        self._means[name].update(values.detach().float().to(self._means[name].device))

    def means(self, device: torch.device) -> dict[str, float]:
        """The means by name, over every process, and empties the tally. ``nll`` becomes ``perplexity`` = exp(nll).

        A collective: every process must call it, even without values.
        """
        names = sorted({name for names in gather_objects(list(self._means)) for name in names})
        result: dict[str, float] = {}
        for name in names:
            metric = self._means.get(name) or _mean()
            result[name] = float(metric.to(device).compute())
        self._means.clear()
        if "nll" in result:
            result["perplexity"] = float(torch.tensor(result.pop("nll"), dtype=torch.float64).exp())
        return result


def _mean() -> MeanMetric:
    return MeanMetric(nan_strategy="disable")  # the other strategies drop NaN, or raise without saying which metric
