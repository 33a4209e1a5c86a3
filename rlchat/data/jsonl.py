"""JSON Lines: files, plain or compressed, read line by line in bounded memory."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from rlchat.data.sources import DataFile, data_file, file_size, json_problem, numbered_lines, to_utf8
from rlchat.errors import UserError
from rlchat.utils.progress import DelayedProgress

MAX_LINE_BYTES = 8_000_000

# Advice for a bad line, in terms of the data module's options.
CURE = "fix the line or set data.on_bad_line=skip"

_SHOWN_BAD_LINES = 5


class BadLineError(Exception):
    """The reason why a line is invalid; :func:`take_lines` adds the file and the line number.

    ``cure`` replaces the general advice to skip the line if that advice would be wrong.
    """

    def __init__(self, reason: str, cure: str | None = None) -> None:
        super().__init__(reason)
        self.cure = cure


@dataclass(slots=True)
class LineReport:
    """How many lines were read (without blank ones), and which of them were invalid."""

    lines: int = 0
    bad_lines: int = 0
    bad_line_examples: list[str] = field(default_factory=list)


def take_lines(
    files: Sequence[str | Path | DataFile],
    take: Callable[[bytes], None],
    report: LineReport,
    *,
    on_bad_line: Literal["error", "skip"] = "error",
    cure: str = CURE,
    max_line_bytes: int = MAX_LINE_BYTES,
    progress: bool = True,
) -> None:
    """Calls ``take`` with every line that is not blank, and counts lines in ``report``.

    If a file is one JSON array of objects, its elements are used as lines. A line is bad if ``take`` raises
    :class:`BadLineError`, or if it is longer than ``max_line_bytes`` without its line break; such a line is never held
    in memory as a whole. ``on_bad_line`` decides whether a bad line stops the reading, with the advice ``cure``, or is
    counted and skipped. Compression is detected from the first bytes of a file, not from its name. A byte order mark is
    ignored. With ``progress``, a bar appears on standard error when reading takes longer than two seconds.

    Raises:
        UserError: a file is missing, a directory, damaged or of an unsupported kind; a bad line.
    """
    sources = [data_file(file) for file in files]
    finished_bytes = 0
    with DelayedProgress("reading", sum(map(file_size, sources)), progress) as bar:

        def show(raw: IO[bytes]) -> None:
            if bar.due:
                bar.update(finished_bytes + _position(raw))

        for source in sources:
            with closing(numbered_lines(source, max_line_bytes, show)) as lines:  # an error closes the file at once
                for number, line in lines:
                    if line is not None and not line.strip():
                        continue
                    report.lines += 1
                    try:
                        if line is None:
                            raise BadLineError(f"the line is longer than {max_line_bytes:,} bytes")
                        take(line)
                    except BadLineError as error:
                        place = f"{source}:{number}: {error}"
                        if on_bad_line == "error":
                            raise UserError(f"{place}; {error.cure or cure}") from None
                        report.bad_lines += 1
                        if len(report.bad_line_examples) < _SHOWN_BAD_LINES:
                            report.bad_line_examples.append(place)
            finished_bytes += file_size(source)


def decode_line(line: bytes) -> str:
    """The text of a line. Raises :class:`BadLineError` if it is not UTF-8 or contains a NUL character."""
    if b"\0" in line:
        raise BadLineError("the line contains a NUL character")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        # Usually the whole file has another encoding. Skipping such lines would lose all text with accents.
        raise BadLineError(f"the line is not UTF-8 (byte {error.start + 1})", to_utf8("LATIN1")) from None


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object in ``line``. Raises :class:`BadLineError` if there is none."""
    text = decode_line(line)
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadLineError(f"not JSON ({json_problem(error, f'column {error.colno}')})") from None
    except (ValueError, RecursionError) as error:
        raise BadLineError(f"not usable as JSON ({error})") from None
    if not isinstance(row, dict):
        raise BadLineError(f"expected a JSON object, got {reprlib.repr(row)}")
    return row


def _position(raw: IO[bytes]) -> int:
    """The number of (compressed) bytes read from ``raw`` so far; 0 for a pipe."""
    return raw.tell() if raw.seekable() else 0
