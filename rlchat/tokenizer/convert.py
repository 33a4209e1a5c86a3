"""A Hugging Face byte-level BPE tokenizer (`tokenizer.json`) as an exactly equal tiktoken encoding, or a refusal.

Why the result is exact. Let z be a token and HF(z) the ids that the Hugging Face model gives for the bytes of z. Assume
(1) HF(z) = [z] for every z, and (2) ids rise with the rank of the merge that makes them. BPE always takes the pair with
the lowest rank. While no merge crosses the border of the bytes of z, the merges inside are the first ones of z's own
run, which ends in one state of two parts: the pair of z. So any two neighbours whose bytes together are z are that
pair, and tiktoken, which merges neighbours whose bytes are a token, sees the same pairs in the same order on any text.
(1) and (2) are checked for the whole vocabulary. For how text is split first, see :mod:`rlchat.tokenizer.pattern`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlchat.tokenizer.pattern import NotExact, tiktoken_pattern
from rlchat.tokenizer.ranks import from_byte_letters, letter_bytes
from rlchat.tokenizer.text_encoding import TextEncoding

_SHOWN = 3  # examples in a message


@dataclass(frozen=True)
class Conversion:
    """A converted tokenizer and what is special about it.

    ``missing_bytes`` have no token in the base model, whose tokenizer drops them silently; here they have ids of their
    own (``encoding.unused``), so that no text is lost. ``unreachable`` tokens are in the vocabulary but no text gives
    them; they have no text here either. ``moved`` maps ids of the base model to ids here where they differ, because
    tiktoken needs ids in the order of merges; the rows of the embedding have to follow.
    """

    encoding: TextEncoding
    missing_bytes: tuple[int, ...]
    unreachable: tuple[str, ...]
    moved: Mapping[int, int]

    def summary(self) -> str:
        """One line for people."""
        encoding = self.encoding
        facts = [
            f"{encoding.size:,} ids",
            f"{len(encoding.special_tokens)} special tokens",
            f"{len(encoding.text_tokens) + len(encoding.normalized_tokens)} added tokens that are text",
        ]
        if encoding.normalizer:
            facts.append(f"text is normalized to {encoding.normalizer}")
        if self.missing_bytes:
            facts.append(f"{len(self.missing_bytes)} single bytes without a token got new ids")
        if self.unreachable:
            facts.append(f"{len(self.unreachable)} tokens that no text gives")
        if self.moved:
            facts.append(f"{len(self.moved):,} ids changed so that they follow the order of merges")
        return ", ".join(facts)


def convert(tokenizer: Mapping[str, Any], name: str) -> Conversion:
    """The tiktoken encoding of ``tokenizer``, the content of a ``tokenizer.json``.

    Raises :class:`NotExact` for a tokenizer that tiktoken cannot reproduce exactly.
    """
    model = tokenizer["model"]
    _check_model(model)
    normalizer = _normalizer(tokenizer.get("normalizer"))
    pattern = tiktoken_pattern(tokenizer.get("pre_tokenizer"))
    added = list(tokenizer.get("added_tokens", ()))
    special, text, normalized = _added_tokens(added)
    bpe = _Merges(model, {str(token["content"]): int(token["id"]) for token in added})
    for content in special:
        if content in bpe.reachable:
            raise NotExact(f"ordinary text gives the special token {content!r} through merges")
    missing = tuple(sorted(byte for letter, byte in letter_bytes().items() if letter not in bpe.vocab))
    if missing and model.get("unk_token"):
        raise NotExact(f"{len(missing)} of the 256 bytes have no token and become {model['unk_token']}")
    behind = max([*bpe.vocab.values(), *special.values(), *text.values(), *normalized.values()], default=-1) + 1
    moved = bpe.moved()
    ranks = {from_byte_letters(token): moved.get(number, number) for token, number in bpe.tokens().items()}
    unused = {bytes([byte]): behind + number for number, byte in enumerate(missing)}
    encoding = TextEncoding(
        name, pattern, {**ranks, **unused}, special, text, normalized, normalizer, tuple(unused.values())
    )
    return Conversion(encoding, missing, tuple(bpe.unreachable), moved)


def _check_model(model: Mapping[str, Any]) -> None:
    kind = model.get("type") or ("BPE" if "merges" in model else "WordPiece")
    if kind != "BPE":
        raise NotExact(f"it is a {kind} model; only byte-level BPE can be converted")
    if model.get("byte_fallback"):
        raise NotExact("it merges characters and not bytes (byte_fallback), as in Llama 2, Gemma and Mistral v1")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise NotExact(f"its BPE uses {option} {model[option]!r}")


def _normalizer(normalizer: Mapping[str, Any] | None) -> str | None:
    if normalizer is None:
        return None
    parts = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    for part in parts:
        if part["type"] != "NFC":
            raise NotExact(f"its normalizer {part['type']} changes text before it is encoded; only NFC is supported")
    return "NFC" if parts else None


def _added_tokens(added: list[Mapping[str, Any]]) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Control tokens; tokens that are text and matched before normalization; those matched after it."""
    special: dict[str, int] = {}
    text: dict[str, int] = {}
    normalized: dict[str, int] = {}
    for token in added:
        content = str(token["content"])
        if token["special"]:
            special[content] = int(token["id"])
            continue
        for option in ("lstrip", "rstrip", "single_word"):
            if token.get(option):
                raise NotExact(f"the added token {content!r} depends on the text around it ({option})")
        (normalized if token.get("normalized") else text)[content] = int(token["id"])
    return special, text, normalized


