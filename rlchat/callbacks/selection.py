"""Which validation metric selects the best model of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rlchat.errors import UserError

REWARD_MINUS_KL = "reward-kl"
"""The name of the selection by ``val/reward`` − β · ``val/kl``, the objective that PPO maximizes."""

# Lower values are better for metrics with these names.
_LOWER_IS_BETTER = ("loss", "perplexity", "nll", "kl", "error", "truncated_fraction")


@dataclass(frozen=True, slots=True)
class Selection:
    """Computes the score of a validation; the best model has the largest or the smallest score."""

    metric: str
    """A metric such as ``val/reward``, or :data:`REWARD_MINUS_KL`."""
    mode: Literal["max", "min"]
    kl_coef: float = 0.0
    """β of :data:`REWARD_MINUS_KL`, per nat per response."""
    required: bool = False
    """Whether the user asked for this metric, so that its absence is an error."""

    def score(self, metrics: Mapping[str, Tensor]) -> Tensor | None:
        """The score of a validation with ``metrics``; None if the metric is absent.

        Raises :class:`UserError` for an absent metric that the user asked for.
        """
        needed = ("val/reward", "val/kl") if self.metric == REWARD_MINUS_KL else (self.metric,)
        missing = [name for name in needed if name not in metrics]
        if missing and self.required:
            present = sorted(name for name in metrics if name.startswith("val/"))
            raise UserError(
                f"best_model.select_by {self.metric}: this stage does not log {missing[0]}; "
                + (f"it logs {', '.join(present)}" if present else "it logs no validation metric")
            )
        if missing:
            return None
        if self.metric == REWARD_MINUS_KL:
            return torch.as_tensor(metrics["val/reward"] - self.kl_coef * metrics["val/kl"])
        return metrics[self.metric]


def selection_of(select_by: str | None, kl_weight: float | None, module: Any) -> Selection | None:
    """The selection according to the options: by default the module's ``monitor``; None if it has none.

    Args:
        select_by: a metric such as ``val/answer_accuracy``, :data:`REWARD_MINUS_KL`, or None.
        kl_weight: β; None uses the ``kl_coef`` of the module.
        module: the LightningModule that is trained.
    """
    if select_by is None:
        monitor = getattr(module, "monitor", None)
        return None if monitor is None else Selection(*monitor)
    if select_by == REWARD_MINUS_KL:
        options = getattr(module, "options", None)
        beta = getattr(options, "kl_coef", 0.0) if kl_weight is None else kl_weight
        return Selection(REWARD_MINUS_KL, "max", float(beta), required=True)
    lower = select_by.endswith(_LOWER_IS_BETTER)
    return Selection(select_by, "min" if lower else "max", required=True)
