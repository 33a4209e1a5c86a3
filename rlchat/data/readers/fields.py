"""Reads and checks the fields of a row. If a field is invalid, a :class:`BadLineError` names it and the reason."""

from __future__ import annotations

import math
import re
import reprlib
import warnings
from typing import Any, cast

import regex

from rlchat.conversation import CHECK_KINDS, Check, CheckKind, Role, escape_braces, is_number, spaced_words
from rlchat.data.jsonl import BadLineError
from rlchat.tokenizer.text_encoding import MAX_SPACES, longest_space_run

# Every prefix of a thread that ends with a user message is a prompt, so the number of prompts grows with its length.
MAX_MESSAGES = 1000

_ROLES: dict[str, Role] = {
    "user": "user",
    "prompter": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
}
_TOOL_ROLES = ("tool", "function", "tool_call", "tool_response", "function_call", "function_response", "observation")
# Fractions are not supported: a message is either trained on or not.
LEARN_KEYS = ("weight", "loss_weight", "train", "loss_mask")
_LEARN_KEYS = frozenset(LEARN_KEYS)


def shown(value: object) -> str:
    """``value`` for an error message: shortened if it is long."""
    return reprlib.repr(value)


def text_field(value: object, name: str, may_be_empty: bool = False) -> str:
    """``value``, which must be a string that UTF-8 can encode and that does not consist of white space only."""
    if not isinstance(value, str):
        raise BadLineError(f"{name} is not a string: got {shown(value)}")
    if "\0" in value:
        raise BadLineError(f"{name} contains a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadLineError(f"{name} contains a lone surrogate, which UTF-8 cannot encode") from None
    if (longest := longest_space_run(value)) > MAX_SPACES:
        raise BadLineError(
            f"{name} contains {longest:,} white-space characters in a row, more than the {MAX_SPACES:,} that can be "
            "tokenized"
        )
    if not may_be_empty and not value.strip():
        raise BadLineError(f"{name} is empty")
    return value


def content_field(value: object, name: str) -> str:
    """The text of ``value``: a string, or a list of parts ``{"type": "text", "text": …}``, which are joined."""
    if not isinstance(value, list):
        return text_field(value, name)
    texts = []
    for part in value:
        if not isinstance(part, dict):
            raise BadLineError(f"a part of {name} is not an object: got {shown(part)}")
        if part.get("type", "text") != "text":
            raise BadLineError(f"{name} has a part of type {shown(part['type'])}; only type 'text' is supported")
        texts.append(text_field(part.get("text"), f"the text of a part of {name}", may_be_empty=True))
    return text_field("".join(texts), name)


def optional_field(row: dict[str, Any], key: str, kind: type) -> Any:
    """The value of ``key``, which must be of type ``kind``; None if it is null or absent."""
    value = row.get(key)
    if value is not None and not isinstance(value, kind):
        raise BadLineError(f"{key} is not of type {kind.__name__}: got {shown(value)}")
    return value


def id_field(row: dict[str, Any], key: str) -> str | None:
    """The identifier ``key``, a string or an integer; None if it is null, empty or absent."""
    value = row.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return optional_field(row, key, str) or None


def role_field(value: object) -> Role:
    """The role that ``value`` stands for: OASST's, ShareGPT's or OpenAI's name, in upper or lower case."""
    name = value.strip().lower() if isinstance(value, str) else ""
    if name in _TOOL_ROLES:
        raise BadLineError(f"role {shown(value)} is not supported: tool calls cannot be trained on")
    if name not in _ROLES:
        raise BadLineError(f"unknown role {shown(value)}; expected one of {', '.join(_ROLES)}")
    return _ROLES[name]


def quality_field(value: object, name: str = "quality") -> float | None:
    """The ``value`` of the key ``name``: a number from 0 to 1, or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadLineError(f"{name} is not a number: got {shown(value)}")
    if not 0 <= value <= 1:
        raise BadLineError(f"{name} {shown(value)} is not between 0 and 1")
    return float(value)


def row_quality(row: dict[str, Any]) -> float | None:
    """The ``quality`` of a row, or 1 or 0 for a KTO ``label`` of true or false."""
    if row.get("quality") is None and isinstance(row.get("label"), bool):
        return float(row["label"])
    return quality_field(row.get("quality"))


def learn_field(row: dict[str, Any]) -> bool:
    """Whether to train on a message or a row: False if a weight, ``train`` or ``loss_mask`` is 0 or false."""
    for key in LEARN_KEYS:
        value = row.get(key)
        if isinstance(value, bool | int | float) and not value:
            return False
    return True


def unread_weights(row: dict[str, Any]) -> set[str]:
    """The keys of ``row`` whose values :func:`learn_field` does not support: fractions and lists."""
    if _LEARN_KEYS.isdisjoint(row):  # as in most rows, of which there may be millions
        return set()
    return {key for key in LEARN_KEYS if key in row and row[key] not in (None, 0, 1)}


def row_check(row: dict[str, Any]) -> Check | None:
    """The check of a row or a message: its ``answer`` compared as ``check`` says, or its ``check`` alone.

    An ``answer`` is a text, a number, or a list of them, one of which suffices. ``check`` is one of
    :data:`rlchat.conversation.CHECK_KINDS`; by default ``number`` if all answers are numbers, else ``contains``.
    Without an ``answer``, ``check`` is an object, as :func:`check_field` reads it. None if neither is there.
    """
    answer, check = row.get("answer"), row.get("check")
    if answer is None:
        if isinstance(check, str):
            raise BadLineError(f"check {shown(check)} needs an answer beside it")
        return check_field(check)
    if isinstance(check, dict):
        raise BadLineError("answer beside a check object: keep one of them")
    if check is not None and check not in CHECK_KINDS:
        raise BadLineError(f"unknown check {shown(check)}; expected one of {', '.join(CHECK_KINDS)}, or an object")
    answers = _answers(answer, "answer")
    return _checked(Check(answers, (), check or ("number" if all(map(is_number, answers)) else "contains")), "answer")


def check_field(value: object) -> Check | None:
    """The check in an object such as ``{any_of: [...], none_of: [...]}``; None for None.

    The accepted answers are under ``any_of`` (or ``contains``), ``exact``, ``number`` or ``regex``, which says how they
    are compared. ``none_of`` holds forbidden ones; ``tolerance`` is the largest difference from a ``number``.
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        raise BadLineError(f"check is not an object: got {shown(value)}")
    keys = [key for key in ("any_of", *CHECK_KINDS) if value.get(key) is not None]
    if len(keys) > 1:
        raise BadLineError(f"check has both {keys[0]} and {keys[1]}; keep one of them")
    if unknown := set(value) - {"any_of", "none_of", "tolerance", *CHECK_KINDS}:
        raise BadLineError(f"check has the unknown key {shown(min(unknown))}")
    key = keys[0] if keys else "any_of"
    accepted = optional_field(value, "any_of", list) if key == "any_of" else value[key]
    if accepted in (None, []):
        raise BadLineError(f"check.{key} is missing or empty")
    kind: CheckKind = "contains" if key == "any_of" else cast(CheckKind, key)
    tolerance = value.get("tolerance") or 0.0
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < math.inf:
        raise BadLineError(f"check.tolerance is not a number of at least 0: got {shown(tolerance)}")
    forbidden = _answers(optional_field(value, "none_of", list) or [], "check.none_of")
    return _checked(Check(_answers(accepted, f"check.{key}"), forbidden, kind, float(tolerance)), f"check.{key}")


def _answers(value: object, name: str) -> tuple[str, ...]:
    """The answers in ``value``, a text, a number, or a list of them."""
    if value == []:
        if name == "answer":
            raise BadLineError("answer is an empty list")
        return ()
    found = []
    for answer in value if isinstance(value, list) else [value]:
        if isinstance(answer, int | float) and not isinstance(answer, bool):
            if not math.isfinite(answer):
                raise BadLineError(f"{name} is not a finite number: got {shown(answer)}")
            answer = str(answer)
        found.append(text_field(answer, name))
    return tuple(found)


def _checked(check: Check, name: str) -> Check:
    """``check``, if every answer in it can match a response."""
    for answer in check.any_of + check.none_of:
        if check.kind == "number" and not is_number(answer):
            raise BadLineError(f"{name} is not a number: got {shown(answer)}")
        if check.kind == "contains" and not spaced_words(answer).strip():
            raise BadLineError(f"{name} holds no word to search for: got {shown(answer)}; use the check exact or regex")
        if check.kind == "regex":
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", FutureWarning)  # such as [[:alpha:]], which re reads as a set
                    re.compile(answer)
                regex.compile(escape_braces(answer))
            except (re.error, regex.error, FutureWarning) as error:
                raise BadLineError(f"{name} is not a regular expression: got {shown(answer)}: {error}") from error
    return check
