"""Conversations as JSON files, which the terminal and the page save and load::

    {
     "format": "rlchat-conversation", "version": 1, "model": "rl_chat_model_tiktoken.pt",
     "sampling": {"max_new_tokens": 100, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "seed": null},
     "messages": [
      {"role": "user", "content": "Hello", "time": "2026-11-24T09:00:00+00:00"},
      {"role": "assistant", "content": "Hi there!", "time": "2026-11-24T09:00:02+00:00",
       "model": "rl_chat_model_tiktoken.pt"}
     ]
    }

A system message, if there is one, is the first message. The model of a response is the file that generated it; without
one, it is that of the conversation. Two other layouts can be loaded: OpenAI's
``{"messages": […]}``, whose contents may be lists of text parts, and an older one,
``{"conversation_history": [{"user": …, "assistant": …, "timestamp": …}]}``.
"""

from __future__ import annotations

import json
import math
import reprlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rlchat.conversation import ROLES, Role
from rlchat.errors import UserError
from rlchat.utils.files import write_atomically

FORMAT = "rlchat-conversation"
VERSION = 1
MAX_BYTES = 64_000_000

# Sampling options and their types. A seed of None draws a fresh seed for each session.
_SAMPLING: Mapping[str, type | tuple[type, ...]] = {
    "max_new_tokens": int,
    "temperature": (int, float),
    "top_k": int,
    "top_p": (int, float),
    "seed": (int, type(None)),
}


@dataclass(frozen=True, slots=True)
class SavedMessage:
    """One message.

    Attributes:
        role, text: as in a conversation.
        time: in ISO 8601, or None if it is unknown.
        model: the name of the model file that generated it, or whose response it corrects; empty if it is unknown.
    """

    role: Role
    text: str
    time: str | None = None
    model: str = ""


@dataclass(frozen=True, slots=True)
class SavedConversation:
    """The content of a file. ``sampling`` has some or all of max_new_tokens, temperature, top_k, top_p and seed."""

    messages: tuple[SavedMessage, ...]
    model: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)

    @property
    def attributed(self) -> tuple[SavedMessage, ...]:
        """The messages; a response that names no model has that of the conversation."""
        return tuple(
            replace(one, model=one.model or self.model) if one.role == "assistant" else one for one in self.messages
        )


def now() -> str:
    """The current UTC time in ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def save_conversation(path: str | Path, conversation: SavedConversation, *, overwrite: bool = False) -> None:
    """Write ``conversation`` atomically.

    Raises :class:`UserError` if the file cannot be written, or exists and ``overwrite`` is False.
    """
    path = _path(path)
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists: choose another name")
    text = json.dumps(conversation_to_dict(conversation), ensure_ascii=False, indent=1) + "\n"
    # Pasted text may contain a lone surrogate, which UTF-8 cannot encode.
    write_atomically(path, lambda file: file.write(text.encode("utf-8", errors="replace")))


def load_conversation(path: str | Path) -> SavedConversation:
    """The conversation in ``path``. Raises :class:`UserError` if the file is missing, damaged or in another format."""
    path = _path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe may block, and reading a device may never end
            raise UserError(f"{path} is a directory, a pipe or a device: expected a file")
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise UserError(f"{path}: too large for a conversation: expected at most {MAX_BYTES:,} bytes")
        content = json.loads(text)
    except FileNotFoundError as error:
        raise UserError(f"{path}: file not found") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a conversation file: it is not valid JSON") from error
    return conversation_from_dict(content, str(path))


def conversation_to_dict(conversation: SavedConversation) -> dict[str, Any]:
    """JSON values of a file, the inverse of :func:`conversation_from_dict`."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": conversation.model,
        "sampling": dict(conversation.sampling),
        "messages": [
            {"role": m.role, "content": m.text, "time": m.time, **({"model": m.model} if m.model else {})}
            for m in conversation.messages
        ],
    }


