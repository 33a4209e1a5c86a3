"""Conversations in files: JSON that says what it is, which the terminal and the page save and load alike::

    {
     "format": "rlchat-conversation", "version": 1, "model": "rl_chat_model_tiktoken.pt",
     "sampling": {"max_new_tokens": 100, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "seed": null},
     "messages": [
      {"role": "user", "content": "Hello", "time": "2026-11-24T09:00:00+00:00"},
      {"role": "assistant", "content": "Hi there!", "time": "2026-11-24T09:00:02+00:00"}
     ]
    }

A system message stands first, where there is one. The layout of older programs is read too:
``{"conversation_history": [{"user": …, "assistant": …, "timestamp": …}]}``.
"""

from __future__ import annotations

import json
import math
import reprlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rlchat.conversation import ROLES, Role
from rlchat.errors import UserError
from rlchat.utils.files import write_atomically

FORMAT = "rlchat-conversation"
VERSION = 1
MAX_BYTES = 64_000_000

# What a reply is sampled with, and of which type each is. A seed of None is a fresh one each time.
_SAMPLING: Mapping[str, type | tuple[type, ...]] = {
    "max_new_tokens": int,
    "temperature": (int, float),
    "top_k": int,
    "top_p": (int, float),
    "seed": (int, type(None)),
}


@dataclass(frozen=True, slots=True)
class SavedMessage:
    """One message; ``time`` is when it was said, in ISO 8601, or None where nobody noted it."""

    role: Role
    text: str
    time: str | None = None


@dataclass(frozen=True, slots=True)
class SavedConversation:
    """What a file holds. ``sampling`` has some or all of max_new_tokens, temperature, top_k, top_p and seed."""

    messages: tuple[SavedMessage, ...]
    model: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)


def now() -> str:
    """The time of a message that is said now."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def save_conversation(path: str | Path, conversation: SavedConversation, *, overwrite: bool = False) -> None:
    """Writes ``conversation``, whole or not at all.

    Raises :class:`UserError` where the place cannot be written, or holds a file and ``overwrite`` does not allow that.
    """
    path = _path(path)
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; give another name")
    text = json.dumps(conversation_to_dict(conversation), ensure_ascii=False, indent=1) + "\n"
    # A lone surrogate, which a broken paste may hold, is no text that UTF-8 can write.
    write_atomically(path, lambda file: file.write(text.encode("utf-8", errors="replace")))


def load_conversation(path: str | Path) -> SavedConversation:
    """The conversation in ``path``. Raises :class:`UserError` for a file that is missing, damaged or another's."""
    path = _path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe may never open, and a device never end
            raise UserError(f"{path}: a directory, a pipe or a device; give a file")
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise UserError(f"{path}: larger than {MAX_BYTES:,} bytes; that is no conversation")
        content = json.loads(text)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; check the name") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; check the name") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, or no conversation: it is not JSON; give another file") from error
    return conversation_from_dict(content, str(path))


def conversation_to_dict(conversation: SavedConversation) -> dict[str, Any]:
    """The plain values of a file, for :func:`conversation_from_dict`."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": conversation.model,
        "sampling": dict(conversation.sampling),
        "messages": [{"role": m.role, "content": m.text, "time": m.time} for m in conversation.messages],
    }


def conversation_from_dict(content: object, source: str) -> SavedConversation:
    """The conversation of a file's plain values. Raises :class:`UserError` naming ``source`` and what is wrong."""
    try:
        if isinstance(content, dict) and "conversation_history" in content:
            return _from_older(content)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise _WrongError("no conversation that rlchat saved")
        if content.get("version") != VERSION:
            raise _WrongError(f"of version {_shown(content.get('version'))}, and this rlchat reads {VERSION}")
        messages = tuple(_message(row, number) for number, row in enumerate(_a_list(content, "messages"), 1))
        if any(message.role == "system" for message in messages[1:]):
            raise _WrongError("a system message stands elsewhere than first")
        model = content.get("model", "")
        if not isinstance(model, str):
            raise _WrongError(f"model is not a name but {_shown(model)}")
        return SavedConversation(messages, model, _sampling(content.get("sampling", {})))
    except _WrongError as error:
        raise UserError(f"{source}: {error}; give another file") from None


class _WrongError(Exception):
    """What is wrong with a file."""


def _message(row: object, number: int) -> SavedMessage:
    if not isinstance(row, dict):
        raise _WrongError(f"message {number} is not an object but {_shown(row)}")
    if row.get("role") not in ROLES:
        raise _WrongError(f"the role of message {number} is {_shown(row.get('role'))}, none of {', '.join(ROLES)}")
    return SavedMessage(row["role"], _text(row.get("content"), f"the content of message {number}"), _time(row, "time"))


def _from_older(content: dict[str, Any]) -> SavedConversation:
    messages: list[SavedMessage] = []
    for number, turn in enumerate(_a_list(content, "conversation_history"), 1):
        if not isinstance(turn, dict):
            raise _WrongError(f"turn {number} is not an object but {_shown(turn)}")
        time = _time(turn, "timestamp")
        messages += [
            SavedMessage("user", _text(turn.get("user"), f"user of turn {number}"), time),
            SavedMessage("assistant", _text(turn.get("assistant"), f"assistant of turn {number}"), time),
        ]
    return SavedConversation(tuple(messages))


def _a_list(content: dict[str, Any], key: str) -> list[Any]:
    value = content.get(key)
    if not isinstance(value, list):
        raise _WrongError(f"{key} is not a list but {_shown(value)}")
    return value


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise _WrongError(f"{what} is not text but {_shown(value)}")
    return value


def _time(row: dict[str, Any], key: str) -> str | None:
    """The time under ``key``: text as it stands, and seconds since 1970 in ISO 8601."""
    value = row.get(key)
    if value is None or isinstance(value, str):
        return value
    try:
        return datetime.fromtimestamp(value, timezone.utc).isoformat(timespec="seconds")
    except (TypeError, ValueError, OverflowError, OSError):
        raise _WrongError(f"{key} is not a time but {_shown(value)}") from None


def _sampling(values: object) -> dict[str, Any]:
    """Those of ``values`` that are known, each of its type; whether it is in range, sampling itself will say."""
    if not isinstance(values, dict):
        raise _WrongError(f"sampling is not an object but {_shown(values)}")
    for name, kind in _SAMPLING.items():
        value = values.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, kind) or (isinstance(value, float) and math.isnan(value)):
            raise _WrongError(f"sampling.{name} is not a number but {_shown(value)}")
    return {name: values[name] for name in _SAMPLING if name in values}


def _path(path: str | Path) -> Path:
    if "\0" in str(path):
        raise UserError(f"{str(path)!r}: no name that a file can have; give another")
    return Path(path).expanduser()


def _shown(value: object) -> str:
    return reprlib.repr(value)
