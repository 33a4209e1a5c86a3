"""`--data my.DataModule`: the user's data module instead of rlchat's."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import yaml

from rlchat.cli.option_errors import imported_class
from rlchat.data.batches import JudgedBatch, PreferenceBatch, PromptBatch, RankedBatch, SequenceBatch
from rlchat.data.datamodule import OASST2DataModule
from rlchat.errors import UserError
from rlchat.training.base import StageModule

_log = logging.getLogger("rlchat")

_BATCHES = {
    "sft": (SequenceBatch,),
    "reward": (RankedBatch,),
    "dpo": (PreferenceBatch, JudgedBatch, SequenceBatch),
    "ppo": (PromptBatch, SequenceBatch),
}


def with_data_class(argv: Sequence[str], scratch: Path) -> tuple[list[str], type[L.LightningDataModule] | None]:
    """``argv`` for the data module that it specifies, and its class; None for rlchat's data module.

    The class comes from ``--data CLASS`` or from ``data.class_path`` in a configuration; the last one is used. Options
    of the data in configurations that specify no class are those of :class:`OASST2DataModule`: a subclass gets them
    too, and other classes do not. Changed configurations are written to ``scratch``.

    Raises :class:`UserError` if the class is not the import path of a LightningDataModule.
    """
    words, chosen, place = _without_class(argv)
    configs = [index for index, word in enumerate(words) if index and words[index - 1] == "--config"]
    contents = {index: yaml.safe_load(Path(words[index]).read_text(encoding="utf-8")) for index in configs}
    for content in contents.values():
        if chosen is None:
            chosen, place = _class_path(content.get("data")), "data.class_path"
    if chosen is None:
        return list(argv), None
    found = imported_class(place, chosen, L.LightningDataModule)
    if not isinstance(found, type):
        raise found
    if found is OASST2DataModule and all(_class_path(content.get("data")) is None for content in contents.values()):
        return words, None
    for index, content in contents.items():
        content["data"] = {"class_path": chosen, "init_args": _arguments(content.get("data"), found, chosen)}
        path = scratch / f"{index}.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        words[index] = str(path)
    return [*words[:1], f"--data={chosen}", *words[1:]], found


def _without_class(argv: Sequence[str]) -> tuple[list[str], str | None, str]:
    """``argv`` without the flags that specify a class, that class or None, and the flag."""
    words, chosen, place = [], None, "--data"
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if flag in ("--data", "--data.class_path") and (equals or (rest and not rest[0].startswith("--"))):
            chosen, place = value if equals else rest.pop(0), flag
        else:
            words.append(word)
    return words, chosen, place


def _class_path(data: Any) -> str | None:
    return data if isinstance(data, str) else data.get("class_path") if isinstance(data, dict) else None


def _arguments(data: Any, found: type, chosen: str) -> dict[str, Any]:
    """The options in ``data``, the section of a configuration, that are options of the class ``found``."""
    if not isinstance(data, dict):
        return {}
    if "class_path" in data:
        return dict(data.get("init_args") or {}) if data["class_path"] == chosen else {}
    if issubclass(found, OASST2DataModule):
        return dict(data)
    _log.info(
        "%s replaces rlchat's data module, so these options of the recipe are ignored: %s", chosen, ", ".join(data)
    )
    return {}


def check_data_needs(module: type, data: type[L.LightningDataModule]) -> None:
    """Raises :class:`UserError` for a module without ``data_needs`` if the data module is rlchat's."""
    if issubclass(data, OASST2DataModule) and not hasattr(module, "data_needs"):
        raise UserError(
            f"{module.__name__} has no data_needs attribute, which rlchat's data module requires; derive it "
            f"from rlchat.SFTModule, RewardModelModule, DPOModule or PPOModule, or set --data to your own data module"
        )


class BatchCheck(L.Callback):
    """Checks that the user's data module returns the batches that the stage expects."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Raises :class:`UserError` for a batch of another type."""
        _check_batch(pl_module, batch)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """As in training."""
        _check_batch(pl_module, batch)

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """As in training."""
        _check_batch(pl_module, batch)

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """As in training."""
        _check_batch(pl_module, batch)


def _check_batch(module: L.LightningModule, batch: Any) -> None:
    if not isinstance(module, StageModule):
        return
    expected = _BATCHES[module.data_needs.task]
    if not isinstance(batch, expected):
        raise UserError(
            f"the data module returns batches of type {type(batch).__name__}, but {type(module).__name__} expects "
            f"rlchat.data.batches.{expected[0].__name__}; derive your data module from rlchat.OASST2DataModule, or "
            f"change --model"
        )
