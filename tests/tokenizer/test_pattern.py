"""Constructs of patterns mean the same in Oniguruma (tokenizers) and in fancy-regex (tiktoken), over all of Unicode."""

from __future__ import annotations

import pytest
import tiktoken
from tokenizers import Regex, pre_tokenizers

from rlchat.tokenizer.pattern import check_same_meaning

CHARACTERS = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
LETTERS = r"(?i:[sdmtlverk])"
CATEGORIES = ("L", "N", "P", "S", "Z", "M", "Lu", "Ll", "Lt", "Lm", "Lo", "Nd", "Mn")
CLASSES = [rf"\p{{{name}}}" for name in CATEGORIES] + [r"\s", r"\S", r"[^\s\p{L}\p{N}]", r"[^\r\n\p{L}\p{N}]", LETTERS]


@pytest.mark.parametrize("construct", CLASSES)
def test_a_class_has_the_same_characters(construct: str) -> None:
    """Every character between two letter a (or two full stops): each match is a piece of its own."""
    check_same_meaning(construct)
    ranks = {bytes([byte]): byte for byte in range(256)}
    matched = tiktoken.Encoding("x", pat_str=construct, mergeable_ranks=ranks, special_tokens={})
    split = pre_tokenizers.Split(Regex(construct), "removed")
    for start in range(0, len(CHARACTERS), 50_000):
        text = "".join(CHARACTERS[start : start + 50_000])
        theirs = set(text).difference(*(piece for piece, _ in split.pre_tokenize_str(text)))
        assert set(matched.decode(matched.encode_ordinary(text))) == theirs
