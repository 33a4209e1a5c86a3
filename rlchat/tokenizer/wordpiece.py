"""What a WordPiece vocabulary makes of a text that may begin inside a word."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, models


class WordPieces:
    """The ids of a WordPiece tokenizer for the tokens of another encoding.

    ``raw`` is the content of a ``tokenizer.json``. WordPiece has two kinds of pieces: ``word`` stands at the start of a
    word and ``##word`` inside one. The tokens of a byte-level encoding show the start of a word by a space: `` word``.
    """

    def __init__(self, raw: dict[str, Any]) -> None:
        model = raw["model"]
        vocabulary: dict[str, int] = model["vocab"]
        prefix, unknown = str(model.get("continuing_subword_prefix", "##")), str(model.get("unk_token", "[UNK]"))
        self._vocabulary, self._prefix = vocabulary, prefix
        self._unknown_id = vocabulary.get(unknown, max(vocabulary.values(), default=-1) + 1)
        self._tokenizer = Tokenizer.from_str(json.dumps(raw))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # a token that reads [SEP] is text
        inner = {text: number for text, number in vocabulary.items() if text.startswith(prefix)}
        # The same model for the rest of a word: its first piece has no prefix here, although it continues a word.
        first = {text.removeprefix(prefix): number for text, number in inner.items()}
        self._rest = models.WordPiece(
            {**first, **inner, unknown: self._unknown_id},
            unk_token=unknown,
            continuing_subword_prefix=prefix,
            max_input_chars_per_word=int(model.get("max_input_chars_per_word", 100)),
        )

    def by_bytes(self) -> dict[bytes, int]:
        """The tokens of the vocabulary by the bytes that stand for them in another encoding.

        These are the bytes of which :meth:`pieces` makes the one token: `` word`` for ``word``, and ``ing`` for
        ``##ing``. Where punctuation is a word of its own, ``,`` stands for ``,``, and no text for ``##,``.
        """
        found: dict[bytes, int] = {}
        for text, number in self._vocabulary.items():
            bare = text.removeprefix(self._prefix)
            for written in (bare, f" {bare}"):
                if self.pieces(written) == (number,):
                    found[written.encode()] = number
        return found

    def pieces(self, text: str) -> tuple[int, ...]:
        """The ids that stand for ``text``, without unknown ones; empty where there are none.

        White space at its beginning starts a word. Without it, ``text`` may begin inside a word or at the start of one
        (after a line break or a quotation mark). The reading with fewer pieces is taken. If both have the same number,
        ``text`` begins inside a word if its first character is a letter and not a capital one. Example:
        ``ational`` is ``##ation ##al`` and not ``at ##ional``, but ``hello`` is ``hello`` and not ``##hell ##o``.
        """
        start = self._known(self._tokenizer.encode(text, add_special_tokens=False).ids)
        inside = () if text[:1].isspace() else self._inside(text)
        if not inside or not start:
            return inside or start
        letter = text[0].isalpha() and text[0] == text[0].lower()
        return inside if len(inside) < len(start) + letter else start

    def _inside(self, text: str) -> tuple[int, ...]:
        """The ids of ``text`` after a letter; empty where it does not continue that word, or has an unknown rest."""
        normalizer, splitter = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        text = text if normalizer is None else normalizer.normalize_str(text)
        words = ["a" + text] if splitter is None else [word for word, _ in splitter.pre_tokenize_str("a" + text)]
        if not words or len(words[0]) < 2 or not words[0].startswith("a"):
            return ()
        rest = [piece.id for piece in self._rest.tokenize(words[0][1:])]
        if self._unknown_id in rest:
            return ()
        return self._known([*rest, *(piece.id for word in words[1:] for piece in self._tokenizer.model.tokenize(word))])

    def _known(self, ids: list[int]) -> tuple[int, ...]:
        return tuple(token for token in ids if token != self._unknown_id)
