"""The cache folder: tokenized data, of which the least recently used is removed, and unpacked base models."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rlchat.errors import UserError
from rlchat.utils.files import user_cache

LIMIT = 10 * 2**30
"""The most bytes of tokenized data that a folder keeps."""

BASE_MODELS = "base_models"
"""The subfolder of unpacked base models in the user's cache folder."""

FILE_HASHES = "file_hashes.json"
"""The file with the hashes of data files; see :mod:`rlchat.data.file_hashes`."""

MARKER = ".rlchat"
"""A file in each unpacked base model. Folders without it are not rlchat's."""

_TOKENIZED = re.compile(r"[0-9a-f]{64}(\.pt)?")  # rlchat 0.1 wrote files, which end in .pt
_UNFINISHED = re.compile(r"\.[0-9a-f]{64}\..+|\.(unpacking|removing)-.+")
_DAY = 24 * 60 * 60

_log = logging.getLogger("rlchat")


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or folder of the cache."""

    path: Path
    what: str  # "tokenized data", "base model", "file hashes", or "unfinished", which a stopped run left
    size: int  # bytes
    used: float  # when it was written or last read, in seconds since 1970


def entries(folder: Path) -> list[Entry]:
    """The entries of the cache ``folder``, the least recently used first. Other files in it are not listed.

    Base models are listed in the user's cache folder only. What another process may still be writing is not listed.

    Raises:
        UserError: the folder cannot be read.
    """
    found = []
    for path, what in _candidates(folder):
        with contextlib.suppress(OSError):  # another process may have removed it
            entry = Entry(path, what, _size(path), path.lstat().st_mtime)
            if what != "unfinished" or entry.used < time.time() - _DAY:
                found.append(entry)
    return sorted(found, key=lambda entry: entry.used)


def mark_used(path: Path) -> None:
    """Records that the entry at ``path`` is used now. A folder that cannot be written stays as it is."""
    with contextlib.suppress(OSError):
        os.utime(path)


def prune(folder: Path) -> list[Entry]:
    """Removes the least recently used tokenized data until at most ``LIMIT`` bytes are left; returns what it removed.

    The data that was used last is kept, whatever its size.
    """
    known = [entry for entry in entries(folder) if entry.what == "tokenized data"]
    total = sum(entry.size for entry in known)
    removed = []
    for entry in known[:-1]:
        if total <= LIMIT:
            break
        if remove(entry.path):
            total -= entry.size
            removed.append(entry)
    if removed:
        size = sum(entry.size for entry in removed) / 1e6
        _log.info("%s: removed the least recently used data (%d entries, %.0f MB)", folder, len(removed), size)
    return removed


def clear(folder: Path) -> list[Entry]:
    """Removes all entries of ``folder``; returns those that could be removed. Raises UserError as :func:`entries`."""
    return [entry for entry in entries(folder) if remove(entry.path)]


def _candidates(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in _listed(folder):
        if _TOKENIZED.fullmatch(path.name) and path.is_dir() != bool(path.suffix):
            yield path, "tokenized data"
        elif _UNFINISHED.fullmatch(path.name):
            yield path, "unfinished"
        elif path.name == FILE_HASHES:
            yield path, "file hashes"
    if folder != user_cache():
        return
    for path in _listed(folder / BASE_MODELS):
        if _UNFINISHED.fullmatch(path.name):
            yield path, "unfinished"
        elif (path / MARKER).is_file():
            yield path, "base model"


def _listed(folder: Path) -> list[Path]:
    try:
        return [path for path in sorted(folder.iterdir()) if not path.is_symlink()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(
            f"the cache folder {folder} cannot be read: {error.strerror}; change its permissions"
        ) from error


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def remove(path: Path) -> bool:
    """Removes an entry. Returns False if that fails; then it is complete, or known as unfinished."""
    try:
        if path.is_dir():
            # Renamed first, so that an interrupted removal leaves no folder that looks complete.
            doomed = path.with_name(f".removing-{path.name.removeprefix('.removing-')}")
            path.rename(doomed)
            shutil.rmtree(doomed)
        else:
            path.unlink()
    except OSError:
        return False
    return True
