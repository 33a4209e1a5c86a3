"""Counts the verdicts in a feedback file while it grows."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from rlchat.chat.verdicts import JudgedResponse, namesake, verdict_of
from rlchat.data.jsonl import MAX_LINE_BYTES, BadLineError, parse_object
from rlchat.errors import UserError

_TAIL = 64  # bytes before the place that was read to; if they differ, the file was replaced or edited


class Tally:
    """The verdicts in the file ``path`` that count, as :func:`rlchat.chat.verdicts.read_verdicts` counts them.

    :meth:`update` reads only what was appended since the last call. A damaged line is counted and skipped. A last
    line without its line break is still being written, and is read later. Only digests are kept in memory.

    Args:
        path: the feedback file. It need not exist yet.
        owns: whether verdicts on responses of the model file with this name count.
        used: digests of verdicts that are not new, see :attr:`digests`.
        model_id: of the model, see :func:`rlchat.models.model_file.identity`; empty: only names are compared.

    Attributes:
        size: bytes that were read: whole lines only.
        bad_lines: lines that are not verdicts.
        others: verdicts on responses of other models, by the name of the model.
    """

    def __init__(self, path: Path, owns: Callable[[str], bool], used: Collection[str] = (), model_id: str = "") -> None:
        self.path = path
        self._model_id = model_id
        self._owns = owns
        self._used = frozenset(used)
        self._stamp: tuple[int, int, int] | None = None  # inode, size and time of the file when it was read
        self._forget()

    @property
    def digests(self) -> frozenset[str]:
        """One per verdict that counts. Two are equal if a client has given the same verdict on the same response."""
        return frozenset(self._digests.values())

    @property
    def total(self) -> int:
        """The number of verdicts that count."""
        return len(self._digests)

    @property
    def new(self) -> int:
        """The number of verdicts that count and were not used."""
        return len(self.digests - self._used)

    def has(self, feedback_id: str) -> bool:
        """Whether the response with this id has a verdict that was not taken back, of whichever model it is."""
        return feedback_id in self._digests or feedback_id in self._other_ids

    def use(self, digests: Collection[str]) -> None:
        """Verdicts with these ``digests`` are no longer new, and all others are."""
        self._used = frozenset(digests)

    def update(self) -> None:
        """Reads what was appended. A file that was replaced or cut is read from its beginning.

        Raises:
            UserError: the file cannot be read.
        """
        try:
            if not self.path.exists():
                self._forget()
                return
            stat = self.path.stat()
            stamp = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if stamp != self._stamp:
                self._read(stat)
                self._stamp = stamp
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror}") from error

    def _forget(self) -> None:
        self.size = self.bad_lines = 0
        self.others: Counter[str] = Counter()
        self._stamp = None
        self._tail = b""
        self._digests: dict[str, str] = {}  # of the feedback id
        self._other_ids: dict[str, str] = {}  # feedback id: name of the model

    def _read(self, stat: os.stat_result) -> None:
        with self.path.open("rb") as file:
            file.seek(max(0, self.size - _TAIL))
            is_other = self._stamp is not None and self._stamp[0] != stat.st_ino
            if is_other or file.read(min(self.size, _TAIL)) != self._tail:
                self._forget()
            file.seek(self.size)
            is_long = False  # whether the line is longer than a line may be
            while piece := file.readline(MAX_LINE_BYTES + 1):
                if piece.endswith(b"\n"):
                    self._take(None if is_long else piece)
                    self.size = file.tell()
                elif len(piece) <= MAX_LINE_BYTES:
                    break
                is_long = not piece.endswith(b"\n")
            file.seek(max(0, self.size - _TAIL))
            self._tail = file.read(min(self.size, _TAIL))
        self.others = Counter(self._other_ids.values())

    def _take(self, line: bytes | None) -> None:
        """One line; None if it is too long."""
        if line is not None and not line.strip():
            return
        try:
            if line is None:
                raise BadLineError("too long")
            verdict = verdict_of(parse_object(line))
        except BadLineError:
            self.bad_lines += 1
            return
        self._digests.pop(verdict.feedback_id, None)
        self._other_ids.pop(verdict.feedback_id, None)
        if verdict.kind == "none":
            return
        has_name = self._owns(verdict.model)
        # The name of a file decides only where an identity is not known, as in `rlchat learn`.
        if verdict.model_id == self._model_id if verdict.model_id and self._model_id else has_name:
            self._digests[verdict.feedback_id] = _digest(verdict)
        else:
            self._other_ids[verdict.feedback_id] = namesake(verdict.model) if has_name else verdict.model


def _digest(verdict: JudgedResponse) -> str:
    parts = "\0".join((verdict.feedback_id, verdict.kind, verdict.correction))
    return hashlib.sha256(parts.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def names_of(others: Mapping[str, int], most: int = 3) -> str:
    """The names of other models, by the number of their verdicts, on one line. Names are text from a file."""
    names = [" ".join(name.split()) for name, _ in sorted(others.items(), key=lambda item: (-item[1], item[0]))]
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])
