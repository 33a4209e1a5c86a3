"""Constructs of patterns mean the same in Oniguruma (tokenizers) and in fancy-regex (tiktoken), over all of Unicode."""

from __future__ import annotations

import numpy as np
import pytest
import tiktoken
from tokenizers import Regex, normalizers

from rlchat.tokenizer.pattern import check_same_meaning

CHARACTERS = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
LETTERS = r"(?i:[sdmtlverk])"
CATEGORIES = ("L", "N", "P", "S", "Z", "M", "Lu", "Ll", "Lt", "Lm", "Lo", "Nd", "Mn")
CLASSES = [rf"\p{{{name}}}" for name in CATEGORIES] + [r"\s", r"\S", r"[^\s\p{L}\p{N}]", r"[^\r\n\p{L}\p{N}]", LETTERS]
FEW = (r"\p{L}", r"\p{N}", r"\s", r"[^\s\p{L}\p{N}]", LETTERS)


def among_all(text: str) -> np.ndarray:
    """For each code point, whether ``text`` contains it."""
    found = np.zeros(0x110000, dtype=bool)
    found[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)] = True
    return found


@pytest.mark.parametrize("construct", [c if c in FEW else pytest.param(c, marks=pytest.mark.slow) for c in CLASSES])
def test_a_class_has_the_same_characters(construct: str) -> None:
    """Tiktoken keeps the characters that the class matches; a replacement in tokenizers removes them."""
    check_same_meaning(construct)
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding("x", pat_str=construct, mergeable_ranks=ranks, special_tokens={})
    matched = encoding.decode(encoding.encode_ordinary(CHARACTERS))
    unmatched = normalizers.Replace(Regex(construct), "").normalize_str(CHARACTERS)
    assert matched
    assert np.array_equal(among_all(matched), among_all(CHARACTERS) & ~among_all(unmatched))
