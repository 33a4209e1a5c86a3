"""Opens data files, plain or compressed. A file that is not text is an error that names its type.

The type of a file is detected from its first bytes, not from its name. gzip, xz, bzip2 and zstd (with the package
``zstandard``) are decompressed while they are read. For archives, other text encodings and binary tables, the error
shows how to convert the file.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import shutil
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import IO, Any

from rlchat.errors import UserError

_CHUNK = 1 << 16
_BOM = codecs.BOM_UTF8


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file to read. Errors show ``name``, the path that the user passed; ``path`` is the file that is opened."""

    name: str
    path: Path

    def __str__(self) -> str:
        return self.name

    @property
    def is_plain_text(self) -> bool:
        """Whether lines are text and not JSON: the name ends in ``.txt`` perhaps with a compression suffix."""
        suffixes = [suffix.lower() for suffix in self.path.suffixes]
        if suffixes and suffixes[-1] in _COMPRESSED_SUFFIXES:
            suffixes.pop()
        return suffixes[-1:] == [".txt"]


def data_file(path: str | Path | DataFile) -> DataFile:
    """``path`` with ``~`` expanded."""
    if isinstance(path, DataFile):
        return path
    return DataFile(str(path), Path(path).expanduser())


def is_pipe(file: DataFile) -> bool:
    """Whether ``file`` can be read only once: it exists, and is neither a regular file nor a folder."""
    return file.path.exists() and not file.path.is_file() and not file.path.is_dir()


def readable_twice(file: DataFile, folder: Path) -> DataFile:
    """``file`` itself, or its copy in ``folder`` if it can be read only once: a pipe such as ``<(command)``.

    Raises:
        UserError: the pipe cannot be read.
    """
    try:
        if not is_pipe(file):
            return file
        folder.mkdir(parents=True, exist_ok=True)
        copy = folder / f"{len(list(folder.iterdir()))}-{file.path.name}"
        with file.path.open("rb") as pipe, copy.open("wb") as kept:
            shutil.copyfileobj(pipe, kept)
    except (OSError, ValueError) as error:
        raise cannot_read(file, error) from None
    return DataFile(file.name, copy)


def cannot_read(file: DataFile, error: Exception) -> UserError:
    """The error for a file that cannot be read."""
    reason = getattr(error, "strerror", None) or error
    return UserError(f"cannot read {file}: {reason}; check the path and its permissions")


def file_size(file: DataFile) -> int:
    """The size in bytes, 0 for a pipe. Raises :class:`UserError` if the file is missing or a directory."""
    try:
        if file.path.is_dir():
            raise UserError(f"{file} is a directory; pass the .jsonl or .jsonl.gz files in it")
        return file.path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"no such data file: {file}; check the path") from None
    except (OSError, ValueError) as error:
        raise cannot_read(file, error) from None


def numbered_lines(
    file: DataFile, max_bytes: int, show_progress: Callable[[IO[bytes]], None]
) -> Generator[tuple[int, bytes | None]]:
    """Yields (line number from 1, line) of a text file; the line is None if it is longer than ``max_bytes``.

    For a file that is one JSON array of objects, it yields the elements, each with the number of the line on which it
    starts. ``show_progress`` is called after each with the open file, whose position is in compressed bytes.

    Raises:
        UserError: the file is missing, damaged, or of a kind that cannot be read.
    """
    try:
        with _opened(file) as (raw, handle):
            is_array = _is_array(handle.peek(512))
            with closing(
                _array_elements(file, handle, max_bytes) if is_array else _lines(handle, max_bytes)
            ) as numbered:
                for number, line in numbered:
                    yield number, line
                    show_progress(raw)
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise _broken(file, error) from None
    except OSError as error:
        if error.errno is None:  # how bz2 reports damage
            raise _broken(file, error) from None
        raise cannot_read(file, error) from None


