"""Rank files: the byte-pair ranks of a tiktoken encoding, how they are trained, written and read."""

from __future__ import annotations

import base64
import binascii
import functools
from collections.abc import Iterator

from rlchat.errors import UserError

# How text is split before byte pairs are merged inside each piece: words with the space or punctuation mark before
# them, runs of up to three digits, punctuation, line ends. It is the pattern of cl100k_base, used by most rank files.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
# The same for training, except that digits stay single so that a small vocabulary is not used up by numbers. A rank
# file without tokens of several digits encodes digits singly under PATTERN too, so PATTERN works for both.
_TRAINING_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+$|\s*[\r\n]|\s+(?!\S)|\s"
)


def train_ranks(texts: Iterator[str], vocab_size: int, *, progress: bool = False) -> dict[bytes, int]:
    """Byte-pair ranks learned from ``texts``: ``vocab_size`` tokens including the 256 single bytes.

    Raises ValueError for fewer than 256 tokens. Returns fewer than requested where the texts have no more pairs.
    """
    if vocab_size < 256:
        raise ValueError(f"a vocabulary of {vocab_size} tokens cannot hold the 256 single bytes")
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_TRAINING_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=progress,
    )
    bpe.train_from_iterator(texts, trainer)
    by_id = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    return {from_byte_letters(token): rank for rank, (token, _) in enumerate(by_id)}


def from_byte_letters(token: str) -> bytes:
    """The bytes of ``token`` as byte-level vocabularies spell it: ``Ġa`` is a space and an ``a``.

    Raises KeyError for a letter outside of GPT-2's byte-level alphabet.
    """
    byte_of = letter_bytes()
    return bytes(byte_of[letter] for letter in token)


def format_ranks(ranks: dict[bytes, int]) -> bytes:
    """The ``.tiktoken`` text of ``ranks``: one line per token, its bytes in base64 and its rank."""
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in sorted(ranks.items(), key=lambda r: r[1]))
    return b"".join(lines)


def parse_ranks(text: bytes, source: str) -> dict[bytes, int]:
    """Ranks from ``.tiktoken`` text. Raises :class:`UserError` naming ``source`` and the invalid line."""
    # Not read with tiktoken's own loader, which caches by path: it would return the old content of a rank file that
    # was trained again.
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            if not 0 <= int(rank) < 2**31:
                raise ValueError(f"a rank of {int(rank)}")
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(
                f"{source}:{number}: not a line of a tiktoken rank file (base64 of the token, a space, its rank)"
            ) from error
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise UserError(f"{source}: {len(missing)} of the 256 single bytes have no rank; this is not a whole rank file")
    if len(set(ranks.values())) != len(ranks):
        raise UserError(f"{source}: some ranks are given twice; this is not a sound rank file")
    return ranks


@functools.cache
def letter_bytes() -> dict[str, int]:
    """GPT-2's byte-level alphabet: the byte of each letter. Printable bytes are their own letters, others follow."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(0x100 + i): byte for i, byte in enumerate(rest)}}


def to_byte_letters(text: bytes) -> str:
    """The inverse of :func:`from_byte_letters`."""
    letters = _byte_letters()
    return "".join(letters[byte] for byte in text)


@functools.cache
def _byte_letters() -> dict[int, str]:
    return {byte: letter for letter, byte in letter_bytes().items()}
