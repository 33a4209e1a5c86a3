"""Lightning callbacks: best model, sampled responses, statistics plot, alarms, rollout log, predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlchat.utils.imports import lazy_exports

if TYPE_CHECKING:
    from rlchat.callbacks.alarms import Alarms as Alarms
    from rlchat.callbacks.best_model import BestModel as BestModel
    from rlchat.callbacks.predictions import Predictions as Predictions
    from rlchat.callbacks.rollout_log import RolloutLog as RolloutLog
    from rlchat.callbacks.samples import SampleResponses as SampleResponses
    from rlchat.callbacks.stats_plot import StatsPlot as StatsPlot

__all__ = [
    "Alarms",
    "BestModel",
    "Predictions",
    "RolloutLog",
    "SampleResponses",
    "StatsPlot",
]
__getattr__ = lazy_exports(
    __name__,
    {
        "Alarms": "rlchat.callbacks.alarms",
        "BestModel": "rlchat.callbacks.best_model",
        "Predictions": "rlchat.callbacks.predictions",
        "RolloutLog": "rlchat.callbacks.rollout_log",
        "SampleResponses": "rlchat.callbacks.samples",
        "StatsPlot": "rlchat.callbacks.stats_plot",
    },
)
