"""The fields of a row, each checked: a :class:`BadLineError` says which is wrong, and how."""

from __future__ import annotations

import reprlib
from typing import Any

from rlchat.conversation import Check, Role
from rlchat.data.jsonl import BadLineError

# Every prefix of a thread is a prompt, so the size of a tree grows with the square of its depth.
MAX_MESSAGES = 1000

_ROLES: dict[str, Role] = {"prompter": "user", "user": "user", "assistant": "assistant", "system": "system"}


def shown(value: object) -> str:
    """``value`` as a message to the user shows it: cut, where it is long."""
    return reprlib.repr(value)


def text_field(value: object, name: str, may_be_empty: bool = False) -> str:
    """``value``, which must be a string that UTF-8 can hold, with more than white space in it."""
    if not isinstance(value, str):
        raise BadLineError(f"{name} is not a string but {shown(value)}")
    if "\0" in value:
        raise BadLineError(f"{name} holds a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadLineError(f"{name} holds a lone surrogate, which no UTF-8 text can") from None
    if not may_be_empty and not value.strip():
        raise BadLineError(f"{name} is empty")
    return value


def optional_field(row: dict[str, Any], key: str, kind: type) -> Any:
    """The value of ``key``, which must be of type ``kind``; None where it is null or absent."""
    value = row.get(key)
    if value is not None and not isinstance(value, kind):
        raise BadLineError(f"{key} is not of type {kind.__name__} but {shown(value)}")
    return value


def role_field(value: object) -> Role:
    """The role that ``value`` names, in OASST's words or in ours."""
    if not isinstance(value, str) or value not in _ROLES:
        raise BadLineError(f"unknown role {shown(value)}; known are {', '.join(_ROLES)}")
    return _ROLES[value]


def quality_field(value: object) -> float | None:
    """``value``, a number in 0..1 or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadLineError(f"quality is not a number but {shown(value)}")
    if not 0 <= value <= 1:
        raise BadLineError(f"quality {shown(value)} is not in 0..1")
    return float(value)


def check_field(value: object) -> Check | None:
    """The check that an object ``{any_of: [...], none_of: [...]}`` is, ``none_of`` optional; None for None."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise BadLineError(f"check is not an object but {shown(value)}")
    any_of, none_of = optional_field(value, "any_of", list), optional_field(value, "none_of", list) or []
    if not any_of:
        raise BadLineError("check.any_of is missing or empty")
    return Check(
        tuple(text_field(phrase, "check.any_of") for phrase in any_of),
        tuple(text_field(phrase, "check.none_of") for phrase in none_of),
    )