class _Merges:
    """The vocabulary of a BPE model, checked token by token."""

    def __init__(self, model: Mapping[str, Any], added: Mapping[str, int]) -> None:
        from tokenizers import models

        self.vocab: dict[str, int] = {}
        odd = []
        letters = letter_bytes()
        split = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        pieces = [(str(left), str(right)) for left, right in split]
        # Merges alone: ignore_merges would hide that a token cannot be made.
        try:
            bpe = models.BPE(model["vocab"], pieces)
        except Exception as error:  # merges of tokens that are not in the vocabulary
            raise NotExact(f"its merges and its vocabulary contradict each other ({error})") from error
        self.reachable = set()
        parts: dict[str, int] = {}
        for token, number in model["vocab"].items():
            if any(letter not in letters for letter in token):
                if token not in added:
                    odd.append(token)
                continue
            found = [piece.id for piece in bpe.tokenize(token)]
            parts[token] = len(found)
            if found == [number]:
                self.reachable.add(token)
            if token not in added or token in self.reachable:
                self.vocab[token] = number
        if odd:
            raise NotExact(f"{len(odd)} tokens are not spelled in bytes, such as {', '.join(map(repr, odd[:_SHOWN]))}")
        self.unreachable = [token for token in self.vocab if token not in self.reachable]
        self._whole_pieces = bool(model.get("ignore_merges"))
        if self._whole_pieces:
            # As a whole piece such a token is used, and nowhere else. tiktoken too, unless two tokens make it up.
            if pairs := [token for token in self.unreachable if parts[token] == 2]:
                raise NotExact(
                    f"{len(pairs)} tokens have no merge although two tokens make them up, such as {pairs[0]!r}; "
                    f"tiktoken would merge these two everywhere"
                )
            self.unreachable = []
        self._pieces = pieces

    def tokens(self) -> dict[str, int]:
        """The tokens that some text gives."""
        if self._whole_pieces:
            return self.vocab
        return {token: number for token, number in self.vocab.items() if token in self.reachable}

    def moved(self) -> dict[int, int]:
        """New ids for tokens whose ids do not follow the order of merges: the same ids, assigned in that order."""
        rank = self._ranks()
        made = sorted(
            (token for token in self.reachable if len(token) > 1 and token in self.vocab), key=lambda t: rank[t]
        )
        ids = sorted(self.vocab[token] for token in made)
        return {self.vocab[token]: new for token, new in zip(made, ids, strict=True) if self.vocab[token] != new}

    def _ranks(self) -> dict[str, int]:
        """The rank of the merge that makes each token."""
        listed: dict[str, list[int]] = {}
        for number, (left, right) in enumerate(self._pieces):
            listed.setdefault(left + right, []).append(number)
        ranks = {token: numbers[0] for token, numbers in listed.items()}
        several = [token for token, numbers in listed.items() if numbers[-1] - numbers[0] >= len(numbers)]
        if several:  # several merges make the token, with others between them: which one is used decides
            order = {pair: number for number, pair in enumerate(self._pieces)}
            ranks.update((token, _last_merge(token, order)) for token in several if token in self.reachable)
        return ranks


def _last_merge(token: str, order: Mapping[tuple[str, str], int]) -> int:
    """The rank of the last merge when ``token`` is built from its letters."""
    parts, last = list(token), -1
    while len(parts) > 1:
        pairs = [(order.get(pair, len(order)), place) for place, pair in enumerate(itertools.pairwise(parts))]
        last, place = min(pairs)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return last
