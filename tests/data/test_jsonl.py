"""JSON Lines: reading, limits, and errors for invalid lines and files."""

from __future__ import annotations

import gzip
import inspect
import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from rlchat.data.jsonl import BadLineError, LineReport, decode_line, parse_object, take_lines
from rlchat.data.sources import numbered_lines
from rlchat.errors import UserError


def read(*files: Path, **options: Any) -> tuple[list[Any], LineReport]:
    """The objects in ``files``, and the report on their lines."""
    rows: list[Any] = []
    report = LineReport()
    take_lines(files, lambda line: rows.append(parse_object(line)), report, **options)
    return rows, report


def write(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


# -- lines --


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"messages": [', r"not JSON \(.* at column 15\)"),
        (b'{"a": "b', r"not JSON \(Unterminated string starting at column 7\)$"),
        (b'{"a": "b\tc"}', r"not JSON \(Invalid control character at column 9\)$"),
        (b'{"a": "\\q"}', r"not JSON \(Invalid \\escape at column 8\)$"),
        (b'{"a": "\\u12"}', r"not JSON \(Invalid \\uXXXX escape at column \d+\)$"),
        (b'{"a" 1}', r"not JSON \(Expecting ':' delimiter at column 6\)$"),
        (b"{} {}", r"not JSON \(Extra data at column 4\)$"),
        (b"[" * 100_000, "not usable as JSON"),
        (b"9" * 5000, "not usable as JSON"),
        (b"[1, 2]", r"expected a JSON object, got \[1, 2\]"),
        (b"null", "expected a JSON object, got None"),
        (b'{"text": "\xff"}', r"the line is not UTF-8 \(byte 11\)"),
        (b'{"text": "a\0b"}', "the line contains a NUL character"),
    ],
)
def test_a_line_that_is_not_an_object(line: bytes, reason: str) -> None:
    with pytest.raises(BadLineError, match=f"^{reason}"):
        parse_object(line)


def test_decode_line() -> None:
    assert decode_line("größer\r\n".encode()) == "größer\r\n"
    with pytest.raises(BadLineError, match=r"^the line is not UTF-8 \(byte 3\)"):
        decode_line(b"ab\xe9")


def test_a_bad_line_stops_the_run_or_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", b'{"a": 1}', b" \t", b"{", b'{"a": 2}')
    with pytest.raises(UserError, match=r"rows\.jsonl:3: not JSON .*; fix the line or set data\.on_bad_line=skip"):
        read(path)
    rows, report = read(path, on_bad_line="skip")
    assert rows == [{"a": 1}, {"a": 2}]
    assert (report.lines, report.bad_lines) == (3, 1)
    assert [example.split(": ")[0] for example in report.bad_line_examples] == [f"{path}:3"]


def test_only_the_first_bad_lines_are_reported(tmp_path: Path) -> None:
    files = [write(tmp_path / name, *[b"{"] * 3) for name in ("1.jsonl", "2.jsonl")]
    _, report = read(*files, on_bad_line="skip")
    assert (report.lines, report.bad_lines) == (6, 6)
    places = [f"{files[0]}:1", f"{files[0]}:2", f"{files[0]}:3", f"{files[1]}:1", f"{files[1]}:2"]
    assert [example.split(": ")[0] for example in report.bad_line_examples] == places


def test_a_line_may_be_as_long_as_the_limit(tmp_path: Path) -> None:
    line = json.dumps({"text": "x" * 100}).encode()
    path = tmp_path / "rows.jsonl"
    for ending in (b"", b"\n"):
        path.write_bytes(line + ending)
        assert len(read(path, max_line_bytes=len(line))[0]) == 1
        with pytest.raises(UserError, match=f"rows.jsonl:1: the line is longer than {len(line) - 2} bytes"):
            read(path, max_line_bytes=len(line) - 2)


def test_long_line_is_not_read_into_memory(tmp_path: Path) -> None:
    """One line of 200 MB (200 kB with gzip) is read with a peak memory below 40 MB."""
    path = tmp_path / "long.jsonl"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(200):
            file.write(b"x" * 1_000_000)
        file.write(b'\n{"a": 1}')
    tracemalloc.start()
    rows, report = read(path, on_bad_line="skip")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (rows, report.bad_lines) == ([{"a": 1}], 1)
    assert peak < 40_000_000


# -- files --


def test_gzip_by_content_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}'
    (tmp_path / "plain.gz").write_bytes(content)
    (tmp_path / "zipped.jsonl").write_bytes(gzip.compress(content))
    for name in ("plain.gz", "zipped.jsonl"):
        rows, report = read(tmp_path / name)
        assert rows == [{"a": 1}, {"a": 2}]
        assert report.lines == 2


@pytest.mark.parametrize("on_bad_line", ["error", "skip"])
def test_damaged_files_are_errors(tmp_path: Path, on_bad_line: Any) -> None:
    good = write(tmp_path / "good.jsonl", b'{"a": 1}')
    zipped = gzip.compress(b'{"a": 1}\n' * 1000)
    truncated, damaged = tmp_path / "truncated.gz", tmp_path / "damaged.gz"
    truncated.write_bytes(zipped[:-20])
    damaged.write_bytes(zipped[:10] + bytes(byte ^ 0xFF for byte in zipped[10:]))
    for path, reason in (
        (tmp_path / "missing.jsonl", "no such data file: .*missing.jsonl"),
        (tmp_path, "is a directory"),
        (truncated, "truncated.gz is a damaged or truncated compressed file"),
        (damaged, "damaged.gz is a damaged or truncated compressed file"),
        (Path("nul\0byte"), "cannot read"),
    ):
        with pytest.raises(UserError, match=reason):
            read(good, path, on_bad_line=on_bad_line)


def test_the_progress_bar_only_appears_when_reading_takes_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "rows.jsonl", *[b'{"a": 1}'] * 50)
    monkeypatch.setenv("FORCE_COLOR", "1")
    read(path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("rlchat.utils.progress.PROGRESS_AFTER_SECONDS", 0.0)
    read(path, progress=False)
    assert capsys.readouterr().err == ""
    read(path)
    out, err = capsys.readouterr()
    assert out == ""
    assert "reading" in err


@pytest.mark.parametrize("content", [b'{"a": 1}\nnot JSON\n{}\n', b'[{"a": 1},\n"not an object",\n{}]'])
def test_an_error_closes_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """At once, and not when the garbage collector finds the generator, which the error's traceback refers to."""
    opened: list[Any] = []

    def watched(*arguments: Any) -> Any:
        opened.append(numbered_lines(*arguments))
        return opened[-1]

    monkeypatch.setattr("rlchat.data.jsonl.numbered_lines", watched)
    (tmp_path / "d.json").write_bytes(content)
    with pytest.raises(UserError, match=r"d\.json:2: ") as error:
        read(tmp_path / "d.json")
    assert error.value is not None
    assert [inspect.getgeneratorstate(lines) for lines in opened] == [inspect.GEN_CLOSED]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'[{"text": "a', "Unterminated string"),
        (b'[{"text": "a\tb"}]', "Invalid control character"),
        (b'[{"text": "a"}', "Unexpected end of file"),
        (b'[{"text": "a"} {}]', "Expecting ',' or ']'"),
    ],
)
def test_a_damaged_array(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    sentence = re.escape(f"{path}:1: the JSON array is damaged or truncated here ({reason}); ")
    with pytest.raises(UserError, match=f"^{sentence}"):
        take_lines([path], lambda line: None, LineReport(), progress=False)
