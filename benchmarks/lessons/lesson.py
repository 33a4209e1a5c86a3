"""A lesson: the blocks of code and the stated figures of a Markdown file."""

from __future__ import annotations

import ast
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

FOLDER = Path(__file__).parents[2] / "docs" / "lessons"
HEADER = ("figure", "in the code", "expected", "band")

UNMEASURED = "?"
"""Stands in the columns expected and band until they are measured."""

_NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure that the lesson states, and the band that it is in for other seeds."""

    name: str
    expression: str  # its value after the last block, in Python
    expected: float  # with seed 0
    low: float
    high: float

    def contains(self, value: float) -> bool:
        """Whether ``value`` is in the band; False if it is not finite."""
        return self.low <= value <= self.high


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block of code."""

    language: str  # python or bash
    code: str
    line: int  # the number of its first line of code in the file, from 1


@dataclass(frozen=True, slots=True)
class Lesson:
    """A lesson as it is run."""

    path: Path
    title: str
    blocks: tuple[Block, ...]
    figures: tuple[Figure, ...]
    parameters: dict[str, Any]  # the constants that the first block sets; SEED is one of them
    short: dict[str, Any]  # their values in the short form
    short_options: str  # added to each `rlchat fit` in the short form

    @property
    def name(self) -> str:
        """The name of the file without its ending."""
        return self.path.stem


def lessons(folder: Path = FOLDER) -> list[Lesson]:
    """All lessons of ``folder`` in order: the files whose names begin with a number."""
    return [read_lesson(path) for path in sorted(folder.glob("[0-9]*.md"))]


def read_lesson(path: Path) -> Lesson:
    """Reads one lesson.

    The first block sets constants only, in Python, and ``SEED`` is one of them. The comment
    ``<!-- short form: STEPS = 3; fit --option value -->`` has their values in the short form, and options that are
    added to `rlchat fit`. A table with the columns of ``HEADER`` states the figures. Blocks in other languages than
    Python and bash are not run.

    Raises:
        ValueError: if the file is not of this form; the message names it.
    """
    tokens = MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))
    blocks = tuple(
        Block(token.info, token.content, token.map[0] + 2)
        for token in tokens
        if token.type == "fence" and token.info in ("python", "bash") and token.map
    )
    if not blocks or blocks[0].language != "python":
        raise ValueError(f"{path.name}: expected a block of Python that sets SEED")
    parameters = _constants(path, blocks[0].code)
    comment = "".join(
        token.content for token in tokens if token.type == "html_block" and "short form:" in token.content
    )
    short, options = _short_form(comment)
    unknown = [name for name in ("SEED", *short) if name not in parameters]
    if unknown:
        raise ValueError(f"{path.name}: the first block does not set {', '.join(unknown)}")
    title = next(tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open")
    return Lesson(path, title, blocks, tuple(_figures(path, tokens)), parameters, short, options)


def _constants(path: Path, code: str) -> dict[str, Any]:
    """The names and values that ``code`` assigns. Raises :class:`ValueError` if it does anything else."""
    found = {}
    for statement in ast.parse(code).body:
        if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
            raise ValueError(f"{path.name}: the first block must only set constants, such as SEED = 0")
        found[statement.targets[0].id] = ast.literal_eval(statement.value)
    return found


def _short_form(comment: str) -> tuple[dict[str, Any], str]:
    """The constants and the options of `rlchat fit` in the comment that describes the short form."""
    values, options = {}, ""
    text = comment.partition("short form:")[2].partition("-->")[0]
    for part in filter(None, (part.strip() for part in text.split(";"))):
        if part.startswith("fit "):
            options = part.removeprefix("fit ")
        else:
            name, _, value = part.partition("=")
            values[name.strip()] = ast.literal_eval(value.strip())
    return values, options


def _figures(path: Path, tokens: list[Any]) -> list[Figure]:
    """The rows of the tables that state figures."""
    found: list[Figure] = []
    row: list[str] = []
    in_table = False
    for i, token in enumerate(tokens):
        if token.type == "tr_open":
            row = []
        elif token.type in ("th_open", "td_open"):
            row.append(tokens[i + 1].content)
        elif token.type == "thead_close":
            in_table = tuple(row) == HEADER
        elif token.type == "tr_close" and in_table and row and tuple(row) != HEADER:
            found.append(_figure(path, row))
    return found


def _figure(path: Path, row: list[str]) -> Figure:
    name, expression, expected, band = row
    code = re.fullmatch(r"`(.+)`", expression)
    if code and (expected, band) == (UNMEASURED, UNMEASURED):
        return Figure(name, code[1], math.nan, -math.inf, math.inf)
    limits = re.fullmatch(rf"({_NUMBER}) to ({_NUMBER})", band)
    if code is None or limits is None or not re.fullmatch(_NUMBER, expected):
        raise ValueError(f"{path.name}: expected | figure | `code` | number | low to high |, got | {' | '.join(row)} |")
    return Figure(name, code[1], float(expected), float(limits[1]), float(limits[2]))
