"""The addresses of clients in a feedback file: digests with a key, which is in a file of its own."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
from pathlib import Path

from rlchat.errors import UserError

_KEY_BYTES = 32


class Addresses:
    """Digests of the addresses that verdicts come from, for the file ``feedback``.

    An address is personal data, and a feedback file is training data that may be shared. There are so few addresses
    that digests without a key could be reversed. The key is in the file ``FEEDBACK.key``, which only its owner can
    read. It is made when it is missing; an address then has another digest than before.

    Raises:
        UserError: the key cannot be read or written.
    """

    def __init__(self, feedback: str | Path) -> None:
        path = Path(feedback)
        path = path.with_name(f"{path.name}.key")
        try:
            self._key = _read(path) or _made(path)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read or written: {error.strerror}; choose another file with --feedback"
            ) from error

    def digest(self, address: str) -> str:
        """16 hexadecimal digits, the same for the same address."""
        return hmac.new(self._key, address.encode(), hashlib.sha256).hexdigest()[:16]


def _read(path: Path) -> bytes:
    """The key; empty if the file is missing, or was not written completely."""
    with contextlib.suppress(FileNotFoundError):
        key = path.read_bytes()
        return key if len(key) == _KEY_BYTES else b""
    return b""


def _made(path: Path) -> bytes:
    """A new key, in a file that nobody else can read at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_bytes(key := secrets.token_bytes(_KEY_BYTES))
    return key
