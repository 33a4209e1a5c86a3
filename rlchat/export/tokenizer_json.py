"""A tiktoken encoding as a `tokenizer.json` of Hugging Face's tokenizers, with the same ids.

transformers can convert tiktoken files itself, but its conversion splits text with another pattern and moves the ids
after a gap, so it gives other ids for `cl100k_base`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from rlchat.export.vocabulary import Vocabulary

_POSSESSIVE_RANGE = re.compile(r"(\\p\{\w+\}\{\d+,\d*\})\+")


def tokenizer_json(vocabulary: Vocabulary) -> str:
    """The content of ``tokenizer.json``. Ids are explicit, so ids without a token stay unused."""
    normalizer = None if vocabulary.normalizer is None else {"type": vocabulary.normalizer}
    added = [
        *(_added(name, token, special=True) for name, token in vocabulary.special.items()),
        *(_added(name, token) for name, token in vocabulary.texts.items()),
        *(_added(name, token, normalized=True) for name, token in vocabulary.normalized_texts.items()),
    ]
    split = {
        "type": "Split",
        "pattern": {"Regex": oniguruma(vocabulary.pattern)},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda token: int(token["id"])),
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # like tiktoken: a piece of text that is a token becomes this token
            "vocab": vocabulary.spelled,
            "merges": vocabulary.merges,
        },
    }
    return json.dumps(content, ensure_ascii=False)


def oniguruma(pattern: str) -> str:
    """``pattern`` of tiktoken (fancy-regex) in the syntax of tokenizers (Oniguruma), where two constructs differ.

    ``X{n,m}+`` is possessive in fancy-regex and a repeated repetition in Oniguruma. It becomes ``X{n,m}`` at the end of
    a top-level alternative, where nothing follows that could make it give back a character, else an atomic group. ``$``
    is the end of the text in fancy-regex and the end of any line in Oniguruma; it becomes ``(?![\\s\\S])``.

    Example: ``\\p{N}{1,3}+|\\s++$`` becomes ``\\p{N}{1,3}|\\s++(?![\\s\\S])``.
    """

    def translated(found: re.Match[str]) -> str:
        last = pattern[found.end() : found.end() + 1] in ("", "|") and _depth(pattern[: found.start()]) == 0
        return found[1] if last else f"(?>{found[1]})"

    return re.sub(r"(?<!\\)\$", lambda _: r"(?![\s\S])", _POSSESSIVE_RANGE.sub(translated, pattern))


def _depth(beginning: str) -> int:
    """The number of groups that are open after ``beginning`` of a pattern."""
    plain = re.sub(r"\[[^\]]*\]", "", re.sub(r"\\.", "", beginning))
    return plain.count("(") - plain.count(")")


def _added(name: str, token: int, *, special: bool = False, normalized: bool = False) -> Mapping[str, Any]:
    return {
        "id": token,
        "content": name,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": normalized,
        "special": special,
    }
