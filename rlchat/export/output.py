"""Writes a file or a folder completely or not at all, and overwrites only what it is asked to."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlchat.errors import UserError
from rlchat.utils.files import give_usual_permissions


def check_file(path: Path, suffix: str, force: bool) -> None:
    """Raises :class:`UserError` if ``path`` has another suffix, or if it exists and may not be overwritten."""
    if path.suffix != suffix:
        raise UserError(f"{path}: the name of the file must end in {suffix}; use another name")
    if path.is_dir():
        raise UserError(f"{path} is a folder; specify a file")
    if path.exists() and not force:
        raise UserError(f"{path} already exists; use another name, or --force to overwrite it")


def check_folder(path: Path, own: Collection[str], force: bool) -> None:
    """Raises :class:`UserError` if the folder ``path`` may not be replaced.

    An empty folder may be. A folder with files may be if ``force`` is True and all their names are in ``own``, the
    names of files that an export writes.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"{path} is a file; specify a folder")
    if path.resolve() == Path.cwd():
        raise UserError(f"{path} is the current folder; specify a new one")
    found = sorted(entry.name for entry in path.iterdir())
    if found and not force:
        raise UserError(f"{path} already exists and is not empty; use another folder, or --force to replace it")
    if foreign := [name for name in found if name not in own]:
        raise UserError(f"{path} contains {foreign[0]}, which no export writes; use another folder")


@contextmanager
def complete(target: Path) -> Iterator[Path]:
    """A path beside ``target`` to write a file or a folder to; it replaces ``target`` when the block ends.

    If the block fails, ``target`` is unchanged. Raises :class:`UserError` for errors of the file system.
    """
    holder = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        new = holder / target.name
        yield new
        _finish(new)
        if target.is_dir():
            target.rename(holder / "old")
        new.replace(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}; specify another path") from error
    finally:
        if holder is not None:
            _restore(holder / "old", target)
            shutil.rmtree(holder, ignore_errors=True)


def _restore(old: Path, target: Path) -> None:
    """Puts a folder back that was moved away, unless the new one took its place."""
    if old.exists() and not target.exists():
        old.rename(target)


def _finish(new: Path) -> None:
    """Flushes all files to the disk and gives them the usual permissions."""
    for path in [new, *new.rglob("*")] if new.is_dir() else [new]:
        give_usual_permissions(path)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
