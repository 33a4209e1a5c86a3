"""Runs that are over or broken off: where they lie, and what their checkpoints are of."""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path
from typing import Any

import torch

from rlchat.callbacks.best_model import BEST, LAST
from rlchat.errors import UserError

LOGS = "lightning_logs"


def newest_run(which: str, stage: str | None = None, folder: Path = Path(LOGS)) -> Path:
    """The ``best`` or ``last`` checkpoint that was written most recently, of ``stage`` or of any.

    Raises :class:`UserError` where no run has left one.
    """
    name = {"best": BEST, "last": LAST}[which]
    found = folder.glob(f"{stage or '*'}/version_*/checkpoints/{name}")
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        raise UserError(f"no {name} under {folder / (stage or '')}; train first with `rlchat fit`, or give a file")
    return newest


def configuration_of(checkpoint: Path) -> Path:
    """The configuration of the run that left ``checkpoint``. Raises :class:`UserError` where it is not beside it."""
    _require(checkpoint)
    config = checkpoint.parent.parent / "config.yaml"
    if not config.is_file():
        raise UserError(f"{checkpoint}: the configuration of its run is not beside it; name one with --config")
    return config


def check_checkpoint(path: Path, module: Any) -> None:
    """Raises :class:`UserError` where ``path`` is no checkpoint of ``module``, the class that is to go on from it."""
    _require(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds something other than tensors and plain values, or is damaged; it was not opened"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: damaged, or no checkpoint; give another, or `best` or `last`") from error
    if not isinstance(content, dict) or "pytorch-lightning_version" not in content:
        raise UserError(
            f"{path}: not the checkpoint of a run, which lie in {LOGS}/<stage>/version_N/checkpoints; a model of "
            f"checkpoints/*.pt is for --model.init_from"
        )
    class_path = content.get("hyper_parameters", {}).get("_class_path")
    if class_path is not None and _imported(class_path) is not module:
        raise UserError(
            f"{path}: a checkpoint of {class_path.rpartition('.')[2]}, and the configuration is for "
            f"{module.__name__}; give the configuration that it was trained with"
        )


def _require(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; give a file, or `best` or `last`")


def _imported(class_path: str) -> Any:
    """The class, or nothing where it cannot be imported any more."""
    module, _, name = class_path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
