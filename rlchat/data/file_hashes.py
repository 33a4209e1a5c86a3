"""Hashes of data files. They are remembered, so that a file that has not changed is not read again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlchat.data.sources import DataFile, cannot_read
from rlchat.errors import UserError
from rlchat.utils.cache_folder import FILE_HASHES
from rlchat.utils.files import write_atomically

# A file that changed so recently may change again without another time: file systems count in steps of up to 2 s.
_SETTLED_SECONDS = 2.0
_MOST_REMEMBERED = 1000


def hashes_of(files: Sequence[DataFile], folder: Path) -> list[bytes]:
    """The SHA-256 of each file's bytes; ``folder`` keeps those of unchanged files.

    A file is unchanged if its path, device, inode, size, and times of modification and of status change are. No program
    can set the last one, so a file that was overwritten and got its old modification time back is noticed.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    remembered = _remembered(folder)
    known = dict(remembered)
    hashes = []
    for file in files:
        try:
            name, before = str(file.path.absolute()), _identity(file.path)
            content = _hash_in(known.get(name), before)
            if content is None:
                content = _hash(file.path)
                if _identity(file.path) == before and _changed(before) < time.time() - _SETTLED_SECONDS:
                    known.pop(name, None)  # so that it becomes the last
                    known[name] = [before, content.hex()]
        except FileNotFoundError:
            raise UserError(f"no such data file: {file}; pass a file with --data.path FILE") from None
        except (OSError, ValueError) as error:
            raise cannot_read(file, error) from None
        hashes.append(content)
    if known != remembered:
        latest = dict(list(known.items())[-_MOST_REMEMBERED:])
        with contextlib.suppress(UserError):  # without it, the next start only takes longer
            write_atomically(folder / FILE_HASHES, lambda opened: opened.write(json.dumps(latest).encode()))
    return hashes


def _remembered(folder: Path) -> dict[str, Any]:
    try:
        known = json.loads((folder / FILE_HASHES).read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _hash_in(entry: Any, identity: list[int]) -> bytes | None:
    """The hash in ``entry`` if it is that of a file with ``identity``."""
    if not isinstance(entry, list) or len(entry) != 2 or entry[0] != identity:
        return None
    try:
        content = bytes.fromhex(entry[1])
    except (TypeError, ValueError):
        return None
    return content if len(content) == hashlib.sha256().digest_size else None


def _identity(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _changed(identity: list[int]) -> float:
    """When a file with ``identity`` was last changed, in seconds since 1970."""
    return max(identity[3:]) / 1e9


def _hash(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.digest()
