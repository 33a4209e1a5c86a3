"""Logs all options of a run together with its final metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from rlchat.callbacks.run_state import is_fast_dev_run


class HyperparameterLog(L.Callback):
    """Logs the options that are not among the module's hyperparameters: those of the data and of the reward.

    They go to every logger. At the end of a fit, TensorBoard's tab *HParams* shows all options with the final metrics.

    Args:
        options: plain values: the options of the data module and the reward.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = dict(options)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the options."""
        for logger in trainer.loggers:
            logger.log_hyperparams(self.options)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs all options again, with the final metrics, for TensorBoard's tab *HParams*."""
        if is_fast_dev_run(trainer) or not trainer.is_global_zero:
            return
        final = {name: float(value) for name, value in trainer.callback_metrics.items()}
        metrics = {name: value for name, value in final.items() if name.startswith("val/")} or final
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and metrics:
                logger.log_hyperparams({**pl_module.hparams, **self.options}, metrics, trainer.global_step)


def options_to_log(config: Any) -> dict[str, Any]:
    """The options of the data module and of the reward in the parsed configuration, as plain values."""
    plain = config.as_dict() if hasattr(config, "as_dict") else dict(config)
    found: dict[str, Any] = {"data": plain["data"]} if plain.get("data") else {}
    model = (plain.get("model") or {}).get("init_args") or {}
    if model.get("reward"):
        found["reward"] = {
            factor["class_path"].rpartition(".")[2] + _number(index, model["reward"]): factor.get("init_args") or {}
            for index, factor in enumerate(_factors(model["reward"]))
        }
    return found


def _factors(reward: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    factors = (reward.get("init_args") or {}).get("factors") or []
    return [factor for factor in factors if isinstance(factor, Mapping) and "class_path" in factor]


def _number(index: int, reward: Mapping[str, Any]) -> str:
    """A suffix that distinguishes factors of the same class: none for the first, then _2, _3, …"""
    factors = _factors(reward)
    same = sum(factor["class_path"] == factors[index]["class_path"] for factor in factors[: index + 1])
    return "" if same == 1 else f"_{same}"
