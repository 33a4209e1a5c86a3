"""JSON Lines: files, plain or gzipped, read line by line in bounded memory."""

from __future__ import annotations

import gzip
import json
import reprlib
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Literal

from rlchat.errors import UserError

if TYPE_CHECKING:
    from rich.progress import Progress

MAX_LINE_BYTES = 8_000_000

# What a user can do about a bad line, where the data module's options are at hand.
CURE = "mend the line or set data.on_bad_line=skip"

_SHOWN_BAD_LINES = 5
_SECONDS_BEFORE_PROGRESS = 2.0


class BadLineError(Exception):
    """Why a line cannot be used; :func:`take_lines` knows where it stands."""


@dataclass(slots=True)
class LineReport:
    """How many lines were read, blank ones not counted, and which of them could not be used."""

    lines: int = 0
    bad_lines: int = 0
    bad_line_examples: list[str] = field(default_factory=list)


def take_lines(
    files: Sequence[Path],
    take: Callable[[bytes], None],
    report: LineReport,
    *,
    on_bad_line: Literal["error", "skip"] = "error",
    cure: str = CURE,
    max_line_bytes: int = MAX_LINE_BYTES,
    progress: bool = True,
) -> None:
    """Call ``take`` with every line that is not blank, and count in ``report``.

    A line is bad where ``take`` raises :class:`BadLineError`, or where it is longer than ``max_line_bytes``, without
    its line break; such a line is never in memory as a whole. ``on_bad_line`` says what to do about it: stop, and tell
    the user to do what ``cure`` says, or count it and go on. A file is gzipped where its first bytes say so, whatever
    its name. A byte order mark is passed over. With ``progress``, a bar shows on standard error when reading takes
    longer than two seconds.

    Raises:
        UserError: a file is missing, a directory or a broken gzip; a bad line.
    """
    with _ReadingBar(sum(map(_file_size, files)), progress) as bar:
        for path in files:
            for number, line in _numbered_lines(path, max_line_bytes, bar):
                if line is not None and not line.strip():
                    continue
                report.lines += 1
                try:
                    if line is None:
                        raise BadLineError(f"longer than {max_line_bytes:,} bytes")
                    take(line)
                except BadLineError as error:
                    place = f"{path}:{number}: {error}"
                    if on_bad_line == "error":
                        raise UserError(f"{place}; {cure}") from None
                    report.bad_lines += 1
                    if len(report.bad_line_examples) < _SHOWN_BAD_LINES:
                        report.bad_line_examples.append(place)


def decode_line(line: bytes) -> str:
    """The text of a line. Raises :class:`BadLineError` where it is not UTF-8 or holds a NUL character."""
    if b"\0" in line:
        raise BadLineError("a NUL character")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadLineError(f"not UTF-8 (byte {error.start + 1} of the line)") from None


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object that is ``line``. Raises :class:`BadLineError` where it is none."""
    text = decode_line(line)
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadLineError(f"not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise BadLineError(f"not usable as JSON ({error})") from None
    if not isinstance(row, dict):
        raise BadLineError(f"not a JSON object but {reprlib.repr(row)}")
    return row


def _file_size(path: Path) -> int:
    try:
        if path.is_dir():
            raise UserError(f"{path} is a directory; name the .jsonl or .jsonl.gz files in it")
        return path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"no such data file: {path}; check the path") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; check the path and its permissions") from None


def _numbered_lines(path: Path, max_bytes: int, bar: _ReadingBar) -> Iterator[tuple[int, bytes | None]]:
    """(line number from 1, the line), None in place of a line longer than ``max_bytes``."""
    try:
        with path.open("rb") as raw:
            is_gzip = raw.peek(2)[:2] == b"\x1f\x8b"
            handle: IO[bytes] = gzip.GzipFile(fileobj=raw) if is_gzip else raw  # type: ignore[assignment]
            for number in count(1):
                line = handle.readline(max_bytes + 1)
                if not line:
                    break
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                too_long = len(line) > max_bytes and not line.endswith(b"\n")
                yield number, None if too_long else line
                if too_long:
                    while (rest := handle.readline(1 << 20)) and not rest.endswith(b"\n"):
                        pass
                bar.show(raw)
            bar.finish_file(raw)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is a broken or truncated gzip file ({error}); download or make it again") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}; check the path and its permissions") from None


class _ReadingBar:
    """A progress bar over bytes, compressed ones where the file is, that appears only once reading has taken long."""

    def __init__(self, total_bytes: int, enabled: bool) -> None:
        self.total_bytes = total_bytes
        self.enabled = enabled
        self.next_update = time.monotonic() + _SECONDS_BEFORE_PROGRESS
        self.finished_bytes = 0
        self.progress: Progress | None = None

    def __enter__(self) -> _ReadingBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.progress is not None:
            self.progress.stop()

    def show(self, raw: IO[bytes]) -> None:
        if not self.enabled or (now := time.monotonic()) < self.next_update:
            return
        self.next_update = now + 0.1
        if self.progress is None:
            from rich.console import Console
            from rich.progress import Progress

            self.progress = Progress(console=Console(stderr=True), transient=True)
            self.progress.add_task("reading", total=self.total_bytes)
            self.progress.start()
        self.progress.update(self.progress.task_ids[0], completed=self.finished_bytes + _position(raw))

    def finish_file(self, raw: IO[bytes]) -> None:
        self.finished_bytes += _position(raw)


def _position(raw: IO[bytes]) -> int:
    return raw.tell() if raw.seekable() else 0
