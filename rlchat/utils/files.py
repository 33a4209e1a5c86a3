"""Files that nobody loses: written whole or not at all, and never over what somebody else left."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from rlchat.errors import UserError

_log = logging.getLogger("rlchat")


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """``write`` into a new file beside ``path``, then one rename; on failure nothing is left but what was there.

    Raises :class:`UserError` where the place cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; give a place that can") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)  # mkstemp's own mode lets nobody else read
        Path(name).replace(path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        # torch.save answers a full disk with an error of its archive's, raised while it handled the system's.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError):
            raise UserError(f"{path}: cannot be written: {cause.strerror}; what was there is unharmed") from error
        raise


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds a line of JSON a row to ``path``, in one write. Raises :class:`UserError` where it cannot be written."""
    # A half of a surrogate pair has no UTF-8; its backslash form is what JSON would have it be.
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "backslashreplace")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            file.write(lines)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; give a place that can") from error


def set_aside(path: Path) -> None:
    """Renames what an earlier run left at ``path``, so that nothing is overwritten."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
    older, number = path.with_name(f"{path.stem}.{stamp}{path.suffix}"), 1
    while older.exists():
        older, number = path.with_name(f"{path.stem}.{stamp}-{number}{path.suffix}"), number + 1
    path.rename(older)
    _log.info("%s of an earlier run is now %s", path, older)
