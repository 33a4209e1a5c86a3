"""From the pre-tokenizer of a `tokenizer.json` to the one regular expression that tiktoken splits text by.

`tokenizers` uses Oniguruma and tiktoken uses fancy-regex. The two read some constructs differently, so a pattern is
accepted only if it consists of constructs with the same meaning in both. Every construct that is accepted here is
compared over all of Unicode in `tests/tokenizer/test_pattern.py`.
"""

from __future__ import annotations

import re
from typing import Any

from rlchat.errors import UserError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Digits(individual_digits) splits before ByteLevel does, and to the latter a digit is the end of the text: white space
# in front of a digit stays whole, as at the end. `Digits` uses Rust's char::is_numeric, which is \p{N}.
GPT2_SINGLE_DIGITS = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

_CLASS = r"\\p\{[A-Z][a-z]?\}|\\[sSrnt]|\\[.\-'()\[\]/|?+*{}]"
_SET = rf"\[\^?(?:{_CLASS}|[^\\\[\]^&])+\]"
# One step through a pattern. What does not match any of these is refused, with the text at that place.
_CONSTRUCT = re.compile(
    rf"(?P<set>{_SET})|(?P<class>{_CLASS})|(?P<group>\(\?(?:i:|:|!|=))|(?P<end>\))|(?P<or>\|)"
    r"|(?P<range>\{\d+(?:,\d*)?\})(?!\+)|(?P<repeat>[?*+]\+?)|(?P<literal>[^\\\[\](){}|?*+^$.])"
)
# Patterns without gaps: every character is matched by one of the alternatives.
_ENDS_WITHOUT_GAPS = (r"\s+(?!\S)|\s+", r"\s+(?!\S)|\s")


class NotExact(UserError):
    """The tokenizer cannot be reproduced exactly under tiktoken; the message says why."""


def tiktoken_pattern(pre_tokenizer: dict[str, Any] | None) -> str:
    """The pattern of ``pre_tokenizer``. Raises :class:`NotExact` for one that is no single regular expression."""
    parts = _parts(pre_tokenizer)
    kinds = [str(part["type"]) for part in parts]
    shown = " + ".join(kinds) or "none"
    if not kinds or kinds[-1] != "ByteLevel":
        raise NotExact(f"its pre-tokenizer ({shown}) is not byte-level, as in SentencePiece and WordPiece tokenizers")
    byte_level = parts[-1]
    if byte_level.get("add_prefix_space"):
        raise NotExact("its pre-tokenizer adds a space before every text (add_prefix_space)")
    own_regex = byte_level.get("use_regex", True)
    if kinds == ["ByteLevel"] and own_regex:
        return GPT2
    if kinds == ["Digits", "ByteLevel"] and own_regex and parts[0].get("individual_digits"):
        return GPT2_SINGLE_DIGITS
    if kinds == ["Split", "ByteLevel"] and not own_regex:
        return _split_pattern(parts[0])
    raise NotExact(f"its pre-tokenizer ({shown}, use_regex {own_regex}) is not one regular expression")


def _parts(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The pre-tokenizers in order, with nested sequences opened."""
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] != "Sequence":
        return [pre_tokenizer]
    return [part for nested in pre_tokenizer["pretokenizers"] for part in _parts(nested)]


def _split_pattern(split: dict[str, Any]) -> str:
    regex = split["pattern"].get("Regex")
    kind = (split["behavior"], bool(split.get("invert")))
    if regex is None or kind not in (("Isolated", False), ("Removed", True)):
        raise NotExact(f"its pre-tokenizer splits by {split['pattern']} with the behavior {split['behavior']}")
    check_same_meaning(regex)
    if kind == ("Removed", True) or regex.endswith(_ENDS_WITHOUT_GAPS):
        return str(regex)
    # What the pattern leaves out is a piece too in `tokenizers`; tiktoken would drop it.
    return rf"{regex}|(?:(?!{regex})[\s\S])+"


def check_same_meaning(regex: str) -> None:
    """Raises :class:`NotExact` at the first construct of ``regex`` that may differ between Oniguruma and fancy-regex.

    Examples: ``\\p{N}{1,3}+`` is possessive in fancy-regex and a repeated repetition in Oniguruma; ``$`` is the end of
    the text in one and the end of a line in the other.
    """
    place, depth, previous = 0, 0, "start"
    while place < len(regex):
        found = _CONSTRUCT.match(regex, place)
        kind = found.lastgroup if found else None
        depth += (kind == "group") - (kind == "end")
        unclear = kind in ("range", "repeat") and previous not in ("set", "class", "literal", "end")
        if found is None or depth < 0 or unclear:
            raise NotExact(
                f"its pattern has {regex[place : place + 12]!r} at character {place + 1}, which tiktoken reads "
                f"differently or not at all"
            )
        previous, place = str(kind), found.end()
    if depth or _may_be_empty(regex):
        raise NotExact(f"its pattern {regex!r} can match the empty text")


def _may_be_empty(regex: str) -> bool:
    """Whether ``regex`` can match the empty text."""
    return _reads_empty(list(_CONSTRUCT.finditer(regex)))


def _reads_empty(constructs: list[re.Match[str]]) -> bool:
    """Whether one of the alternatives can match nothing; consumes ``constructs`` up to the end of the group."""
    any_empty, empty, before = False, True, True  # before: whether the alternative is empty without its last part
    while constructs:
        found = constructs.pop(0)
        kind, text = found.lastgroup, found.group()
        if kind == "end":
            break
        if kind == "or":
            any_empty, empty, before = any_empty or empty, True, True
        elif kind in ("repeat", "range"):
            if text[0] in "?*" or text.startswith("{0"):
                empty = before
        else:
            inner = _reads_empty(constructs) if kind == "group" else False
            before, empty = empty, empty and (inner or text in ("(?!", "(?="))
    return any_empty or empty
