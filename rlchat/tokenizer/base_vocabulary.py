"""What the tokens of a base model stand for, whatever kind of tokenizer it has."""

from __future__ import annotations

import json
import re
from typing import Any

from rlchat.tokenizer.base_files import TokenizerFiles
from rlchat.tokenizer.chat_format import ChatFormat
from rlchat.tokenizer.chat_template import read_template
from rlchat.tokenizer.pattern import NotExact
from rlchat.tokenizer.ranks import from_byte_letters, to_byte_letters
from rlchat.tokenizer.wordpiece import WordPieces

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # SentencePiece's space


class BaseVocabulary:
    """The tokens of a base model by the bytes that they stand for, and pieces for any other bytes.

    Byte-level tokens are exact. WordPiece's ``word`` stands for `` word`` and ``##ing`` for ``ing`` (see
    :class:`WordPieces`); in SentencePiece vocabularies ``▁word`` stands for `` word`` and ``<0x0A>`` for a byte.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        from tokenizers import Tokenizer

        self._files, raw = files, files.tokenizer
        added = {str(token["content"]): token for token in raw.get("added_tokens", ())}
        self.special = {text: int(token["id"]) for text, token in added.items() if token.get("special", True)}
        self._tokenizer = Tokenizer.from_str(json.dumps(raw))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._byte_level = '"ByteLevel"' in json.dumps([raw.get("pre_tokenizer"), raw.get("decoder")])
        wordpiece = raw["model"].get("type") == "WordPiece" and not self._byte_level
        self._words = WordPieces(raw) if wordpiece else None
        self.by_bytes: dict[bytes, int] = {} if self._words is None else self._words.by_bytes()
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.size = max(vocabulary.values(), default=-1) + 1
        for text, number in vocabulary.items():
            if text in added:
                if text not in self.special:
                    self.by_bytes[text.encode()] = number
            elif (raw_bytes := self._bytes(text)) is not None:
                self.by_bytes.setdefault(raw_bytes, number)
        self._unknown = {vocabulary[name] for name in ("[UNK]", "<unk>") if name in vocabulary}
        self._form = self._format()

    def pieces(self, text: bytes) -> tuple[int, ...]:
        """The base tokens that ``text`` is made of; empty where it has none."""
        if self._byte_level:
            return tuple(piece.id for piece in self._tokenizer.model.tokenize(to_byte_letters(text)))
        try:
            decoded = text.decode()
        except UnicodeDecodeError:
            return ()
        return self._encode(decoded.removeprefix(" ")) if self._words is None else self._words.pieces(decoded)

    def end(self) -> tuple[int, ...]:
        """The token that ends a response: that of the chat template, or else of a text."""
        names = (self._form.end if self._form else "", self._files.token("eos_token"), self._files.token("sep_token"))
        common = ("<|endoftext|>", "</s>", "<eos>", "[SEP]")
        return self._first(*names, *common)

    def pad(self) -> tuple[int, ...]:
        """The token for padding, or else the end token."""
        return self._first(self._files.token("pad_token"), "[PAD]", "<pad>") or self.end()

    def role(self, role: str) -> tuple[int, ...]:
        """What opens a message of ``role``: as the chat template writes it, or else the word itself."""
        if self._form and self._form.before.get(role):
            return self._encode(self._form.before[role])
        return self._encode(f" {role}" if self._byte_level else role)

    def _first(self, *names: str) -> tuple[int, ...]:
        return next(((self.special[name],) for name in names if name in self.special), ())

    def _encode(self, text: str) -> tuple[int, ...]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return tuple(token for token in ids if token not in self._unknown)

    def _bytes(self, token: str) -> bytes | None:
        if self._byte_level:
            try:
                return from_byte_letters(token)
            except KeyError:
                return None
        if self._words is not None:
            return None  # they are in by_bytes already
        if found := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(found[1], 16)])
        return token.replace(_SPACE, " ").encode()

    def _format(self) -> ChatFormat | None:
        if not self._files.template:
            return None
        names: dict[str, Any] = {name: self._files.token(name) for name in ("bos_token", "eos_token", "pad_token")}
        try:
            return read_template(self._files.template, self.special, names, "base")
        except NotExact:
            return None
