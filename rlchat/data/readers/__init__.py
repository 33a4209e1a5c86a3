"""One module per family of file formats. :class:`Readers` reads a row with the reader that recognises it.

A new format is a module in this folder with a subclass of :class:`rlchat.data.readers.base.Reader`.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections import Counter
from functools import cache
from importlib import import_module
from typing import Any

from rlchat.data.jsonl import BadLineError
from rlchat.data.readers.base import LinkedTree, Reader, ReadOptions, Row
from rlchat.data.readers.fields import LEARN_KEYS, shown, unread_weights

__all__ = ["LinkedTree", "ReadOptions", "Reader", "Readers", "Row", "reader_classes"]

# Keys that usually change the meaning of a row. If a reader does not support one of them, there is a warning.
_MEANINGFUL = frozenset(
    {
        "weight",
        "weights",
        "loss_weight",
        "train",
        "label",
        "labels",
        "loss_mask",
        "mask",
        "rank",
        "score",
        "rating",
        "reward",
        "quality",
        "system",
        "tools",
        "functions",
        "completion",
        "response",
        "answer",
        "output",
        "chosen",
        "rejected",
        "messages",
        "conversations",
    }
)

# Keys whose effect on the training data is reported whenever they occur.
CHOOSING = (*LEARN_KEYS, "label")


@cache
def reader_classes() -> tuple[type[Reader], ...]:
    """The readers of all modules in this folder, in the order in which they are tried."""
    found = set()
    for module in pkgutil.iter_modules(__path__):
        members = vars(import_module(f"{__name__}.{module.name}")).values()
        found |= {c for c in members if inspect.isclass(c) and issubclass(c, Reader) and not inspect.isabstract(c)}
    return tuple(sorted(found, key=lambda c: (-c.priority, -len(c.required), c.name)))


class Readers:
    """Reads rows of all formats, and counts what is left out.

    ``dropped`` counts by reason. ``warnings`` counts rows by warning. ``used`` and ``unread`` count rows by key: keys
    that choose what is trained on, in a row or in its messages, and keys without effect.
    """

    def __init__(self, options: ReadOptions, dropped: Counter[str]) -> None:
        self.dropped = dropped
        self.warnings: Counter[str] = Counter()
        self.used: Counter[str] = Counter(dict.fromkeys(CHOOSING, 0))  # in a fixed order
        self.unread: Counter[str] = Counter()
        self._readers = [reader(options, dropped) for reader in reader_classes()]

    def read(self, row: dict[str, Any]) -> Row:
        """The content of ``row``. Raises :class:`BadLineError` if no reader recognises it or if it is invalid."""
        for reader in self._readers:
            if reader.recognises(row):
                result = reader.read(row)
                self._count(row, reader, result)
                return result
        known = "; ".join(sorted(", ".join(sorted(reader.required)) for reader in self._readers))
        raise BadLineError(f"no known format: it has the keys {shown(list(row))}; expected one of: {known}")

    def linked(self) -> list[LinkedTree]:
        """The trees of rows that are linked to each other. Call it once, after the last row."""
        return [tree for reader in self._readers for tree in reader.linked()]

    def _count(self, row: dict[str, Any], reader: Reader, result: Row) -> None:
        self.warnings.update(result.notes)
        understood = reader.required | reader.optional
        honoured = _choosing_keys(row) & understood
        for messages in row.values():
            if isinstance(messages, list):
                honoured = honoured.union(*(_choosing_keys(part) for part in messages if isinstance(part, dict)))
        self.used.update(honoured)
        understood |= reader.ignored
        for key, value in row.items():
            if key in understood or value is None:
                continue
            if key in _MEANINGFUL:
                self.warnings[f"`{key}`, which is not supported beside {reader.name}"] += 1
            else:
                self.unread[key] += 1


def _choosing_keys(part: dict[str, Any]) -> set[str]:
    """The keys of a row or a message that choose what is trained on and have a supported value."""
    return {key for key in CHOOSING if part.get(key) is not None} - unread_weights(part)
