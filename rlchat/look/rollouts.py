"""Reads ``rollouts.jsonl`` for the page, also while a run appends to it.

The page gets a *chunk*: lines of text. The first is a JSON object with the rows from a given one on, without token
data. Then each row has one line with its token data as JSON, empty if it has none. The page decodes such a line when it
shows that response.
"""

from __future__ import annotations

import json
import math
import os
import threading
from pathlib import Path
from typing import Any

from rlchat.conversation import messages_id

NAME = "rollouts.jsonl"
FIELDS = ("advantage", "value", "kl", "ratio", "entropy", "logprob")  # the numbers per token, in the order of page.html


class Rollouts:
    """The responses in ``path`` so far. Damaged lines are skipped and counted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._generation = 0  # how often the file has been replaced
        self._start_again()

    def _start_again(self) -> None:
        self._offset = 0  # in bytes: the end of the last complete line that was read
        self._number = 0  # of lines read
        self._identity: tuple[int, int] | None = None  # of the file
        self._rows: list[str] = []  # as JSON
        self._prompts_before: list[int] = []  # of each row: the number of prompts in the rows before it
        self._tokens: list[str] = []
        self._prompts: dict[str, int] = {}
        self._messages: list[list[Any]] = []  # of each prompt: its id, and its messages as [role, text]
        self._factors: list[str] = []
        self.damaged: list[int] = []  # line numbers

    def chunk(self, first: int, source: str = "", **more: Any) -> str:
        """Reads new lines, and returns the chunk of the rows from ``first`` on, as described above.

        ``source`` is what the page knows of the file. If the file has been replaced since, all rows are sent.
        ``more`` is added to the first line.
        """
        with self._lock:
            self._read_new_lines()
            here = "-".join(map(str, (*(self._identity or ()), self._generation)))
            first = min(first, len(self._rows)) if source == here else 0
            known_prompts = [*self._prompts_before, len(self._messages)][first]
            head = {
                "source": here,
                "first": first,
                "factors": self._factors,
                "firstPrompt": known_prompts,
                "prompts": self._messages[known_prompts:],
                "damaged": self.damaged,
                **more,
            }
            rows = f'{_compact(head)[:-1]},"rows":[{",".join(self._rows[first:])}]}}'
            return "\n".join([rows, *self._tokens[first:]])

    def _read_new_lines(self) -> None:
        """Reads complete lines from where the last call stopped, or from the start if the file was replaced."""
        with self.path.open("rb") as file:
            state = os.fstat(file.fileno())
            identity = (state.st_dev, state.st_ino)
            if self._identity not in (None, identity) or state.st_size < self._offset:
                self._generation += 1
                self._start_again()
            self._identity = identity
            file.seek(self._offset)
            content = file.read()
        complete, newline, _ = content.rpartition(b"\n")  # the rest is a line that is being written
        self._offset += len(complete) + len(newline)
        for line in complete.split(b"\n") if newline else ():
            self._number += 1
            try:
                self._add(*_parsed(line))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                self.damaged.append(self._number)

    def _add(self, line: dict[str, Any], tokens: str) -> None:
        """Adds one response. Raises ValueError, TypeError, KeyError or AttributeError if the line is not one."""
        messages = [[str(message["role"]), str(message["content"])] for message in line["prompt"]]
        name = str(line.get("prompt_id") or messages_id(messages))
        scores = {str(factor): _number(score) for factor, score in line["factors"].items()}
        names = [*self._factors, *(factor for factor in scores if factor not in self._factors)]
        prompt = self._prompts.get(name, len(self._messages))
        row = [
            int(line["iteration"]),
            prompt,
            str(line["reply"]),
            int(line["tokens"]),
            str(line["ended_by"]),
            _number(line["reward"]),
            _number(line["kl"]),
            _number(line["value"]),
            [scores.get(factor) for factor in names],
            None if line["per_token"] is None else _all_extremes(line["per_token"], line["tokens"]),
        ]
        encoded = _compact(row)
        # The line is complete: from here on, nothing fails.
        self._prompts_before.append(len(self._messages))
        if prompt == len(self._messages):
            self._prompts[name] = prompt
            self._messages.append([name, messages])
        self._factors = names
        self._rows.append(encoded)
        self._tokens.append(tokens)


def _parsed(line: bytes) -> tuple[dict[str, Any], str]:
    """The row in ``line``, and the text of its token data, empty if there is none.

    The text is part of the line as it is, because to encode numbers again would take most of the time. Raises
    ValueError or another error if the line is damaged.
    """
    # In a string, the quotes would be escaped.
    before, key, after = line.rpartition(b'"per_token":')
    text = after.rstrip()[:-1]
    if key and not _odd(text):
        try:
            row = json.loads(before.rstrip().removesuffix(b",") + b"}", parse_constant=_no_number)
            return {**row, "per_token": json.loads(text)}, text.decode()
        except ValueError:  # the token data are not the last field
            pass
    row = json.loads(line, parse_constant=_no_number)
    given = row.setdefault("per_token", None)
    if given is None:
        return row, ""
    row["per_token"] = {
        name: column if name == "text" else [_number(x) for x in column]
        for name, column in given.items()
        if name == "text" or name in FIELDS
    }
    return row, _compact(row["per_token"])


def _odd(text: bytes) -> bool:
    """Whether JSON ``text`` may contain a number that is not finite, which JavaScript does not read."""
    return b"NaN" in text or b"Infinity" in text


def _no_number(_: str) -> None:
    return None


def _all_extremes(given: dict[str, Any], count: int) -> list[list[float] | None]:
    """The lowest and the highest number of each field, None without one. Raises ValueError for other lengths."""
    columns = [given.get(field) for field in FIELDS]
    if any(len(column) != count for column in (given["text"], *columns) if column is not None):
        raise ValueError("the token data have another length than the response")
    if not all(isinstance(text, str) for text in given["text"]):
        raise TypeError("a text of a token is not a string")
    return [_extremes(column) for column in columns]


def _extremes(column: list[float | None] | None) -> list[float] | None:
    """The lowest and the highest number; None if there is none. Raises TypeError if one is not a finite number."""
    numbers = [x for x in column or () if x is not None]
    if not numbers:
        return None
    low, high = min(numbers), max(numbers)  # a TypeError, unless all are of one kind
    if _number(low) is None or _number(high) is None:
        raise TypeError("not a finite number")
    return [low, high]


def _number(given: Any) -> float | None:
    """A finite number, or None. Raises TypeError if it is neither a number nor None."""
    if given is None or (type(given) is float and not math.isfinite(given)):
        return None
    if type(given) is not float and type(given) is not int:
        raise TypeError("not a number")
    return given


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