def _is_array(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is an array of objects, rather than JSON Lines with a bad first line."""
    head = head.removeprefix(_BOM).lstrip()
    return head[:1] == b"[" and head[1:].lstrip()[:1] in (b"{", b"]", b"")


def _broken(file: DataFile, error: Exception) -> UserError:
    return UserError(f"{file} is a damaged or truncated compressed file ({error}); download or create it again")


def _lines(handle: IO[bytes], max_bytes: int) -> Generator[tuple[int, bytes | None]]:
    for number in count(1):
        line = handle.readline(max_bytes + 1)
        if not line:
            return
        if number == 1:
            line = line.removeprefix(_BOM)
        too_long = len(line) > max_bytes and not line.endswith(b"\n")
        yield number, None if too_long else line
        while too_long and (rest := handle.readline(1 << 20)) and not rest.endswith(b"\n"):
            pass


def _array_elements(file: DataFile, handle: IO[bytes], max_bytes: int) -> Generator[tuple[int, bytes | None]]:
    """The elements of a JSON array as JSON text, parsed one at a time so that memory stays bounded."""
    text = _TextWindow(handle)
    decoder = json.JSONDecoder()
    try:
        text.skip_space()
        text.take(1)  # the opening bracket
        while text.skip_space() != "]":
            line, wanted = text.line, _CHUNK
            while True:
                try:
                    _, end = decoder.raw_decode(text.buffer)
                    break
                except json.JSONDecodeError:
                    if not text.grow(wanted):
                        raise
                    if len(text.buffer) > max_bytes:
                        raise UserError(
                            f"{file}:{line}: an element of the JSON array is longer than {max_bytes:,} bytes, or is "
                            "not JSON; convert the file to JSON Lines, one object per line"
                        ) from None
                    wanted *= 2
            yield line, text.take(end).encode()
            if text.skip_space() == ",":
                text.take(1)
            elif text.buffer[:1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text.buffer, 0)
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8; {to_utf8('LATIN1')}") from None
    except (ValueError, RecursionError) as error:
        reason = json_problem(error) if isinstance(error, json.JSONDecodeError) else error
        raise UserError(
            f"{file}:{text.line}: the JSON array is damaged or truncated here ({reason}); download or create it again"
        ) from None
    finally:
        text.detach()  # the caller closes the file


class _TextWindow:
    """A part of a text file: ``buffer`` starts on line ``line`` of the file."""

    def __init__(self, handle: IO[bytes]) -> None:
        self._text = io.TextIOWrapper(handle, encoding="utf-8-sig", newline="")
        self.buffer = ""
        self.line = 1

    def detach(self) -> None:
        """Leaves the binary file open; the window cannot be used any more."""
        self._text.detach()

    def grow(self, characters: int) -> bool:
        """Reads up to ``characters`` more. Returns whether there was anything left to read."""
        more = self._text.read(characters)
        self.buffer += more
        return bool(more)

    def take(self, characters: int) -> str:
        taken, self.buffer = self.buffer[:characters], self.buffer[characters:]
        self.line += taken.count("\n")
        return taken

    def skip_space(self) -> str:
        """The next character that is not white space. Raises ``json.JSONDecodeError`` at the end of the file."""
        while True:
            rest = self.buffer.lstrip()
            self.take(len(self.buffer) - len(rest))
            if rest:
                return rest[0]
            if not self.grow(_CHUNK):
                raise json.JSONDecodeError("Unexpected end of file", "", 0)


def json_problem(error: json.JSONDecodeError, place: str = "") -> str:
    """What is wrong, and at which ``place``. Some messages of :mod:`json` expect one and end with "at" or a colon."""
    problem = re.sub(r"(?: at|:)\s*$", "", error.msg)
    return f"{problem} at {place}" if place else problem.removesuffix(" starting")


def to_utf8(encoding: str) -> str:
    """Advice for a file in another text encoding."""
    return f"convert the file to UTF-8, for example with `iconv -f {encoding} -t UTF-8 FILE > NEW_FILE`"


# ---- detection by the first bytes ------------------------------------------------------------------------------------

_COMPRESSED_SUFFIXES = (".gz", ".xz", ".bz2", ".zst")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\xfd7zXZ\0": "xz", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd"}
_UNPACK = "unpack it and pass the .jsonl file in it"
_TABLE = "export its rows as JSON Lines, one object per line"
_REFUSED = {
    b"PK\x03\x04": ("a zip archive", _UNPACK),
    b"7z\xbc\xaf": ("a 7-Zip archive", _UNPACK),
    b"Rar!": ("a RAR archive", _UNPACK),
    b"PAR1": ("a Parquet file", _TABLE),
    b"ARROW1": ("an Arrow file", _TABLE),
    b"SQLite format 3": ("an SQLite database", _TABLE),
    b"\xff\xfe\0\0": ("text in UTF-32", to_utf8("UTF-32")),
    b"\0\0\xfe\xff": ("text in UTF-32", to_utf8("UTF-32")),
    b"\xff\xfe": ("text in UTF-16", to_utf8("UTF-16")),
    b"\xfe\xff": ("text in UTF-16", to_utf8("UTF-16")),
}


@contextmanager
def _opened(file: DataFile) -> Iterator[tuple[IO[bytes], io.BufferedReader]]:
    """The open file, and its decompressed content."""
    with file.path.open("rb") as raw:
        packing = _packing(raw.peek(16))
        handle = raw if packing is None else io.BufferedReader(_decompressor(packing, file)(raw))
        head = handle.peek(512)[:512]
        if packing is not None and (inner := _packing(head)) is not None:
            raise UserError(f"{file} is compressed twice ({inner} inside {packing}); decompress it once")
        for magic, (kind, cure) in _REFUSED.items():
            if head.startswith(magic):
                raise UserError(f"{file} is {kind}, which is not supported; {cure}")
        if head[257:262] == b"ustar":
            raise UserError(f"{file} is a tar archive, which is not supported; {_UNPACK}")
        if (order := _utf16_without_mark(head)) is not None:
            raise UserError(f"{file} is text in UTF-16, which is not supported; {to_utf8(order)}")
        yield raw, handle


def _packing(head: bytes) -> str | None:
    return next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None)


def _utf16_without_mark(head: bytes) -> str | None:
    """ASCII text in UTF-16 has a zero in every second byte."""
    for order, zeros in (("UTF-16LE", head[1::2]), ("UTF-16BE", head[0::2])):
        if len(head) >= 8 and zeros.count(0) > 0.9 * len(zeros) and head.count(0) < 0.6 * len(head):
            return order
    return None


def _decompressor(packing: str, file: DataFile) -> Callable[[IO[bytes]], Any]:
    if packing == "gzip":
        return lambda raw: gzip.GzipFile(fileobj=raw)
    if packing == "xz":
        return lzma.LZMAFile
    if packing == "bzip2":
        return bz2.BZ2File
    try:
        zstandard = import_module("zstandard")
    except ModuleNotFoundError:
        raise UserError(
            f"{file} is compressed with zstd; install the package that reads it (`pip install zstandard`), or "
            "decompress the file with `zstd -d`"
        ) from None
    return lambda raw: zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
