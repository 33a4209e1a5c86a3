"""Finds and checks the checkpoints of earlier runs."""

from __future__ import annotations

import importlib
import json
import pickle
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch

from rlchat.callbacks.best_model import BEST, LAST, BestModel
from rlchat.callbacks.disk import delete_checkpoints
from rlchat.callbacks.run_state import is_fast_dev_run
from rlchat.errors import UserError
from rlchat.utils.files import write_atomically

LOGS = "lightning_logs"
_PACKAGES = ("rlchat", "torch", "lightning", "transformers", "tiktoken")
_RECORD = Path(LOGS, "checkpoint_folders.json")


class CheckpointRecord(L.Callback):
    """Records the checkpoint folder of each run in ``lightning_logs/checkpoint_folders.json`` of the working directory.

    ``--ckpt_path best`` and ``last`` read this file, so that they find a run with any logger or
    ``default_root_dir``. The checkpoints themselves stay where the logger puts them.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Adds the folder of this run and drops folders that no longer exist."""
        best = next((c for c in trainer.checkpoint_callbacks if isinstance(c, BestModel)), None)
        if best is None or best.dirpath is None or not trainer.is_global_zero or is_fast_dev_run(trainer):
            return
        folders = {stage: [path for path in paths if Path(path).is_dir()] for stage, paths in _recorded().items()}
        mine = folders.setdefault(self.stage, [])
        if str(best.dirpath) not in mine:
            mine.append(str(best.dirpath))
        text = json.dumps(folders, indent=1)
        write_atomically(_RECORD, lambda file: file.write(text.encode()))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Deletes the checkpoints of older runs of this stage if ``best_model.keep_runs`` is set.

        This happens after ``last.ckpt`` of this run is written, because this run may be a continuation of an older one.
        """
        best = next((c for c in trainer.checkpoint_callbacks if isinstance(c, BestModel)), None)
        if best is None or best.keep_runs is None or not trainer.is_global_zero or is_fast_dev_run(trainer):
            return
        older = [Path(path) for path in _recorded().get(self.stage, []) if path != str(best.dirpath)]
        delete_checkpoints(older[: len(older) - (best.keep_runs - 1)], (BEST, LAST))


def record_versions(folder: Path) -> None:
    """Writes ``versions.json``: the versions of Python and of the packages that determine the result of a run."""
    found = {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
    write_atomically(folder / "versions.json", lambda file: file.write(json.dumps(found, indent=1).encode()))


def _recorded() -> dict[str, list[str]]:
    """Stage → checkpoint folders of its runs; empty if no run has been recorded."""
    try:
        return dict(json.loads(_RECORD.read_text(encoding="utf-8")))
    except (OSError, ValueError):  # missing or damaged: the folders of lightning_logs are still searched
        return {}


def newest_run(which: str, stage: str | None = None, folder: Path = Path(LOGS)) -> Path:
    """The ``best`` or ``last`` checkpoint that was written most recently, of ``stage`` or of any stage.

    Raises :class:`UserError` if there is none.
    """
    name = {"best": BEST, "last": LAST}[which]
    folders = [*folder.glob(f"{stage or '*'}/version_*/checkpoints")]
    folders += [Path(path) for known, paths in _recorded().items() if stage in (None, known) for path in paths]
    found = (path for checkpoints in folders if (path := checkpoints / name).is_file())
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        raise UserError(f"no {name} under {folder / (stage or '')}; train first with `rlchat fit`, or specify a file")
    return newest


def configuration_of(checkpoint: Path) -> Path:
    """The configuration file of the run of ``checkpoint``. Raises :class:`UserError` if it is not found."""
    _require(checkpoint)
    config = checkpoint.parent.parent / "config.yaml"
    if not config.is_file():
        raise UserError(f"{checkpoint}: the configuration of its run was not found; set --config")
    return config


def check_checkpoint(path: Path, module: Any) -> None:
    """Raises :class:`UserError` unless ``path`` is a checkpoint of the class ``module``."""
    _require(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: contains something other than tensors and plain values, or is damaged; it was not loaded"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: damaged, or not a checkpoint; specify another, or `best` or `last`") from error
    if not isinstance(content, dict) or "pytorch-lightning_version" not in content:
        raise UserError(
            f"{path}: not a checkpoint; checkpoints are in {LOGS}/<stage>/version_N/checkpoints; pass model files "
            f"(checkpoints/*.pt) with --model.init_from"
        )
    class_path = content.get("hyper_parameters", {}).get("_class_path")
    if class_path is not None and _imported(class_path) is not module:
        raise UserError(
            f"{path}: a checkpoint of {class_path.rpartition('.')[2]}, but the configuration is for "
            f"{module.__name__}; use the configuration that it was trained with"
        )


def _require(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; specify a file, or `best` or `last`")


def _imported(class_path: str) -> Any:
    """The class at ``class_path``, or None if it can no longer be imported."""
    module, _, name = class_path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
