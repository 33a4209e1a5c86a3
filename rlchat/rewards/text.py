"""Words and n-grams of any script."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Kana and Han, which are written without spaces. A character counts as a word, as is usual for these languages.
_CJK = "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_EMOJI = "\u2600-\u27bf\U0001f000-\U0001faff"

# Python's \w excludes combining accents and the vowel signs of Hebrew, Arabic and South Asian scripts, which would
# split words of these languages. (\u0964 and \u0965 are full stops.)
_LETTER = "\\w\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0900-\u0963\u0966-\u109f\u1780-\u17d3"
_RUN = rf"(?:(?![{_CJK}_])[{_LETTER}])+"
_WORD = re.compile(
    rf"""
      [{_CJK}]
    | [{_EMOJI}] (?: \ufe0f | [\U0001f3fb-\U0001f3ff] | \u200d[{_EMOJI}] )*   # with a skin tone, or joined to others
    | {_RUN} (?: ['’-] {_RUN} )*
    """,
    re.VERBOSE,
)

_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])|\n+")


def words(text: str) -> list[str]:
    """The words of ``text`` in any language, casefolded, without punctuation.

    Apostrophes and hyphens inside a word belong to it. A Chinese character, a kana and an emoji count as a word each.
    """
    return _WORD.findall(text.casefold())


def sentences(text: str) -> list[str]:
    """The sentences of ``text`` that contain a word. A line break ends a sentence too.

    An abbreviation counts as an end: "Dr. Smith is in." has two.
    """
    return [sentence for sentence in _SENTENCE_END.split(text) if words(sentence)]


def distinct_n(texts: Sequence[str], n: int) -> float:
    """The fraction of distinct n-grams of words among all n-grams of ``texts`` together; 0 if there are none.

    Li et al. 2016, with the usual change of the denominator: they divide by the number of words, so that a corpus of
    short responses can never reach 1. No n-gram crosses from one text to the next.
    """
    found = [ngram for text in texts for ngram in ngrams(words(text), n)]
    return len(set(found)) / len(found) if found else 0.0


def ngrams(items: list[str], n: int) -> list[tuple[str, ...]]:
    """All runs of ``n`` consecutive items."""
    return [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]


def repeated_share(items: Sequence[tuple[str, ...]]) -> float:
    """The fraction of ``items`` that occurred earlier in the list."""
    return 1 - len(set(items)) / len(items) if items else 0.0