def conversation_from_dict(content: object, source: str) -> SavedConversation:
    """The conversation in a file's JSON values. Raises :class:`UserError` that names ``source`` and the problem."""
    try:
        if isinstance(content, dict) and "conversation_history" in content:
            return _from_older(content)
        if not isinstance(content, dict):
            raise _InvalidError("it is not a JSON object")
        is_openai = "format" not in content and "messages" in content
        if not is_openai and content.get("format") != FORMAT:
            raise _InvalidError("its format is neither rlchat's nor OpenAI's")
        if not is_openai and content.get("version") != VERSION:
            raise _InvalidError(f"its version is {_shown(content.get('version'))}: expected {VERSION}")
        model = _name(content.get("model", ""), "model")
        messages = tuple(_message(row, number) for number, row in enumerate(_a_list(content, "messages"), 1))
        if any(message.role == "system" for message in messages[1:]):
            raise _InvalidError("a system message is not the first message")
        return SavedConversation(messages, model, _sampling(content.get("sampling", {})))
    except _InvalidError as error:
        raise UserError(f"{source} cannot be loaded: {error}") from None


class _InvalidError(Exception):
    """The reason why a file cannot be loaded."""


def _message(row: object, number: int) -> SavedMessage:
    if not isinstance(row, dict):
        raise _InvalidError(f"message {number} is {_shown(row)}: expected an object")
    role = "system" if row.get("role") == "developer" else row.get("role")  # OpenAI's newer name
    if role not in ROLES:
        raise _InvalidError(f"the role of message {number} is {_shown(role)}: expected one of {', '.join(ROLES)}")
    text = _content(row.get("content"), f"the content of message {number}")
    return SavedMessage(role, text, _time(row, "time"), _name(row.get("model", ""), f"the model of message {number}"))


def _content(value: object, what: str) -> str:
    """Text, or OpenAI's list of text parts, which are joined."""
    if not isinstance(value, list):
        return _text(value, what)
    parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in value]
    return "".join(_text(part, f"a part of {what}") for part in parts)


def _from_older(content: dict[str, Any]) -> SavedConversation:
    messages: list[SavedMessage] = []
    for number, turn in enumerate(_a_list(content, "conversation_history"), 1):
        if not isinstance(turn, dict):
            raise _InvalidError(f"turn {number} is {_shown(turn)}: expected an object")
        time = _time(turn, "timestamp")
        messages += [
            SavedMessage("user", _text(turn.get("user"), f"user of turn {number}"), time),
            SavedMessage("assistant", _text(turn.get("assistant"), f"assistant of turn {number}"), time),
        ]
    return SavedConversation(tuple(messages))


def _a_list(content: dict[str, Any], key: str) -> list[Any]:
    value = content.get(key)
    if not isinstance(value, list):
        raise _InvalidError(f"{key} is {_shown(value)}: expected a list")
    return value


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise _InvalidError(f"{what} is {_shown(value)}: expected text")
    return value


def _name(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise _InvalidError(f"{what} is {_shown(value)}: expected a string")
    return value


def _time(row: dict[str, Any], key: str) -> str | None:
    """The time under ``key``: text unchanged, seconds since 1970 as ISO 8601."""
    value = row.get(key)
    if value is None or isinstance(value, str):
        return value
    try:
        return datetime.fromtimestamp(value, timezone.utc).isoformat(timespec="seconds")
    except (TypeError, ValueError, OverflowError, OSError):
        raise _InvalidError(f"{key} is {_shown(value)}: expected a time") from None


def _sampling(values: object) -> dict[str, Any]:
    """The known options in ``values``, with their types checked; :class:`Sampling` checks their ranges."""
    if not isinstance(values, dict):
        raise _InvalidError(f"sampling is {_shown(values)}: expected an object")
    for name, kind in _SAMPLING.items():
        value = values.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, kind) or (isinstance(value, float) and math.isnan(value)):
            raise _InvalidError(f"sampling.{name} is {_shown(value)}: expected a number")
    return {name: values[name] for name in _SAMPLING if name in values}


def _path(path: str | Path) -> Path:
    if "\0" in str(path):
        raise UserError(f"invalid file name {str(path)!r}: it contains a NUL character")
    return Path(path).expanduser()


def _shown(value: object) -> str:
    return reprlib.repr(value)
