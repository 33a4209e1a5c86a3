"""The versions of a model as a table of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from rlchat.chat.learning.rounds import Outcome

_COLUMNS = ("version", "when", "outcome", "verdicts", "agreement", "correct controls", "")


def version_table(outcomes: Sequence[Outcome], active: int, remark: Callable[[Outcome], str]) -> list[str]:
    """One line per version, the original first, below a line of titles. ``*`` marks version ``active``.

    Args:
        outcomes: of all rounds, the oldest first. A rejected version has no number.
        active: the version that answers; 0 is the original.
        remark: why the version of an outcome cannot be used, or empty.
    """
    rows: list[Sequence[str]] = [_COLUMNS, ("0", "", "original", "", "", "", "")]
    rows += [_row(outcome, remark(outcome)) for outcome in outcomes]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append(f"{'*' if row[0] == str(active) else ' '} {'  '.join(cells)}".rstrip())
    return lines


def _row(outcome: Outcome, remark: str) -> Sequence[str]:
    is_accepted = outcome.number is not None
    return (
        str(outcome.number) if is_accepted else "",
        _local(outcome.date),
        "accepted" if is_accepted else "rejected",
        str(outcome.verdicts),
        _change(outcome, "agrees", "verdicts"),
        _change(outcome, "correct", "controls"),
        "; ".join([*outcome.reasons, *([remark] if remark else [])]),
    )


def _change(outcome: Outcome, name: str, of: str) -> str:
    """A count before and after, as in ``11 → 17 of 20``; ``-`` if it was not measured."""
    before, after, total = _figure(outcome.before, name), _figure(outcome.after, name), _figure(outcome.after, of)
    return f"{before} → {after} of {total}" if "-" not in (before, after, total) else "-"


def _figure(measures: dict[str, Any], name: str) -> str:
    value = measures.get(name)
    return "-" if value is None else str(value)


def _local(date: str) -> str:
    """An ISO 8601 time as local time, to the minute."""
    try:
        return datetime.fromisoformat(date).astimezone().strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError, OSError):
        return date
