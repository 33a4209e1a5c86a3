"""The cache folder: tokenized data and unpacked base models, of which the longest unused are removed."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

LIMIT = 10 * 2**30
"""The most bytes that the folder keeps."""

BASE_MODELS = "base_models"
"""The subfolder of unpacked base models."""

_log = logging.getLogger("rlchat")

_TOKENIZED = re.compile(r"[0-9a-f]{64}\.pt")
_BASE_MODEL = re.compile(r".+-[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or folder of the cache."""

    path: Path
    what: str  # "tokenized data" or "base model"
    size: int  # bytes
    used: float  # when it was written or last read, in seconds since 1970


def entries(folder: Path) -> list[Entry]:
    """The entries of the cache ``folder``, the longest unused first. Other files in it are not listed."""
    found = [(path, "tokenized data") for path in _listed(folder) if _TOKENIZED.fullmatch(path.name)]
    models = _listed(folder / BASE_MODELS)
    found += [(path, "base model") for path in models if _BASE_MODEL.fullmatch(path.name) and path.is_dir()]
    known = []
    for path, what in found:
        with contextlib.suppress(OSError):  # another process may have removed it
            known.append(Entry(path, what, _size(path), path.stat().st_mtime))
    return sorted(known, key=lambda entry: entry.used)


def mark_used(path: Path) -> None:
    """Records that the entry at ``path`` is used now. A folder that cannot be written stays as it is."""
    with contextlib.suppress(OSError):
        os.utime(path)


def prune(folder: Path, limit: int = LIMIT) -> list[Entry]:
    """Removes the longest unused entries until the rest has at most ``limit`` bytes; returns the removed ones.

    The entry that was used last is kept, whatever its size.
    """
    known = entries(folder)
    total = sum(entry.size for entry in known)
    removed = []
    for entry in known[:-1]:
        if total <= limit:
            break
        if _remove(entry.path):
            total -= entry.size
            removed.append(entry)
    return removed


def log_pruned(folder: Path) -> None:
    """Prunes ``folder``, and logs what was removed."""
    if removed := prune(folder):
        size = sum(entry.size for entry in removed) / 1e6
        _log.info("%s: removed %d entries (%.0f MB) that were not used for the longest", folder, len(removed), size)


def clear(folder: Path) -> list[Entry]:
    """Removes all entries of ``folder``; returns those that could be removed."""
    return [entry for entry in entries(folder) if _remove(entry.path)]


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _remove(path: Path) -> bool:
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError:
        return False
    return True
