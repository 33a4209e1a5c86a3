"""Atomic writes, appending, reading from the end, and renaming of files that would be overwritten."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from rlchat.errors import UserError

_BLOCK = 1 << 20  # bytes that are read at once
_log = logging.getLogger("rlchat")


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Calls ``write`` with a temporary file in the folder of ``path`` and renames it; on failure ``path`` is unchanged.

    Raises :class:`UserError` if the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; specify a path that can be written") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        give_usual_permissions(Path(name))
        Path(name).replace(path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        # On a full disk, torch.save raises a different error while it handles the system's.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError):
            raise UserError(f"{path}: cannot be written: {cause.strerror}; the existing file is unchanged") from error
        raise


def user_cache() -> Path:
    """rlchat's folder in the user's cache folder, whether it exists or not."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlchat"


def give_usual_permissions(path: Path) -> None:
    """Gives a temporary file or folder, which only its owner can read, the permissions of a new one."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def lines_from_end(path: Path, most: int) -> Iterator[bytes]:
    """The lines of the file ``path`` without their line breaks, the last one first, in its last ``most`` bytes.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        first, rest = max(0, end - most), b""
        while end > first:
            start = max(first, end - _BLOCK)
            file.seek(start)
            rest, *lines = (file.read(end - start) + rest).split(b"\n")
            yield from reversed(lines)
            end = start
        if first == 0:  # else it may be a part of a line
            yield rest


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]], compact: bool = False) -> None:
    """Appends one line of JSON per row to ``path``, in one write. Raises :class:`UserError` if that fails.

    ``compact`` lines have no spaces between fields and numbers.
    """
    separators = (",", ":") if compact else (", ", ": ")
    # A lone surrogate has no UTF-8 encoding; JSON represents it by its backslash escape.
    text = "".join(json.dumps(row, ensure_ascii=False, separators=separators) + "\n" for row in rows)
    lines = text.encode("utf-8", "backslashreplace")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            file.write(lines)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; specify a path that can be written") from error


def set_aside(path: Path) -> None:
    """Renames a file that an earlier run left at ``path``, adding its date, so that it is not overwritten."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
    older, number = path.with_name(f"{path.stem}.{stamp}{path.suffix}"), 1
    while older.exists():
        older, number = path.with_name(f"{path.stem}.{stamp}-{number}{path.suffix}"), number + 1
    path.rename(older)
    _log.info("renamed %s of an earlier run to %s", path, older)
