"""TextEncoding: text to ids and back without any chat format, over a tiktoken encoding."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import tiktoken

from rlchat.errors import UserError
from rlchat.tokenizer.ranks import format_ranks, parse_ranks

MAX_SPACES = 100_000
"""The most white-space characters in a row that a text may have; tiktoken's patterns fail on about a million."""


def longest_space_run(text: str) -> int:
    """The most white-space characters in a row in ``text``; 0 if it is too short to have more than MAX_SPACES."""
    return 0 if len(text) <= MAX_SPACES else max(map(len, re.findall(r"\s+", text)), default=0)


@dataclass(frozen=True)
class TextEncoding:
    """The vocabulary of a tokenizer and how text is split.

    ``special_tokens`` stand for no text and are never produced by :meth:`encode`. ``text_tokens`` are ordinary text
    that is one token wherever it occurs (the added tokens of a Hugging Face tokenizer with ``special: false``, such as
    ``<think>`` of Qwen3); ``normalized_tokens`` are the same, but matched after normalization. ``unused`` are ids for
    single bytes that the base model has no token for: they are encoded, but a response never contains them.
    """

    name: str
    pattern: str
    ranks: dict[bytes, int]
    special_tokens: dict[str, int] = field(default_factory=dict)
    text_tokens: dict[str, int] = field(default_factory=dict)
    normalized_tokens: dict[str, int] = field(default_factory=dict)
    normalizer: str | None = None
    unused: tuple[int, ...] = ()

    @classmethod
    def of_tiktoken(cls, encoding: tiktoken.Encoding) -> TextEncoding:
        """The encoding as tiktoken has it."""
        return cls(encoding.name, encoding._pat_str, encoding._mergeable_ranks, dict(encoding._special_tokens))

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> TextEncoding:
        """The encoding that :meth:`state` described. Raises KeyError, TypeError or ValueError for damaged values."""
        if (normalizer := state.get("normalizer")) not in (None, "NFC"):
            raise ValueError(f"unknown normalizer {normalizer!r}")
        return cls(
            state["name"],
            state["pattern"],
            parse_ranks(state["ranks"], state["name"]),
            _ids(state["special_tokens"]),
            _ids(state.get("text_tokens", {})),
            _ids(state.get("normalized_tokens", {})),
            normalizer,
            tuple(map(int, state.get("unused", ()))),
        )

    def state(self) -> dict[str, Any]:
        """Plain values (``ranks`` is bytes). What is only needed for converted tokenizers is left out where unset."""
        more = {
            "text_tokens": self.text_tokens,
            "normalized_tokens": self.normalized_tokens,
            "normalizer": self.normalizer,
            "unused": list(self.unused),
        }
        return {
            "name": self.name,
            "pattern": self.pattern,
            "ranks": format_ranks(self.ranks),
            "special_tokens": self.special_tokens,
            **{key: value for key, value in more.items() if value},
        }

    @functools.cached_property
    def size(self) -> int:
        """One more than the largest id. Smaller ids may be unused."""
        every = (*self.ranks.values(), *self.special_tokens.values(), *self._whole_texts.values())
        return max(every) + 1

    @functools.cached_property
    def tokens(self) -> dict[int, bytes]:
        """The bytes of every id that stands for text."""
        texts = {token: text.encode() for text, token in self._whole_texts.items()}
        return {**{token: text for text, token in self.ranks.items()}, **texts}

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; never a special token, even where the text spells one.

        Raises :class:`UserError` for text that tiktoken cannot encode, such as a run of a million spaces.
        """
        if not self._whole_texts and self.normalizer is None:
            return self._encode_plain(text)
        return [
            token
            for part in self._parts(text)
            for token in (self._encode_plain(part) if isinstance(part, str) else [part])
        ]

    def _parts(self, text: str) -> Iterator[str | int]:
        """``text`` normalized, with each token that is matched as a whole replaced by its id."""
        for outer in _split(text, self.text_tokens):
            if isinstance(outer, str):
                yield from _split(self._normalize(outer), self.normalized_tokens)
            else:
                yield outer

    def _normalize(self, text: str) -> str:
        if self.normalizer is None or text.isascii():
            return text
        from tokenizers import normalizers  # its own NFC: unicodedata may know fewer characters

        return str(normalizers.NFC().normalize_str(text))

    def _encode_plain(self, text: str) -> list[int]:
        # Where tiktoken fails, it writes a traceback to the terminal; a long run of spaces is the usual cause.
        if longest_space_run(text) > MAX_SPACES:
            raise UserError(
                f"the tokenizer cannot encode more than {MAX_SPACES:,} white-space characters in a row; remove some"
            )
        try:
            return self._tiktoken.encode_ordinary(text)
        except BaseException as error:
            # tiktoken's Rust code panics where its pattern needs too much stack. The class of that error cannot be
            # imported, and it is no Exception.
            if type(error).__name__ != "PanicException":
                raise
            raise UserError(
                f"the tokenizer cannot encode a text of {len(text):,} characters; shorten it, or remove long runs of "
                f"spaces or of other repeated characters"
            ) from None

    @functools.cached_property
    def _whole_texts(self) -> dict[str, int]:
        return {**self.text_tokens, **self.normalized_tokens}

    @functools.cached_property
    def _tiktoken(self) -> tiktoken.Encoding:
        return tiktoken.Encoding(self.name, pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens={})


def _ids(values: dict[str, Any]) -> dict[str, int]:
    return {str(text): int(token) for text, token in values.items()}


def _split(text: str, tokens: dict[str, int]) -> Iterator[str | int]:
    """``text`` cut at ``tokens``, whose ids take their places: the leftmost first, and of those the longest."""
    if not tokens:
        yield text
        return
    for part in _any_of(tuple(tokens)).split(text):
        if part in tokens:
            yield tokens[part]
        elif part:
            yield part


@functools.lru_cache(maxsize=64)
def _any_of(texts: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("(" + "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) + ")")
