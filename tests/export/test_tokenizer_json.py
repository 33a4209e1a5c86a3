"""`tokenizer.json` of a tiktoken encoding: equal ids on any text, explicit ids, translated patterns."""

from __future__ import annotations

import json
import random

import pytest
import tiktoken
from tokenizers import Tokenizer

from rlchat.export.tokenizer_json import oniguruma, tokenizer_json
from rlchat.export.vocabulary import Vocabulary
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.tokenizer.ranks import format_ranks, from_byte_letters, to_byte_letters

PIECES = (
    *(
        "the",
        " The",
        "a",
        "Zebra",
        "I'm",
        "we'LL",
        "'s",
        "12",
        "3456789",
        "½",
        "٣",
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
        "\u00a0",
    ),
    *(
        "é",
        "e\u0301",
        "ß",
        "你好",
        "🙂",
        "\u200d",
        "👩",
        "\u3000",
        ".",
        ",",
        "!?",
        "...",
        "_",
        "#",
        "/",
        "<|",
        "|>",
        "<b>",
    ),
    *("\x00", "\x7f", "\ufeff", "\u2028", "\x85", "ﬁ", "ǅ", "ʰ", "\u0345", "Ⅷ", "𝟘", "\U0010ffff"),
)


def fuzz(count: int, seed: int = 0) -> list[str]:
    """Texts from pieces that fall into different branches of the patterns."""
    draw = random.Random(seed)
    return ["".join(draw.choices(PIECES, k=draw.randint(1, 12))) for _ in range(count)]


def exported(tokenizer: ChatTokenizer) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_json(Vocabulary.of(tokenizer)))


def test_ids_are_equal_on_any_text(tokenizer: ChatTokenizer) -> None:
    theirs = exported(tokenizer)
    texts = [text for text in fuzz(3000) if not any(name in text for name in Vocabulary.of(tokenizer).special)]
    assert len(texts) > 2900
    for text in texts:
        assert theirs.encode(text, add_special_tokens=False).ids == tokenizer.encode(text), text


def test_every_id_is_decoded_equally(tokenizer: ChatTokenizer) -> None:
    theirs = exported(tokenizer)
    for token in range(tokenizer.base_size):
        assert theirs.decode([token]) == tokenizer.decode([token])
    assert theirs.decode([*tokenizer.encode("Hi"), tokenizer.end_id], skip_special_tokens=True) == "Hi"


def test_the_names_of_control_tokens_have_their_ids(byte_tokenizer: ChatTokenizer) -> None:
    theirs = exported(byte_tokenizer)
    ids = theirs.encode("<|system|>A<|end|><|user|>b<|end|><|assistant|>", add_special_tokens=False).ids
    assert ids == [257, 65, 260, 258, 98, 260, 259]
    assert theirs.token_to_id("<|pad|>") == 256


def with_special_tokens(ranks: dict[bytes, int], pattern: str, special: dict[str, int]) -> ChatTokenizer:
    """A tokenizer over an encoding that has special tokens."""
    return ChatTokenizer.from_state(
        {"name": "test", "pattern": pattern, "ranks": format_ranks(ranks), "special_tokens": special}
    )


def test_ids_behind_a_gap_stay_where_they_are() -> None:
    """cl100k_base has no token 100256; transformers' own conversion moves all special tokens by one."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b"abc": 300}
    tokenizer = with_special_tokens(ranks, r"\p{L}+|[\s\S]", {"<|endoftext|>": 310})
    theirs = exported(tokenizer)
    assert theirs.encode("abc ab", add_special_tokens=False).ids == tokenizer.encode("abc ab") == [300, 32, 256]
    assert theirs.token_to_id("<|endoftext|>") == 310
    assert theirs.token_to_id("<|pad|>") == tokenizer.pad_id == 311
    assert theirs.token_to_id("<|end|>") == tokenizer.end_id == 315


def test_an_end_marker_of_the_encoding_itself_gets_another_name() -> None:
    """o200k_harmony has its own <|end|>; the name must belong to rlchat's."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    tokenizer = with_special_tokens(ranks, r"[\s\S]", {"<|end|>": 256})
    theirs = exported(tokenizer)
    assert theirs.encode("a<|end|>", add_special_tokens=False).ids == [97, tokenizer.end_id]
    assert tokenizer.end_id == 261
    assert theirs.id_to_token(256) == "<|end|>#256"


def test_all_pairs_are_merges_in_the_order_of_ranks() -> None:
    tokens = [b"a", b"b", b"c", b"ab", b"bc", b"abc"]
    vocabulary = Vocabulary("", {t: i for i, t in enumerate(tokens)}, {}, 6, "", "", "")
    assert vocabulary.merges == [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]


def test_every_byte_is_spelled_as_in_gpt2() -> None:
    every = bytes(range(256))
    assert from_byte_letters(to_byte_letters(every)) == every
    assert to_byte_letters(b" a\n") == "ĠaĊ"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"\p{N}{1,3}+|\s++$|\s", r"\p{N}{1,3}|\s++(?![\s\S])|\s"),
        (r"(?:\p{N}{1,3}+|a)b", r"(?:(?>\p{N}{1,3})|a)b"),
        (r"\p{N}{1,3}+a", r"(?>\p{N}{1,3})a"),
        (r"[()]|\p{N}{2,}+", r"[()]|\p{N}{2,}"),
        (r"\(\p{N}{1,3}+|\$", r"\(\p{N}{1,3}|\$"),
        (r"[^\r\n\p{L}\p{N}]?+\p{L}++", r"[^\r\n\p{L}\p{N}]?+\p{L}++"),
    ],
)
def test_patterns_are_translated(pattern: str, expected: str) -> None:
    assert oniguruma(pattern) == expected


def test_the_translated_constructs_split_as_in_tiktoken() -> None:
    """Untranslated, Oniguruma reads {1,3}+ as a run of any length and $ as the end of any line."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"123": 256, b"1234": 257, b"  ": 258}
    for pattern in (r"\p{N}{1,3}+|[\s\S]", r"\s++$|[\s\S]"):
        base = tiktoken.Encoding("t", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        theirs = Tokenizer.from_str(tokenizer_json(Vocabulary(pattern, ranks, {}, 259, "", "", "")))
        for text in ("1234", "1231234", "a  \nb", "a  ", "  \n  "):
            assert theirs.encode(text, add_special_tokens=False).ids == base.encode_ordinary(text), (pattern, text)


def test_added_tokens_and_a_normalizer() -> None:
    ranks = {bytes([byte]): byte for byte in range(256)}
    vocabulary = Vocabulary(
        r"[\s\S]", ranks, {"<|im_end|>": 256}, 259, "", "<|im_end|>", "", texts={"<think>": 257}, normalizer="NFC"
    )
    theirs = Tokenizer.from_str(tokenizer_json(vocabulary))
    assert theirs.encode("e\u0301<think>", add_special_tokens=False).ids == [*"é".encode(), 257]
    assert json.loads(theirs.to_str())["added_tokens"][1]["special"] is False
