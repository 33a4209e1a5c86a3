"""Disk usage of a run, and the deletion of checkpoints of old runs."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

_log = logging.getLogger("rlchat")

WORTH_A_MESSAGE = 10**9
"""A run that will write more bytes than this prints a message."""


def bytes_of_run(module: nn.Module, checkpoints: int = 2) -> tuple[int, int]:
    """Bytes of one checkpoint and of all files of a run: ``checkpoints`` checkpoints and the model file.

    A checkpoint contains all weights, or the trained ones if the run trains a part of them, and the two moments of
    AdamW of each trained weight. The model file is at most as large as all weights.
    """
    weights = _bytes(module.state_dict().values())
    trained = _bytes(weight for weight in module.parameters() if weight.requires_grad)
    saved = weights if getattr(module, "strict_loading", True) else trained
    return saved + 2 * trained, checkpoints * (saved + 2 * trained) + weights


def announce_size(module: nn.Module, folder: Path) -> None:
    """Logs how much a run will write if it is more than :data:`WORTH_A_MESSAGE`; warns if it does not fit."""
    checkpoint, total = bytes_of_run(module)
    if total <= WORTH_A_MESSAGE:
        return
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents, Path()) if place.exists())).free
    text = (
        f"this run will write up to {total / 1e9:.1f} GB: best.ckpt and last.ckpt with {checkpoint / 1e9:.1f} GB each, "
        f"and the model file; {free / 1e9:.1f} GB are free"
    )
    # While a file is replaced atomically, the old and the new one exist side by side.
    if total + checkpoint > free:
        _log.warning("%s; use another folder, or --best_model.keep_runs 1 to delete checkpoints of old runs", text)
    else:
        _log.info("%s", text)


def delete_checkpoints(folders: Iterable[Path], names: Iterable[str]) -> None:
    """Deletes the files ``names`` in each of ``folders``, and logs each deletion."""
    names = list(names)
    for folder in folders:
        found = [path for name in names if (path := folder / name).is_file()]
        size = sum(path.stat().st_size for path in found)
        for path in found:
            path.unlink(missing_ok=True)
        if found:
            _log.info(
                "deleted %s in %s (%.1f GB), because of best_model.keep_runs",
                " and ".join(path.name for path in found),
                folder,
                size / 1e9,
            )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
